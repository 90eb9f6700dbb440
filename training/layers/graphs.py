"""Graph layers over padded batches, dense: GCN, GAT, GraphSAGE, and an MLP that sees no edge.

Up to 64 nodes an image, a dense (B, n, n) product beats gather and scatter over an edge list. A graph comes as `edges`
(B, n, n, F): F weights in [0,1] an edge, symmetric, 0 where there is none, diagonal 0, and a mask (B, n). What a layer
needs of it changes neither from layer to layer nor by training: `prepare` makes it once, and `forward(x, prepared)`
maps (B, n, inputs) to (B, n, outputs). A graph that all images share may come with B = 1. Nodes may be permuted; a
padded node is never read by another, and what it holds itself is to be masked by whoever reads it. All equal PyG's
convolutions on each graph alone.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.blocks import Dropout, normalise_adjacency

Kind = Literal["gcn", "gat", "sage", "mlp"]
TIE = 1e-5  # of the largest product: what differs from a threshold by less is equal to it, whatever rounding says


def pairs(mask: Tensor) -> Tensor:
    """(B, n, n) bool: both nodes exist."""
    return mask[:, :, None] & mask[:, None, :]


def mean_weight(edges: Tensor) -> Tensor:
    """(B, n, n): the mean of an edge's weights, several times as fast as torch.mean over so short a dimension."""
    return torch.stack(edges.unbind(-1)).sum(0) / edges.shape[-1]


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias in the precision of x: under autocast a float32 bias would widen all that follows."""
    return x + bias.to(x.dtype)


class GCN(nn.Module):
    """D^-1/2 (W + I) D^-1/2 X V + b, W the mean of an edge's weights (Kipf and Welling, ICLR 2017)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    @staticmethod
    def prepare(edges: Tensor, mask: Tensor) -> Tensor:
        """The normalised adjacency (B, n, n)."""
        return normalise_adjacency(mean_weight(edges), mask)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return add_bias(adjacency @ self.linear(x), self.bias)


class SAGE(nn.Module):
    """V_1 mean of the neighbours + V_2 x + b (Hamilton et al., NeurIPS 2017); the mean is weighted by the edges'.

    PyG has equal weights only, and equals this one there. A node without neighbours has a mean of 0.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.neighbours, self.own = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    @staticmethod
    def prepare(edges: Tensor, mask: Tensor) -> Tensor:
        """The weights of each node's mean (B, n, n); rows sum to 1, or to 0 without neighbours."""
        weight = mean_weight(edges) * pairs(mask)
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return add_bias(mean @ F.linear(x, self.neighbours.weight) + self.own(x), self.neighbours.bias)


class GAT(nn.Module):
    """Attention of each node over its neighbours and itself (Velickovic et al., ICLR 2018), heads side by side.

    A head weighs j for i by softmax_j LeakyReLU(a . V x_i + a' . V x_j + a'' . U e_ij), e_ij the edge's F weights,
    those of a self loop the mean over the node's edges, as in PyG. The last layer's heads stand side by side like the
    others', where the paper averages them.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, weights: int) -> None:
        """`weights`: F. Raises ValueError where heads do not divide outputs."""
        super().__init__()
        if outputs % heads:
            raise ValueError(f"{heads} heads do not divide a width of {outputs}")
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.by_edge = nn.Linear(weights, heads, bias=False)  # a'' . U, which is all that enters the score
        self.by_target, self.by_source = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs // heads))) for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(outputs))

    @staticmethod
    def prepare(edges: Tensor, mask: Tensor) -> Tensor:
        """(B, n, n, F+1): the weights with those of self loops, and last whether there is an edge (1) or not (0)."""
        linked = (edges > 0).any(-1) & pairs(mask)
        edges = edges * linked[..., None]
        count = linked.sum(-1).clamp(min=1)[..., None]
        loops = torch.eye(edges.shape[1], dtype=edges.dtype, device=edges.device)[None, :, :, None]
        edges = edges + loops * (edges.sum(2) / count)[:, :, None]
        # A padded node has its loop too: a softmax over nothing is no number.
        return torch.cat([edges, linked[..., None] + loops.expand(len(edges), -1, -1, -1)], dim=-1)

    def forward(self, x: Tensor, prepared: Tensor) -> Tensor:
        heads = len(self.by_edge.weight)
        values = self.linear(x).unflatten(-1, (heads, -1))  # (B, n, heads, d)
        to, of = ((values * vector).sum(-1).transpose(1, 2) for vector in (self.by_target, self.by_source))
        score = to[..., :, None] + of[..., None, :] + self.by_edge(prepared[..., :-1]).permute(0, 3, 1, 2)
        score = F.leaky_relu(score, 0.2).float().masked_fill(prepared[:, None, :, :, -1] == 0, float("-inf"))
        attended = score.softmax(-1).to(values.dtype) @ values.transpose(1, 2)  # (B, heads, n, d)
        return add_bias(attended.transpose(1, 2).flatten(2), self.bias)


class MLP(nn.Module):
    """V x + b: what a layer of the same shape does without edges."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    @staticmethod
    def prepare(edges: Tensor, mask: Tensor) -> Tensor:
        return mask

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


GraphLayer = GCN | SAGE | GAT | MLP


def make_layer(kind: Kind, inputs: int, outputs: int, heads: int, weights: int) -> GraphLayer:
    """A layer of a kind; `heads` and the number of weights an edge are for gat."""
    match kind:
        case "gcn":
            return GCN(inputs, outputs)
        case "sage":
            return SAGE(inputs, outputs)
        case "gat":
            return GAT(inputs, outputs, heads, weights)
        case "mlp":
            return MLP(inputs, outputs)


