from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import gda, zero_shot
from training.methods.gda import Settings

FIXED: dict[str, Any] = {"shrinkage": [0.3], "weight": [0.5]}


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(noise=2.0))


def said(cache: Cache, **knobs: Any) -> torch.Tensor:
    fitted = gda.fit(cache, Settings.model_validate(FIXED | knobs), 0)
    return predict(fitted.model, cache, cache.images("test"))


def test_equals_zero_shot_plus_a_discriminant_by_normal_equations(cache: Cache) -> None:
    train, test = cache.images("train"), cache.images("test")
    x, new = (cache.globals(images).double().numpy() for images in (train, test))
    mean, scale = x.mean(0), x.var(0).mean() ** 0.5
    residual = (x - mean) / scale
    y = cache.y[train].numpy()
    centres = np.array([residual[y == label].mean(0) for label in range(4)])
    within = np.cov((residual - centres[y]).T, bias=True)
    shrunk = 0.7 * within + 0.3 * np.trace(within) / 32 * np.eye(32)
    weight = np.linalg.solve(shrunk, centres.T)
    images_say = (new - mean) / scale @ weight - (centres.T * weight).sum(0) / 2
    names = predict(zero_shot.fit(cache, zero_shot.Settings(scale=50.0), 0).model, cache, test).numpy()
    found = said(cache, scale=50.0).numpy()
    np.testing.assert_allclose(found, names + 0.5 * images_say, atol=1e-3, rtol=1e-3)


def test_the_weight_goes_from_texts_to_images(cache: Cache) -> None:
    texts = predict(zero_shot.fit(cache, zero_shot.Settings(), 0).model, cache, cache.images("test"))
    torch.testing.assert_close(said(cache, weight=[1e-9]), texts, atol=1e-3, rtol=1e-3)
    heavy = said(cache, weight=[1e4]) / 1e4
    assert not torch.allclose(heavy, texts, atol=0.1)
    light, other = said(cache, weight=[1e-9], texts="concepts"), said(cache, weight=[1e-9], texts="both")
    assert not torch.allclose(light, other)
