"""SwinFC: three stages of a tower are attended to, fused and supervised each (a Chinese journal; notes on it, no code).

Its formulas are missing from the notes. What follows is a reconstruction [design], and claims no fidelity to the paper.

    X_i    = LN(V_i x_i + b_i)                      cells (L_i, d_i) of stage i = 2, 3, 4, standardised, to width C
    A      = softmax((Q X_4)(K X_4)^T / sqrt C_h)   by head; X_4 + A V X_4 goes on as X_4
    EACA   F_i = X_e + X_c
             X_e = X + W_2 LN(W_1 * X)          external attention: W_1 (C, S, 3) a convolution along the cells, row
                                                by row, W_2 (S, C); S units of memory
             X_c = X a_h a_w                    cross-space attention: a_h of a row is sigmoid(MLP(mean of the row)),
                                                a_w of a column likewise, each by an MLP of its own
    FFM    F_i' = F_i + gamma sum_{j != i} softmax_j(-F_i F_j^T / sqrt C) F_j       what stage j has and i has not
    FSM    z    = mean over heads of the cell of F_4' that most cells look at: argmax_l mean_q A_ql
    stage i     = Linear(LN(max over cells of F_i'))
    backbone    = Linear(mean over cells of the deepest map)
    loss   = CE(backbone) + sum_i beta_i CE(stage i) + contrast * margin_contrast(z)        layers/losses.py

The notes leave open which output is final. All four are there after one training, and `final` says which answers; it
changes nothing in training. `average` is that of the four softmaxes. The backbone shares no weight with the stages, and
the features under it are frozen: whatever deep supervision does, it does to the stages. With `beta: [0, 0, 0.8]` and
`final: stage4` against the same with all three, that is seen.

Ours besides [design]: the notes' batch normalisation is layer normalisation, so that no image depends on others; scores
of fusion are scaled as in attention; a stage tells of the largest cell by dimension, for a mean drowns a mark of one.

Stages are layers of a tower whose map shrinks from stage to stage (`layers`), or one map at three scales: as it is, and
means of 2 x 2 and 4 x 4 cells. Where these do not fill a map, those of the last row and column are means of the cells
that are there: 9 x 9 becomes 5 x 5 and 3 x 3; 3 x 4 becomes 2 x 2 and 1 x 1.
"""

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers.attention import Attention, pick
from training.layers.blocks import Standardise, silent
from training.layers.losses import margin_contrast
from training.layers.nodes import TOKEN_SAMPLE, Projection, training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, HeadSettings, fit_head, head_also_reads, head_reads, tokens_word

SEEDED = True
READS = frozenset({"tokens"}) | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads

STAGES = ("stage2", "stage3", "stage4")
OUTPUTS = ("backbone", *STAGES)
POOLED = (1, 2, 4)  # cells along a side that one cell of each scale stands for
REDUCTION = 8  # of the width within the gates of rows and columns

LayerNumber = Annotated[int, Field(ge=0)]
# A file's list is a tuple here: a list would be a grid, from which val chooses.
Layers = Annotated[tuple[LayerNumber, LayerNumber, LayerNumber], Field(strict=False)]
Weights = Annotated[tuple[NotNegative, NotNegative, NotNegative], Field(strict=False)]


class Settings(HeadSettings):
    layers: Layers | None = None  # three of `tokens.ENCODER`, by number, shallow to deep; null: one map at three scales
    final: Literal["average", "backbone", "stage2", "stage3", "stage4"] = "average"  # the output that answers
    beta: Weights = (0.4, 0.6, 0.8)  # weights of the cross entropies of stages 2, 3 and 4
    contrast: NotNegative = 1.0  # weight of the contrastive loss
    hidden: Count = 256  # width of stages: C
    memory: Count = 64  # units of external attention: S
    heads: Count = 8  # of the attention of stage 4, which divide the width
    dropout: Fraction = 0.1  # share of a stage's vector dropped in training

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.layers is not None and self.layer is not None:
            raise ValueError("layer: `layers` say which are read; leave one of them out")
        if self.hidden % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide hidden, {self.hidden}")
        if self.final in STAGES and not self.beta[STAGES.index(self.final)]:
            raise ValueError(f"final: {self.final} has a beta of 0 and learns nothing; give it one, or another final")
        return self


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return frozenset(words(settings))


def words(settings: Settings) -> tuple[str, ...]:
    """What READS calls the maps, from the shallow to the deep."""
    return (tokens_word(settings),) if settings.layers is None else tuple(f"tokens/{each}" for each in settings.layers)


class Map(NamedTuple):
    """Cells (B, L, d), row by row of a grid (h, w)."""

    cells: Tensor
    grid: tuple[int, int]

    def pooled(self, size: int) -> "Map":
        """Means of `size` x `size` cells; where these do not fill the map, of the cells that are there."""
        if size == 1:
            return self
        image = self.cells.transpose(1, 2).unflatten(2, self.grid)
        image = F.avg_pool2d(image, size, ceil_mode=True, count_include_pad=False)
        return Map(image.flatten(2).transpose(1, 2), (image.shape[2], image.shape[3]))


def stages_of(batch: Batch, settings: Settings) -> tuple[list[Map], Tensor]:
    """The maps of the three stages, and the mean cell (B, d) of the deepest one."""
    maps = [Map(batch.of(word), batch.grid_of(word)) for word in words(settings)]
    mean = maps[-1].cells.mean(1)
    return [maps[0].pooled(size) for size in POOLED] if settings.layers is None else maps, mean


