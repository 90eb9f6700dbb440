"""Label smoothing, against what a minimum of the smoothed loss has to fulfil, and against the probe."""

from collections.abc import Callable
from dataclasses import replace

import torch

from tests.training.cache import Plan, seen_twice
from training.data import Cache
from training.layers.features import Features
from training.layers.logistic import assess
from training.loop import predict
from training.methods import label_smoothing, linear_probe

Planted = Callable[[Plan], Cache]
PLAN = Plan(classes=6, train=12, val=6, test=8, cue="global", noise=1.5, dimension=16)


def test_without_smoothing_it_is_the_probe(planted: Planted) -> None:
    cache = planted(PLAN)
    images = cache.images("test")
    probe = predict(linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model, cache, images)
    settings = label_smoothing.Settings(smoothing=[0.0], l2=[0.1])
    ours = predict(label_smoothing.fit(cache, settings, 0).model, cache, images)
    torch.testing.assert_close(ours, probe, atol=1e-3, rtol=1e-3)


def test_the_gradient_of_the_smoothed_loss_is_zero(planted: Planted) -> None:
    """mean over images of x (p - target) + l2 W = 0, and mean of (p - target) = 0: written out by hand."""
    cache, s, l2 = planted(PLAN), 0.3, 0.05
    train = cache.images("train")
    settings = label_smoothing.Settings(smoothing=[s], l2=[l2])
    model = label_smoothing.fit(cache, settings, 0).model
    x = Features.measure(cache, settings).of(cache, train)
    target = torch.full((len(train), 6), s / 6)
    target[torch.arange(len(train)), cache.target[train]] += 1 - s
    residual = predict(model, cache, train).softmax(1) - target
    gradient = residual.T @ x / len(train) + l2 * model.layer.weight
    assert gradient.abs().max() < 1e-4
    assert residual.mean(0).abs().max() < 1e-4


def test_val_chooses_among_all_points(planted: Planted) -> None:
    cache = planted(PLAN)
    fitted = label_smoothing.fit(cache, label_smoothing.Settings(), 0)
    assert len(fitted.history) == 16
    best = max(fitted.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert fitted.chosen == {name: best[name] for name in ("l2", "smoothing")}
    val = cache.images("val")
    accuracy, loss = assess(predict(fitted.model, cache, val), cache.y[val])
    assert abs(accuracy - best["val_accuracy"]) < 1e-6
    assert abs(loss - best["val_loss"]) < 1e-4
    # What is told in probabilities is smoothed as they stand.
    soft = torch.nn.functional.one_hot(cache.target, 6).float()
    other = label_smoothing.fit(replace(cache, target=soft), label_smoothing.Settings(), 0)
    assert other.chosen == fitted.chosen


def test_a_view_that_is_a_copy_changes_nothing(planted: Planted) -> None:
    cache = planted(PLAN)
    twice, images = seen_twice(cache), cache.images("test")
    settings = label_smoothing.Settings(smoothing=[0.2], l2=[0.1])
    once = predict(label_smoothing.fit(cache, settings, 0).model, cache, images)
    again = predict(label_smoothing.fit(twice, settings, 0).model, twice, images)
    torch.testing.assert_close(again, once, atol=1e-3, rtol=1e-3)
