"""Logistic regression on the global vector, its L2 strength chosen on val: the rival that every method has to beat.

Fitted over all views of the training images (training/logistic.py). The vectors are centred by the training mean and
divided by one common scale (layers.Standardise), not dimension by dimension: angles stay as they are.
"""

import torch
from pydantic import Field
from torch import nn

from stages.params import Block, Count
from training.data import Batch, Cache
from training.layers import Standardise
from training.logistic import MAX_ITERATIONS, STRENGTHS, fit_logistic
from training.loop import Positive
from training.methods import Fitted, Output

SEEDED = False


class Settings(Block):
    l2: list[Positive] = Field(default=list(STRENGTHS), min_length=1)
    max_iterations: Count = MAX_ITERATIONS


class LinearProbe(nn.Module):
    def __init__(self, standardise: Standardise, linear: nn.Linear) -> None:
        super().__init__()
        self.standardise, self.linear = standardise, linear

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(self.standardise(batch.g.float())), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    train, val = cache.images("train"), cache.images("val")
    sample = torch.cat([cache.globals(train, view) for view in range(cache.views)])
    standardise = Standardise(sample)
    chosen = fit_logistic(
        standardise(sample),
        torch.cat([cache.target[train]] * cache.views),
        standardise(cache.globals(val)),
        cache.y[val],
        len(cache.classes),
        settings.l2,
        settings.max_iterations,
    )
    return Fitted(LinearProbe(standardise, chosen.linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)
