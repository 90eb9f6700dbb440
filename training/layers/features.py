"""The vector of an image that every probe of the family reads: vectors of the cache side by side, on one scale.

`features` names vectors that parts of the cache give (training/data/features.py); a vector may come in several blocks,
as the mean and the maximum of nodes do. What is fitted goes through the same function of a batch as what is predicted.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal, Protocol, Self

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block
from training.data import Batch, Cache, feature_blocks, words_behind
from training.layers.blocks import Span, Standardise
from training.layers.inherited import Inherited, encoders_of, is_inherited
from training.layers.states import State, within

CHUNK = 2048  # images read at a time, and fewer of long vectors:
ROOM = 2**24  # numbers that a chunk holds at most
Transform = Literal["none", "signed_sqrt"]


def require_feature(name: str) -> str:
    words_behind(name)
    return name


class FeatureSettings(Block):
    """The knobs that all probes share."""

    features: list[Annotated[str, AfterValidator(require_feature)]] = Field(
        default=["global"], min_length=1
    )  # side by side: global; nodes; keys of `moments`; descriptions; again/NAME; asked/NAME/FIELD; inherited/NAME
    transform: Transform = "none"  # of each vector before: none, signed_sqrt (sign(x) sqrt|x|, then unit length)


def parts_of(features: Collection[str]) -> frozenset[str]:
    """The parts behind these vectors: what a probe reads under its settings."""
    parts = frozenset[str]().union(*map(words_behind, features))
    return parts - {"globals"} if "nodes" in parts else parts  # node 0 is the global vector


class HasFeatures(Protocol):
    """Settings of a method that takes such vectors."""

    @property
    def features(self) -> list[str]: ...


def feature_reads(settings: HasFeatures) -> frozenset[str]:
    """`reads` of every probe."""
    return parts_of(settings.features)


def feature_also_reads(settings: HasFeatures) -> frozenset[str]:
    """`also_reads` of every probe: of another encoder, where a batch takes no global vector out of the nodes."""
    return frozenset[str]().union(*map(words_behind, settings.features))


class Features(nn.Module):
    """From a batch to x (B, F): each block transformed and standardised (Standardise), then given an equal weight.

    A block's variances, summed over its dimensions, are F / blocks: a block of 9,000 dimensions does not drown one of
    400. One block alone is standardised and no more, so that one grid of penalties fits every choice of vectors. Blocks
    of other encoders (`also`) come behind, the same vectors of each.
    """

    def __init__(
        self, settings: FeatureSettings, standardise: Sequence[Standardise], inherited: Sequence[Inherited]
    ) -> None:
        """By what standardises each block, and what is inherited, in the order of the blocks."""
        super().__init__()
        self.settings, sizes = settings, [len(each.mean) for each in standardise]
        self.size = sum(sizes)  # F
        self.weights = [math.sqrt(self.size / len(sizes) / size) for size in sizes]
        self.standardise = nn.ModuleList(standardise)
        self.inherited = nn.ModuleList(inherited)

    @classmethod
    def measure(cls, cache: Cache, settings: FeatureSettings) -> Self:
        """Mean and scale of every view of the training images, taken from `cache` chunk by chunk."""
        train = cache.images("train")
        inherited = [
            Inherited.of(cache, name, encoder)
            for encoder in range(1 + len(cache.also))
            for name in filter(is_inherited, settings.features)
        ]
        sums = [Sums(block) for block in blocks_of(settings, cache.batch(train[:1]), inherited)]
        chunk = chunk_of(sum(len(total.total) for total in sums))
        for view in range(cache.views):
            for images in train.split(chunk):
                blocks = blocks_of(settings, view_of(cache, images, view), inherited)
                for total, block in zip(sums, blocks, strict=True):
                    total.add(block)
        return cls(settings, [total.standardise() for total in sums], inherited)

    @classmethod
    def from_state(cls, state: State, settings: FeatureSettings) -> Self:
        count = sum(name.endswith(".mean") for name in state)
        names = list(filter(is_inherited, settings.features))
        # Each name for each encoder.
        heard = sum(name.startswith("inherited.") and name.endswith(".text") for name in state)
        return cls(
            settings,
            [Standardise.from_state(within(state, f"standardise.{block}")) for block in range(count)],
            [Inherited.from_state(within(state, f"inherited.{n}"), names[n % len(names)]) for n in range(heard)],
        )

    @property
    def chunk(self) -> int:
        return chunk_of(self.size)

    def forward(self, batch: Batch) -> Tensor:
        blocks = blocks_of(self.settings, batch, self.inherited)
        parts = zip(blocks, self.standardise, self.weights, strict=True)
        return torch.cat([standardise(block) * weight for block, standardise, weight in parts], dim=-1)

    def columns(self, feature: str, batch: Batch) -> slice:
        """Where in x a feature of the run's own encoder stands."""
        place, own = self.settings.features.index(feature), batch.changed(also=())
        before, upto = (
            sum(block.shape[1] for block in blocks_of(part, own, self.inherited))
            for part in (
                self.settings.model_copy(update={"features": self.settings.features[:count]})
                for count in (place, place + 1)
            )
        )
        return slice(before, upto)

    def of(self, cache: Cache, images: Tensor, view: int = 0) -> Tensor:
        """x (len(images), F) of these images in one view."""
        return torch.cat([self(view_of(cache, chunk, view)) for chunk in images.split(self.chunk)])

    def of_training(self, cache: Cache) -> Tensor:
        """x (V n, F) of the training images, all of view 0 first."""
        return torch.cat([self.of(cache, cache.images("train"), view) for view in range(cache.views)])

    def span_of_training(self, cache: Cache, dtype: torch.dtype = torch.float32) -> Span:
        """The space that x of the training images spans, which are read only where they are fewer than dimensions."""
        rows = len(cache.images("train")) * cache.views
        return Span(self.of_training(cache).to(dtype) if self.size > rows else None)


def blocks_of(settings: FeatureSettings, batch: Batch, inherited: Iterable[nn.Module] = ()) -> list[Tensor]:
    """The vectors that settings name, (B, F) each, transformed: of the run's own encoder, then of each other.

    `inherited` makes those that are, in their order.
    """
    heard = iter(inherited)
    found = [
        block
        for seen in encoders_of(batch)
        for name in settings.features
        for block in ((next(heard)(seen),) if is_inherited(name) else feature_blocks(name, seen))
    ]
    if settings.transform == "signed_sqrt":
        found = [F.normalize(block.sign() * block.abs().sqrt(), dim=-1) for block in found]
    return found


def chunk_of(size: int) -> int:
    """How many images of `size` numbers are read at a time."""
    return max(1, min(CHUNK, ROOM // size))


class Sums:
    """Mean and scale of vectors (n, D) that come in chunks. In float64, so that they do not depend on the chunks."""

    def __init__(self, like: Tensor) -> None:
        """Of vectors like these (n, D), none of which counts yet."""
        self.count = 0
        self.total = torch.zeros(like.shape[1], dtype=torch.float64, device=like.device)
        self.squares = torch.zeros((), dtype=torch.float64, device=like.device)

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.count += len(x)
        self.total += x.sum(0)
        self.squares += x.square().sum()

    def standardise(self) -> Standardise:
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square().sum()
        return Standardise.of(mean, variance / len(mean))


def view_of(cache: Cache, images: Tensor, view: int) -> Batch:
    return cache.batch(images, torch.full_like(images, view))
