from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import knn, tip_adapter, zero_shot
from training.methods.tip_adapter import TipAdapter, fill_cache


@pytest.fixture
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(noise=3.0, views=2))


def build(cache: Cache, alpha: float, beta: float, scale: float = 100.0, cache_images: int = 100) -> TipAdapter:
    keys, values = fill_cache(cache, cache_images, 0)
    return TipAdapter(zero_shot.class_text(cache), keys, values, scale, alpha, beta)


def test_logits_equal_a_loop(cache: Cache) -> None:
    images = cache.images("test")[:3]
    keys, values = fill_cache(cache, 5, 0)
    logits = predict(build(cache, 2.0, 3.0, cache_images=5), cache, images)
    for image, g in enumerate(cache.globals(images)):
        expected = 100 * zero_shot.class_text(cache) @ g
        for key, value in zip(keys, values, strict=True):
            expected = expected + 2 * torch.exp(-3 * (1 - g @ key)) * value
        torch.testing.assert_close(logits[image], expected, atol=1e-3, rtol=1e-4)


def test_without_its_cache_it_is_zero_shot(cache: Cache) -> None:
    images = cache.images("test")
    names = predict(zero_shot.fit(cache, zero_shot.Settings(), 0).model, cache, images)
    assert torch.equal(predict(build(cache, 0.0, 1.0), cache, images), names)


def test_a_heavy_and_sharp_cache_is_the_nearest_key(cache: Cache) -> None:
    images = cache.images("test")
    keys, values = fill_cache(cache, 100, 0)
    nearest = values[knn.nearest(cache.globals(images), keys, 1)[1][:, 0]].argmax(1)
    assert torch.equal(predict(build(cache, 1e36, 100.0), cache, images).argmax(1), nearest)


def test_a_key_an_image_is_the_mean_of_its_views(cache: Cache) -> None:
    keys, values = fill_cache(cache, 100, 0)
    train = cache.images("train")
    images = F.normalize((cache.globals(train, 0) + cache.globals(train, 1)) / 2, dim=-1)
    nearest = (images @ keys.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(len(train)), atol=1e-4, rtol=0)
    assert torch.equal(values[nearest.indices].argmax(1), cache.y[train])
    assert len(set(nearest.indices.tolist())) == len(train) == len(keys)


def test_a_small_cache_holds_means_of_groups(cache: Cache) -> None:
    keys, values = fill_cache(cache, 5, 0)
    assert values.sum(0).tolist() == [5, 5, 5, 5]
    one, _ = fill_cache(cache, 1, 0)
    again, _ = fill_cache(cache, 1, 1)
    torch.testing.assert_close(one, again)  # the mean of a class, however it is dealt
    assert not torch.allclose(keys, fill_cache(cache, 5, 1)[0])


def test_probabilities_are_averaged_with_their_images(cache: Cache) -> None:
    target = 0.5 * F.one_hot(cache.y, 4).float() + 0.125
    _, values = fill_cache(replace(cache, target=target), 5, 0)
    torch.testing.assert_close(values.sort(1).values, torch.tensor([[0.125, 0.125, 0.125, 0.625]]).expand(20, -1))


def test_no_epochs_leave_the_keys_as_they_were(cache: Cache) -> None:
    settings = tip_adapter.Settings(epochs=0, alpha=[2.0], beta=[3.0], cache_images=5)
    fitted = tip_adapter.fit(cache, settings, 0)
    images = cache.images("test")
    assert torch.equal(predict(fitted.model, cache, images), predict(build(cache, 2.0, 3.0, 20.0, 5), cache, images))
    assert fitted.chosen["alpha"] == 2
