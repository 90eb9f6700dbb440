"""Attention pooling: the picture's own vector beside a learned weighted mean of its nodes, then one linear layer.

Every node, the global one among them, is projected to h dimensions (Linear, LayerNorm, GELU); gated attention weighs
them (Ilse et al., ICML 2018 [mem]) and logits = Linear(g) + Linear(LN(pooled)), which is Linear([g; pooled]) with its
two parts apart. The first starts as the tuned linear probe, the second at zero, and each also answers alone under
`loss_weights`, all as in concept_graph. This rival sees patches, but neither texts nor edges: what concept_graph gains
over it is due to those.
"""

from dataclasses import replace

from torch import nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import GatedAttention, Standardise
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output
from training.start import starting_point

SEEDED = True
READS = frozenset({"nodes"})


class LossWeights(Block):
    """Cross entropies of each stream alone, beside that of their sum."""

    image: NotNegative = 0.5  # cross entropy of the global stream alone
    pooled: NotNegative = 0.5  # cross entropy of the pooled stream alone


class Settings(Schedule):
    start_l2: Positive | None = None  # strength of the probe that it starts from; null: val chooses
    hidden: Count = 256  # width of the patch stream
    dropout: Fraction = 0.3  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off


class AttentionPool(nn.Module):
    def __init__(
        self, standardise_global: Standardise, standardise_nodes: Standardise, probe: nn.Linear, settings: Settings
    ) -> None:
        """`probe` (D -> C): where the global vector's part of the last layer starts."""
        super().__init__()
        dimension, classes, hidden = probe.in_features, probe.out_features, settings.hidden
        self.standardise_global, self.standardise_nodes = standardise_global, standardise_nodes
        self.project = nn.Sequential(nn.Linear(dimension, hidden), nn.LayerNorm(hidden), nn.GELU())
        self.attention = GatedAttention(hidden, hidden // 2)
        self.norm_pooled = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify_global, self.classify_pooled = nn.Linear(dimension, classes), nn.Linear(hidden, classes)
        self.classify_global.load_state_dict(probe.state_dict())
        nn.init.zeros_(self.classify_pooled.weight)
        nn.init.zeros_(self.classify_pooled.bias)

    def forward(self, batch: Batch) -> Output:
        x = self.project(self.standardise_nodes(batch.nodes.float()))
        attention = self.attention(x, batch.mask)
        pooled = (attention[:, None].to(x.dtype) @ x).squeeze(1)
        by_global = self.classify_global(self.dropout(self.standardise_global(batch.g.float())))
        by_pooled = self.classify_pooled(self.dropout(self.norm_pooled(pooled)))
        losses = {}
        if self.training:
            losses = {
                "image": F.cross_entropy(by_global.float(), batch.target),
                "pooled": F.cross_entropy(by_pooled.float(), batch.target),
            }
        return Output(by_global + by_pooled, losses, attention)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    start = starting_point(cache, settings.start_l2)
    fitted = fit_epochs(
        lambda: AttentionPool(start.standardise_global, start.standardise_nodes, start.probe, settings),
        cache,
        settings,
        seed,
        settings.loss_weights.model_dump(),
    )
    return replace(fitted, chosen={**fitted.chosen, "start_l2": start.l2})
