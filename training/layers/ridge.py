"""Ridge regression with a free intercept, and what it says of each image when that image is left out, exactly.

    minimise   |Y - K A - 1 b^T|^2 + penalty tr(A^T K A)        K (m, m) the kernel of the training rows, Y (m, C)

The fit is A = B Y with B = R^-1 - R^-1 1 1^T R^-1 / (1^T R^-1 1), R = K + penalty I. Leaving the rows I of one image
out, intercept refitted, kernel, scale and basis held fixed, changes what is said of them to Y_I - B_II^-1 (B Y)_I:
residual (B Y)_i / B_ii for a single row (Allen's PRESS; with the free intercept as in generalised least squares
[mem]). Centring K and leaving out of its inverse would not do: a held-out row would be minus the sum of the rest.

B is the inverse of R within the complement of the constant, so one eigendecomposition there serves every penalty:
penalty B = rest + U diag(penalty / (spread + penalty)) U^T, where `rest` projects on what neither the constant nor U
spans. All in float64.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fieldmark.command import UserError
from training.data import Cache
from training.layers.features import Features
from training.layers.logistic import as_probabilities, assess
from training.metrics import fit_temperature

RANK = 1e-13  # of the largest eigenvalue: what is below it is rounding
MAX_SCALE = 100.0  # of scores, which are about 0 and 1, into logits: where leaving out mistakes nothing, none is best
SCALE = 10.0  # where no class has two images, so that none can be left out [design]


class Basis(NamedTuple):
    """Axes in which every penalty costs a product. `u` (m, r) is orthonormal and orthogonal to the constant."""

    u: Tensor
    spread: Tensor  # (r,) > 0, and 0 where a kernel leaves axes empty

    @property
    def whole(self) -> bool:
        """Whether the constant and `u` span everything: the rest is exactly 0, and not what rounding leaves of it."""
        return self.u.shape[1] == len(self.u) - 1

    def project(self, y: Tensor, penalty: float) -> Tensor:
        """penalty B y (m, C)."""
        weight, axes = self.filter(penalty), self.u.T @ y
        moved = self.u @ (weight[:, None] * axes)
        return moved if self.whole else moved + y - y.mean(0)

    def blocks(self, views: int, penalty: float) -> Tensor:
        """penalty B_II (n, V, V) of every image's rows, one a view."""
        u = self.u.unflatten(0, (views, -1))
        blocks = torch.einsum("vnr,r,wnr->nvw", u, self.filter(penalty), u)
        return blocks if self.whole else blocks + torch.eye(views, dtype=u.dtype, device=u.device) - 1 / len(self.u)

    def filter(self, penalty: float) -> Tensor:
        """(r,): penalty / (spread + penalty), less the 1 that stands in the rest where there is one."""
        return (penalty if self.whole else -self.spread) / (self.spread + penalty)

    def coefficients(self, y: Tensor, penalty: float) -> Tensor:
        """u diag(1 / (spread + penalty)) u^T y (m, C): B y, or what a linear kernel's rows see of it."""
        return self.u @ ((self.u.T @ y) / (self.spread + penalty)[:, None])


def basis_of_rows(x: Tensor) -> Basis:
    """Of the linear kernel x x^T of rows (m, F), by the smaller of its two Gram matrices."""
    x = x - x.mean(0)
    if x.shape[1] >= len(x) - 1:
        return basis_of_kernel(x @ x.T)
    spread, axes = torch.linalg.eigh(x.T @ x)
    kept = spread > RANK * spread[-1]
    return Basis(x @ axes[:, kept] / spread[kept].sqrt(), spread[kept])


def basis_of_kernel(kernel: Tensor) -> Basis:
    """Of a kernel (m, m), all m - 1 axes."""
    row = kernel.mean(0)
    centred = kernel - row - row[:, None] + row.mean()
    # The constant becomes the last axis, of the greatest eigenvalue, and is left out.
    spread, axes = torch.linalg.eigh(centred + (1 + 2 * centred.trace()) / len(kernel))
    return Basis(axes[:, :-1], spread[:-1].clamp(min=0))


def left_out(basis: Basis, y: Tensor, views: int, penalty: float) -> Tensor:
    """(V n, C): what the fit without any view of an image says of it. Rows are view by view, y (V n, C)."""
    moved = basis.project(y, penalty).unflatten(0, (views, -1)).transpose(0, 1)
    residual = torch.linalg.solve(basis.blocks(views, penalty), moved)
    return y - residual.transpose(0, 1).flatten(0, 1)


class Judged(NamedTuple):
    """How well a fit says what each image is told when that image is left out; nan where no class has two images."""

    accuracy: float  # the share of what an image is told that falls to the class said
    loss: float  # squared error an image
    scale: float  # that makes logits of scores: the log loss of the left-out scores is least there


def judge_left_out(basis: Basis, y: Tensor, views: int, penalty: float) -> Judged:
    """Judge by view 0 of the images whose class has another image."""
    n = len(y) // views
    told, said = y[:n], left_out(basis, y, views, penalty)[:n]
    label = told.argmax(1)
    judged = (told.sum(0) - told).gather(1, label[:, None])[:, 0] > 0
    if not judged.any():
        return Judged(math.nan, math.nan, SCALE)
    told, said, label = told[judged], said[judged], label[judged]
    accuracy = told.gather(1, said.argmax(1, keepdim=True)).mean().item()
    temperature = fit_temperature(said.cpu().numpy(), label.cpu().numpy())
    return Judged(accuracy, (said - told).square().sum(1).mean().item(), min(1 / temperature, MAX_SCALE))


def choose_left_out(
    cache: Cache,
    features: Features,
    knobs: Mapping[str, Sequence[float]],
    basis_of: Callable[[Mapping[str, float]], Basis],
    build: Callable[[Mapping[str, float], Judged], nn.Module],
) -> tuple[nn.Module, dict[str, float | str], list[dict[str, float]]]:
    """The point of the grid by which left-out images are told best, as a layer on x; the point; a row a point.

    By accuracy, then by squared error. Val is read out and chooses nothing. Raises UserError for several points where
    no class has two images.
    """
    told, val = training_targets(cache), cache.images("val")
    x_val, y_val = features.of(cache, val), cache.y[val]
    best: tuple[tuple[float, float], nn.Module, dict[str, float | str]] | None = None
    history: list[dict[str, float]] = []
    points = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    for step, point in enumerate(points, start=1):
        judged = judge_left_out(basis_of(point), told, cache.views, point["penalty"])
        if math.isnan(judged.loss) and len(points) > 1:
            raise UserError(
                "train: no class has two training images, so leaving one out cannot choose among"
                f" {len(points)} settings of {', '.join(knobs)}; give each of them one value"
            )
        layer = build(point, judged)
        with torch.no_grad():
            accuracy, log_loss = assess(layer(x_val), y_val)
        left = {"left_out_accuracy": judged.accuracy, "left_out_loss": judged.loss}
        history.append({"epoch": step, **point, **left, "val_loss": log_loss, "val_accuracy": accuracy})
        if best is None or (judged.accuracy, -judged.loss) > best[0]:
            best = (judged.accuracy, -judged.loss), layer, {**point}
    assert best is not None
    return best[1], best[2], history


def training_targets(cache: Cache) -> Tensor:
    """(V n, C) float64: what training is told of its images, once a view."""
    told = as_probabilities(cache.target[cache.images("train")], len(cache.classes)).double()
    return torch.cat([told] * cache.views)
