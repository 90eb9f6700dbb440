"""The system of the notes that this project grew from, as its authors ran it, on vectors computed once [code].

g (D) is the vector of the object's crop, l_n of N local crops, t of what a model said of the picture, K' (M, D) the
bank of phrases with each dimension standardised over the bank. For an image:

    p, p-     the `select_concepts` phrases nearest to g by cosine, and as many that are farthest
    r         the crop most like g; the `select_locals` crops of the highest 1 / (1 + |l_n - r|) are kept
    k_n       of a kept crop the nearest phrase of p
    x_n       = z_n, z_n ~ N(m_n, s_n), [m; log s^2] = Linear(dropout(ReLU(Linear(l_n))))   z is m at evaluation
    a, c      = mean_n G(x_n), mean_n G(k_n): one network G of three graph layers for both, each image's crops linked by
              TRD's rule (layers/graphs.py, threshold_edges), and its phrases alike
    logits    = relation([g; a; t; c]) + w local(a) + global(g) + text(t) + w concept(c)    w: recovery_weight
    losses    KL(N(m, s) || N(0, 1)) + InfoNCE(z_n*, mean p, p-), cosines over 0.1; n*: sum_k cos(g, p_k) cos(l_n, p_k)
              is highest

Every stream is a Mapper (layers/mapper.py). `contrast: false` leaves out z and both losses (x_n = l_n), `concepts:
false` k_n and c, `text: none` t. Where fewer crops or phrases are there than the settings say, all crops are taken, and
half of the phrases, so that none is near and far; of more crops than `num_local` those that are taken lie evenly
among the nodes.

GraphNorm begins by taking the mean over an image's crops away (`mean_share: 1`), so that `local` and `relation` see at
first in what crops differ, and not what they all show; where all kept crops have one phrase, `concept` sees nothing.
It has to learn otherwise, and hardly does: tests/training/methods/test_notes_graph.py plants a class that the mean of
the crops tells without an error, and only `mean_share: 0` finds it.

The code has faults. `faults` brings each back, to see what it was worth:

    scrambled_crops            an image's crops are those of others of its batch (layers/faults.py)
    idle_contrast              x_n = l_n: what the two losses train reaches no logit; other weights feel them by the
                               longest gradient alone (clip_norm, which their code has not) and by the random stream
    threshold_precedence       TRD's rule as their code reads: for crops, of unit length here, all are linked
    random_crops_at_evaluation num_local crops are drawn anew each time that an image is seen, at evaluation too; where
                               there are no more than num_local, nothing is left to draw
    batch_norm                 Mappers have BatchNorm in the place of LayerNorm

Others lie in how it was run, not in what it is: the learning rate followed the test loss, the best epoch was read on
test, and descriptions of test images came from a model that knew the class (docs/methods.md).

Ours [design]: features are frozen and have unit length, so crops are ordered by direction alone; g, l and t are
standardised before any layer, K' is; the contrasted encoder feeds the graph; all kept crops pay the KL, theirs one;
`relation` has the Mapper's three layers, theirs four; the last layers begin at zero; GAT's heads
stand side by side; crops that are fixed, where theirs were drawn anew at each step; AdamW, a cosine schedule, val.
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.data.bank import Bank
from training.data.descriptions import Descriptions, mean_sentence, require_described
from training.layers.blocks import Dropout, Standardise, draw_normal
from training.layers.faults import misplaced_edges, scramble
from training.layers.gather import rows_of
from training.layers.graphs import Kind, NormedNetwork, masked_mean, prepare_edges, threshold_edges
from training.layers.losses import TEMPERATURE, info_nce, kl_from_normal
from training.layers.mapper import Mapper
from training.layers.nodes import training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, NotPossible, Output
from training.offset import PROBE_WORDS
from training.region_heads import OWN, Regions, RegionSettings
from training.token_heads import Beside, fit_head, head_also_reads, head_reads

SEEDED = True
READS = OWN | {"concepts", "descriptions"} | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads

LAYERS, ENCODER_DROPOUT = 3, 0.2
LOSS_WEIGHTS = {"contrast": 1.0, "bottleneck": 1.0}
Fault = Literal[
    "scrambled_crops", "idle_contrast", "threshold_precedence", "random_crops_at_evaluation", "batch_norm"
]


class Settings(RegionSettings):
    num_local: Count = 36  # local crops that it looks at, at most
    select_locals: Count = 20  # crops that it keeps, those most like the one most like the object
    select_concepts: Count = 40  # phrases nearest to the object, and as many farthest from it
    text: Literal["description", "none"] = "none"  # what a model said of each picture, or nothing
    concepts: bool = True  # whether the kept crops' phrases have a graph and a stream
    contrast: bool = True  # whether crops pass a bottleneck that is pulled to the nearest phrases
    graph: Kind = "gcn"  # gcn, gat, sage, or mlp: no edges
    heads: Count = 8  # of graph: gat
    hidden: Count = 512  # width of the graph, of the encoder, of every stream
    mean_share: Annotated[float, Field(ge=0, le=1)] = 1.0  # of the crops' mean, which GraphNorm takes away at first
    dropout: Fraction = 0.5  # share of the graph's activations dropped in training
    recovery_weight: NotNegative = 1.0  # weight of the logits of crops, and of phrases: w
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()  # defects of the code to bring back, by name

    @field_validator("hidden")
    @classmethod
    def _heads_divide_the_width(cls, hidden: int, info: ValidationInfo) -> int:
        if info.data.get("graph") == "gat" and hidden % info.data.get("heads", 1):
            raise ValueError(f"it has to be a multiple of heads, {info.data['heads']}")
        return hidden

    @field_validator("faults")
    @classmethod
    def _have_something_to_spoil(cls, faults: tuple[Fault, ...], info: ValidationInfo) -> tuple[Fault, ...]:
        if "idle_contrast" in faults and not info.data.get("contrast"):
            raise ValueError("idle_contrast needs contrast: true")
        if "threshold_precedence" in faults and info.data.get("graph") == "mlp":
            raise ValueError("threshold_precedence changes nothing without edges (graph: mlp)")
        return faults

    @property
    def reads_concepts(self) -> bool:
        return self.concepts or self.contrast


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    wanted = {"concepts": settings.reads_concepts, "descriptions": settings.text == "description"}
    return OWN | {name for name, is_read in wanted.items() if is_read}


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


class Given(NamedTuple):
    """What a model takes of the training images and of the bank before it learns; None where it does not read it."""

    regions: Regions
    whole: Standardise  # of g
    local: Standardise
    text: Standardise | None
    phrases: Tensor | None  # K' (M, D)

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        """Raises NotPossible where images lack crops or an object, or the bank two phrases; UserError where an image
        lacks a description that is asked for."""
        regions = Regions.measure(cache, settings)
        if "random_crops_at_evaluation" not in settings.faults:
            local = evenly(regions.local, settings.num_local)
            regions = Regions(int(regions.at), local, settings.local_kinds)
        regions, sample = regions.to(cache.device), training_sample(cache)
        views, text, phrases = regions(sample), None, None
        if settings.text == "description":
            require_described(cache.part(Descriptions).dm)
            text = Standardise(mean_sentence(sample.d, sample.dm))
        if settings.reads_concepts:
            phrases = standard_phrases(cache.part(Bank))
        local = views.local[views.mask] if views.mask.any() else views.whole  # no training image has a crop
        return cls(regions, Standardise(views.object), Standardise(local), text, phrases)

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        """From that of a NotesGraph."""
        whole, local, text = (within(state, name) for name in ("scale_whole", "scale_local", "scale_text"))
        return cls(
            Regions.from_state(within(state, "regions"), settings),
            Standardise.from_state(whole),
            Standardise.from_state(local),
            Standardise.from_state(text) if text else None,
            state.get("phrases"),
        )


def evenly(nodes: Tensor, count: int) -> Tensor:
    """At most `count` of nodes (N,), evenly taken: of a grid none of its sides is preferred."""
    if len(nodes) <= count:
        return nodes
    return nodes[torch.linspace(0, len(nodes) - 1, count).round().long()]


def standard_phrases(bank: Bank) -> Tensor:
    """K' (M, D): the kept phrases, each dimension of mean 0 and variance 1. Raises NotPossible for fewer than two."""
    K = bank.K[bank.kept]
    if len(K) < 2:
        raise NotPossible(
            f"{bank.path}: holds {len(K)} kept concepts, and near and far ones are two at least; ask for more, or set"
            " settings.concepts: false and settings.contrast: false"
        )
    spread, mean = torch.std_mean(K.float(), dim=0, correction=0)
    return (K - mean) / spread.clamp(min=1e-6)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """(B, n, m): of x (B, n, D) and y (B, m, D)."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2)


class Nearby(NamedTuple):
    """The phrases of an image."""

    near: Tensor  # (B, P, D): p
    far: Tensor  # (B, P, D): p-
    cosine: Tensor  # (B, P): of g and p


def choose_phrases(g: Tensor, phrases: Tensor, count: int) -> Nearby:
    """The `count` phrases (M, D) nearest to g (B, D) by cosine, and as many farthest; at most half of them all."""
    cosine = F.normalize(g, dim=-1) @ F.normalize(phrases, dim=-1).T
    count = min(count, len(phrases) // 2)
    value, near = cosine.topk(count, dim=1)
    far = cosine.topk(count, dim=1, largest=False).indices
    return Nearby(phrases[near], phrases[far], value)


def keep_crops(g: Tensor, local: Tensor, mask: Tensor, count: int) -> Tensor:
    """(B, k): at most `count` crops with the highest 1 / (1 + |l_n - r|), r the one most like g (B, D).

    local (B, N, D), mask (B, N). An image with fewer has others, which its mask does not hold, behind them.
    """
    cosine = cosines(g[:, None], local)[:, 0].masked_fill(~mask, float("-inf"))
    reference = rows_of(local, cosine.argmax(1, keepdim=True))
    density = 1 / (1 + (local - reference).norm(dim=-1))
    return density.masked_fill(~mask, -1.0).topk(min(count, local.shape[1]), dim=1).indices


def draw_crops(local: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of an image's crops and their mask, drawn anew by torch's generator; all if there are no more."""
    if count >= mask.shape[1]:
        return local, mask
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    drawn = order.topk(count, dim=1).indices
    return rows_of(local, drawn), mask.gather(1, drawn)


