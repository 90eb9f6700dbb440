"""Leaving out exactly: against one explicit refit an image, down to the smallest penalty."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.cache import Plan
from training.data import Cache
from training.layers import ridge
from training.layers.features import Features
from training.layers.kernels import gauss
from training.layers.logistic import Tally
from training.layers.ridge import Basis, Rows, basis_of_kernel, basis_of_rows, judge_left_out
from training.methods.rbf_ridge import Settings as RbfSettings
from training.methods.ridge import Settings

PENALTIES = sorted({*Settings().penalty, *RbfSettings().penalty})


def vectors(views: int, dimension: int, images: int = 30, classes: int = 3) -> tuple[Tensor, Tensor]:
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


def rows_of(x: Tensor, y: Tensor, views: int, chunk: int = 7) -> Rows:
    by_view, n = x.unflatten(0, (views, -1)), len(x) // views
    return Rows(n, views, x.shape[1], chunk, lambda images: by_view[:, images], lambda images: y[:n][images])


def linear(x: Tensor, rows: Rows) -> tuple[Tensor, Basis]:
    return x @ x.T, basis_of_rows(rows)[0]


def gaussian(x: Tensor, rows: Rows) -> tuple[Tensor, Basis]:
    kernel = gauss(x, x, 2.0)
    return kernel, basis_of_kernel(kernel.clone(), rows)


def left_out(basis: Basis, y: Tensor, penalty: float) -> Tensor:
    """(V n, C), chunk by chunk."""
    n = basis.rows.images
    said = [basis.left_out(basis.u(chunk), y[:n][chunk], penalty) for chunk in basis.rows.chunks()]
    return torch.cat(said, 1).flatten(0, 1)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    ("of", "dimension"),
    [(linear, 5), (linear, 28), (linear, 200), (gaussian, 5)],
    ids=["few dimensions", "nearly as many as images", "more", "rbf"],
)
def test_leaving_out_equals_explicit_refits(
    of: Callable[[Tensor, Rows], tuple[Tensor, Basis]], dimension: int, views: int
) -> None:
    x, y = vectors(views, dimension)
    kernel, basis = of(x, rows_of(x, y, views))
    owner = torch.arange(len(x)) % (len(x) // views)
    for penalty in PENALTIES:
        said = left_out(basis, y, penalty).numpy()
        expected = np.zeros_like(said)
        for image in range(len(x) // views):
            held = owner == image
            expected[held.numpy()] = refit(kernel, y, ~held, held, penalty)
        np.testing.assert_allclose(said, expected, atol=1e-8, rtol=0, err_msg=str(penalty))


def test_copies_of_a_row_and_dimensions_without_content_change_nothing_of_that() -> None:
    x, y = vectors(1, 6)
    x = torch.cat([x, x[:5], torch.zeros(4, 6, dtype=torch.float64)])
    x, y = torch.cat([x, x[:, :2], torch.ones(len(x), 1, dtype=torch.float64)], 1), torch.cat([y, y[:9]])
    kernel, basis = linear(x, rows_of(x, y, 1))
    for penalty in PENALTIES:
        said = left_out(basis, y, penalty).numpy()
        for image in range(len(x)):
            held = torch.arange(len(x)) == image
            np.testing.assert_allclose(said[held.numpy()], refit(kernel, y, ~held, held, penalty), atol=1e-8, rtol=0)


def test_centring_first_or_a_constant_column_would_not_do() -> None:
    """The two ways that look right: each says something else of a held-out row than a refit."""
    x, y = vectors(1, 200)
    kernel, basis = linear(x, rows_of(x, y, 1))
    penalty = PENALTIES[0]
    exact = left_out(basis, y, penalty)
    centred = x - x.mean(0)
    for k, targets in ((centred @ centred.T, y - y.mean(0)), (kernel + 1, y)):
        inverse = torch.linalg.inv(k + penalty * torch.eye(len(k), dtype=k.dtype))
        residual = (inverse @ targets) / inverse.diagonal()[:, None]
        assert (y - residual - exact).abs().max() > 1e-3


def test_an_image_whose_class_has_no_other_is_not_judged() -> None:
    x, y = vectors(1, 5)
    y = torch.cat([torch.eye(5, dtype=torch.float64)[torch.arange(len(y)) % 3][:-1], torch.eye(5)[4:].double()])
    basis, _ = basis_of_rows(rows_of(x, y, 1))
    [judged], said = judge_left_out(basis, [1.0]), left_out(basis, y, 1.0)
    right = (said.argmax(1) == y.argmax(1))[:-1]
    assert judged.accuracy == pytest.approx(right.double().mean().item())
    assert judged.loss == pytest.approx((said - y)[:-1].square().sum(1).mean().item())


def test_the_scale_makes_the_log_loss_least() -> None:
    x, y = vectors(2, 5)
    y = torch.eye(3, dtype=torch.float64)[torch.arange(30) % 3].repeat(2, 1)
    basis, _ = basis_of_rows(rows_of(x, y, 2))
    scale = judge_left_out(basis, [1.0])[0].scale
    scores, label = left_out(basis, y, 1.0)[:30], y[:30].argmax(1)
    least = torch.nn.functional.cross_entropy(scale * scores, label)
    for other in (0.9 * scale, 1.1 * scale):
        assert least < torch.nn.functional.cross_entropy(other * scores, label)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return made


def test_rows_that_outnumber_dimensions_are_never_held() -> None:
    """20,000 rows of 48 dimensions, drawn chunk by chunk: nothing is as large as they are, or grows with them."""
    images, size, chunk, classes = 10_000, 48, 64, 3

    def x(images: slice) -> Tensor:
        generator = torch.Generator().manual_seed(images.start)
        return torch.randn(2, images.stop - images.start, size, generator=generator, dtype=torch.float64)

    def y(images: slice) -> Tensor:
        return torch.eye(classes, dtype=torch.float64)[torch.arange(images.start, images.stop) % classes]

    rows = Rows(images, 2, size, chunk, x, y)
    with Largest() as largest:
        basis, _ = basis_of_rows(rows)
        judged = judge_left_out(basis, [10.0, 0.1])
        weight = basis.solve(0.1)
    # A chunk in two views, or the normal equations; and the scores that the scale is found by, a number a class.
    assert largest.bytes <= 8 * max(2 * chunk * size, size * size, images * classes)
    assert largest.bytes < 8 * 2 * images * size / 10
    whole = torch.cat([x(part) for part in rows.chunks()], 1).flatten(0, 1)
    told = torch.cat([y(slice(0, images))] * 2)
    centred = whole - whole.mean(0)
    direct = torch.linalg.solve(centred.T @ centred + 0.1 * torch.eye(size, dtype=torch.float64), centred.T @ told)
    torch.testing.assert_close(weight, direct, atol=1e-12, rtol=1e-9)
    said = left_out(basis, told, 0.1)[:images]
    assert judged[1].accuracy == pytest.approx((said.argmax(1) == told[:images].argmax(1)).double().mean().item())


def test_the_scale_may_be_found_by_some_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = vectors(1, 5, images=300)
    basis, _ = basis_of_rows(rows_of(x, y, 1))
    [whole] = judge_left_out(basis, [1.0])
    monkeypatch.setattr("training.layers.ridge.SCALED", 450)  # every second image
    [some] = judge_left_out(basis, [1.0])
    assert some[:2] == whole[:2]
    assert some.scale == pytest.approx(whole.scale, rel=0.5)


@pytest.mark.parametrize("dimension", [5, 200])
def test_weights_are_those_of_the_direct_system(dimension: int) -> None:
    x, y = vectors(2, dimension)
    basis, mean = basis_of_rows(rows_of(x, y, 2))
    centred = x - x.mean(0)
    for penalty in PENALTIES:
        system = centred.T @ centred + penalty * torch.eye(dimension, dtype=torch.float64)
        torch.testing.assert_close(basis.solve(penalty), torch.linalg.solve(system, centred.T @ y))
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(basis.mean, y.mean(0))


def test_many_classes_are_counted_as_many_dimensions_are(
    planted: Callable[[Plan], Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of an image may be longer than its vector: 24 images of 8 dimensions and 12 classes."""
    cache, rooms = planted(Plan(classes=12, train=2, val=2, test=2, dimension=8)), []
    features = Features.measure(cache, Settings())
    monkeypatch.setattr("training.layers.features.ROOM", 60)
    assert ridge.training_rows(cache, features, kept=12 * 24).chunk == 24
    assert ridge.training_rows(cache, features, kept=12 * 24 - 1).chunk == 60 // 12

    def tally(room: int) -> Tally:
        rooms.append(room)
        return Tally(room=room)

    monkeypatch.setattr(ridge, "Tally", tally)
    monkeypatch.setattr(ridge, "ROOM", 90)
    ridge.assess_layers([torch.nn.Linear(8, 12)] * 3, cache, features, cache.images("val"))
    assert rooms == [30, 30, 30]  # the logits of all layers wait in the room of one
