"""PMRC: regions that a navigator proposes, their posture as a graph of where they lie (CVPR 2023 [web, code]).

    s_n      = MLP(l_n)                                     the navigator, over standardised local views
    1..R     = the highest s_n, none overlapping a higher one by more than 0.25 (IoU)
    v_i      = LN(V l_i + b)
    e_ij     = exp(-|c_i - c_j|^2 / (2 sigma^2)), e_ii = 0  c_i the centre of region i, in sides of the picture
    v       <- LN(v + ReLU(W_s v + E v W_m)), `depth` times  E: e with rows of sum 1
    logits   = Linear([g; v_1; ...; v_R])                   in the order of s
    loss     = CE(logits) + CE of g alone + mean over regions of CE of v_i alone, before messages + rank_hinge
               + reverse * reverse_cross_entropy            layers/losses.py; 0 by default

The choice has no gradient: the navigator learns by rank_hinge alone, which asks that regions whose own classifier is
surer of the class score higher. The messages are those of GraphSAGE with a weighted mean (layers/graphs.py). That the
whole picture g stands in the last layer is NTS-Net's way [mem]; nothing would read its classifier otherwise.

A reconstruction: this is the abstract's paper, with NTS-Net's rank loss [mem] and weights of our own [design]. The
authors call the code that they released a re-design. `regions: maps` is that one [code], as far as it is built here:

    a_r      = softmax_t(w_r . x_t)                         x_t standardised raw tokens, r one of R branches
    v_r      = LN(V sum_t a_r,t x_t + b)                    c_r = sum_t a_r,t p_t, p_t the place of cell t

The code takes the cell where a_r is highest for c_r, and then does not use it; the soft centre has a gradient. There is
no navigator, for every map is a region. Transformer layers as wide as there are classes, which the code has in the
place of the graph, are left out. It withdrew the reverse cross entropy.
"""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.boxes import cell_places, centre_and_sides, keep_apart
from training.layers.gather import rows_of
from training.layers.graphs import SAGE
from training.layers.logistic import as_probabilities
from training.layers.losses import rank_hinge, reverse_cross_entropy
from training.layers.nodes import Projection, in_precision, token_scale, training_sample
from training.layers.states import State, within
from training.loop import NotNegative, Positive
from training.methods import Fitted, NotPossible, Output
from training.offset import PROBE_WORDS
from training.region_heads import OWN, Regions, RegionSettings
from training.token_heads import Beside, HeadSettings, fit_head, head_also_reads, head_reads, tokens_word

SEEDED = True
READS = OWN | {"boxes", "globals", "tokens"} | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads
APART = 0.25  # IoU: regions that overlap more are one


class LossWeights(Block):
    """Of each loss beside the cross entropy."""

    whole: NotNegative = 1.0  # cross entropy of the whole picture alone
    regions: NotNegative = 1.0  # cross entropy of each region alone, the mean over regions
    rank: NotNegative = 1.0  # whether the navigator orders regions as their cross entropy does; not with regions: maps
    reverse: NotNegative = 0.0  # reverse cross entropy, which the authors withdrew


class Settings(HeadSettings):
    regions: Literal["crop", "grid", "token", "all", "maps"] = "all"  # nodes of a kind, or all; maps: of raw tokens
    count: Count = 10  # regions at most, or maps: R
    sigma: Positive = 0.25  # how far messages reach, in sides of the picture
    hidden: Count = 256  # width of regions
    depth: Count = 2  # times that messages pass
    dropout: Fraction = 0.1  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy, weight 1; 0 switches one off

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.layer is not None and self.regions != "maps":
            raise ValueError("layer: only regions: maps reads tokens")
        return self

    @property
    def of_nodes(self) -> RegionSettings:
        """Which nodes are local views; the object is not looked for."""
        return RegionSettings.model_validate({"object": "global", "regions": self.regions})


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return frozenset({"globals", tokens_word(settings)}) if settings.regions == "maps" else OWN | {"boxes"}


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


class Found(NamedTuple):
    """The regions of a batch."""

    v: Tensor  # (B, R, hidden)
    centre: Tensor  # (B, R, 2): x, y in [0,1]
    real: Tensor  # (B, R) bool: an image may have fewer
    scores: Tensor | None  # (B, R): the navigator's, where there is one


class Navigator(nn.Module):
    """The R nodes that score highest and keep apart."""

    def __init__(self, scale: Standardise, regions: Regions, settings: Settings) -> None:
        super().__init__()
        self.count = settings.count
        self.regions, self.project = regions, Projection(scale, settings.hidden)
        self.score = nn.Sequential(
            nn.Linear(len(scale.mean), settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1, bias=False)
        )

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        """From that of the module."""
        scale = Standardise.from_state(within(state, "project.standardise"))
        return cls(scale, Regions.from_state(within(state, "regions"), settings.of_nodes), settings)

    def forward(self, batch: Batch) -> Found:
        views, box = self.regions(batch), self.regions.boxes(batch)
        scores = self.score(in_precision(self.project.standardise(views.local))).squeeze(-1).float()
        place, real = keep_apart(scores.detach(), box, views.mask, self.count, APART)
        if not box.shape[1]:  # there is no node to gather
            views = views._replace(local=F.pad(views.local, (0, 0, 0, 1)))
            box, scores = F.pad(box, (0, 0, 0, 1)), F.pad(scores, (0, 1))
        local, box = (rows_of(x, place) for x in (views.local, box))
        return Found(self.project(local), centre_and_sides(box)[0], real, scores.gather(1, place))


