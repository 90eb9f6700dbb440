"""Parts as groups of channels: MA-CNN (Zheng et al., ICCV 2017 [mem]), over raw tokens.

    d_i      = sigmoid(FC_i(mean_t x_t)) (d)                how much each channel is of part i, x_t standardised tokens
    M_i      = sigmoid(d_i . x_t)                           over cells t, then of sum 1
    z_i      = sum_t M_i,t x_t
    logits   = Linear([mean_t x_t; z_1; ...; z_P])          and of each part alone in training: Linear_i(z_i)
    distance = sum_i sum_t M_i,t |p_t - p_i|^2              p_t (2) the place of cell t, p_i that of the top of M_i
    diversity = sum_i sum_t M_i,t (max over k not i of M_k,t - 0.02)

Channels whose peaks lie at the same places picture by picture are one part. k-means groups the channels by these places
over training images, and FC starts as this grouping, the same for every image: its weights are 0, its biases plus or
minus 4.

A reconstruction from memory, without the authors' code. The paper alternates between training channels and training FC,
at a larger picture; here channels are frozen, and FC learns with the rest. Tokens are centred, so that a map is near 0
where the channels of a part are weaker than usual. The mean token stands for its vector of the whole picture, places
are shares of the picture's sides, and the weights of the losses are ours [design].
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.labels.kmeans import find_centres, nearest_centres
from fieldmark.params import Block, Fraction
from training.data import Batch, Cache
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.boxes import cell_places
from training.layers.nodes import in_precision, token_scale
from training.layers.states import State, within
from training.loop import EVALUATION_BATCH, NotNegative
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
MARGIN = 0.02
SURE = 4.0  # what FC says at first of a channel that is of a part; minus that of one that is not
PEAKS = 4096  # training images whose peaks say which channels go together


class LossWeights(Block):
    """Of each loss beside the cross entropy of all parts together."""

    parts: NotNegative = 1.0  # cross entropy of each part alone, the sum over parts
    distance: NotNegative = 1.0  # pulls the map of a part together
    diversity: NotNegative = 1.0  # keeps the maps of parts apart


class Settings(HeadSettings):
    parts: int = Field(default=4, ge=2)  # groups of channels: P
    dropout: Fraction = 0.3  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off


def channel_peaks(cache: Cache, word: str) -> Tensor:
    """(d, 2 m): where each channel is highest in each of m training images, x and y; the first cell of equals."""
    train, found = cache.images("train"), []
    for images in train[:: math.ceil(len(train) / PEAKS)].split(EVALUATION_BATCH):
        batch = cache.batch(images)
        cell = batch.of(word).argmax(1)  # (B, d)
        found.append(cell_places(batch.grid_of(word), cell.device)[cell])
    return torch.cat(found).transpose(0, 1).flatten(1)


def group_channels(peaks: Tensor, parts: int, seed: int) -> Tensor:
    """(P, d) bool on the CPU: which channels are of which part, by k-means of their peaks (d, F)."""
    peaks = peaks.cpu()
    part = nearest_centres(peaks, find_centres(peaks, parts, seed))
    return torch.arange(parts)[:, None] == part


def distance(maps: Tensor, places: Tensor) -> Tensor:
    """Each cell's squared distance to the top of its map, weighed by the map: maps (B, P, T) of sum 1, places (T, 2).

    The sum over parts, the mean over images.
    """
    top = places[maps.argmax(2)]  # (B, P, 2)
    return (maps * (places - top[:, :, None]).square().sum(-1)).sum((1, 2)).mean()


def diversity(maps: Tensor) -> Tensor:
    """What the highest of the other parts says, less a margin, weighed by each map (B, P, T), P at least 2.

    The sum over parts, the mean over images.
    """
    itself = torch.eye(maps.shape[1], dtype=torch.bool, device=maps.device)[:, :, None]
    others = maps[:, None].masked_fill(itself, -torch.inf).amax(2)  # (B, P, T)
    return (maps * (others - MARGIN)).sum((1, 2)).mean()


class MultiAttention(nn.Module):
    def __init__(self, scale: Standardise, groups: Tensor, beside: Beside, classes: int, settings: Settings) -> None:
        """`groups` (P, d) bool: the channels that each part starts with."""
        super().__init__()
        parts, dimension = groups.shape
        self.word = tokens_word(settings)
        self.scale, self.beside = scale, beside
        self.group = nn.Linear(dimension, parts * dimension)
        nn.init.zeros_(self.group.weight)
        with torch.no_grad():
            self.group.bias.copy_((SURE * (2.0 * groups - 1)).flatten())
        self.dropout = Dropout(settings.dropout)
        self.classify = silent((parts + 1) * dimension, classes)
        self.by_part = nn.ModuleList([silent(dimension, classes) for _ in range(parts)])

    def forward(self, batch: Batch) -> Output:
        x = in_precision(self.scale(batch.of(self.word)))
        maps = self.maps(x)
        found = self.dropout(torch.cat([x.mean(1, keepdim=True), maps.to(x.dtype) @ x], dim=1))  # (B, 1 + P, d)
        losses = {}
        if self.training:
            alone = [classify(z) for classify, z in zip(self.by_part, found[:, 1:].unbind(1), strict=True)]
            by_part = [F.cross_entropy(self.beside(batch, logits), batch.target) for logits in alone]
            losses = {
                "parts": torch.stack(by_part).sum(),
                "distance": distance(maps, cell_places(batch.grid_of(self.word), maps.device)),
                "diversity": diversity(maps),
            }
        return Output(self.beside(batch, self.classify(found.flatten(1))), losses, None)

    def maps(self, x: Tensor) -> Tensor:
        """Standardised tokens x (B, T, d) -> (B, P, T) float32, of sum 1 over cells: where each part is."""
        member = self.group(x.mean(1)).sigmoid().unflatten(1, (len(self.by_part), -1))  # (B, P, d)
        scores = member.to(x.dtype) @ x.transpose(1, 2)
        # sigmoid(scores) over its sum, which may be too small for a float where the former is not.
        return F.logsigmoid(scores.float()).softmax(2)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    word = tokens_word(settings)
    scale, classes = token_scale(cache, word), len(cache.classes)
    groups = group_channels(channel_peaks(cache, word), settings.parts, seed)
    return fit_head(
        cache,
        settings,
        seed,
        own_layer(settings),
        lambda beside: MultiAttention(scale, groups, beside, classes, settings),
        settings.loss_weights.model_dump(),
    )


def build(state: State, settings: Settings, classes: int) -> MultiAttention:
    scale = Standardise.from_state(within(state, "scale"))
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    groups = torch.zeros(settings.parts, len(scale.mean), dtype=torch.bool)
    return MultiAttention(scale, groups, beside, classes, settings)
