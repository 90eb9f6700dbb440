"""SMOTE: where a long tail is forgotten it is remembered, and where nothing is forgotten nothing is gained."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.layers.features import Features
from training.loop import predict
from training.methods import linear_probe, smote
from training.metrics import macro_accuracy
from training.regimes import LongTail
from training.synthesis import synthesise

Planted = Callable[[Plan], Cache]


def macro(cache: Cache, l2: float = 0.1, **knobs: object) -> tuple[float, float]:
    """Mean accuracy of the classes, of the probe and of SMOTE."""
    test = cache.images("test")
    models = (
        linear_probe.fit(cache, linear_probe.Settings(l2=[l2]), 0).model,
        smote.fit(cache, smote.Settings(l2=[l2], **knobs), 0).model,
    )
    y = cache.y[test].numpy()
    plain, ours = (macro_accuracy(predict(model, cache, test).numpy(), y) for model in models)
    return plain, ours


def tail(planted: Planted, noise: float, test: int = 60) -> Cache:
    plan = Plan(classes=6, train=60, val=10, test=test, cue="global", noise=noise, dimension=16)
    return LongTail(imbalance=20).apply(planted(plan), 0)


@pytest.mark.slow
def test_it_helps_a_tail_whose_classes_overlap(planted: Planted) -> None:
    plain, ours = macro(tail(planted, noise=2.0))
    assert ours > plain + 0.05


@pytest.mark.slow
def test_it_gains_nothing_where_classes_lie_apart(planted: Planted) -> None:
    plain, ours = macro(tail(planted, noise=0.3), l2=1e-3)
    assert plain > 0.99
    assert ours - plain < 0.01


def test_equal_classes_leave_the_probe(planted: Planted) -> None:
    cache = planted(Plan(noise=1.5))
    test = cache.images("test")
    probe = predict(linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model, cache, test)
    ours = predict(smote.fit(cache, smote.Settings(l2=[0.1]), 0).model, cache, test)
    torch.testing.assert_close(ours, probe, atol=1e-4, rtol=1e-4)


def test_the_objective_is_the_weighed_mean_over_real_and_synthetic_images(planted: Planted) -> None:
    cache, settings = tail(planted, noise=1.5, test=2), smote.Settings(l2=[0.05], weight=0.25)
    model = smote.fit(cache, settings, 0).model
    features, train = Features.measure(cache, settings), cache.images("train")
    x = features.of_training(cache)
    made = synthesise(cache, features, x, settings, 0)
    layer = model.layer.requires_grad_()
    real = F.cross_entropy(layer(x), cache.y[train], reduction="sum")
    synthetic = F.cross_entropy(layer(made.x), made.told.argmax(1), reduction="sum")
    loss = (real + 0.25 * synthetic) / (len(x) + 0.25 * len(made.x)) + 0.05 / 2 * layer.weight.square().sum()
    gradient = torch.autograd.grad(loss, layer.weight)[0]
    assert gradient.abs().max() < 1e-3  # a minimum
