"""Efficient probing: learned queries, each with a part of the values of its own, over raw tokens (ICLR 2026 [web]).

    a_i    = softmax_t(q_i . x_t / sqrt d)                  x_t the standardised tokens (T, d), i one of `queries`
    z_i    = sum_t a_i,t (V x_t)_i                          (V x)_i the i-th of Q equal parts of V x (d_v)
    logits = Linear(LN([z_1; ...; z_Q]))

The queries look at the tokens as they are, without a map of keys, and one map of values serves them all. The
normalisation before the last layer is ours [design]. Tokens have no place here: their order changes nothing.
"""

import math

import torch
from torch import Tensor, nn

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import Standardise, silent
from training.layers.nodes import in_precision, token_scale
from training.layers.states import State, within
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


class Settings(HeadSettings):
    queries: Count = 32  # ways to look at the tokens: Q
    hidden: Count = 8  # width of the values of each query: d_v / Q
    dropout: Fraction = 0.1  # share of pooled values dropped in training


class EfficientProbing(nn.Module):
    def __init__(self, scale: Standardise, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        width = len(scale.mean)
        self.word = tokens_word(settings)
        self.scale, self.beside = scale, beside
        self.queries = nn.Parameter(torch.randn(settings.queries, width) / math.sqrt(width))
        pooled = settings.queries * settings.hidden
        self.value = nn.Linear(width, pooled, bias=False)
        self.norm, self.dropout = nn.LayerNorm(pooled), nn.Dropout(settings.dropout)
        self.classify = silent(pooled, classes)

    def forward(self, batch: Batch) -> Output:
        x = in_precision(self.scale(batch.of(self.word)))
        by_query = self.pool(x, self.attention(x))
        return Output(self.beside(batch, self.classify(self.dropout(self.norm(by_query)))), {}, None)

    def attention(self, x: Tensor) -> Tensor:
        """Standardised tokens x (B, T, d) -> (B, Q, T), of sum 1 over tokens."""
        scores = x @ self.queries.T.to(x.dtype) / math.sqrt(x.shape[-1])
        return scores.float().softmax(1).transpose(1, 2)

    def pool(self, x: Tensor, attention: Tensor) -> Tensor:
        """x (B, T, d), attention (B, Q, T) -> (B, d_v): part i of the values, weighed by query i."""
        values = self.value(x).unflatten(-1, (len(self.queries), -1))
        return torch.einsum("bqt,btqd->bqd", attention.to(values.dtype), values).flatten(1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scale, classes = token_scale(cache, tokens_word(settings)), len(cache.classes)
    return fit_head(
        cache, settings, seed, own_layer(settings), lambda beside: EfficientProbing(scale, beside, classes, settings)
    )


def build(state: State, settings: Settings, classes: int) -> EfficientProbing:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return EfficientProbing(Standardise.from_state(within(state, "scale")), beside, classes, settings)
