"""S3N: a picture read again where a classifier finds its classes, and where less so (Ding et al., ICCV 2019 [code]).

    O: raw            o = mean_t x_t                            x_t the standardised tokens (T, d) on their grid (h, w)
                      logits_O = Linear(o)
    R, peaks, s_i     the response map of the likeliest classes of O, and its peaks (training/layers/response.py)
    peaks go to D     if s_i > u_i, u_i ~ U(0, 1), else to C: in training; in its first share `warm_up`, to both
                      at evaluation the highest peak is D's and the lowest is C's
    Q_D, Q_C          base_ratio + Gaussians around these peaks (training/layers/sampler.py)
    x_D, x_C          tokens read anew by the sampler's grid, at as many points as there were
    D: discriminative d = mean_t GELU(LN(V_D x_D,t)),  logits_D = Linear(d);      C: complementary, alike
    logits            Linear([o; d; c])                         the answer
    losses            CE(logits) + smoothed(logits_O) + CE(logits_D) + smoothed(logits_C)

`smoothed` is cross entropy with smooth_ratio for the class and the rest in equal parts for the other classes: for O and
C, not for D, as in the public code. There, too, the answer is the classifier of the concatenated features, no gradient
goes through R, and what is sampled trains the two radii alone beside its own branch. Ours [design]: tokens are
resampled and not pixels, so nothing is seen that the tower had not seen; the buffer is one linear layer with LN in the
place of a strided 3 x 3 convolution with BatchNorm; the radii are learned as logarithms, at the learning rate of all
else (theirs move 1e-4 times as fast), and the sampler's Gaussian is fixed; warm-up is a share of the schedule; peaks
are never drawn at evaluation, where the code drew them for 21 epochs. An image without a peak, such as one whose map is
constant, is sampled evenly: Q is base_ratio throughout.

With `look` D and C read pixels, as in the paper: d = GELU(LN(V_D g_D)), g_D the pooled vector of the picture that a
first look has sampled for D, embedded again (stages/look_again.py), and c alike. O still reads the tokens. Both samples
are those of evaluation, fixed before this fit: no peak is drawn here, and no radius is learned.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from fieldmark.pictures.sampler import over_picture
from training.data import Batch, Cache
from training.data.again import WORD as AGAIN
from training.data.part import NAME
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.nodes import in_precision, token_scale
from training.layers.response import peaks, salient_map
from training.layers.sampler import complementary, discriminative, sampling_grid, sampling_weights
from training.layers.states import State, within
from training.loop import NotNegative, Positive
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS, fit_rival
from training.token_heads import (
    Beside,
    HeadSettings,
    fit_head,
    head_also_reads,
    head_reads,
    own_layer,
    tokens_word,
)

SEEDED = True
READS = frozenset({"tokens", AGAIN}) | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads

SIDE = 31  # of response maps, attention and the sampler's grid


class LossWeights(Block):
    """Cross entropies of each branch alone, beside that of all together."""

    raw: Positive = 1.0  # smoothed cross entropy of the tokens as they came (O), whose classifier finds the peaks
    discriminative: NotNegative = 1.0  # cross entropy of what is read around strong peaks (D)
    complementary: NotNegative = 1.0  # smoothed cross entropy of what is read around weak peaks (C)


class Settings(HeadSettings):
    hidden: Count = 256  # width of the buffer of D and of C
    dropout: Fraction = 0.3  # share of what each classifier reads dropped in training
    base_ratio: Positive = 0.09  # attention where no peak is
    radius: Positive = 0.09  # of D's Gaussians at the start, a share of the map's side
    complementary_radius: Positive = 0.3  # of C's Gaussians at the start
    warm_up: Fraction = 1 / 3  # share of `epochs` in which every peak is in D and in C
    smooth_ratio: Annotated[float, Field(ge=0.5, le=1)] = 0.85  # what the class has in the smoothed cross entropies
    look: str | None = None  # key of `train.first_looks` whose pictures D and C read; null: tokens that are read anew
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the answer, weight 1; 0 switches one off


    @field_validator("look")
    @classmethod
    def _is_a_name(cls, look: str | None) -> str | None:
        if look is not None and not NAME.fullmatch(look):
            raise ValueError("input should be a key under train.first_looks in params.yaml")
        return look


def look_word(look: str) -> str:
    """What READS calls a second look."""
    return f"{AGAIN}/{look}"


def own_reads(settings: Settings) -> frozenset[str]:
    """What the head reads itself, and not by its probe."""
    own = own_layer(settings)
    return own if settings.look is None else own | {look_word(settings.look)}


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


class Answers(NamedTuple):
    """What each classifier says, (B, C) each; beside a probe, with the probe's logits."""

    joint: Tensor
    raw: Tensor
    discriminative: Tensor
    complementary: Tensor


