"""A multilayer perceptron on the global vector: LN, Linear, GELU, dropout, Linear.

Trained by training/loop.py on standardised vectors. It has the global vector alone, as linear_probe, and no convex
problem: what it gains over the probe is what a straight boundary misses.
"""

from pydantic import Field
from torch import nn

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers.blocks import Standardise
from training.layers.logistic import training_globals
from training.layers.states import State, within
from training.loop import Positive, Schedule, fit_epochs
from training.methods import Fitted, Output

SEEDED = True
READS = frozenset({"globals"})


class Settings(Schedule):
    lr: list[Positive] = Field(default=[1e-3, 3e-3], min_length=1)  # learning rates that val chooses from
    hidden: Count = 512  # width
    dropout: Fraction = 0.5  # share of activations dropped in training


class MLP(nn.Module):
    def __init__(self, standardise: Standardise, classes: int, settings: Settings) -> None:
        super().__init__()
        self.standardise, dimension = standardise, len(standardise.mean)
        self.layers = nn.Sequential(
            nn.LayerNorm(dimension),
            nn.Linear(dimension, settings.hidden),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, classes),
        )

    def forward(self, batch: Batch) -> Output:
        return Output(self.layers(self.standardise(batch.g.float())), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    standardise = Standardise(training_globals(cache)[0])
    return fit_epochs(lambda: MLP(standardise, len(cache.classes), settings), cache, settings, seed)


def build(state: State, settings: Settings, classes: int) -> MLP:
    return MLP(Standardise.from_state(within(state, "standardise")), classes, settings)
