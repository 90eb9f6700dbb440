"""LDA for few images: what images of a class look like, and where classes lie, is learned from other classes.

    S      = covariance within the other classes, shrunk as in lda
    m_0, T = mean and covariance of the other classes' means
    tau    = strength tr(S) / tr(T)
    s_c    = k_c / (k_c + tau),   d_c = s_c (m_c - m_0)
    logits = (w_c (x - m_0) - w_c d_c / 2) / s,   w_c = S^-1 d_c,   s the mean of s_c

m_c is the mean of the k_c training images of class c. m_0 + d_c is its posterior mean where class means are drawn
around m_0 with covariance S / tau: at strength 1 they spread as much, in all, as those of the other classes do [design;
the prior is the conjugate one]. s makes up for what the pull takes from all logits alike, so that no strong prior is
chosen for being less sure of itself; it changes no prediction. Nothing of the covariance is learned from the few
images, and no text is read.

The other classes are `Cache.others`: all training images of classes that are not told apart here. They should be
classes that nothing is reported on. Val, or development classes, choose both knobs. Without other classes the method is
not possible: it would be lda.
"""

import functools
from typing import NamedTuple

from pydantic import Field
from torch import Tensor, nn

from training.data import Cache, feature_words
from training.layers.blocks import linear_layer
from training.layers.features import FeatureSettings, Transform, feature_also_reads, feature_reads
from training.layers.gaussian import Share, discriminant
from training.layers.logistic import Positive
from training.layers.ridge import training_targets
from training.layers.teachers import Teachers, teach
from training.methods import Fitted, NotPossible, linear_probe, search
from training.methods.prototypes import means_of

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build
BORROWS = True  # it reads the images and labels of `Cache.others`


class Settings(FeatureSettings):
    shrinkage: list[Share] = Field(
        default=[0.1, 0.3, 0.6], min_length=1
    )  # of the covariance towards a round one, that val chooses from
    strength: list[Positive] = Field(
        default=[1.0, 3.0, 10.0, 30.0, 100.0], min_length=1
    )  # of the prior on class means, that val chooses from


class Learned(NamedTuple):
    """What no knob changes: a search for few shots fits every point of the grid anew."""

    teachers: Teachers
    centre: Tensor  # m_0 (F,)
    ratio: float  # tr(S) / tr(T)
    means: Tensor  # (C, F)
    known: Tensor  # (C,) bool: the classes that have images
    images: Tensor  # k_c (C,)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where the cache has no images of other classes, or those of one alone."""
    teachers, centre, ratio, means, known, images = learn(cache, tuple(settings.features), settings.transform)
    features = teachers.features
    x_val = features.of(cache, cache.images("val"))

    def layer(shrinkage: float, strength: float) -> nn.Linear:
        trusted = trust(images, strength * ratio)
        weight, bias = discriminant(trusted[:, None] * (means - centre), teachers, shrinkage, known)
        scale = trusted[known].mean()
        return linear_layer(weight / scale, (bias - weight @ centre) / scale)

    point, history = search(cache, settings, lambda shrinkage, strength: layer(shrinkage, strength)(x_val))
    return Fitted(linear_probe.Probe(features, layer(**point)), history, dict(point))


@functools.lru_cache(maxsize=1)
def learn(cache: Cache, names: tuple[str, ...], transform: Transform) -> Learned:
    """From the other classes and the few images. Raises NotPossible."""
    others = cache.others
    if others is None or training_targets(others).any(0).sum() < 2:
        raise NotPossible("no images of two other classes are lent to it, so there is nothing to transfer; take lda")
    teachers = teach(others, names, transform)  # mean and scale too: few images say little of them
    told = training_targets(cache)
    means, known = means_of(teachers.features.of_training(cache).double(), told)
    ratio = (teachers.trace / teachers.centres.var(0, correction=0).sum()).item()
    centre = teachers.span.back(teachers.centres.mean(0))
    return Learned(teachers, centre, ratio, means, known, told.sum(0) / cache.views)


def trust(images: Tensor, strength: float) -> Tensor:
    """The share (C,) that k images (C,) have in a class's posterior mean, beside a prior worth `strength` images."""
    return images / (images + strength)
