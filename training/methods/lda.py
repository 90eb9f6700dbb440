"""Linear discriminant analysis on cached vectors: every class a Gaussian, all of one covariance.

    S      = covariance within classes, over all training images and views
    S_a    = (1 - shrinkage) S + shrinkage tr(S)/F I
    logits = w_c x + b_c,   w_c = S_a^-1 m_c,   b_c = -m_c S_a^-1 m_c / 2

m_c is the mean of class c. The same as scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a) less its
log prior: classes are taken as equally likely, as Wang et al., ICLR 2024 [web] do with CLIP's vectors. Val chooses the
shrinkage. What training is told in probabilities weighs images by them; a class without images is never said. x is the
probe's vector (layers/features.py). More than layers.logistic.KEPT numbers of them are read in chunks and never held.
"""

import torch
from pydantic import Field
from torch import nn

from training.data import Cache, feature_words
from training.layers.blocks import linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.gaussian import Share, Spread, discriminant
from training.layers.logistic import KEPT, Rows, judge
from training.layers.ridge import training_rows
from training.methods import Fitted, linear_probe, search_judged
from training.methods.prototypes import class_means_of

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
    span, rows = features.span_of_training(cache, torch.float64), training_rows(cache, features, kept=KEPT)
    means, covariance, known = class_means_of((span.into(x), y) for x, y in rows.pieces())
    spread = Spread(covariance, features.size)

    def layer(shrinkage: float) -> nn.Linear:
        weight, bias = discriminant(means, spread, shrinkage, known)
        return linear_layer(span.back(weight), bias)

    val = cache.images("val")
    judged = Rows.read(lambda images, view: features.of(cache, images, view), val, 1, cache.y[val], len(cache.classes))
    point, history = search_judged(cache, settings, lambda shrinkage: judge(layer(shrinkage), judged))
    return Fitted(linear_probe.Probe(features, layer(**point)), history, dict(point))
