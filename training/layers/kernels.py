"""Kernels over the rows that a method was fitted to."""

from typing import Self

import torch
from torch import Tensor, nn

from training.layers.states import State


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

    @classmethod
    def from_state(cls, state: State) -> Self:
        return cls(state["rows"], state["coefficients"], state["bias"], float(state["distance"]))

    def forward(self, x: Tensor) -> Tensor:
        return gauss(x, self.rows, self.distance) @ self.coefficients + self.bias


def gauss(x: Tensor, rows: Tensor, distance: Tensor | float) -> Tensor:
    """exp(-|x_i - r_j|^2 / distance) (n, m) of x (n, F) and rows (m, F)."""
    squared = x.square().sum(1)[:, None] - 2 * x @ rows.T + rows.square().sum(1)
    return (-squared.clamp(min=0) / distance).exp()
