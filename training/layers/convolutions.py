"""Graph convolutions over links between images: torch-geometric's GCN, GAT and GraphSAGE, a `Hop` at a time.

Formula, weights and their start are PyG's; what is ours is how messages are summed (hops.py) and that a layer is asked
for the nodes alone that the next one needs: `layer(x, hop)` maps (n, inputs) to (hop.count, outputs). On a whole graph
all equal PyG's layers. A node's value depends on what it hears and on no other node of a batch.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.blocks import Dropout
from training.layers.hops import Hop

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which PyG names as it is loaded
    from torch_geometric.nn import GATConv, GCNConv, GraphConv

Conv = Literal["gcn", "gat", "sage"]
Norm = Literal["layer", "none"]


class GCN(GCNConv):
    """D^-1/2 (W + I) D^-1/2 X V + b (Kipf and Welling, ICLR 2017), D as `Hop.symmetric` says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, normalize=False)

    def forward(self, x: Tensor, hop: Hop) -> Tensor:
        out: Tensor = super().forward(x, hop)
        return out

    def propagate(self, hop: Hop, x: Tensor, **_: Any) -> Tensor:
        weight, own = hop.symmetric()
        return hop.sum(x, weight) + own[:, None] * x[: hop.count]


class SAGE(GraphConv):
    """V_1 mean of the neighbours + b + V_2 x (Hamilton et al., NeurIPS 2017); the mean is weighted by the edges'.

    It is PyG's GraphConv under weights that sum to 1: PyG's SAGEConv takes equal weights only, and is the same there. A
    node that hears nobody has a mean of 0.
    """

    def forward(self, x: Tensor, hop: Hop) -> Tensor:
        out: Tensor = super().forward((x, x[: hop.count]), hop)
        return out

    def propagate(self, hop: Hop, x: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        return hop.sum(x[0], hop.mean())


class GAT(GATConv):
    """Attention of each node over those it hears and itself (Velickovic et al., ICLR 2018), heads side by side.

    A head weighs j for i by softmax_j LeakyReLU(a . V x_i + a' . V x_j + u w_ij), w_ij the edge's weight, that of the
    node itself the mean of these, as in PyG with `edge_dim=1`. The softmax is over what is sampled, where links are.
    """

    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        """Raises ValueError where heads do not divide outputs."""
        if outputs % heads:
            raise ValueError(f"{heads} heads do not divide a width of {outputs}")
        super().__init__(inputs, outputs // heads, heads, edge_dim=1, add_self_loops=False)

    def forward(self, x: Tensor, hop: Hop) -> Tensor:
        out: Tensor = super().forward((x, x[: hop.count]), hop.looped, hop.looped.weight)
        return out

    def edge_updater(
        self, hop: Hop, alpha: tuple[Tensor, Tensor], edge_attr: Tensor, **_: Any
    ) -> Tensor:
        of, to = alpha[0].float()[hop.sender], alpha[1].float()[hop.receiver]
        with torch.autocast(of.device.type, enabled=False):
            weight: Tensor = self.edge_update(of, to, edge_attr, hop.receiver, None, hop.count)
        return weight

    def propagate(self, hop: Hop, x: tuple[Tensor, Tensor], alpha: Tensor, **_: Any) -> Tensor:
        return hop.sum(x[0].flatten(1), alpha)


def require_heads(conv: Conv | None, hidden: int, heads: int) -> None:
    """Raise ValueError, in the words of the knobs of a method, where heads of gat do not divide its width."""
    if conv == "gat" and hidden % heads:
        raise ValueError(f"heads: {heads} of them do not divide hidden: {hidden}")


def make_convolution(conv: Conv, inputs: int, outputs: int, heads: int) -> GCN | GAT | SAGE:
    """A layer of a kind; `heads` are for gat."""
    match conv:
        case "gcn":
            return GCN(inputs, outputs)
        case "gat":
            return GAT(inputs, outputs, heads)
        case "sage":
            return SAGE(inputs, outputs)


class LinkNetwork(nn.Module):
    """x = x + dropout(GELU(layer(LN(x)))), a few times: residual layers of one kind and width."""

    def __init__(self, conv: Conv, layers: int, width: int, heads: int, dropout: float, norm: Norm = "layer") -> None:
        super().__init__()
        self.attends = conv == "gat"  # weights of links are inputs, and shares of no sum
        self.layers = nn.ModuleList(make_convolution(conv, width, width, heads) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm == "layer" else nn.Identity() for _ in range(layers))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, hops: Sequence[Hop]) -> Tensor:
        """x (n, width) of the first hop's nodes, a hop a layer -> (count, width) of the last one's receivers."""
        for number, hop in enumerate(hops):
            x = self.step(number, x, hop)
        return x

    def step(self, number: int, x: Tensor, hop: Hop) -> Tensor:
        """One layer: (n, width) -> (hop.count, width)."""
        passed = self.layers[number](self.norms[number](x), hop)
        return x[: hop.count] + self.dropout(F.gelu(passed))
