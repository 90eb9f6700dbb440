"""Messages along the edges of a sparse graph: weighted sums over the edges into each node, deterministic and fast.

One layer of a graph network passes messages over a `Hop`. No message is written out: forward and backward are sums of a
table's rows (`embedding_bag`), the backward one over the same edges in the order of their senders. On a CPU that takes
a tenth of the time of gathering and scattering, and on a GPU it gives the same bits each time.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Hop:
    """The edges of one step: from any of n nodes to the first `count` of them, those into one node beside each other.

    No edge goes from a node to itself. A weight is 0 or more. What is sampled has the weights that make its sums right
    in the mean; `degree` is always that of the whole graph, so that a node has one value, alone and in any batch.
    """

    sender: Tensor  # (E,) int64, 0 .. n-1
    receiver: Tensor  # (E,) int64, 0 .. count-1, ascending
    weight: Tensor  # (E,) float32
    degree: Tensor  # (n,) float32: the sum of the weights of all edges into each node
    count: int

    @cached_property
    def start(self) -> Tensor:
        """(count + 1,): edges start[i] .. start[i + 1] enter node i."""
        return starts(self.receiver, self.count)

    @cached_property
    def by_sender(self) -> tuple[Tensor, Tensor]:
        """The edges (E,) in the order of their senders, and where those of each of the n nodes start, (n + 1,)."""
        return self.sender.int().argsort(stable=True), starts(self.sender, len(self.degree))

    @cached_property
    def looped(self) -> "Hop":
        """The same with an edge from each receiver to itself, behind the others; its weight is the mean of theirs."""
        node = torch.arange(self.count, device=self.sender.device)
        edges = (self.start[1:] - self.start[:-1]).clamp(min=1)
        own = self.sum(self.weight.new_ones(len(self.degree), 1), self.weight)[:, 0] / edges
        order = torch.cat([self.receiver, node]).argsort(stable=True)
        sender, receiver, weight = (
            torch.cat(pair)[order] for pair in ((self.sender, node), (self.receiver, node), (self.weight, own))
        )
        return Hop(sender, receiver, weight, self.degree, self.count)

    def symmetric(self) -> tuple[Tensor, Tensor]:
        """Weights (E,) of D^-1/2 (W + I) D^-1/2, and those (count,) of its diagonal; D the degrees, and 1 for the loop.

        Degrees are of the edges into a node, of its sender's too: where edges have directions, W's rows (PyG's rule).
        """
        scale = (self.degree + 1).rsqrt()
        return self.weight * scale[self.sender] * scale[self.receiver], scale[: self.count].square()

    def mean(self) -> Tensor:
        """Weights (E,) that sum to 1 over the edges into a node."""
        return self.weight / self.degree[self.receiver].clamp(min=1e-12)

    def sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """(count, h) float32: for each receiver the sum of weight x over its edges; x (n, h), and a gradient to both.

        weight (E,), or (E, H): then head j of H weighs the j-th of H equal parts of x.
        """
        weight = weight[:, None] if weight.ndim == 1 else weight
        out: Tensor = Sum.apply(x.float(), weight.float(), self)
        return out


def starts(owner: Tensor, count: int) -> Tensor:
    """(count + 1,): where each of 0 .. count-1 begins among these once they are sorted."""
    ends = torch.bincount(owner, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def sums(table: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """(m, h): row i sums the rows index[e] of table (n, h), e from start[i] to start[i + 1]; weight (E, H)."""
    heads = zip(table.chunk(weight.shape[1], 1), weight.T, strict=True)
    return torch.cat(
        [
            F.embedding_bag(
                index, part.contiguous(), start, per_sample_weights=own.contiguous(), mode="sum",
                include_last_offset=True,
            )
            for part, own in heads
        ],
        dim=1,
    )  # fmt: skip


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, hop: Hop) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.hop = hop
        return sums(x, hop.sender, hop.start, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), hop = ctx.saved_tensors, ctx.hop
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            order, start = hop.by_sender
            to_x = sums(gradient, hop.receiver[order], start, weight[order])
        if ctx.needs_input_grad[1]:
            product = gradient.index_select(0, hop.receiver) * x.index_select(0, hop.sender)
            to_weight = product.unflatten(1, (weight.shape[1], -1)).sum(-1)
        return to_x, to_weight, None
