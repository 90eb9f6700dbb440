"""Attention pooling: the picture's own vector beside a learned weighted mean of its nodes, then one linear layer.

Every node, the global one among them, is projected to h dimensions (Linear, LayerNorm, GELU); gated attention weighs
them (Ilse et al., ICML 2018 [mem]) and logits = z + Linear(g) + Linear(LN(pooled)), which is Linear([g; pooled]) with
its two parts apart. The first starts as the tuned linear probe, the second at zero, and each also answers alone under
`loss_weights`. `with_probe` gives z, what that probe says, which is 0 else; `nodes: tokens` takes raw tokens for the
patches: all as in concept_graph. This rival sees patches, but neither texts nor edges: what concept_graph gains over it
is due to those.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import GatedAttention, silent
from training.layers.nodes import NodeInput, NodeScales
from training.layers.states import State, within
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS, ProbeBeside, probe_also_reads, reduce, with_reads
from training.start import StartingPoint, starting_point
from training.token_heads import Layer, tokens_word

SEEDED = True
READS = frozenset({"nodes", "tokens"}) | PROBE_WORDS
ALSO = PROBE_WORDS  # what its probe reads of other encoders


class LossWeights(Block):
    """Cross entropies of each stream alone, beside that of their sum."""

    image: NotNegative = 0.5  # cross entropy of the global stream alone
    pooled: NotNegative = 0.5  # cross entropy of the pooled stream alone


class Settings(Schedule):
    start_l2: Positive | None = None  # strength of the probe that it starts from; null: val chooses
    with_probe: ProbeBeside = None  # {method, settings}: the probe whose logits it adds to; null: none
    nodes: Literal["all", "tokens"] = "all"  # all, or tokens: raw ones, before the projection
    layer: Layer = None  # of tokens, by its number; null: the deepest stored
    hidden: Count = 256  # width of the patch stream
    dropout: Fraction = 0.3  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off


def reads(settings: Settings) -> frozenset[str]:
    return with_reads(own_reads(settings), settings.with_probe)


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return frozenset({"nodes"} if settings.nodes == "all" else {"globals", tokens_word(settings)})


def also_reads(settings: Settings) -> frozenset[str]:
    return probe_also_reads(settings.with_probe)


class AttentionPool(nn.Module):
    def __init__(self, start: StartingPoint, scales: NodeScales, settings: Settings) -> None:
        super().__init__()
        dimension, classes, hidden = start.probe.in_features, start.probe.out_features, settings.hidden
        self.offset, self.standardise_global = start.offset, start.standardise_global
        self.has_boxes = settings.nodes == "all"
        self.in_nodes = NodeInput(scales, settings.nodes, hidden, tokens_word(settings))
        self.attention = GatedAttention(hidden, hidden // 2)
        self.norm_pooled = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify_global, self.classify_pooled = nn.Linear(dimension, classes), silent(hidden, classes)
        self.classify_global.load_state_dict(start.probe.state_dict())

    def forward(self, batch: Batch) -> Output:
        x, mask = self.in_nodes(batch)
        x = F.gelu(x)
        attention = self.attention(x, mask)
        pooled = (attention[:, None].to(x.dtype) @ x).squeeze(1)
        by_global = self.classify_global(self.dropout(self.standardise_global(batch.g.float()))).float()
        by_pooled = self.classify_pooled(self.dropout(self.norm_pooled(pooled))).float()
        z = torch.zeros_like(by_global) if self.offset is None else self.offset(batch)
        losses = {}
        if self.training:
            losses = {
                "image": F.cross_entropy(z + by_global, batch.target),
                "pooled": F.cross_entropy(z + by_pooled, batch.target),
            }
        return Output(z + by_global + by_pooled, losses, attention if self.has_boxes else None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    start = starting_point(cache, settings.start_l2, settings.with_probe)
    told = cache if start.rival is None else start.rival.told(cache)
    scales = NodeScales.measure(cache, settings.nodes, tokens_word(settings))
    fitted = fit_epochs(
        lambda: AttentionPool(start, scales, settings),
        reduce(told, own_reads(settings), frozenset()),
        settings,
        seed,
        settings.loss_weights.model_dump(),
    )
    return replace(fitted, chosen={**fitted.chosen, **start.chosen})


def build(state: State, settings: Settings, classes: int) -> AttentionPool:
    start = StartingPoint.from_state(state, settings.with_probe, classes)
    return AttentionPool(start, NodeScales.from_state(within(state, "in_nodes")), settings)
