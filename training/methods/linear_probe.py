"""Logistic regression on the global vector, its L2 strength chosen on val: the rival that every method has to beat.

Fitted over all views of the training images (layers/logistic.py). The vectors are centred by the training mean and
divided by one common scale (layers.Standardise), not dimension by dimension: angles stay as they are.
"""

from torch import nn

from training.data import Batch, Cache
from training.layers.blocks import Standardise
from training.layers.logistic import ProbeSettings, fit_probe, training_globals
from training.methods import Fitted, Output

SEEDED = False
READS = frozenset({"globals"})


class Settings(ProbeSettings):
    pass


class LinearProbe(nn.Module):
    def __init__(self, standardise: Standardise, linear: nn.Linear) -> None:
        super().__init__()
        self.standardise, self.linear = standardise, linear

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(self.standardise(batch.g.float())), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    standardise = Standardise(training_globals(cache)[0])
    chosen = fit_probe(cache, settings, lambda images, view: standardise(cache.globals(images, view)))
    return Fitted(LinearProbe(standardise, chosen.linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
