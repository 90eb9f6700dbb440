"""Ridge regression of the classes on cached vectors, its penalty chosen by leaving each training image out.

    minimise   sum over images and views of |y - W z - b|^2 + penalty |W|^2         b is free

y is what training is told of an image, as probabilities; z the probe's vector (layers/features.py) on the scale where
its squared length is 1 on average. Leaving out is exact (layers/ridge.py): all views of an image at once, intercept
refitted, mean and scale of the vectors held. So val chooses nothing here. logits = scale (W z + b), the scale by which
the left-out scores have the least log loss; it changes no prediction.

Where there are more rows than dimensions, these are read in chunks and never held: memory does not grow with them.
"""

import math
from collections.abc import Mapping

from pydantic import Field
from torch import nn

from training.data import Cache, feature_words
from training.layers.blocks import linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.logistic import Positive
from training.layers.ridge import Basis, Build, Judged, basis_of_rows, choose_left_out, training_rows
from training.methods import Fitted, grid, linear_probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build


class Settings(FeatureSettings):
    penalty: list[Positive] = Field(
        default=[100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001], min_length=1
    )  # strengths that leaving out chooses from


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)
    unit = math.sqrt(features.size)

    def basis_of(point: Mapping[str, float]) -> tuple[Basis, Build]:
        basis, mean = basis_of_rows(training_rows(cache, features, unit))

        def build(penalty: float, judged: Judged) -> nn.Linear:
            weight = basis.solve(penalty)  # (F, C)
            return linear_layer(judged.scale * weight.T / unit, judged.scale * (basis.mean - mean @ weight))

        return basis, build

    linear, chosen, history = choose_left_out(cache, features, grid(settings), basis_of)
    return Fitted(linear_probe.Probe(features, linear), history, chosen)