class Scales(NamedTuple):
    """What is standard among training images: cells of each stage, and the mean cell of the deepest map."""

    stages: list[Standardise]
    backbone: Standardise

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        maps, mean = stages_of(training_sample(cache, TOKEN_SAMPLE), settings)
        return cls([Standardise(each.cells.flatten(0, 1).float()) for each in maps], Standardise(mean.float()))

    @classmethod
    def from_state(cls, state: State) -> Self:
        stages = [Standardise.from_state(within(state, f"project.{stage}.standardise")) for stage in range(len(STAGES))]
        return cls(stages, Standardise.from_state(within(state, "standardise")))


class ExternalAttention(nn.Module):
    """X + W_2 LN(W_1 * X): what a memory of S units, shared by all images, gives back to cells."""

    def __init__(self, width: int, memory: int) -> None:
        super().__init__()
        self.into, self.norm = nn.Conv1d(width, memory, 3, padding=1), nn.LayerNorm(memory)
        self.back = nn.Linear(memory, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> the same shape."""
        out: Tensor = x + self.back(self.norm(self.into(x.transpose(1, 2)).transpose(1, 2)))
        return out


class CrossSpaceAttention(nn.Module):
    """X a_h a_w: a gate for each row and one for each column, by what is in it on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows, self.columns = self.gate(width), self.gate(width)

    @staticmethod
    def gate(width: int) -> nn.Sequential:
        narrow = math.ceil(width / REDUCTION)
        return nn.Sequential(
            nn.Linear(width, narrow), nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, h w, width) -> the same shape."""
        image = x.unflatten(1, grid)
        rows, columns = self.rows(image.mean(2))[:, :, None], self.columns(image.mean(1))[:, None]
        return (image * rows * columns).flatten(1, 2)


class EACA(nn.Module):
    """External and cross-space attention, side by side."""

    def __init__(self, width: int, memory: int) -> None:
        super().__init__()
        self.external, self.cross = ExternalAttention(width, memory), CrossSpaceAttention(width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, h w, width) -> the same shape."""
        out: Tensor = self.external(x) + self.cross(x, grid)
        return out


def unlike(x: Tensor, other: Tensor) -> Tensor:
    """softmax(-x other^T / sqrt C), x (B, L, C), other (B, M, C) -> (B, L, M), of row sum 1."""
    scores = x @ other.transpose(1, 2) / -math.sqrt(x.shape[-1])
    return scores.float().softmax(-1).to(x.dtype)


def fuse(stages: list[Tensor], gamma: Tensor) -> list[Tensor]:
    """FFM: to each stage (B, L_i, C) comes what is least like it in each of the others."""
    return [
        x + gamma.to(x.dtype) * sum(unlike(x, other) @ other for other in stages if other is not x) for x in stages
    ]


def average(own: Tensor, z: Tensor) -> Tensor:
    """Logits (B, C) whose softmax is the mean over k of softmax(z + own_k); own (k, B, C), z (B, C).

    Of all such logits those that are z itself where `own` is 0: a constant of each image is free.
    """
    gain = own - (z + own).logsumexp(-1, keepdim=True) + z.logsumexp(-1, keepdim=True)
    highest = gain.amax(0)
    return z + highest + (gain - highest).exp().mean(0).log()


class SwinFC(nn.Module):
    def __init__(self, scales: Scales, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        width = settings.hidden
        self.settings, self.beside, self.standardise = settings, beside, scales.backbone
        self.backbone = silent(len(scales.backbone.mean), classes)
        self.project = nn.ModuleList(Projection(scale, width) for scale in scales.stages)
        self.attention = Attention(width, settings.heads)
        self.attend = nn.ModuleList(EACA(width, settings.memory) for _ in STAGES)
        self.gamma = nn.Parameter(torch.ones(1))
        self.classify = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Dropout(settings.dropout), silent(width, classes)) for _ in STAGES
        )

    def forward(self, batch: Batch) -> Output:
        maps, mean = stages_of(batch, self.settings)
        fused, attention = self.fused(maps)
        by_stage = [classify(x.max(1).values) for classify, x in zip(self.classify, fused, strict=True)]
        own = torch.stack([self.backbone(self.standardise(mean)), *by_stage]).float()
        z = self.beside(batch, torch.zeros_like(own[0]))
        if not self.training:
            return Output(self.answer(own, z), {}, None)
        losses = {name: F.cross_entropy(z + each, batch.target) for name, each in zip(STAGES, own[1:], strict=True)}
        losses["contrast"] = margin_contrast(selected(fused[-1], attention), batch.target)
        return Output(z + own[0], losses, None)

    def fused(self, maps: list[Map]) -> tuple[list[Tensor], Tensor]:
        """F_i' (B, L_i, C) of each stage, and the attention (B, heads, L_4, L_4) of the last."""
        x = [project(each.cells) for project, each in zip(self.project, maps, strict=True)]
        seen, attention = self.attention(x[-1], x[-1])
        x[-1] = x[-1] + seen
        attended = [attend(each, a.grid) for attend, each, a in zip(self.attend, x, maps, strict=True)]
        return fuse(attended, self.gamma), attention

    def answer(self, own: Tensor, z: Tensor) -> Tensor:
        """The logits (B, C) of `final`; own (4, B, C) of OUTPUTS."""
        final = self.settings.final
        return average(own, z) if final == "average" else z + own[OUTPUTS.index(final)]


def selected(x: Tensor, attention: Tensor) -> Tensor:
    """FSM: (B, C), the mean over heads of the cell of x (B, L, C) at which the cells look most."""
    return pick(x, attention.mean(2)).mean(1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scales, classes = Scales.measure(cache, settings), len(cache.classes)
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: SwinFC(scales, beside, classes, settings),
        {**dict(zip(STAGES, settings.beta, strict=True)), "contrast": settings.contrast},
    )


def build(state: State, settings: Settings, classes: int) -> SwinFC:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return SwinFC(Scales.from_state(state), beside, classes, settings)
