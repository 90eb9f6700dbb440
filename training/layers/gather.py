"""Rows of padded batches, and weighted sums of a table's rows, with a gradient that is found as fast as they are."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_of(x: Tensor, places: Tensor) -> Tensor:
    """Rows (B, k, D) of x (B, n, D) at places (B, k)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def spans(start: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The places (E,) that rows (B,) of a ragged table have, one row after the other, and which of 0 .. B-1 has each.

    start (n + 1,): row i has the places start[i] .. start[i + 1].
    """
    first = start[rows]
    count = start[rows + 1] - first
    owner = torch.repeat_interleave(count)
    return torch.arange(len(owner), device=start.device) - (count.cumsum(0) - count - first)[owner], owner


class SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # A sum of rows as well: PyTorch's own adds them up one by one.
        index, weight = ctx.saved_tensors
        flat = index.flatten()
        order, count = flat.int().argsort(stable=True), torch.bincount(flat, minlength=ctx.rows)
        of, weights = order // index.shape[1], weight.flatten().index_select(0, order)
        first = count.cumsum(0) - count
        return F.embedding_bag(of, gradient.contiguous(), first, per_sample_weights=weights, mode="sum"), None, None


def sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(n, h): sum_k weight_nk table[index_nk]; table (M, h), index and weight (n, k), k > 0, no gradient to weight."""
    out: Tensor = SumRows.apply(table, index, weight.to(table.dtype))
    return out
