"""PLDA: what images of a class look like, and where classes lie, is learned from other classes, axis by axis.

    z       = S^-1/2 (x - m_0)                  S the covariance within the classes that teach, shrunk as in lda
    B       = mean over them of r r^T - I / n,  r from where each was expected without it to its mean
            = sum over j of b_j v_j v_j^T + b_0 I, once shrunk towards a round one
    mu_c    = e_c + A_c (m_c - e_c),  A_c = B (B + I / k_c)^-1              A_c = 0 for a class without images
    logits  = w_c z - w_c mu_c / 2,   w_c = (I + B - A B)^-1 mu_c           A that of the mean number of images a class

m_c is the mean, in z, of the k_c training images of class c, and m_0 the mean of the means of the classes that teach,
which have n images each (the mean of 1 / n counts). mu_c is the posterior mean of a class, and I + B - A B the
covariance of an image about it, where class means are drawn around e_c with covariance B: probabilistic LDA (Ioffe,
ECCV 2006 [mem]; Prince & Elder, ICCV 2007 [mem]). transfer_lda and prior_lda are the case of one share for all axes,
the same in every direction of x; of few images, most axes hold noise alone, and a few where classes differ. One
covariance for all classes keeps the answer linear [design]: strictly, each has that of its own number of images.

e_c is m_0 where `texts` is none; else where the text of class c says that its images lie (layers/text_map.py, as in
prior_lda): leaving classes out chooses that map's penalty and says, axis by axis, how far it can be trusted [design].

The classes that teach are `Cache.others` where a study lends some (few shots), else the classes that have training
images (regime unseen); of these e_c is what is said without them. Val, or development classes, choose both knobs. No
label of a class without images is looked at.
"""

import functools
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from training.class_texts import Texts, expect, text_reads
from training.data import Cache, feature_words
from training.layers.blocks import linear_layer
from training.layers.features import FeatureSettings, Transform, feature_also_reads, parts_of
from training.layers.gaussian import Share
from training.layers.logistic import Positive
from training.layers.ridge import training_targets
from training.layers.teachers import Teachers, teach
from training.layers.text_map import PENALTIES, TEACHERS
from training.methods import Fitted, NotPossible, linear_probe, search
from training.methods.prototypes import means_of

SEEDED = False
READS = feature_words() | {"names", "concepts", "owners"}
ALSO = feature_words()
BORROWS = True  # it reads the images and labels of `Cache.others`, and their texts where it reads texts
also_reads, build = feature_also_reads, linear_probe.build
FLAT = 1e-6  # the least variance of class means, in each direction: theirs may be less than that of their noise


class Settings(FeatureSettings):
    texts: Literal["none", Texts] = "none"  # that say where a class is expected: none, names, concepts, or both
    penalty: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (
        PENALTIES
    )  # of the map from texts; leaving classes out chooses, val has no part in it
    shrinkage: list[Share] = Field(
        default=[0.3, 0.6, 0.8], min_length=1
    )  # of the covariance within classes towards a round one, that val chooses from
    prior_shrinkage: list[Share] = Field(
        default=[0.5, 0.7, 0.9], min_length=1
    )  # of the covariance of class means towards a round one, that val chooses from


def reads(settings: Settings) -> frozenset[str]:
    texts = frozenset[str]() if settings.texts == "none" else text_reads(settings.texts)
    return parts_of(settings.features) | texts