class Kept(NamedTuple):
    """What is chosen of an image before any layer sees it; all in float32."""

    crops: Tensor  # (B, k, D), as the encoder gave them
    mask: Tensor  # (B, k)
    nearby: Nearby | None
    phrase: Tensor | None  # (B, k, D): the nearest phrase of each crop
    contrasted: Tensor | None  # (B, 1): the crop n*


class NotesGraph(nn.Module):
    phrases: Tensor

    def __init__(self, given: Given, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        self.settings, self.faults = settings, frozenset(settings.faults)
        self.regions, self.beside = given.regions, beside
        self.scale_whole, self.scale_local, self.scale_text = given.whole, given.local, given.text
        width, hidden = len(given.whole.mean), settings.hidden
        self.feeds_graph = settings.contrast and "idle_contrast" not in self.faults
        if given.phrases is not None:
            self.register_buffer("phrases", given.phrases)
        if settings.contrast:
            self.encode = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), Dropout(ENCODER_DROPOUT), nn.Linear(hidden, 2 * width)
            )
        self.network = NormedNetwork(
            settings.graph, LAYERS, width, hidden, settings.heads, 1, settings.dropout, settings.mean_share
        )
        inputs = {"global": width, "local": hidden}
        inputs |= {"text": width} if settings.text == "description" else {}
        inputs |= {"concept": hidden} if settings.concepts else {}
        inputs["relation"] = sum(inputs.values())
        norm = "batch_norm" in self.faults
        self.streams = nn.ModuleDict({name: Mapper(size, hidden, classes, norm) for name, size in inputs.items()})

    def forward(self, batch: Batch) -> Output:
        views, losses = self.regions(batch), {}
        with torch.no_grad(), torch.autocast(batch.nodes.device.type, enabled=False):
            kept = self.choose(views.object.float(), views.local.float(), views.mask)
        x = self.scale_local(kept.crops)
        if self.settings.contrast and (self.training or self.feeds_graph):
            mean, log_variance = self.encode(x).chunk(2, dim=-1)
            z = draw_normal(mean, log_variance) if self.training else mean
            if self.training:
                losses = self.contrast(kept, z, mean, log_variance)
            x = z if self.feeds_graph else x
        said = {"global": self.scale_whole(views.object), "local": self.read(x, kept.crops, kept.mask)}
        if self.scale_text is not None:
            if not self.training:  # fit has looked at all of its images
                require_described(batch.dm)
            said["text"] = self.scale_text(mean_sentence(batch.d, batch.dm))
        if self.settings.concepts and kept.phrase is not None:
            said["concept"] = self.read(kept.phrase, kept.phrase, kept.mask)
        said["relation"] = torch.cat([each.float() for each in said.values()], dim=1)
        weight = {"local": self.settings.recovery_weight, "concept": self.settings.recovery_weight}
        logits = sum(weight.get(name, 1.0) * self.streams[name](each).float() for name, each in said.items())
        return Output(self.beside(batch, logits), losses, None)

    def choose(self, g: Tensor, local: Tensor, mask: Tensor) -> Kept:
        """g (B, D), local (B, N, D), mask (B, N)."""
        settings = self.settings
        if not local.shape[1]:  # images without crops have one that shows nothing
            local, mask = local.new_zeros(len(local), 1, local.shape[2]), mask.new_zeros(len(mask), 1)
        if "random_crops_at_evaluation" in self.faults:
            local, mask = draw_crops(local, mask, settings.num_local)
        if "scrambled_crops" in self.faults:
            local, mask = scramble(local, mask)
        places = keep_crops(g, local, mask, settings.select_locals)
        crops, mask = rows_of(local, places), mask.gather(1, places)
        if not settings.reads_concepts:
            return Kept(crops, mask, None, None, None)
        nearby = choose_phrases(g, self.phrases, settings.select_concepts)
        cosine = cosines(crops, nearby.near)  # (B, k, P)
        weighed = (cosine * nearby.cosine[:, None]).sum(-1).masked_fill(~mask, float("-inf"))
        phrase = rows_of(nearby.near, cosine.argmax(-1))
        return Kept(crops, mask, nearby, phrase, weighed.argmax(1, keepdim=True))

    def contrast(self, kept: Kept, z: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
        """The losses of the bottleneck, of z (B, k, D) drawn from N(mean, variance)."""
        assert kept.nearby is not None
        assert kept.contrasted is not None
        query = rows_of(z, kept.contrasted).float()  # (B, 1, D)
        with torch.autocast(z.device.type, enabled=False):
            positive = cosines(query, kept.nearby.near.mean(1, keepdim=True))[:, 0, 0] / TEMPERATURE
            negatives = cosines(query, kept.nearby.far)[:, 0] / TEMPERATURE
            # An image without a crop has nothing to pull.
            told = kept.mask.any(1)
            contrast = (info_nce(positive, negatives) * told).sum() / told.sum().clamp(min=1)
        return {"contrast": contrast, "bottleneck": kl_from_normal(mean, log_variance, kept.mask)}

    def read(self, x: Tensor, linked_by: Tensor, mask: Tensor) -> Tensor:
        """Mean over nodes (B, hidden) of the graph network, x (B, k, D), linked by the products of `linked_by`."""
        edges = None
        if self.settings.graph != "mlp":
            with torch.no_grad():
                rule = misplaced_edges if "threshold_precedence" in self.faults else threshold_edges
                edges = rule(linked_by, mask, "similar")
        prepared = mask if edges is None else prepare_edges(self.settings.graph, edges, mask)
        return masked_mean(self.network(x, prepared, mask).float(), mask)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    given, classes = Given.measure(cache, settings), len(cache.classes)
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: NotesGraph(given, beside, classes, settings),
        LOSS_WEIGHTS,
    )


def build(state: State, settings: Settings, classes: int) -> NotesGraph:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return NotesGraph(Given.from_state(state, settings), beside, classes, settings)
