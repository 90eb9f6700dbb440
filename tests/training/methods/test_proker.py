from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.layers.texts import class_text
from training.loop import predict
from training.methods import proker, zero_shot
from training.methods.proker import Settings

FIXED: dict[str, Any] = {"width": [0.5], "penalty": [0.1], "scale": [20.0], "sharpness": 1.0}


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(train=6, noise=2.0, views=2))


def said(cache: Cache, split: str = "test", **knobs: Any) -> torch.Tensor:
    fitted = proker.fit(cache, Settings.model_validate(FIXED | knobs), 0)
    return predict(fitted.model, cache, cache.images(split))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_equals_the_closed_form_by_loops(cache: Cache, penalty: float) -> None:
    train, test = cache.images("train"), cache.images("test")
    g = torch.cat([cache.globals(train, view) for view in range(2)]).double().numpy()
    new, t = cache.globals(test).double().numpy(), class_text(cache).double().numpy()
    rows, queries = ((each - g.mean(0)) / g.var(0).mean() ** 0.5 for each in (g, new))
    distance = 0.5 * np.mean([[np.square(a - b).sum() for b in rows] for a in rows])

    def kernel(left: np.ndarray) -> np.ndarray:
        return np.array([[np.exp(-np.square(a - b).sum() / distance) for b in rows] for a in left])

    y = np.eye(4)[np.concatenate([cache.y[train].numpy()] * 2)]
    coefficients = np.linalg.inv(kernel(rows) + penalty * np.eye(len(rows))) @ (y - softmax(20 * g @ t.T))
    expected = softmax(20 * new @ t.T) + kernel(queries) @ coefficients
    np.testing.assert_allclose(said(cache, penalty=[penalty]).numpy(), expected, atol=1e-3)


def test_between_the_texts_and_the_images_by_heart(cache: Cache) -> None:
    texts = predict(zero_shot.fit(cache, zero_shot.Settings(scale=20.0), 0).model, cache, cache.images("test"))
    torch.testing.assert_close(said(cache, penalty=[1e9]), texts.softmax(-1), atol=1e-4, rtol=1e-4)
    y = torch.eye(4)[cache.y[cache.images("train")]]
    torch.testing.assert_close(said(cache, "train", penalty=[1e-9]), y, atol=1e-3, rtol=1e-3)


def test_far_from_all_images_the_texts_are_left(cache: Cache) -> None:
    """A narrow kernel reaches no other image."""
    texts = predict(zero_shot.fit(cache, zero_shot.Settings(scale=20.0), 0).model, cache, cache.images("test"))
    torch.testing.assert_close(said(cache, width=[1e-3]), texts.softmax(-1), atol=1e-4, rtol=1e-4)
