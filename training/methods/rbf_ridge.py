"""Ridge regression with a Gaussian kernel: as ridge, but the vectors of training images near by count, and not all.

    minimise   sum over rows of |y - f(x) - b|^2 + penalty |f|^2        f(x) = sum_i k(x, x_i) a_i, b is free
    k(x, x')   = exp(-|x - x'|^2 / (width d))                          d the mean squared distance of training rows

x is the probe's vector (layers/features.py), rows are training images in every view. Leaving each image out chooses
both knobs, exactly and with kernel and intercept as layers/ridge.py says; val chooses nothing. Cost grows with the cube
of the number of rows, and the model holds all of them.
"""

import functools
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from training.data import Cache
from training.layers.features import Features, FeatureSettings, feature_parts, parts_of
from training.layers.logistic import Positive
from training.layers.ridge import Basis, Judged, basis_of_kernel, choose_left_out, training_targets
from training.methods import Fitted, grid
from training.methods.linear_probe import Probe

SEEDED = False
READS = feature_parts()


class Settings(FeatureSettings):
    width: list[Positive] = Field(default=[1.0, 2.0], min_length=1)  # of the kernel, that leaving out chooses from
    penalty: list[Positive] = Field(
        default=[3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003], min_length=1
    )  # strengths that leaving out chooses from


def reads(settings: Settings) -> frozenset[str]:
    return parts_of(settings.features)


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
    features, told = Features(cache, settings), training_targets(cache)
    rows = features.of_training(cache)
    # Twice the sum of the variances.
    mean_distance = 2 * rows.double().var(0, correction=0).sum().item()

    @functools.lru_cache(maxsize=1)
    def kernel(width: float) -> tuple[Tensor, Basis]:
        found = gauss(rows.double(), rows.double(), width * mean_distance)
        return found, basis_of_kernel(found)

    def build(point: Mapping[str, float], judged: Judged) -> KernelLayer:
        found, basis = kernel(point["width"])
        coefficients = basis.coefficients(told, point["penalty"])
        bias = (told - found @ coefficients).mean(0)
        scale = judged.scale
        return KernelLayer(rows, scale * coefficients, scale * bias, point["width"] * mean_distance)

    layer, chosen, history = choose_left_out(
        cache, features, grid(settings), lambda point: kernel(point["width"])[1], build
    )
    return Fitted(Probe(features, layer), history, chosen)
