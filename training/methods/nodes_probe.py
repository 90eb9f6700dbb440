"""Logistic regression on [mean; max] of an image's nodes, the global one among them: the tuned probe that sees patches.

The mean (D) and the maximum by dimension (D) run over the nodes that exist; each is standardised by its own mean and
scale (layers.Standardise), and the L2 strength is chosen on val as in linear_probe. What a method with attention gains
over it is due to more than to reading patches at all.
"""

import torch
from torch import Tensor, nn

from training.data import Batch, Cache
from training.data.nodes import Nodes
from training.layers.blocks import Standardise
from training.layers.logistic import ProbeSettings, fit_probe
from training.methods import Fitted, Output

SEEDED = False
READS = frozenset({"nodes"})
CHUNK = 2048  # images pooled at a time


class Settings(ProbeSettings):
    pass


class NodesProbe(nn.Module):
    def __init__(self, standardise_mean: Standardise, standardise_max: Standardise, linear: nn.Linear) -> None:
        """`linear` (2 D -> C)."""
        super().__init__()
        self.standardise_mean, self.standardise_max, self.linear = standardise_mean, standardise_max, linear

    def forward(self, batch: Batch) -> Output:
        mean, highest = pool(batch.nodes.float(), batch.mask)
        x = torch.cat([self.standardise_mean(mean), self.standardise_max(highest)], dim=-1)
        return Output(self.linear(x), {}, None)


def pool(nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum (B, D) of nodes (B, N+1, D) over those that exist."""
    nodes = nodes.masked_fill(~mask[..., None], 0.0)
    highest = nodes.masked_fill(~mask[..., None], float("-inf")).amax(1)
    return nodes.sum(1) / mask.sum(1, keepdim=True), highest


def pool_images(cache: Cache, images: Tensor, view: int) -> tuple[Tensor, Tensor]:
    """`pool` of these images in one view, without their graphs."""
    rows = images * cache.views + view
    nodes = cache.part(Nodes)
    parts = [pool(nodes.nodes[chunk].float(), nodes.mask[chunk]) for chunk in rows.split(CHUNK)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([highest for _, highest in parts])


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    sample = [pool_images(cache, cache.images("train"), view) for view in range(cache.views)]
    standardise_mean = Standardise(torch.cat([mean for mean, _ in sample]))
    standardise_max = Standardise(torch.cat([highest for _, highest in sample]))

    def features(images: Tensor, view: int) -> Tensor:
        mean, highest = pool_images(cache, images, view)
        return torch.cat([standardise_mean(mean), standardise_max(highest)], dim=-1)

    chosen = fit_probe(cache, settings, features)
    model = NodesProbe(standardise_mean, standardise_max, chosen.linear)
    return Fitted(model, chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
