"""Logistic regression on cached vectors, its L2 strength chosen on val: the rival that every method has to beat.

Fitted over all views of the training images (layers/logistic.py), by default on the global vector: *the probe*. The
vectors are centred by the training mean and divided by one common scale (layers/features.py), not dimension by
dimension: angles stay as they are. On `features: [nodes]` it is the tuned probe that sees patches; what a method with
attention gains over that one is due to more than to reading patches at all.

Vectors of more dimensions than there are rows are brought into the space that the rows span (layers.blocks.Span): no
weight outside it pays, so that the objective and its minimum are the same, in fewer dimensions.

Of more rows than memory is meant for, L-BFGS reads them anew at every pass (layers/logistic.py).
"""

from torch import nn

from training.data import Batch, Cache, feature_words
from training.layers.blocks import linear_from_state, linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.logistic import ProbeSettings, fit_probe
from training.layers.states import State, within
from training.methods import Fitted, Output

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads = feature_reads, feature_also_reads


class Settings(FeatureSettings, ProbeSettings):
    pass


class Probe(nn.Module):
    """The vector of an image under one layer, from x (B, F) to logits (B, C), whatever that was fitted by."""

    def __init__(self, features: Features, layer: nn.Module) -> None:
        super().__init__()
        self.features, self.layer = features, layer

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(self.features(batch)), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)
    span = features.span_of_training(cache)
    chosen = fit_probe(cache, settings, lambda images, view: span.into(features.of(cache, images, view)))
    linear = linear_layer(span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach())
    return Fitted(Probe(features, linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)


def build(state: State, settings: FeatureSettings, classes: int) -> Probe:
    """That of every probe with a linear layer."""
    return Probe(Features.from_state(within(state, "features"), settings), linear_from_state(within(state, "layer")))
