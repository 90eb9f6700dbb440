"""Ridge regression with a Gaussian kernel: as ridge, but the vectors of training images near by count, and not all.

    minimise   sum over rows of |y - f(x) - b|^2 + penalty |f|^2        f(x) = sum_i k(x, x_i) a_i, b is free
    k(x, x')   = exp(-|x - x'|^2 / (width d))                          d the mean squared distance of training rows

x is the probe's vector (layers/features.py), rows are training images in every view. Leaving each image out chooses
both knobs, exactly and with kernel and intercept as layers/ridge.py says; val chooses nothing. Cost grows with the cube
of the number of rows, and the model holds all of them.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from training.data import Cache, feature_words
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.logistic import Positive
from training.layers.ridge import Basis, Build, Judged, basis_of_kernel, choose_left_out, training_rows
from training.layers.states import State, within
from training.methods import Fitted, grid
from training.methods.linear_probe import Probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads = feature_reads, feature_also_reads


class Settings(FeatureSettings):
    width: list[Positive] = Field(default=[1.0, 2.0], min_length=1)  # of the kernel, that leaving out chooses from
    penalty: list[Positive] = Field(
        default=[3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003], min_length=1
    )  # strengths that leaving out chooses from


class KernelLayer(nn.Module):
    """Scores (B, C) of x (B, F): k(x, x_i) a_i summed over rows, plus b."""

    rows: Tensor
    coefficients: Tensor
    bias: Tensor
    distance: Tensor

    def __init__(self, rows: Tensor, coefficients: Tensor, bias: Tensor, distance: float) -> None:
        """rows (m, F); coefficients (m, C); bias (C,); `distance`: the squared one at which k is 1/e."""
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("coefficients", coefficients.float())
        self.register_buffer("bias", bias.float())
        self.register_buffer("distance", torch.tensor(distance))

    def forward(self, x: Tensor) -> Tensor:
        return gauss(x, self.rows, self.distance) @ self.coefficients + self.bias


def gauss(x: Tensor, rows: Tensor, distance: Tensor | float) -> Tensor:
    """exp(-|x_i - r_j|^2 / distance) (n, m) of x (n, F) and rows (m, F)."""
    squared = x.square().sum(1)[:, None] - 2 * x @ rows.T + rows.square().sum(1)
    return (-squared.clamp(min=0) / distance).exp()


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)
    held, rows = features.of_training(cache), training_rows(cache, features)
    # Twice the sum of the variances.
    mean_distance = 2 * held.double().var(0, correction=0).sum().item()

    def basis_of(point: Mapping[str, float]) -> tuple[Basis, Build]:
        distance = point["width"] * mean_distance
        kernel = gauss(held.double(), held.double(), distance)
        row = kernel.mean(0)
        basis = basis_of_kernel(kernel, rows)

        def build(penalty: float, judged: Judged) -> KernelLayer:
            coefficients = basis.solve(penalty)
            bias = basis.mean - row @ coefficients
            return KernelLayer(held, judged.scale * coefficients, judged.scale * bias, distance)

        return basis, build

    layer, chosen, history = choose_left_out(cache, features, grid(settings), basis_of)
    return Fitted(Probe(features, layer), history, chosen)


def build(state: State, settings: Settings, classes: int) -> Probe:
    layer = within(state, "layer")
    kernel = KernelLayer(layer["rows"], layer["coefficients"], layer["bias"], float(layer["distance"]))
    return Probe(Features.from_state(within(state, "features"), settings), kernel)
