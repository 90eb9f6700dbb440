"""SMOTE: logistic regression on real and synthetic images, as many of every class (Chawla et al., JAIR 2002 [mem]).

    minimise   (sum_i CE(z_i, y_i) + weight sum_s CE(z_s, y_s)) / (n + weight m) + l2/2 |W|^2        z = W x + b

i runs over the n training images in every view and s over m synthetic ones (training/synthesis.py), made of training
images alone. Val chooses l2, and is never synthesised. With classes of equal size and balance 1 it is linear_probe.
What a synthetic image weighs is ours [design]. x is the probe's vector (layers/features.py). The rivals that make no
image up are balanced_probe and lda.
"""

import torch

from training.data import Cache, feature_words
from training.layers.blocks import Span, linear_layer
from training.layers.features import Features, feature_also_reads
from training.layers.logistic import ProbeSettings, as_probabilities, fit_logistic
from training.methods import Fitted, linear_probe
from training.synthesis import SynthesisSettings, synthesis_reads, synthesise

SEEDED = True
READS = feature_words()
ALSO = READS
reads, also_reads, build = synthesis_reads, feature_also_reads, linear_probe.build


class Settings(SynthesisSettings, ProbeSettings):
    pass


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features, train, val = Features.measure(cache, settings), cache.images("train"), cache.images("val")
    x = features.of_training(cache)
    made = synthesise(cache, features, x, settings, seed)
    told = torch.cat([as_probabilities(cache.target[train], len(cache.classes))] * cache.views)
    rows = torch.cat([x, made.x])
    weighed = torch.cat([told, settings.weight * made.told])
    span = Span(rows)
    chosen = fit_logistic(
        span.into(rows),
        weighed * (len(rows) / (len(x) + settings.weight * len(made.x))),
        span.into(features.of(cache, val)),
        cache.y[val],
        len(cache.classes),
        settings.l2,
        settings.max_iterations,
    )
    linear = linear_layer(span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach())
    return Fitted(linear_probe.Probe(features, linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