class Maps(nn.Module):
    """R attention maps over raw tokens."""

    def __init__(self, scale: Standardise, settings: Settings) -> None:
        super().__init__()
        width = len(scale.mean)
        self.word, self.scale = tokens_word(settings), scale
        self.branch = nn.Linear(width, settings.count, bias=False)  # softmax would not see a bias
        self.project = nn.Sequential(nn.Linear(width, settings.hidden), nn.LayerNorm(settings.hidden))

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        """From that of the module."""
        return cls(Standardise.from_state(within(state, "scale")), settings)

    def forward(self, batch: Batch) -> Found:
        x = in_precision(self.scale(batch.of(self.word)))
        maps = self.maps(x)
        with torch.autocast(x.device.type, enabled=False):
            centre = maps @ cell_places(batch.grid_of(self.word), x.device)
        real = torch.ones(maps.shape[:2], dtype=torch.bool, device=x.device)
        return Found(self.project(maps.to(x.dtype) @ x), centre, real, None)

    def maps(self, x: Tensor) -> Tensor:
        """Standardised tokens x (B, T, d) -> (B, R, T) float32, of sum 1 over cells."""
        return self.branch(x).float().softmax(1).transpose(1, 2)


def log_edges(centre: Tensor, sigma: float) -> Tensor:
    """log e (B, R, R) of centres (B, R, 2): -|c_i - c_j|^2 / (2 sigma^2)."""
    return -(centre[:, :, None] - centre[:, None]).square().sum(-1) / (2 * sigma**2)


def messages(centre: Tensor, real: Tensor, sigma: float) -> Tensor:
    """E (B, R, R): e_ij by rows of sum 1, e_ii = 0; 0 from and to what is not real, and for a region alone.

    As a softmax of log e: however small sigma is, the nearest region counts.
    """
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    heard = real[:, :, None] & real[:, None] & ~itself
    weight = log_edges(centre.float(), sigma).masked_fill(~heard, torch.finfo(torch.float32).min).softmax(-1)
    return weight * heard


class Message(nn.Module):
    """LN(v + ReLU(W_s v + E v W_m + b))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.graph, self.norm = SAGE(width, width), nn.LayerNorm(width)

    def forward(self, v: Tensor, weight: Tensor) -> Tensor:
        """v (B, R, width), weight (B, R, R): E."""
        out: Tensor = self.norm(v + F.relu(self.graph(v, weight)))
        return out


class PMRC(nn.Module):
    def __init__(
        self, whole: Standardise, find: Navigator | Maps, beside: Beside, classes: int, settings: Settings
    ) -> None:
        """`whole`: what is standard among pictures."""
        super().__init__()
        width = settings.hidden
        self.sigma, self.reversed = settings.sigma, settings.loss_weights.reverse > 0
        self.whole, self.find, self.beside = Projection(whole, width), find, beside
        self.messages = nn.ModuleList([Message(width) for _ in range(settings.depth)])
        self.dropout = Dropout(settings.dropout)
        self.classify = silent((1 + settings.count) * width, classes)
        self.classify_whole, self.classify_region = silent(width, classes), silent(width, classes)

    def forward(self, batch: Batch) -> Output:
        g, found = self.whole(batch.g), self.find(batch)
        v = self.pass_messages(found)
        both = torch.cat([g[:, None], v * found.real[..., None]], dim=1).flatten(1)
        logits = self.beside(batch, self.classify(self.dropout(both)))
        return Output(logits, self.losses(batch, g, found, logits) if self.training else {}, None)

    def pass_messages(self, found: Found) -> Tensor:
        """(B, R, hidden): the regions, each told of the others."""
        weight = messages(found.centre, found.real, self.sigma)
        v = found.v
        for message in self.messages:
            v = message(v, weight.to(v.dtype))
        return v

    def losses(self, batch: Batch, g: Tensor, found: Found, logits: Tensor) -> dict[str, Tensor]:
        whole = self.beside(batch, self.classify_whole(self.dropout(g)))
        # Regions first: what a rival says of an image is added to each.
        by_region = self.beside(batch, self.classify_region(self.dropout(found.v)).transpose(0, 1))
        sure = (by_region.log_softmax(-1) * as_probabilities(batch.target, by_region.shape[-1])).sum(-1).T  # (B, R)
        losses = {
            "whole": F.cross_entropy(whole, batch.target),
            "regions": -(sure * found.real).sum() / found.real.sum().clamp(min=1),
        }
        if found.scores is not None:
            losses["rank"] = rank_hinge(found.scores, sure, found.real)
        if self.reversed:
            losses["reverse"] = reverse_cross_entropy(logits, batch.target)
        return losses


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    classes = len(cache.classes)
    whole = Standardise(cache.globals(cache.images("train")))
    if settings.regions == "maps":
        cells = token_scale(cache, tokens_word(settings))
    else:
        regions = Regions.measure(cache, settings.of_nodes).to(cache.device)
        views = regions(training_sample(cache))
        if not views.mask.any():
            raise NotPossible("no training picture has a region: set embed.regions, or settings.regions")
        cells = Standardise(views.local[views.mask])

    def make(beside: Beside) -> PMRC:
        find = Maps(cells, settings) if settings.regions == "maps" else Navigator(cells, regions, settings)
        return PMRC(whole, find, beside, classes, settings)

    return fit_head(cache, settings, seed, own_reads(settings), make, settings.loss_weights.model_dump())


def build(state: State, settings: Settings, classes: int) -> PMRC:
    find = (Maps if settings.regions == "maps" else Navigator).from_state(within(state, "find"), settings)
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    whole = Standardise.from_state(within(state, "whole.standardise"))
    return PMRC(whole, find, beside, classes, settings)
