"""TransFG: the last block of a ViT sees CLS and one cell for each head, and no others (He et al., AAAI 2022 [code]).

    i_h    = argmax_t rollout_h,t                           the cell of which most has reached CLS, by head h
    z      = LN(block([x_CLS; x_i_1; ...; x_i_H]))_CLS      one pre-norm block of attention and MLP
    logits = Linear(z)
    loss   = CE(logits) + contrast * margin_contrast(z)     layers/losses.py

x are CLS and cells of the layer before the last block, each standardised, and rollout is what embed_tokens stored with
them (fieldmark/encoders/layers.py). Heads may pick the same cell, as in the authors' code. They go on from weights of
the encoder's own last block; the cache holds none, so ours begins anew, and behind a projection to `hidden`, for the
block's cost grows with its width squared [design]. Only what CLS becomes is computed.

For a tower without CLS or rollout there is a substitute [design], `select: attention`: the mean cell m stands for CLS,
and a head picks by an attention that is learned.

    a_h    = softmax_t((Q m)_h . (K x_t)_h / sqrt d_h)      cells of the deepest layer stored, or of `layer`
    x_i_h  = x at argmax_t a_h,t                            its gradient is that of sum_t a_h,t x_t (straight-through)
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers.attention import TransformerBlock, pick
from training.layers.blocks import Standardise, silent
from training.layers.losses import margin_contrast
from training.layers.nodes import TOKEN_SAMPLE, in_precision, training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, HeadSettings, fit_head, head_also_reads, head_reads, tokens_word

SEEDED = True
READS = frozenset({"tokens", "cls", "rollout"}) | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads


class Settings(HeadSettings):
    select: Literal["rollout", "attention"] = "rollout"  # rollout; attention: learned, for a tower without rollout
    hidden: Count | None = 256  # width of the block, behind a projection; null: that of the cells, without one
    heads: Count = 8  # of the block, which divide its width; with select: attention, also the cells that are picked
    dropout: Fraction = 0.1  # share of activations dropped in training
    contrast: NotNegative = 1.0  # weight of the contrastive loss

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.select == "rollout" and self.layer is not None:
            raise ValueError("layer: rollout says which layer is read; leave it out, or take select: attention")
        if self.hidden is not None and self.hidden % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide hidden, {self.hidden}")
        return self


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    if settings.select == "attention":
        return frozenset({tokens_word(settings)})
    return frozenset({"tokens/rollout", "cls/rollout", "rollout"})


def cells_and_cls(batch: Batch, settings: Settings) -> tuple[Tensor, Tensor]:
    """(B, T, d), and what stands for the picture (B, d): CLS, or the mean cell."""
    if settings.select == "attention":
        cells = batch.of(tokens_word(settings))
        return cells, cells.mean(1)
    return batch.of("tokens/rollout"), batch.of("cls/rollout")


class Scales(NamedTuple):
    """What is standard among training images."""

    cell: Standardise
    cls: Standardise

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        cells, whole = cells_and_cls(training_sample(cache, TOKEN_SAMPLE), settings)
        return cls(Standardise(cells.flatten(0, 1).float()), Standardise(whole.float()))

    @classmethod
    def from_state(cls, state: State) -> Self:
        return cls(*(Standardise.from_state(within(state, f"scale_{name}")) for name in cls._fields))


class LearnedAttention(nn.Module):
    """How each head looks at cells, by what stands for the picture."""

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(inputs, width), nn.Linear(inputs, width, bias=False)

    def forward(self, whole: Tensor, x: Tensor) -> Tensor:
        """whole (B, d), x (B, T, d) -> (B, heads, T) float32, of sum 1."""
        query, key = (each.unflatten(-1, (self.heads, -1)) for each in (self.query(whole), self.key(x)))
        scores = torch.einsum("bhe,bthe->bht", query, key) / math.sqrt(query.shape[-1])
        return scores.float().softmax(-1)


class TransFG(nn.Module):
    def __init__(self, scales: Scales, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        inputs = len(scales.cell.mean)
        width = settings.hidden or inputs
        self.settings = settings
        self.scale_cell, self.scale_cls, self.beside = scales.cell, scales.cls, beside
        learned = settings.select == "attention"
        self.attention = LearnedAttention(inputs, width, settings.heads) if learned else None
        narrow = settings.hidden is not None
        self.narrow = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width)) if narrow else nn.Identity()
        self.block = TransformerBlock(width, settings.heads, 4 * width, settings.dropout)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(settings.dropout)
        self.classify = silent(width, classes)

    def forward(self, batch: Batch) -> Output:
        z = self.norm(self.block(self.narrow(in_precision(self.picked(batch))), rows=1).squeeze(1))
        losses = {"contrast": margin_contrast(z, batch.target)} if self.training else {}
        return Output(self.beside(batch, self.classify(self.dropout(z))), losses, None)

    def picked(self, batch: Batch) -> Tensor:
        """(B, 1 + heads, d), standardised: CLS, and the cell that each head picks."""
        cells, cls = cells_and_cls(batch, self.settings)
        cls = self.scale_cls(cls)
        if self.attention is None:
            parts = self.scale_cell(pick(cells, batch.rollout))
        else:
            x = self.scale_cell(cells)
            a = self.attention(in_precision(cls), in_precision(x))
            mean = a @ x
            parts = pick(x, a) + mean - mean.detach()
        return torch.cat([cls[:, None], parts], dim=1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scales, classes = Scales.measure(cache, settings), len(cache.classes)
    width = len(scales.cell.mean)
    if settings.hidden is None and width % settings.heads:
        what = f"{settings.heads} do not divide {width}, the width of the encoder's cells"
        raise UserError(f"settings.heads of transfg: {what}; change heads, or give hidden")
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: TransFG(scales, beside, classes, settings),
        {"contrast": settings.contrast},
    )


def build(state: State, settings: Settings, classes: int) -> TransFG:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return TransFG(Scales.from_state(state), beside, classes, settings)
