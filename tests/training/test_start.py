from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.layers.logistic import L2_WITHOUT_VAL
from training.loop import predict
from training.methods import attention_pool, concept_graph, linear_probe
from training.regimes import hide_test

STARTED = pytest.mark.parametrize("method", [attention_pool, concept_graph], ids=lambda module: module.__name__)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    """Three views of few images: what is fitted on one view alone is another probe."""
    return planted(Plan(train=6, views=3, noise=2.0))


@STARTED
@pytest.mark.parametrize("few", [False, True])
def test_epoch_0_is_the_tuned_probe_to_the_bit(cache: Cache, method: object, few: bool) -> None:
    told = hide_test(cache)
    settings = linear_probe.Settings()
    if few:
        told = replace(told, split=np.where(told.split == "val", "unused", told.split))
        settings = linear_probe.Settings(l2=[L2_WITHOUT_VAL])
    images = torch.arange(len(cache.paths))
    probe = predict(linear_probe.fit(told, settings, 0).model, cache, images)
    started = method.fit(told, method.Settings(epochs=0, weight_decay=[0.1]), 5)  # type: ignore[attr-defined]
    assert torch.equal(predict(started.model, cache, images), probe)
    if not few:
        assert started.history[0]["val_accuracy"] == max(
            row["val_accuracy"] for row in linear_probe.fit(told, settings, 0).history
        )
