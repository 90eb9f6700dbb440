"""The vector of an image that every probe of the family reads: vectors of the cache side by side, on one scale.

`features` names vectors that parts of the cache give (training/data/features.py); a vector may come in several blocks,
as the mean and the maximum of nodes do. What is fitted goes through the same function of a batch as what is predicted.
"""

import math
from collections.abc import Collection
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block
from training.data import Batch, Cache, feature_blocks, feature_words, word_behind
from training.layers.blocks import Standardise

CHUNK = 2048  # images read at a time
Transform = Literal["none", "signed_sqrt"]


def require_feature(name: str) -> str:
    word_behind(name)
    return name


class FeatureSettings(Block):
    """The knobs that all probes share."""

    features: list[Annotated[str, AfterValidator(require_feature)]] = Field(
        default=["global"], min_length=1
    )  # vectors put side by side: global; nodes, their mean and maximum; pooled or another key of `moments`
    transform: Transform = "none"  # of each vector before: none, signed_sqrt (sign(x) sqrt|x|, then unit length)


def feature_parts() -> frozenset[str]:
    """Every part that gives a vector: READS of a probe."""
    return feature_words()


def parts_of(features: Collection[str]) -> frozenset[str]:
    """The parts behind these vectors: what a probe reads under its settings."""
    parts = frozenset(map(word_behind, features))
    return parts - {"globals"} if "nodes" in parts else parts  # node 0 is the global vector


class Features(nn.Module):
    """From a batch to x (B, F): each block transformed and standardised (Standardise), then given an equal weight.

    A block's variances, summed over its dimensions, are F / blocks: a block of 9,000 dimensions does not drown one of
    400. One block alone is standardised and no more, so that one grid of penalties fits every choice of vectors.
    """

    def __init__(self, cache: Cache, settings: FeatureSettings) -> None:
        """Mean and scale of every view of the training images, taken from `cache`."""
        super().__init__()
        self.names = settings.features
        self.transform: Transform = settings.transform
        samples = [torch.cat(views) for views in zip(*self.chunks(cache), strict=True)]
        self.standardise = nn.ModuleList(Standardise(sample) for sample in samples)
        sizes = [sample.shape[1] for sample in samples]
        self.weights = [math.sqrt(sum(sizes) / len(sizes) / size) for size in sizes]
        self.size = sum(sizes)  # F

    def chunks(self, cache: Cache) -> list[list[Tensor]]:
        """The blocks of the training images, view by view, in chunks of images."""
        train = cache.images("train")
        return [
            self.blocks(cache.batch(images, torch.full_like(images, view)))
            for view in range(cache.views)
            for images in train.split(CHUNK)
        ]

    def blocks(self, batch: Batch) -> list[Tensor]:
        found = [block for name in self.names for block in feature_blocks(name, batch)]
        if self.transform == "signed_sqrt":
            found = [F.normalize(block.sign() * block.abs().sqrt(), dim=-1) for block in found]
        return found

    def forward(self, batch: Batch) -> Tensor:
        parts = zip(self.blocks(batch), self.standardise, self.weights, strict=True)
        return torch.cat([standardise(block) * weight for block, standardise, weight in parts], dim=-1)

    def of(self, cache: Cache, images: Tensor, view: int = 0) -> Tensor:
        """x (len(images), F) of these images in one view."""
        chunks = [self(cache.batch(chunk, torch.full_like(chunk, view))) for chunk in images.split(CHUNK)]
        return torch.cat(chunks)

    def of_training(self, cache: Cache) -> Tensor:
        """x (V n, F) of the training images, all of view 0 first."""
        return torch.cat([self.of(cache, cache.images("train"), view) for view in range(cache.views)])