class Branch(nn.Module):
    """What is made of tokens that were read anew, or of the vector of a picture that was."""

    def __init__(self, width: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.buffer, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        self.classify = silent(hidden, classes)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Tokens x (B, T, d), to be read with weights (B, T', T) -> (B, hidden)."""
        # The buffer first: it is linear, so the order does not matter, and what is resampled is narrower.
        return F.gelu(self.norm(weights.to(x.dtype) @ self.buffer(x))).mean(1)

    def whole(self, g: Tensor) -> Tensor:
        """A vector of each picture, g (B, d) -> (B, hidden)."""
        return F.gelu(self.norm(self.buffer(g)))


class S3N(nn.Module):
    left: Tensor

    def __init__(
        self,
        scale: Standardise,
        beside: Beside,
        classes: int,
        settings: Settings,
        warm_up: int = 0,
        look: Standardise | None = None,
    ) -> None:
        """`warm_up`: how many images training takes with every peak in both branches; `look`: of a second look's."""
        super().__init__()
        width, hidden = len(scale.mean), settings.hidden
        self.word = tokens_word(settings)
        self.scale, self.beside, self.look = scale, beside, look
        self.look_word = None if settings.look is None else look_word(settings.look)
        self.base_ratio, self.smooth_ratio = settings.base_ratio, settings.smooth_ratio
        self.log_radius = nn.Parameter(torch.tensor([settings.radius, settings.complementary_radius]).log())
        self.register_buffer("left", torch.tensor(warm_up))  # counted on the device, so that no step waits for it
        self.dropout = Dropout(settings.dropout)
        self.classify_raw = silent(width, classes)
        self.discriminative, self.complementary = (
            Branch(width if look is None else len(look.mean), classes, hidden) for _ in range(2)
        )
        self.classify = silent(width + 2 * hidden, classes)

    def forward(self, batch: Batch) -> Output:
        said, losses = self.answers(batch), {}
        if self.training:
            losses = {
                "raw": smoothed(said.raw, batch.target, self.smooth_ratio),
                "discriminative": F.cross_entropy(said.discriminative, batch.target),
                "complementary": smoothed(said.complementary, batch.target, self.smooth_ratio),
            }
        return Output(said.joint, losses, None)

    def answers(self, batch: Batch) -> Answers:
        """All that it says of a batch; `joint` is the answer."""
        x, grid = self.scale(batch.of(self.word)), batch.grid_of(self.word)
        z = self.beside(batch, x.new_zeros(self.classify.out_features))
        o, d, c = map(self.dropout, (x.mean(1), *self.branches(batch, x, grid, z)))
        logits = (
            self.classify(torch.cat([o, d, c], 1)),
            self.classify_raw(o),
            self.discriminative.classify(d),
            self.complementary.classify(c),
        )
        return Answers(*(z + each.float() for each in logits))

    def branches(self, batch: Batch, x: Tensor, grid: tuple[int, int], z: Tensor) -> tuple[Tensor, Tensor]:
        """d and c, (B, hidden) each, of standardised tokens as `attention` takes them, or of a second look."""
        if self.look is not None and self.look_word is not None:
            g_d, g_c = in_precision(self.look(batch.of(self.look_word))).unbind(1)
            return self.discriminative.whole(g_d), self.complementary.whole(g_c)
        with torch.autocast(x.device.type, enabled=False):  # places are told in full precision
            by_d, by_c = sampling_weights(sampling_grid(self.attention(x, grid, z), grid), grid).unbind(1)
        x = in_precision(x)
        return self.discriminative(x, by_d), self.complementary(x, by_c)

    def attention(self, x: Tensor, grid: tuple[int, int], z: Tensor) -> Tensor:
        """Q_D and Q_C, (B, 2, SIDE, SIDE), of standardised tokens x (B, T, d) of a grid (h, w).

        z (B, C) is what a probe says of each image, which has a part in its likeliest classes; (C,) zeros without one.
        """
        with torch.no_grad():
            raw = self.classify_raw
            scores = salient_map(x, grid, raw.weight, raw.bias + z, SIDE)
            by_d, by_c = self.deal(scores, peaks(scores))
        radius, complementary_radius = self.log_radius.exp()
        most = x.shape[1]  # peaks, see there
        q_d = discriminative(scores, by_d, radius, most)
        q_c = complementary(scores, by_c, complementary_radius, most)
        return self.base_ratio + torch.stack([q_d, q_c], 1)

    def deal(self, scores: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the peaks `found` (B, SIDE, SIDE) D has, and which C has."""
        if not self.training:
            return highest(scores, found), highest(-scores, found)
        strong, early = scores > torch.rand(scores.shape, device=scores.device), self.left > 0
        self.left -= len(scores)
        return found & (strong | early), found & (~strong | early)


def highest(scores: Tensor, found: Tensor) -> Tensor:
    """The highest (B, h, w) of what was found in each map, alone; of equal ones the first, and of none none."""
    at = scores.masked_fill(~found, float("-inf")).flatten(1).argmax(1)
    cells = torch.arange(scores[0].numel(), device=scores.device).view_as(scores[0])
    return found & (cells == at[:, None, None])


def smoothed(logits: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Cross entropy with `ratio` of the target and the rest in equal parts for the others, of logits (B, C).

    `target` is classes (B,) or probabilities (B, C). 1/2 <= ratio <= 1.
    """
    classes = logits.shape[1]
    # PyTorch's share is spread over all classes, the target too.
    share = (1 - ratio) * classes / max(classes - 1, 1)
    return F.cross_entropy(logits, target, label_smoothing=share)


@torch.no_grad()
def maps_of(model: S3N, batch: Batch) -> Tensor:
    """The attention Q_D and Q_C that a fitted model has for a batch at evaluation: (B, 2, SIDE, SIDE), rows first.

    base_ratio at least, and never drawn. Their nodes reach from border to border of the picture, so that it can be
    sampled itself (fieldmark/pictures/zoom.py), and not from the first to the last centre of a cell.
    """
    model.eval()
    z = model.beside(batch, model.classify.bias.new_zeros(model.classify.out_features))
    grid = batch.grid_of(model.word)
    return over_picture(model.attention(model.scale(batch.of(model.word)), grid, z), grid)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scale, classes = token_scale(cache, tokens_word(settings)), len(cache.classes)
    trains = len(cache.images("train"))
    if settings.with_probe is not None:  # beside it an image may be left out: as fit_head does, which shares the fit
        trains = int(fit_rival(cache, settings.with_probe).trains.sum())
    warm_up = round(settings.warm_up * settings.epochs * trains)
    look = None if settings.look is None else token_scale(cache, look_word(settings.look))
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: S3N(scale, beside, classes, settings, warm_up, look),
        settings.loss_weights.model_dump(),
    )


def build(state: State, settings: Settings, classes: int) -> S3N:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    look = None if settings.look is None else Standardise.from_state(within(state, "look"))
    return S3N(Standardise.from_state(within(state, "scale")), beside, classes, settings, look=look)
