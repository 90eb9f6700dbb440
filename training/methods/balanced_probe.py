"""Logistic regression where classes have unequal numbers of images: the simple rivals of whatever mends a long tail.

    balance: prior      minimise the mean over images of CE(z + tau log p, y) + l2/2 |W|^2,      z = W x + b, logits = z
    balance: weights    minimise sum_i w_(y_i) CE(z_i, y_i) / sum_i w_(y_i) + l2/2 |W|^2,        w_c = 1 / n_c

n_c is the number of training images of class c, p_c = n_c / n. `prior` is logit adjustment (Menon et al., ICLR 2021
[mem]): tau 1 judges as if classes were equally frequent, tau 0 is linear_probe. The intercept b is free, so that the
form with the prior in the loss and the one that takes tau log p off the fitted logits have the same minimum here; val
chooses l2 by the adjusted logits. `weights` counts every class alike. A class without images has the prior of one
image, and no weight. What training is told in probabilities counts in parts. x is the probe's vector
(layers/features.py). lda and gda take classes as equally likely by themselves.
"""

from typing import Literal

import torch
from torch import Tensor

from training.data import Cache, feature_words
from training.layers.blocks import Span, linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.logistic import ProbeSettings, as_probabilities, fit_logistic
from training.loop import NotNegative
from training.methods import Fitted, linear_probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build


class Settings(FeatureSettings, ProbeSettings):
    balance: Literal["prior", "weights"] = "prior"  # prior: logit adjustment; weights: every class counts alike
    tau: NotNegative = 1.0  # of `prior`: how much of the classes' frequencies is taken off


def log_prior(told: Tensor) -> Tensor:
    """log p (C,) of what training is told (n, C); one image where a class has none."""
    count = told.sum(0)
    return (torch.where(count > 0, count, 1.0) / count.sum()).log()


def weighed(told: Tensor) -> Tensor:
    """What training is told (n, C), each class of the same sum, and n in all."""
    count = told.sum(0)
    each = torch.where(count > 0, 1 / count.clamp(min=1e-12), 0.0)
    return told * each * (len(told) / (count > 0).sum())


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features, train, val = Features.measure(cache, settings), cache.images("train"), cache.images("val")
    x = features.of_training(cache)
    span = Span(x)
    told = as_probabilities(torch.cat([cache.target[train]] * cache.views), len(cache.classes))
    prior = settings.balance == "prior"
    chosen = fit_logistic(
        span.into(x),
        told if prior else weighed(told),
        span.into(features.of(cache, val)),
        cache.y[val],
        len(cache.classes),
        settings.l2,
        settings.max_iterations,
        offset=settings.tau * log_prior(told) if prior else None,
    )
    linear = linear_layer(span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach())
    return Fitted(linear_probe.Probe(features, linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