class Learned(NamedTuple):
    """What no knob changes that val chooses: a search for few shots fits every point of the grid anew."""

    teachers: Teachers
    centre: Tensor  # m_0 (r,), within the span of the images that teach
    missed: Tensor  # (T, r), along S's axes: by how much means of classes that teach miss what is said without them
    noise: float  # the mean of 1 / n
    expected: Tensor  # e_c - m_0 (C, r), along S's axes
    inside: Tensor  # m_c - m_0 (C, r), along S's axes
    beside: Tensor  # what of m_c - m_0 (C, F) lies beside the span
    images: Tensor  # k_c (C,)
    chosen: dict[str, float]  # of the map from texts


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where fewer than three classes have images to learn from, or a class lacks a text."""
    learned = learn(cache, tuple(settings.features), settings.transform, settings.texts, settings.penalty)
    features = learned.teachers.features
    x_val = features.of(cache, cache.images("val"))
    layer = functools.partial(posterior, learned)
    point, history = search(cache, settings, lambda **knobs: layer(**knobs)(x_val))
    chosen: dict[str, float | str] = {**point, **learned.chosen}
    return Fitted(linear_probe.Probe(features, layer(**point)), history, chosen)


@functools.lru_cache(maxsize=1)
def learn(
    cache: Cache,
    names: tuple[str, ...],
    transform: Transform,
    texts: Literal["none", Texts],
    penalties: tuple[float, ...],
) -> Learned:
    """From the classes that teach, the few images and the texts. Raises NotPossible."""
    lent = cache if cache.others is None else cache.others
    taught_by = training_targets(lent)
    if taught_by.any(0).sum() < TEACHERS:
        raise NotPossible(
            f"fewer than {TEACHERS} classes have images to learn from where classes lie; take lda, or zero_shot where"
            " classes have no images"
        )
    teachers = teach(lent, names, transform)
    span, centres, taught = teachers.span, teachers.centres, teachers.taught
    told = training_targets(cache)
    images, centre = told.sum(0) / cache.views, centres.mean(0)
    means, _ = means_of(teachers.features.of_training(cache).double(), told)
    chosen: dict[str, float] = {}
    if texts == "none":
        # The mean of the others, as a map that says nothing has it.
        left_out = centre - (centres - centre) / (len(centres) - 1)
        expected = centre.expand(len(images), -1).clone()
        if lent is cache:
            expected[taught] = left_out
    else:
        found = expect(cache, lent, teachers, texts, penalties)
        left_out, expected = found.of_teachers, found.of_classes
        chosen = {"penalty": found.penalty, "explained": found.explained}
    off = means - span.back(centre)
    inside = span.into(off)
    to_axes = teachers.spread.axes
    return Learned(
        teachers=teachers,
        centre=centre,
        missed=(centres - left_out) @ to_axes,
        noise=(lent.views / taught_by.sum(0)[taught]).mean().item(),
        expected=(expected - centre) @ to_axes,
        inside=inside @ to_axes,
        beside=off - span.back(inside),
        images=images,
        chosen=chosen,
    )


def posterior(learned: Learned, shrinkage: float, prior_shrinkage: float) -> nn.Linear:
    """The classes' logits, linear in x.

    In z an axis lies within the span of the images that teach, along S's eigenvectors, or beside it, where S is round.
    """
    teachers, k = learned.teachers, learned.images[:, None]
    span, spread, size = teachers.span, teachers.spread, teachers.features.size
    within = ((1 - shrinkage) * spread.values + shrinkage * spread.mean).sqrt()
    beside = (shrinkage * spread.mean).sqrt()
    expected, means_in, means_out = learned.expected / within, learned.inside / within, learned.beside / beside

    _, lengths, axes = torch.linalg.svd(learned.missed / within, full_matrices=False)
    b = (lengths.square() / len(learned.missed) - learned.noise).clamp(min=0)
    b_0 = (prior_shrinkage * b.sum() / size).clamp(min=FLAT)
    b = (1 - prior_shrinkage) * b + b_0

    def along(values: Tensor, other: Tensor, rows: Tensor) -> Tensor:
        """Rows (C, r) times `values` along the axes of B (C or 1, J), times `other` (C or 1, 1) along all others."""
        of_axes = rows @ axes.T
        return rows * other + (of_axes * (values - other)) @ axes

    few = learned.images.mean()
    mu_in = expected + along(b * k / (b * k + 1), b_0 * k / (b_0 * k + 1), means_in - expected)
    mu_out = means_out * (b_0 * k / (b_0 * k + 1))
    about, about_0 = 1 + b / (b * few + 1), (1 + b_0 / (b_0 * few + 1)).reshape(1, 1)
    w_in, w_out = along(1 / about, 1 / about_0, mu_in), mu_out / about_0
    # From z back to x.
    weight = span.back((w_in / within) @ spread.axes.T) + w_out / beside
    bias = -(w_in * mu_in).sum(1) / 2 - (w_out * mu_out).sum(1) / 2
    return linear_layer(weight, bias - weight @ span.back(learned.centre))
