"""Linear discriminant analysis on cached vectors: every class a Gaussian, all of one covariance.

    S      = covariance within classes, over all training images and views
    S_a    = (1 - shrinkage) S + shrinkage tr(S)/F I
    logits = w_c x + b_c,   w_c = S_a^-1 m_c,   b_c = -m_c S_a^-1 m_c / 2

m_c is the mean of class c. The same as scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a) less its
log prior: classes are taken as equally likely, as Wang et al., ICLR 2024 [web] do with CLIP's vectors. Val chooses the
shrinkage. What training is told in probabilities weighs images by them; a class without images is never said. x is the
probe's vector (layers/features.py).
"""

from pydantic import Field
from torch import nn

from training.data import Cache, feature_words
from training.layers.blocks import Span, linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.gaussian import Share, Spread, discriminant
from training.layers.ridge import training_targets
from training.methods import Fitted, linear_probe, search
from training.methods.prototypes import class_means

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build


class Settings(FeatureSettings):
    shrinkage: list[Share] = Field(
        default=[0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0], min_length=1
    )  # of the covariance towards a round one, that val chooses from


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)
    x, x_val = features.of_training(cache).double(), features.of(cache, cache.images("val"))
    span = Span(x)
    means, covariance, known = class_means(span.into(x), training_targets(cache))
    spread = Spread(covariance, features.size)

    def layer(shrinkage: float) -> nn.Linear:
        weight, bias = discriminant(means, spread, shrinkage, known)
        return linear_layer(span.back(weight), bias)

    point, history = search(cache, settings, lambda shrinkage: layer(shrinkage)(x_val))
    return Fitted(linear_probe.Probe(features, layer(**point)), history, dict(point))
