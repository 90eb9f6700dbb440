from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.layers import logistic
from training.layers.blocks import silent
from training.layers.logistic import Tally, assess, fit_logistic
from training.methods import lda, linear_probe, ridge

Planted = Callable[[Plan], Cache]


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(90) % 3
    return torch.randn(90, 5, generator=generator) + F.one_hot(y, 5), y


def plain(x: Tensor, y: Tensor, l2: float) -> nn.Linear:
    """The objective as one expression."""
    linear = silent(x.shape[1], 3)
    optimiser = torch.optim.LBFGS(
        linear.parameters(), max_iter=40, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(linear(x), y) + l2 / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return linear


def test_rows_of_one_block_are_fitted_to_the_last_bit_as_one_expression_is() -> None:
    x, y = sample()
    found = fit_logistic(x, y, x, y, 3, [0.01], 40).linear
    expected = plain(x, y, 0.01)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize("told", ["classes", "probabilities"])
def test_blocks_of_rows_sum_to_the_same_fit(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = sample()
    y = label if told == "classes" else 0.5 * F.one_hot(label, 3).float() + 0.2
    whole = fit_logistic(x, y, x, label, 3, [0.1], 200)
    monkeypatch.setattr(logistic, "ROOM", 21)  # 7 rows of 3 logits: the last block has 6
    blocks = fit_logistic(x, y, x, label, 3, [0.1], 200)
    # Both end where the gradient is under 1e-5: there the objective is the same to more digits than the weights.
    torch.testing.assert_close(blocks.linear.weight, whole.linear.weight, atol=1e-3, rtol=0)
    found, expected = (one.history[0] for one in (blocks, whole))
    assert found["val_accuracy"] == pytest.approx(expected["val_accuracy"])
    assert found["train_loss"] + 0.05 * blocks.linear.weight.square().sum().item() == pytest.approx(
        expected["train_loss"] + 0.05 * whole.linear.weight.square().sum().item(), abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", [linear_probe, lda, ridge])
def test_probes_read_the_rows_that_they_do_not_keep_and_say_the_same(
    method: Any, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = planted(Plan(views=2, noise=2.0))
    settings = method.Settings(features=["global", "pooled"])
    whole = method.fit(cache, settings, 0)
    largest = 0
    cut = Cache.batch

    def count(self: Cache, images: Tensor, views: Tensor | None = None) -> object:
        nonlocal largest
        largest = max(largest, len(images))
        return cut(self, images, views)

    monkeypatch.setattr(logistic, "KEPT", 1)
    monkeypatch.setattr(lda, "KEPT", 1)
    monkeypatch.setattr("training.layers.features.ROOM", 700)
    monkeypatch.setattr(logistic, "ROOM", 700)
    monkeypatch.setattr(Cache, "batch", count)
    read = method.fit(cache, settings, 0)
    assert largest <= 700 // 32  # images at a time, of 68 numbers or fewer
    assert read.chosen == whole.chosen
    for one, other in zip(read.history, whole.history, strict=True):
        assert one == pytest.approx(other, abs=1e-3 if method is linear_probe else 1e-6)


def test_a_tally_judges_chunks_as_the_whole_is_judged() -> None:
    x, y = sample()
    logits = x[:, :3]
    few, many = Tally(), Tally(room=50)
    for some, own in zip(logits.split(8), y.split(8), strict=True):
        few.add(some, own)
    assert few.result() == assess(logits, y)
    for some, own in zip(logits.split(8), y.split(8), strict=True):
        many.add(some, own)
        assert len(many.waiting) < 3
    assert many.result() == pytest.approx(assess(logits, y), abs=1e-6)
