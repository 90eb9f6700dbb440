from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import linear_probe, lpp


@pytest.fixture
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(noise=3.0))


def test_logits_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    text, x = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)
    layer = lpp.BlendedLinear(text)
    nn.init.normal_(layer.weight, generator=generator)
    nn.init.normal_(layer.bias, generator=generator)
    for image in range(2):
        for label in range(3):
            w, alpha = layer.weight[label, :-1], layer.weight[label, -1]
            expected = x[image] @ (w + alpha * text[label]) + layer.bias[label]
            torch.testing.assert_close(layer(x)[image, label], expected)


def test_without_its_texts_it_is_the_linear_probe(cache: Cache) -> None:
    images = cache.images("test")
    ours = lpp.fit(cache, lpp.Settings(l2=[0.1], text_scale=[0.0]), 0)
    probe = linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0)
    torch.testing.assert_close(
        predict(ours.model, cache, images), predict(probe.model, cache, images), atol=1e-2, rtol=1e-2
    )


def test_texts_that_tell_the_classes_carry_it_where_images_may_not(cache: Cache) -> None:
    # The class texts are near what was planted; a penalty this strong leaves the probe next to nothing to say.
    images = cache.images("test")
    ours = lpp.fit(cache, lpp.Settings(l2=[10.0], text_scale=[100.0]), 0)
    probe = linear_probe.fit(cache, linear_probe.Settings(l2=[10.0]), 0)
    loss = [
        nn.functional.cross_entropy(predict(fitted.model, cache, images), cache.y[images]) for fitted in (ours, probe)
    ]
    assert loss[0] < 0.8 * loss[1]


def test_val_chooses_among_all_points(cache: Cache) -> None:
    fitted = lpp.fit(cache, lpp.Settings(l2=[10.0, 0.1], text_scale=[1.0, 10.0]), 0)
    assert [row["epoch"] for row in fitted.history] == [1, 2, 3, 4]
    best = max(fitted.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert fitted.chosen == {"l2": best["l2"], "text_scale": best["text_scale"]}
