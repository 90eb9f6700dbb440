"""Classes as Gaussians of one covariance: what linear discriminant analysis is made of. All in float64."""

from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

Share = Annotated[float, Field(gt=0, le=1)]
SPREADLESS = 1e-9  # a mean variance of standardised vectors that is rounding
NEVER = -1e6  # the logit of a class that nothing is known of


class Spread:
    """A covariance (F, F), shrunk by any amount: (1 - shrinkage) S + shrinkage tr(S)/F I."""

    def __init__(self, covariance: Tensor, size: int) -> None:
        """Of a covariance (r, r) within a space of `size` F >= r dimensions, the others of which it does not reach."""
        values, self.axes = torch.linalg.eigh(covariance)
        self.values, mean = values.clamp(min=0), values.sum() / size
        # One image a class says nothing of their spread, which then counts as round.
        self.mean = mean if mean > SPREADLESS else torch.ones_like(mean)

    def whiten(self, means: Tensor, shrinkage: float) -> Tensor:
        """S^-1 m of every row m of means (C, r)."""
        values = (1 - shrinkage) * self.values + shrinkage * self.mean
        return (means @ self.axes / values) @ self.axes.T


class Whitens(Protocol):
    """What divides by a covariance: a Spread, or one within the space of lent images (layers/teachers.py)."""

    def whiten(self, means: Tensor, shrinkage: float) -> Tensor: ...


def discriminant(means: Tensor, spread: Whitens, shrinkage: float, known: Tensor) -> tuple[Tensor, Tensor]:
    """w_c = S^-1 m_c (C, r) and -m_c w_c / 2 (C,): Gaussians of one covariance S, all classes as likely.

    means (C, r); known (C,) bool: of the other classes nothing is known, and none of them is ever said.
    """
    weight = spread.whiten(means, shrinkage)
    bias = -(means * weight).sum(1) / 2
    return weight.where(known[:, None], torch.zeros_like(weight)), bias.where(known, torch.full_like(bias, NEVER))
