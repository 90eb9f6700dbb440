"""Multi-head attention that tells what it looked at."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v in each head, then Linear (Vaswani et al., NeurIPS 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        """`heads` divides `width`."""
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)  # into: queries, keys and values

    def forward(self, asking: Tensor, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """asking (B, n, width), x (B, L, width) -> (B, n, width), and maps (B, heads, n, L) float32 of row sum 1.

        `mask` (B, L) bool: which of x may be looked at, one at least in every row; all without it.
        """
        weights, biases = self.into.weight.chunk(3), self.into.bias.chunk(3)
        query, key, value = (
            self.by_head(F.linear(each, weight, bias))
            for each, weight, bias in zip((asking, x, x), weights, biases, strict=True)
        )
        scores = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).float()
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        maps = scores.softmax(-1)
        return self.out((maps.to(value.dtype) @ value).transpose(1, 2).flatten(2)), maps

    def by_head(self, x: Tensor) -> Tensor:
        """(B, n, width) -> (B, heads, n, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x): a pre-norm block."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        """`hidden`: width within the MLP."""
        super().__init__()
        self.norm, self.attention, self.dropout = nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, width), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
        """x (B, L, width) -> (B, L, width), or its first `rows` alone; mask as in Attention."""
        normed = self.norm(x)
        first = x[:, :rows] + self.dropout(self.attention(normed[:, :rows], normed, mask)[0])
        out: Tensor = first + self.mlp(first)
        return out


def pick(x: Tensor, scores: Tensor) -> Tensor:
    """x (B, L, d), scores (B, heads, L) -> (B, heads, d): what each head scores highest. Heads may pick the same."""
    best = scores.argmax(-1)
    return x.gather(1, best[..., None].expand(-1, -1, x.shape[-1]))
