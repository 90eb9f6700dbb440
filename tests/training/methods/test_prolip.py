from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.data.projection import Projection
from training.layers.texts import class_text
from training.loop import predict
from training.methods import Fitted, prolip
from training.methods.prolip import Settings

FIXED: dict[str, Any] = {"epochs": 5, "lr": [1e-2], "batch_size": 1000, "clip_norm": 1e9}


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(train=5))


def fitted(cache: Cache, **knobs: Any) -> Fitted:
    return prolip.fit(cache, Settings.model_validate(FIXED | knobs), 0)


def without_val(cache: Cache) -> Cache:
    """So that the last epoch is kept."""
    return cache.take(torch.cat([cache.images("train"), cache.images("test")]))


def moved(cache: Cache, **knobs: Any) -> float:
    model: Any = fitted(without_val(cache), **knobs).model
    return (model.weight - model.start).norm().item()


def test_it_starts_as_zero_shot_through_the_projection(cache: Cache) -> None:
    images, part = cache.images("test"), cache.part(Projection)
    found = predict(fitted(cache, epochs=0).model, cache, images)
    v = F.normalize(cache.batch(images).pooled @ part.weight.T + part.bias, dim=1)
    torch.testing.assert_close(found, 100 * v @ class_text(cache).T, atol=1e-3, rtol=1e-4)


def test_a_step_equals_one_by_hand(cache: Cache) -> None:
    """AdamW's first step is lr times the sign of the gradient, nearly; that of the loss with its penalty."""
    images, part = cache.images("train"), cache.part(Projection)
    step = 1e-4
    model: Any = fitted(without_val(cache), epochs=1, lr=[step], anchor=0.0, scale=10.0).model
    weight = part.weight.clone().requires_grad_()
    v = F.normalize(cache.batch(images).pooled @ weight.T + part.bias, dim=1)
    F.cross_entropy(10 * v @ class_text(cache).T, cache.y[images]).backward()
    assert weight.grad is not None
    clear = weight.grad.abs() > 1e-5
    assert clear.float().mean() > 0.9
    expected = -step * weight.grad.sign()
    torch.testing.assert_close((model.weight - part.weight)[clear], expected[clear], atol=step / 50, rtol=0)


def test_a_stronger_anchor_holds_it_nearer(cache: Cache) -> None:
    soft = {"epochs": 30, "scale": 5.0}  # else there is nothing to gain: texts and images meet
    free, held, chained = (moved(cache, anchor=anchor, **soft) for anchor in (0.0, 1.0, 1e4))
    assert free > held > chained
    # 1 / images a class, if nothing is said.
    assert moved(cache, **soft) == moved(cache, anchor=1 / 5, **soft)
