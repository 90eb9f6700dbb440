from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.layers import teachers
from training.layers.teachers import KEPT, teach

Planted = Callable[[Plan], Cache]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "remembered", {})


@pytest.fixture
def cache(planted: Planted) -> Cache:
    return planted(Plan(classes=5, train=30, val=5, test=5, nodes=1, ragged=False, cue="global", dimension=48))


@pytest.mark.parametrize("images", [30, 400])
def test_whitening_is_by_the_inverse_in_the_whole_space(planted: Planted, images: int) -> None:
    """Also of means beside the span of the images, which are fewer than dimensions here, or more."""
    told = planted(Plan(classes=5, train=images, val=5, test=5, nodes=1, ragged=False, cue="global", dimension=48))
    taught = teach(told, ("global",), "none")
    x = taught.features.of_training(told).double().numpy()
    y = told.y[told.images("train")].numpy()
    means = np.array([x[y == label].mean(0) for label in range(5)])
    np.testing.assert_allclose(taught.span.back(taught.centres).numpy(), means, atol=1e-9)
    residual = x - means[y]
    within = residual.T @ residual / len(x)
    assert taught.trace == pytest.approx(np.trace(within), rel=1e-9)
    d = torch.randn(7, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shrinkage in (0.1, 1.0):
        shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / 48 * np.eye(48)
        np.testing.assert_allclose(taught.whiten(d, shrinkage).numpy(), d.numpy() @ np.linalg.inv(shrunk), rtol=1e-6)


def test_the_same_images_teach_once(cache: Cache) -> None:
    taught = teach(cache, ("global",), "none")
    images = torch.arange(len(cache.paths))
    again = teach(cache.take(images), ("global",), "none")  # other tensors of the same content
    assert again is taught


def test_whatever_differs_teaches_anew(cache: Cache) -> None:
    taught = teach(cache, ("global",), "none")
    train = cache.images("train")
    target = cache.target.clone()
    target[train[0]] = (target[train[0]] + 1) % 5
    less = cache.split.copy()
    less[train[0].item()] = "unused"
    for other in (replace(cache, target=target), replace(cache, split=less)):
        assert teach(other, ("global",), "none") is not taught
    assert teach(cache, ("global",), "signed_sqrt") is not taught


def test_no_more_than_two_are_remembered(cache: Cache) -> None:
    for image in cache.images("train")[: KEPT + 1].tolist():
        split = cache.split.copy()
        split[image] = "unused"
        teach(replace(cache, split=split), ("global",), "none")
    assert len(teachers.remembered) == KEPT
