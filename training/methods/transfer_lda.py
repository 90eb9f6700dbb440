"""LDA for few images: what images of a class look like, and where classes lie, is learned from other classes.

    S      = covariance within the other classes, shrunk as in lda
    m_0, T = mean and covariance of the other classes' means
    tau    = strength tr(S) / tr(T)
    mu_c   = (k_c m_c + tau m_0) / (k_c + tau)
    logits = w_c x + b_c,   w_c = S^-1 mu_c,   b_c = -mu_c S^-1 mu_c / 2

m_c is the mean of the k_c training images of class c. mu_c is its posterior mean where class means are drawn around m_0
with covariance S / tau: at strength 1 they spread as much, in all, as those of the other classes do [design; the prior
is the conjugate one]. Nothing of the covariance is learned from the few images, and no text is read.

The other classes are `Cache.others`: all training images of classes that are not told apart here. They should be
classes that nothing is reported on. Val, or development classes, choose both knobs. Without other classes the method is
not possible: it would be lda.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from training.data import Cache
from training.layers.blocks import linear_layer
from training.layers.features import Features, FeatureSettings, feature_parts, parts_of
from training.layers.gaussian import Share, Spread, discriminant, span
from training.layers.logistic import Positive
from training.layers.ridge import training_targets
from training.methods import Fitted, NotPossible, search
from training.methods.linear_probe import Probe
from training.methods.prototypes import class_means

SEEDED = False
READS = feature_parts()
BORROWS = True  # it reads the images and labels of `Cache.others`


class Settings(FeatureSettings):
    shrinkage: list[Share] = Field(
        default=[0.1, 0.3, 0.6], min_length=1
    )  # of the covariance towards a round one, that val chooses from
    strength: list[Positive] = Field(
        default=[0.3, 1.0, 3.0, 10.0, 30.0], min_length=1
    )  # of the prior on class means, that val chooses from


def reads(settings: Settings) -> frozenset[str]:
    return parts_of(settings.features)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where the cache has no images of other classes, or those of one alone."""
    others = cache.others
    if others is None or training_targets(others).any(0).sum() < 2:
        raise NotPossible("no images of two other classes are lent to it, so there is nothing to transfer; take lda")
    features = Features(others, settings)  # few images say little of mean and scale too
    x_others, x = features.of_training(others).double(), features.of_training(cache).double()
    told, x_val = training_targets(cache), features.of(cache, cache.images("val"))
    axes = span(torch.cat([x_others, x]))
    centres, covariance, taught = class_means(x_others @ axes, training_targets(others))
    means, _, known = class_means(x @ axes, told)
    spread, centres, images = Spread(covariance, features.size), centres[taught], told.sum(0) / cache.views
    ratio = (covariance.trace() / centres.var(0, correction=0).sum()).item()

    def layer(shrinkage: float, strength: float) -> nn.Linear:
        pulled = posterior_means(means, images, centres.mean(0), strength * ratio)
        weight, bias = discriminant(pulled, spread, shrinkage, known)
        return linear_layer(weight @ axes.T, bias)

    point, history = search(cache, settings, lambda shrinkage, strength: layer(shrinkage, strength)(x_val))
    return Fitted(Probe(features, layer(**point)), history, dict(point))


def posterior_means(means: Tensor, images: Tensor, centre: Tensor, strength: float) -> Tensor:
    """Means (C, r) of so many images (C,), pulled to `centre` (r,) as by `strength` images that lie there."""
    share = (images / (images + strength))[:, None]
    return share * means + (1 - share) * centre
