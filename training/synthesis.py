"""Synthetic training images for classes with few: between two of a class (SMOTE, Chawla et al., JAIR 2002 [mem]).

    x = x_i + u (x_j - x_i)        i an image of the class, j one of its k nearest of the same class, u ~ U(0, 1)

Vectors are those of `features`, and neighbours are nearest in them, in view 0; every view is interpolated alike. Each
class gets as many as it lacks to `balance` times the largest: its images take turns, in an order that is drawn, so that
none is used twice before each is used once. A class of one image has no neighbour: x = x_i + jitter s e, e ~ N(0, 1) in
each dimension and s the standard deviation within classes [design]. All that is drawn follows from the seed and the
image's path. Only vectors of training images are looked at, and nothing is made for a class that has none.

With `texts` the vector of `descriptions` in x is not interpolated (LA-TAG [web]): it is that of a text which a language
model wrote of image i for the purpose (`ask` with prompts/oversample.md, mixup.md or combine.md), beside interpolated
vectors of what the image shows. The texts of an image take turns too; an image without one begins nothing. Texts of
mixup.md and combine.md come from neighbours too: they are read where no image is hidden (training/inputs.py).
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fieldmark.params import Count
from training.data import Cache
from training.data.asked import asked_word, is_asked, texts_said
from training.layers.features import Features, FeatureSettings, feature_reads, view_of
from training.layers.logistic import Positive, as_probabilities
from training.methods import NotPossible

BLOCK = 2**24  # distances found at a time
CHUNK = 2048  # images whose texts are read at a time


class SynthesisSettings(FeatureSettings):
    """The knobs of methods that make training images."""

    balance: Annotated[float, Field(gt=0, le=10)] = 1.0  # images that every class is raised to, times the largest class
    k: Count = 3  # nearest images of the same class that one is interpolated with
    weight: Positive = 0.5  # of a synthetic image in the loss, where a real one weighs 1
    jitter: Positive = 0.3  # of the copies of a class's only image, in standard deviations within classes
    texts: str | None = None  # asked/NAME/FIELD, in the place of `descriptions` among `features`; null: none

    @model_validator(mode="after")
    def _texts_stand_for_descriptions(self) -> Self:
        if self.texts is not None:
            asked_word(self.texts)
            if not is_asked(self.texts) or "descriptions" not in self.features:
                raise ValueError("texts: asked/NAME/FIELD stands for `descriptions`, which `features` has to name")
        return self


def synthesis_reads(settings: SynthesisSettings) -> frozenset[str]:
    """What they read of what READS names."""
    texts = frozenset[str]() if settings.texts is None else frozenset({asked_word(settings.texts)})
    return feature_reads(settings) | texts


class Draw(NamedTuple):
    """m synthetic images, class by class. Rows are of training images, 0 .. n-1."""

    base: Tensor  # (m,) int64: i
    other: Tensor  # (m,) int64: j; i itself where a class has one image
    u: Tensor  # (m,) float32
    turn: Tensor  # (m,) int64: how often i was used before
    noise: list[str]  # the seed of each one's jitter


def draw(
    vectors: Tensor,
    label: Tensor,
    paths: list[str],
    settings: SynthesisSettings,
    seed: int,
    usable: Tensor | None = None,
    names: Sequence[str] = (),
) -> Draw:
    """What to interpolate: vectors (n, F) of training images, their class label (n,), a path each.

    usable (n,) bool: the images that may be i. Raises NotPossible where a class, one of `names`, lacks images and
    has none of these.
    """
    count = torch.bincount(label.cpu())
    wanted = max(1, round(settings.balance * int(count.max())))
    near, there = neighbours(vectors, label, settings.k)
    near, there = near.cpu(), there.cpu()
    order = sorted(range(len(paths)), key=lambda row: drawn(f"{seed} order {paths[row]}"))
    rows = torch.tensor(order)
    rows = rows if usable is None else rows[usable.cpu()[rows]]
    base, turn = [], []
    for class_label, lacking in enumerate((wanted - count).clamp(min=0).tolist()):
        members = rows[label.cpu()[rows] == class_label]
        if not count[class_label] or not lacking:
            continue
        if not len(members):
            raise NotPossible(
                f"of class {names[class_label]} no training image has a text that was written for it; ask with"
                " prompts/oversample.md, which needs no second image of a class, or set texts: null"
            )
        place = torch.arange(lacking)
        base.append(members[place % len(members)])
        turn.append(place // len(members))
    nothing = torch.zeros(0, dtype=torch.int64)
    i, turns = torch.cat([nothing, *base]), torch.cat([nothing, *turn])
    seeds = [f"{seed} {paths[row]} {again}" for row, again in zip(i.tolist(), turns.tolist(), strict=True)]
    choices = there[i].sum(1)
    picked = torch.tensor([int(drawn(f"{each} neighbour") * 2**32) for each in seeds], dtype=torch.int64)
    j = torch.where(choices > 0, near[i, picked % choices.clamp(min=1)], i)
    u = torch.tensor([drawn(f"{each} u") for each in seeds], dtype=torch.float32)
    return Draw(i, j, u, turns, seeds)


def drawn(name: str) -> float:
    """A number in [0, 1) that follows from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def neighbours(vectors: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the same class (n, k), the nearest first, and which of them there are, (n, k) bool.

    By Euclidean distance, of vectors (n, F) with classes (n,). A class of n_c images has n_c - 1 neighbours at most.
    """
    k = min(k, max(len(vectors) - 1, 1))
    squares, found = vectors.square().sum(1), []
    for rows in torch.arange(len(vectors), device=vectors.device).split(max(1, BLOCK // len(vectors))):
        distance = squares - 2 * vectors[rows] @ vectors.T
        other = label[rows, None] != label
        other[torch.arange(len(rows), device=rows.device), rows] = True
        found.append(distance.masked_fill(other, torch.inf).topk(k, largest=False))
    return torch.cat([each.indices for each in found]), torch.cat([each.values.isfinite() for each in found])


def interpolate(vectors: Tensor, label: Tensor, made: Draw, jitter: float) -> Tensor:
    """(m, F): the synthetic images, of the vectors (n, F) of one view."""
    device = vectors.device
    base, other = vectors[made.base.to(device)], vectors[made.other.to(device)]
    x = base + made.u.to(device)[:, None] * (other - base)
    alone = (made.base == made.other).nonzero().flatten().tolist()
    if alone:
        noise = np.stack([normal(made.noise[row], vectors.shape[1]) for row in alone])
        x[alone] = x[alone] + jitter * spread_within(vectors, label) * torch.from_numpy(noise).to(x)
    return x


def normal(name: str, size: int) -> np.ndarray:
    """(size,) of N(0, 1), which follow from a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8])).standard_normal(size, dtype=np.float32)


