"""Leaving out exactly: against one explicit refit an image, down to the smallest penalty."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from training.layers.ridge import Basis, basis_of_kernel, basis_of_rows, judge_left_out, left_out
from training.methods.rbf_ridge import Settings as RbfSettings
from training.methods.rbf_ridge import gauss
from training.methods.ridge import Settings

PENALTIES = sorted({*Settings().penalty, *RbfSettings().penalty})
Rows = tuple[Tensor, Tensor]


def rows(views: int, dimension: int, images: int = 30, classes: int = 3) -> Rows:
    """x (V n, F) of mean squared length 1, as the probes have them, off centre; y (V n, C), partly uncertain."""
    generator = torch.Generator().manual_seed(dimension)
    y = torch.eye(classes, dtype=torch.float64)[torch.arange(images) % classes]
    y[::4] = 1 / classes  # told no more than that it is one of them
    x = torch.randn(views * images, dimension, generator=generator, dtype=torch.float64) + 3.0
    x[:, 0] += 2 * torch.cat([y[:, 0]] * views)
    x = (x - x.mean(0)) / (x - x.mean(0)).square().sum(1).mean().sqrt() + 0.1
    return x, torch.cat([y] * views)


def refit(kernel: Tensor, y: Tensor, kept: Tensor, held: Tensor, penalty: float) -> np.ndarray:
    """What the fit on rows `kept` says of rows `held`, intercept refitted: one system for both."""
    k, n = kernel.numpy(), int(kept.sum())
    system = np.block([[k[kept][:, kept] + penalty * np.eye(n), np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    solved = np.linalg.solve(system, np.concatenate([y[kept].numpy(), np.zeros((1, y.shape[1]))]))
    return np.asarray(k[held][:, kept] @ solved[:-1] + solved[-1])


def linear(x: Tensor) -> tuple[Tensor, Basis]:
    return x @ x.T, basis_of_rows(x)


def gaussian(x: Tensor) -> tuple[Tensor, Basis]:
    kernel = gauss(x, x, 2.0)
    return kernel, basis_of_kernel(kernel)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    ("of", "dimension"),
    [(linear, 5), (linear, 28), (linear, 200), (gaussian, 5)],
    ids=["few dimensions", "nearly as many as images", "more", "rbf"],
)
def test_leaving_out_equals_explicit_refits(
    of: Callable[[Tensor], tuple[Tensor, Basis]], dimension: int, views: int
) -> None:
    x, y = rows(views, dimension)
    kernel, basis = of(x)
    owner = torch.arange(len(x)) % (len(x) // views)
    for penalty in PENALTIES:
        said = left_out(basis, y, views, penalty).numpy()
        expected = np.zeros_like(said)
        for image in range(len(x) // views):
            held = owner == image
            expected[held.numpy()] = refit(kernel, y, ~held, held, penalty)
        np.testing.assert_allclose(said, expected, atol=1e-8, rtol=0, err_msg=str(penalty))


def test_copies_of_a_row_and_dimensions_without_content_change_nothing_of_that() -> None:
    x, y = rows(1, 6)
    x = torch.cat([x, x[:5], torch.zeros(4, 6, dtype=torch.float64)])
    x, y = torch.cat([x, x[:, :2], torch.ones(len(x), 1, dtype=torch.float64)], 1), torch.cat([y, y[:9]])
    kernel, basis = linear(x)
    for penalty in PENALTIES:
        said = left_out(basis, y, 1, penalty).numpy()
        for image in range(len(x)):
            held = torch.arange(len(x)) == image
            np.testing.assert_allclose(said[held.numpy()], refit(kernel, y, ~held, held, penalty), atol=1e-8, rtol=0)


def test_centring_first_or_a_constant_column_would_not_do() -> None:
    """The two ways that look right: each says something else of a held-out row than a refit."""
    x, y = rows(1, 200)
    kernel, basis = linear(x)
    penalty = PENALTIES[0]
    exact = left_out(basis, y, 1, penalty)
    centred = x - x.mean(0)
    for k, targets in ((centred @ centred.T, y - y.mean(0)), (kernel + 1, y)):
        inverse = torch.linalg.inv(k + penalty * torch.eye(len(k), dtype=k.dtype))
        residual = (inverse @ targets) / inverse.diagonal()[:, None]
        assert (y - residual - exact).abs().max() > 1e-3


def test_an_image_whose_class_has_no_other_is_not_judged() -> None:
    x, y = rows(1, 5)
    y = torch.cat([torch.eye(5, dtype=torch.float64)[torch.arange(len(y)) % 3][:-1], torch.eye(5)[4:].double()])
    basis = basis_of_rows(x)
    judged, said = judge_left_out(basis, y, 1, 1.0), left_out(basis, y, 1, 1.0)
    right = (said.argmax(1) == y.argmax(1))[:-1]
    assert judged.accuracy == pytest.approx(right.double().mean().item())
    assert judged.loss == pytest.approx((said - y)[:-1].square().sum(1).mean().item())


def test_the_scale_makes_the_log_loss_least() -> None:
    x, y = rows(2, 5)
    y = torch.eye(3, dtype=torch.float64)[torch.arange(30) % 3].repeat(2, 1)
    basis = basis_of_rows(x)
    scale = judge_left_out(basis, y, 2, 1.0).scale
    scores, label = left_out(basis, y, 2, 1.0)[:30], y[:30].argmax(1)
    least = torch.nn.functional.cross_entropy(scale * scores, label)
    for other in (0.9 * scale, 1.1 * scale):
        assert least < torch.nn.functional.cross_entropy(other * scores, label)
