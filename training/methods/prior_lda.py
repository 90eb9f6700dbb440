"""LDA whose prior on class means comes from texts: of classes with few images, or with none.

    p_c, S  = means of the classes that teach, and covariance within them, shrunk as in lda
    q_c     = where the text of class c says that its images lie: ridge from texts to p_c (layers/text_map.py)
    tau     = strength tr(S) / tr(R)         R the mean squared error of q for classes that the map was fitted without
    s_c     = k_c / (k_c + tau),   d_c = s_c (m_c - m_0) + (1 - s_c) (q_c - m_0)
    logits  = (w_c (x - m_0) - w_c d_c / 2) / s,   w_c = S^-1 d_c

m_c is the mean of the k_c training images of class c, m_0 the mean of p. m_0 + d_c is the posterior mean where class
means are drawn around q_c with covariance S / tau: at strength 1 they miss it, in all, as far as those of the classes
that teach do [design; the prior is the conjugate one]. A class without images lies where its text says, and one with
many where its images do. A map that says nothing gives q_c = m_0, and transfer_lda is left. s is the mean of
s_c + (1 - s_c) v, v the share of the spread of p that the map explains of classes left out, 0 where it misleads: it
makes up for what the pull takes from all logits alike, and changes no prediction.

The classes that teach are `Cache.others` where a study lends some (few shots), else the classes that have training
images (regime unseen); of these q_c is what the map without them says. Leaving classes out chooses the map's penalty,
by squared error, and sets the prior's width; val, or development classes, choose the shrinkage. They would choose the
strength badly: of ten classes, by log loss, 3 came out on cub100, which cost up to 8 points on others. No label of a
class without images is looked at.
"""

import functools
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from training.class_texts import Texts, expect, text_reads
from training.data import Cache, feature_words
from training.layers.blocks import linear_layer
from training.layers.features import FeatureSettings, Transform, feature_also_reads, parts_of
from training.layers.gaussian import Share, discriminant
from training.layers.logistic import Positive
from training.layers.ridge import training_targets
from training.layers.teachers import Teachers, teach
from training.layers.text_map import PENALTIES, TEACHERS
from training.methods import Fitted, NotPossible, linear_probe, search
from training.methods.prototypes import means_of

SEEDED = False
READS = feature_words() | {"names", "concepts", "owners"}
ALSO = feature_words()
BORROWS = True  # it reads the images, labels and texts of `Cache.others`
also_reads, build = feature_also_reads, linear_probe.build
FAINT = 0.01  # the least that s is taken for: where texts say nothing, logits of classes without images are noise


class Settings(FeatureSettings):
    texts: Texts = "both"  # what is said of a class: names, concepts, or both side by side
    penalty: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (
        PENALTIES
    )  # of the map from texts; leaving classes out chooses, val has no part in it
    shrinkage: list[Share] = Field(
        default=[0.1, 0.3, 0.6], min_length=1
    )  # of the covariance towards a round one, that val chooses from
    strength: list[Positive] = Field(
        default=[1.0], min_length=1
    )  # of the prior on class means, that val chooses from; 1: as far as classes left out say that texts can be trusted


def reads(settings: Settings) -> frozenset[str]:
    return parts_of(settings.features) | text_reads(settings.texts)


class Learned(NamedTuple):
    """What no knob changes that val chooses: a search for few shots fits every point of the grid anew."""

    teachers: Teachers
    centre: Tensor  # m_0 (F,)
    ratio: float  # tr(S) / tr(R)
    explained: float  # v
    penalty: float
    expected: Tensor  # q_c (C, F)
    means: Tensor  # m_c (C, F)
    images: Tensor  # k_c (C,)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where fewer than three classes have images to learn from, or a class lacks a text."""
    learned = learn(cache, tuple(settings.features), settings.transform, settings.texts, settings.penalty)
    features, centre = learned.teachers.features, learned.centre
    x_val = features.of(cache, cache.images("val"))
    known = torch.ones_like(learned.images, dtype=torch.bool)

    def layer(shrinkage: float, strength: float) -> nn.Linear:
        share = trust(learned.images, strength * learned.ratio)[:, None]
        offsets = share * (learned.means - centre) + (1 - share) * (learned.expected - centre)
        weight, bias = discriminant(offsets, learned.teachers, shrinkage, known)
        scale = (share + (1 - share) * max(learned.explained, 0.0)).mean().clamp(min=FAINT)
        return linear_layer(weight / scale, (bias - weight @ centre) / scale)

    point, history = search(cache, settings, lambda shrinkage, strength: layer(shrinkage, strength)(x_val))
    chosen: dict[str, float | str] = {**point, "penalty": learned.penalty, "explained": learned.explained}
    return Fitted(linear_probe.Probe(features, layer(**point)), history, chosen)


@functools.lru_cache(maxsize=1)
def learn(
    cache: Cache, names: tuple[str, ...], transform: Transform, texts: Texts, penalties: tuple[float, ...]
) -> Learned:
    """From the classes that teach, the few images and the texts. Raises NotPossible."""
    lent = cache if cache.others is None else cache.others
    if training_targets(lent).any(0).sum() < TEACHERS:
        raise NotPossible(
            f"fewer than {TEACHERS} classes have images to learn from where images of a class with this text lie; take"
            " zero_shot or description_zero_shot"
        )
    teachers = teach(lent, names, transform)
    told = training_targets(cache)
    means, _ = means_of(teachers.features.of_training(cache).double(), told)
    found = expect(cache, lent, teachers, texts, penalties)
    return Learned(
        teachers=teachers,
        centre=teachers.span.back(teachers.centres.mean(0)),
        ratio=teachers.trace / max(found.error, 1e-12),
        explained=found.explained,
        penalty=found.penalty,
        expected=teachers.span.back(found.of_classes),
        means=means,
        images=told.sum(0) / cache.views,
    )


def trust(images: Tensor, strength: float) -> Tensor:
    """The share (C,) that k images (C,) have in a class's posterior mean, beside a prior worth `strength` images."""
    return images / (images + strength)
