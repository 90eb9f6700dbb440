"""Bilinear pooling of raw tokens (Lin, RoyChowdhury and Maji, ICCV 2015 [mem]): one map says where, the other what.

    a_t = A x_t (p)        b_t = B x_t (p)                  x_t the standardised tokens (T, d), p = `hidden`
    X   = sum_t a_t b_t^T / T                               (p, p)
    x   = vec(X)           x <- sign(x) sqrt(|x| + eps)     x <- x / |x|
    logits = Linear(x)

`symmetric` has A = B. X is then symmetric, and x its upper triangle, off-diagonals times sqrt 2 after the root, so that
lengths and products are those of the full matrix.

The paper multiplies the channels of one or two networks as they are, and trains these; its last classifier is a linear
SVM. Here features are frozen: A and B are learned in their place, narrow, for d^2 products are more than a few thousand
images can weigh, and the classifier is trained with them [design]. Tokens have no place: their order changes nothing,
nor does it that all of them come twice. `isqrt` and `bilinear` of moments.ENCODER are closed forms of the same, for
probes.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.nodes import in_precision, token_scale
from training.layers.states import State, within
from training.loop import Positive
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.token_heads import (
    Beside,
    HeadSettings,
    fit_head,
    head_also_reads,
    layer_reads,
    own_layer,
    tokens_word,
)

SEEDED = True
READS = frozenset({"tokens"}) | PROBE_WORDS
ALSO = PROBE_WORDS
reads, also_reads = layer_reads, head_also_reads
EPS = 1e-10  # within the root, whose slope at 0 is infinite


class Settings(HeadSettings):
    lr: list[Positive] = Field(default=[1e-2], min_length=1)  # learning rates that val chooses from; x is short
    hidden: Count = 64  # width of each map: p
    symmetric: bool = False  # true: one map for both
    dropout: Fraction = 0.3  # share of products dropped in training


def signed_sqrt(x: Tensor) -> Tensor:
    """sign(x) sqrt(|x| + EPS), 0 with a slope of 0 at 0."""
    return x.sign() * (x.abs() + EPS).sqrt()


def products(a: Tensor, b: Tensor) -> Tensor:
    """a (B, T, p), b (B, T, q) -> (B, p, q) float32: the mean over tokens of their outer products."""
    return torch.einsum("btp,btq->bpq", a, b).float() / a.shape[1]


def vector_of(X: Tensor) -> Tensor:
    """X (B, p, q) -> (B, p q): signed root, then unit length, image by image."""
    return F.normalize(signed_sqrt(X.flatten(1)), dim=1)


def vector_of_symmetric(X: Tensor) -> Tensor:
    """X (B, p, p), symmetric -> (B, p (p + 1) / 2): <x, x'> is that of `vector_of` of both."""
    size = X.shape[1]
    row, column = torch.triu_indices(size, size, device=X.device)
    x = signed_sqrt(X.flatten(1).index_select(1, row * size + column))
    return F.normalize(torch.where(row == column, x, math.sqrt(2) * x), dim=1)


class Bilinear(nn.Module):
    def __init__(self, scale: Standardise, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        dimension, width = len(scale.mean), settings.hidden
        self.word, self.symmetric = tokens_word(settings), settings.symmetric
        self.scale, self.beside = scale, beside
        self.where = nn.Linear(dimension, width)
        if not settings.symmetric:
            self.what = nn.Linear(dimension, width)
        self.dropout = Dropout(settings.dropout)
        self.classify = silent(width * (width + 1) // 2 if settings.symmetric else width**2, classes)

    def forward(self, batch: Batch) -> Output:
        x = self.pool(in_precision(self.scale(batch.of(self.word))))
        return Output(self.beside(batch, self.classify(self.dropout(x))), {}, None)

    def pool(self, x: Tensor) -> Tensor:
        """Standardised tokens x (B, T, d) -> (B, F) float32, of unit length."""
        a = self.where(x)
        return vector_of_symmetric(products(a, a)) if self.symmetric else vector_of(products(a, self.what(x)))


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scale, classes = token_scale(cache, tokens_word(settings)), len(cache.classes)
    return fit_head(
        cache, settings, seed, own_layer(settings), lambda beside: Bilinear(scale, beside, classes, settings)
    )


def build(state: State, settings: Settings, classes: int) -> Bilinear:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return Bilinear(Standardise.from_state(within(state, "scale")), beside, classes, settings)