def spread_within(vectors: Tensor, label: Tensor) -> Tensor:
    """(): the standard deviation of a dimension around the mean of its class; around all, where no class has two."""
    count = torch.bincount(label)
    freedom = int((count - 1).clamp(min=0).sum())
    if not freedom:
        return vectors.var(0, correction=0).mean().sqrt()
    sums = vectors.new_zeros(len(count), vectors.shape[1]).index_add_(0, label, vectors)
    around = vectors - (sums / count.clamp(min=1)[:, None])[label]
    return (around.square().sum() / (freedom * vectors.shape[1])).sqrt()


class Synthetic(NamedTuple):
    """Synthetic images in every view, those of view 0 first."""

    x: Tensor  # (V m, F)
    told: Tensor  # (V m, C): what training is told of them, rows that sum to 1
    made: Draw


def synthesise(cache: Cache, features: Features, x: Tensor, settings: SynthesisSettings, seed: int) -> Synthetic:
    """Of the training images, by their vectors x (V n, F) in every view, as `features` gives them."""
    train = cache.images("train")
    told = as_probabilities(cache.target[train], len(cache.classes))
    label = told.argmax(1)
    paths = [cache.paths[image] for image in train.tolist()]
    views = x.unflatten(0, (cache.views, -1))
    texts = None if settings.texts is None else Written.read(cache, settings.texts, train)
    usable = None if texts is None else texts.number > 0
    made = draw(views[0], label, paths, settings, seed, usable, cache.classes)
    vectors = [interpolate(view, label, made, settings.jitter) for view in views]
    if texts is not None and len(made.base):
        for view, rows in enumerate(vectors):
            texts.put_into(rows, cache, features, train[made.base], made, view)
    base, other, u = (each.to(x.device) for each in made[:3])
    said = told[base] + u[:, None] * (told[other] - told[base])
    return Synthetic(torch.cat(vectors), torch.cat([said] * cache.views), made)


class Written(NamedTuple):
    """The texts that were written of n training images."""

    text: Tensor  # (n, S, D), those that there are first
    number: Tensor  # (n,) int64: how many each image has

    @classmethod
    def read(cls, cache: Cache, feature: str, train: Tensor) -> Self:
        _, name, field = feature.split("/", 2)
        read = [texts_said(cache.batch(some), name, field) for some in train.split(CHUNK)]
        return cls(torch.cat([text for text, _ in read]), torch.cat([mask.sum(1) for _, mask in read]))

    def put_into(
        self, x: Tensor, cache: Cache, features: Features, images: Tensor, made: Draw, view: int
    ) -> None:
        """Write what was written of the images (m,) that m synthetic ones begin with over their `descriptions` in x."""
        for rows in torch.arange(len(images)).split(features.chunk):
            base = made.base[rows].to(x.device)
            text = self.text[base, made.turn[rows].to(x.device) % self.number[base]]
            batch = view_of(cache, images[rows], view)
            batch = batch.changed(d=text[:, None], dm=torch.ones_like(text[:, :1], dtype=torch.bool))
            columns = features.columns("descriptions", batch)
            x[rows.to(x.device), columns] = features(batch)[:, columns]
