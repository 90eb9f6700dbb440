"""Logistic regression on labels that are not quite believed (label smoothing; Szegedy et al., CVPR 2016 [mem]).

    minimise   mean over images of CE(W x + b, (1 - s) y + s / C) + l2/2 |W|^2

y is what training is told of an image, as probabilities (C,), x the probe's vector (layers/features.py). A wrong label
then asks for a logit that is finite, and pulls less. With s = 0 it is the objective of linear_probe. Val chooses
s and l2; as regularisation the two do much alike.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from training.data import Cache, feature_words
from training.layers.features import feature_also_reads, feature_reads
from training.layers.told_labels import ToldRows, ToldSettings, fit_told
from training.methods import Fitted, linear_probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build


class Settings(ToldSettings):
    smoothing: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.0, 0.1, 0.2, 0.4], min_length=1
    )  # shares of a label that go to all classes alike, that val chooses from


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    def smoothed(rows: ToldRows, smoothing: float, l2: float) -> Tensor:
        return (1 - smoothing) * rows.told + smoothing / rows.told.shape[1]

    return fit_told(cache, settings, linear_probe.Probe, smoothed)
