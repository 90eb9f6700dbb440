"""Logistic regression on cached vectors, its L2 strength chosen on val: the rival that every method has to beat.

Fitted over all views of the training images (layers/logistic.py), by default on the global vector: *the probe*. The
vectors are centred by the training mean and divided by one common scale (layers/features.py), not dimension by
dimension: angles stay as they are. On `features: [nodes]` it is the tuned probe that sees patches; what a method with
attention gains over that one is due to more than to reading patches at all.
"""

from functools import partial

from torch import nn

from training.data import Batch, Cache
from training.layers.features import Features, FeatureSettings, feature_parts, parts_of
from training.layers.logistic import ProbeSettings, fit_probe
from training.methods import Fitted, Output

SEEDED = False
READS = feature_parts()


class Settings(FeatureSettings, ProbeSettings):
    pass


def reads(settings: Settings) -> frozenset[str]:
    return parts_of(settings.features)


class Probe(nn.Module):
    """The vector of an image under one layer, from x (B, F) to logits (B, C), whatever that was fitted by."""

    def __init__(self, features: Features, layer: nn.Module) -> None:
        super().__init__()
        self.features, self.layer = features, layer

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(self.features(batch)), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features(cache, settings)
    chosen = fit_probe(cache, settings, partial(features.of, cache))
    return Fitted(Probe(features, chosen.linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