def prepare_edges(kind: Kind, edges: Tensor, mask: Tensor) -> Tensor:
    """What layers of a kind need of edges (B, n, n, F) and mask (B, n)."""
    layers: dict[Kind, type[GraphLayer]] = {"gcn": GCN, "sage": SAGE, "gat": GAT, "mlp": MLP}
    return layers[kind].prepare(edges, mask)


class GraphNetwork(nn.Module):
    """x = x + dropout(GELU(layer(LN(x)))), a few times: residual layers of one kind and width."""

    def __init__(self, kind: Kind, layers: int, width: int, heads: int, weights: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layer(kind, width, width, heads, weights) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = Dropout(dropout, by_image=True)

    def forward(self, x: Tensor, prepared: Tensor) -> Tensor:
        """x (B, n, width), and its edges as prepare_edges makes them -> (B, n, width)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.dropout(F.gelu(layer(norm(x), prepared)))
        return x


class GraphNorm(nn.Module):
    """w (x - a mean) / sqrt(mean of (x - a mean)^2 + 1e-5) + b over the nodes of each image (Cai et al., ICML 2021)."""

    def __init__(self, width: int, share: float = 1.0) -> None:
        """`share`: a at the start, of the mean over nodes that is taken away."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean_scale = nn.Parameter(torch.full((width,), share))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, width), mask (B, n) -> the same shape."""
        centred = x.float() - self.mean_scale * masked_mean(x.float(), mask)[:, None]
        spread = masked_mean(centred.square(), mask)[:, None]
        return (self.weight * centred * (spread + 1e-5).rsqrt() + self.bias).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, width): the mean of x (B, n, width) over the nodes that exist, mask (B, n); 0 where there is none."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class NormedNetwork(nn.Module):
    """A layer, then dropout(ReLU(GraphNorm(x))) and another layer, and so on: the stack of TRD and of the notes [code].

    Where GraphNorm begins with a share of 1, what all nodes of an image show gets past it only as far as rows of the
    prepared graph have unequal sums; on a complete graph it does not.
    """

    def __init__(
        self,
        kind: Kind,
        layers: int,
        inputs: int,
        width: int,
        heads: int,
        weights: int,
        dropout: float,
        share: float = 1.0,
    ) -> None:
        """`share`: of GraphNorm."""
        super().__init__()
        sizes = [inputs, *[width] * layers]
        self.layers = nn.ModuleList(make_layer(kind, *size, heads, weights) for size in pairwise(sizes))
        self.norms = nn.ModuleList(GraphNorm(width, share) for _ in range(layers - 1))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, prepared: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, inputs), its edges as prepare_edges makes them, and mask (B, n) -> (B, n, width)."""
        first, *others = self.layers
        x = first(x, prepared)
        for norm, layer in zip(self.norms, others, strict=True):
            x = layer(self.dropout(F.relu(norm(x, mask))), prepared)
        return x


def grid_edges(rows: int, columns: int) -> Tensor:
    """Edges (1, n, n, 1) of n = rows columns cells, row by row: 1 between a cell and the up to 8 that touch it."""
    cell = torch.arange(rows * columns)
    place = torch.stack([cell // columns, cell % columns], dim=1)
    steps = (place[:, None] - place[None]).abs().amax(-1)
    return (steps == 1).float()[None, :, :, None]


def nearest_edges(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """Edges (B, n, n, 1) between each node and the k most like it: max(0, cosine) of unit vectors x (B, n, D).

    An edge stands where either of its ends chose the other.
    """
    cosine = (x @ x.transpose(1, 2)).float()
    loops = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    candidates = cosine.masked_fill(~pairs(mask) | loops, float("-inf"))
    values, nearest = candidates.topk(min(k, x.shape[1]), dim=-1, sorted=False)
    weight = torch.zeros_like(cosine).scatter(-1, nearest, values.clamp(min=0))
    return torch.maximum(weight, weight.transpose(1, 2))[..., None]


def threshold_edges(x: Tensor, mask: Tensor, kind: Literal["similar", "complementary"]) -> Tensor:
    """Edges (B, n, n, 1), 1 or 0: pairs more alike than an end is like the others in the mean, or less alike.

    x (B, n, D) of any length, mask (B, n). S = x x^T and t_i = sum of S_ij over j != i / (n - 1): similar links i and j
    where S_ij > t_i or S_ij > t_j, complementary where one is below (TRD, NeurIPS 2023 [code]). A tie is no edge.
    """
    alike = likeness(x, mask)
    return linked_over(alike, mean_over_others(alike, mask), mask, kind)


def likeness(x: Tensor, mask: Tensor) -> Tensor:
    """x x^T (B, n, n) in float32, 0 on the diagonal and where one of two is padding."""
    with torch.autocast(x.device.type, enabled=False):
        alike = x.float() @ x.float().transpose(1, 2)
    loops = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return alike.masked_fill(~pairs(mask) | loops, 0.0)


def mean_over_others(alike: Tensor, mask: Tensor) -> Tensor:
    """(B, n): of likeness (B, n, n)."""
    return alike.sum(-1) / (mask.sum(1, keepdim=True) - 1).clamp(min=1)


def linked_over(
    alike: Tensor, threshold: Tensor, mask: Tensor, kind: Literal["similar", "complementary"]
) -> Tensor:
    """Edges (B, n, n, 1) where i, or j, finds the other one over its threshold (B, n), or under it."""
    tie = TIE * F.pad(alike.abs().flatten(1), (0, 1)).amax(1)[:, None, None]  # there may be no node
    over = alike - threshold[..., None]
    found = (over > tie) if kind == "similar" else (over < -tie)
    loops = torch.eye(over.shape[1], dtype=torch.bool, device=over.device)
    return ((found | found.transpose(1, 2)) & pairs(mask) & ~loops).float()[..., None]
