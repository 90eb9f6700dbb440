"""Relational Proxies: how local views relate to the whole tells the class (Chaudhuri et al., NeurIPS 2022 [code]).

    g, l_n   = LN(V v + b)                                  of the object and of its local views, one map for all
    s        = LN(AST([cls; l_1; ...; l_N]))_cls            `depth` pre-norm blocks of attention and MLP, no positions
    r        = Linear(LeakyReLU(LN(Linear([g; s]))))        how the summary relates to the object
    logits   = P g / 1 + P s / 1 + P r / 3                  P (C, hidden): a proxy for each class
    loss     = CE(logits) + anchor * sum of proxy_anchor(x, P) over x of g, s, r         layers/losses.py

What differs from the authors' code. Its network is trained with the rest; here vectors are frozen, and V stands for the
last layer of it. Its loss sees r alone, though g and s are added at prediction; the paper applies it to all three
[mem], and so do we. The cross entropy, which every method here has, and the normalisation of s are ours [design].
Proxies begin at zero, so that the head says nothing at first, where the code draws them.

`faults` switches on known defects of that code [code], to see what they cost:

    scrambled_crops    local views are those of other images of the batch, in evaluation too (layers/faults.py)
    untrained_proxies  proxies stay as they are drawn, N(0, 2 / C): the optimiser was made before they were. With them
                       the head speaks from the start, beside a probe too
    crop_positions     a vector is learned for each place in the list of crops, which has no order that means anything
    shared_batch_norm  BatchNorm in V, which object and local views share, and in the relation net
    constant_rate      the learning rate never falls: its schedule moves once in five epochs there

Others have no place on frozen features (crops drawn anew at evaluation, test read while training).
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.layers.attention import TransformerBlock
from training.layers.blocks import Dropout, Standardise
from training.layers.faults import BatchNorm, scramble
from training.layers.losses import proxy_anchor
from training.layers.nodes import Projection, training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.region_heads import OWN, Regions, RegionSettings
from training.token_heads import Beside, fit_head, head_also_reads, head_reads

SEEDED = True
READS = OWN | {"boxes"} | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads
Fault = Literal["scrambled_crops", "untrained_proxies", "crop_positions", "shared_batch_norm", "constant_rate"]
SHARES = (1, 1, 3)  # what the logits of object, summary and relation are divided by


class LossWeights(Block):
    """Of each loss beside the cross entropy."""

    anchor: NotNegative = 1.0  # Proxy-Anchor of object, summary and relation, the sum


class Settings(RegionSettings):
    hidden: Count = 256  # width of the space of views and proxies
    heads: Count = 4  # of the blocks that summarise, which divide `hidden`
    depth: Count = 3  # blocks that summarise
    boxes: bool = False  # whether each local view also says where it lies
    dropout: Fraction = 0.1  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy, weight 1; 0 switches one off
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()  # known defects of the reference code to switch on

    @property
    def decays(self) -> bool:
        return "constant_rate" not in self.faults

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide hidden, {self.hidden}")
        return self


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return OWN | ({"boxes"} if settings.boxes else set())


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


class Summary(nn.Module):
    """What local views say together, whatever their order."""

    def __init__(self, settings: Settings, positions: int) -> None:
        """`positions`: places of local views that have a vector each, which is a fault; 0 for none."""
        super().__init__()
        width = settings.hidden
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + positions, width)) if positions else None
        blocks = [TransformerBlock(width, settings.heads, width, settings.dropout) for _ in range(settings.depth)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(width)

    def forward(self, local: Tensor, mask: Tensor) -> Tensor:
        """local (B, N, width), mask (B, N) -> (B, width)."""
        x = torch.cat([self.cls.to(local.dtype).expand(len(local), -1, -1), local], dim=1)
        if self.position is not None:
            x = x + self.position[:, : x.shape[1]].to(x.dtype)
        mask = F.pad(mask, (1, 0), value=True)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        out: Tensor = self.norm(last(x, mask, rows=1).squeeze(1))
        return out


class RelationalProxies(nn.Module):
    def __init__(self, scale: Standardise, regions: Regions, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        width, faults = settings.hidden, settings.faults
        self.settings = settings
        self.regions, self.beside = regions, beside
        norm = BatchNorm if "shared_batch_norm" in faults else nn.LayerNorm
        self.project = Projection(scale, width, norm(width))
        self.place = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width)) if settings.boxes else None
        self.summary = Summary(settings, len(regions.local) if "crop_positions" in faults else 0)
        self.relation = nn.Sequential(
            nn.Linear(2 * width, 2 * width), norm(2 * width), nn.LeakyReLU(), nn.Linear(2 * width, width)
        )
        self.dropout = Dropout(settings.dropout)
        drawn = "untrained_proxies" in faults
        proxies = torch.randn(classes, width) * (2 / classes) ** 0.5 if drawn else torch.zeros(classes, width)
        self.proxies = nn.Parameter(proxies, requires_grad=not drawn)

    def forward(self, batch: Batch) -> Output:
        views = self.represent(batch)
        shared = torch.stack([x / share for x, share in zip(views, SHARES, strict=True)]).sum(0)
        logits = self.dropout(shared) @ self.proxies.T
        losses = {}
        if self.training:
            anchors = [proxy_anchor(x, self.proxies, batch.target) for x in views]
            losses = {"anchor": torch.stack(anchors).sum()}
        return Output(self.beside(batch, logits), losses, None)

    def represent(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """g, s and r, (B, hidden) each."""
        views = self.regions(batch)
        g, local, mask = self.project(views.object), self.project(views.local), views.mask
        if self.place is not None:
            local = local + self.place(self.regions.boxes(batch))
        if "scrambled_crops" in self.settings.faults:
            local, mask = scramble(local, mask)
        s = self.summary(local, mask)
        return g, s, self.relation(torch.cat([g, s], dim=1))


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    regions, classes = Regions.measure(cache, settings), len(cache.classes)
    sample = training_sample(cache)
    scale = Standardise(sample.nodes[sample.mask])
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: RelationalProxies(scale, regions, beside, classes, settings),
        settings.loss_weights.model_dump(),
    )


def build(state: State, settings: Settings, classes: int) -> RelationalProxies:
    regions = Regions.from_state(within(state, "regions"), settings)
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    scale = Standardise.from_state(within(state, "project.standardise"))
    return RelationalProxies(scale, regions, beside, classes, settings)
