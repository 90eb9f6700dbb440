"""The nearest class mean, by cosine in a space where the images of a class spread alike in all directions.

p_c is the mean of class c's training vectors in every view, g the global vector, both standardised
(layers.Standardise). With S the covariance within classes,

    A = (S + shrinkage I)^-1/2        logits = scale * cos(A g, A p_c)

Class means under a metric are Mensink et al., TPAMI 2013 [mem], who learn theirs; S, shrunk towards the identity, is
that of linear discriminant analysis, and putting it under a cosine is ours [design]. A large shrinkage, or one image a
class, leaves the plain cosine of centred vectors. Val chooses both knobs; `scale` calibrates and changes no
prediction. What training is told in probabilities weighs images by them. A class without images has cosine -1.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block
from training.data import Batch, Cache
from training.layers.blocks import Standardise
from training.layers.logistic import as_probabilities, training_globals
from training.layers.states import State, within
from training.loop import Positive
from training.methods import Fitted, Output, search

SEEDED = False
READS = frozenset({"globals"})


class Settings(Block):
    shrinkage: list[Positive] = Field(default=[0.01, 0.1, 1.0, 10.0], min_length=1)  # added to the covariance
    scale: list[Positive] = Field(default=[10.0, 20.0, 30.0, 60.0], min_length=1)  # turns cosines into logits


class Prototypes(nn.Module):
    whiten: Tensor
    means: Tensor
    seen: Tensor
    scale: Tensor

    def __init__(self, standardise: Standardise, whiten: Tensor, means: Tensor, seen: Tensor, scale: float) -> None:
        """whiten (D, D); means (C, D), whitened; seen (C,) bool: the classes that have a mean."""
        super().__init__()
        self.standardise = standardise
        self.register_buffer("whiten", whiten)
        self.register_buffer("means", means)
        self.register_buffer("seen", seen)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, batch: Batch) -> Output:
        return Output(self.classify(batch.g.float()), {}, None)

    def classify(self, g: Tensor) -> Tensor:
        """Logits (B, C) of global vectors (B, D)."""
        g = F.normalize(self.standardise(g) @ self.whiten, dim=-1)
        cosine = g @ F.normalize(self.means, dim=-1).T
        return self.scale * cosine.masked_fill(~self.seen, -1.0)


def means_of(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, D) of x (n, D) by values (n, C), and the classes with images."""
    weight = values.sum(0)
    return values.T @ x / weight.clamp(min=1e-12)[:, None], weight > 0


def class_means(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (C, D) of x (n, D) by values (n, C), the covariance (D, D) within classes, and the classes with images."""
    return class_means_of([(x, values)])


def class_means_of(pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """class_means of rows and their values that come in pieces, none of which is held: two products are summed."""
    found: tuple[Tensor, ...] | None = None
    count = 0
    for x, values in pieces:
        count += len(x)
        own = values.sum(0), values.T @ x, x.T @ x
        found = own if found is None else tuple(total.add_(more) for total, more in zip(found, own, strict=True))
    assert found is not None
    weight, sums, squares = found
    means = sums / weight.clamp(min=1e-12)[:, None]
    # Sum over i and c of v_ic (x_i - m_c)(x_i - m_c)^T, without n C differences: each row of values sums to 1.
    within = (squares - (means * weight[:, None]).T @ means) / count
    return means, within, weight > 0


def whitening(within: Tensor, shrinkage: float) -> Tensor:
    """(within + shrinkage I)^-1/2 (D, D), symmetric; negative eigenvalues, which are rounding, count as 0."""
    spread, axes = torch.linalg.eigh(within)
    return (axes * (spread.clamp(min=0) + shrinkage).rsqrt()) @ axes.T


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    vectors, target = training_globals(cache)
    standardise = Standardise(vectors)
    means, within, seen = class_means(standardise(vectors), as_probabilities(target, len(cache.classes)))
    g = cache.globals(cache.images("val"))

    def model(shrinkage: float, scale: float) -> Prototypes:
        whiten = whitening(within, shrinkage)
        return Prototypes(standardise, whiten, means @ whiten, seen, scale)

    point, history = search(cache, settings, lambda shrinkage, scale: model(shrinkage, scale).classify(g))
    return Fitted(model(**point), history, dict(point))


def build(state: State, settings: Settings, classes: int) -> Prototypes:
    standardise = Standardise.from_state(within(state, "standardise"))
    return Prototypes(standardise, state["whiten"], state["means"], state["seen"], float(state["scale"]))
