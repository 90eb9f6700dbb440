"""Against dense matrices: what the probe got wrong out of fold, how it spreads, and where it leaves the probe."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from tests.training.methods.test_label_propagation import mean_of_heard
from training.data import Cache
from training.loop import predict
from training.methods import NotPossible, correct_smooth, read_settings
from training.methods.correct_smooth import Settings
from training.offset import fit_rival

Planted = Callable[[Plan], Cache]
NOISY = Plan(classes=3, train=10, val=4, test=5, noise=3.0)


def settings(**knobs: Any) -> Settings:
    return Settings(with_probe={"method": "ridge", "settings": {"penalty": [1.0]}}, **knobs)


def test_where_nothing_is_heard_it_is_the_probe(planted: Planted) -> None:
    cache = planted(NOISY)
    one = settings(correct=[0.0], smooth=[0.0])
    fitted, rival = correct_smooth.fit(cache, one, 0), fit_rival(cache, one.with_probe)
    images = cache.images("test")
    expected = (predict(rival.probe, cache, images) / rival.temperature).log_softmax(1)
    torch.testing.assert_close(predict(fitted.model, cache, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sources", ["train", "all"])
@pytest.mark.parametrize(("a", "b", "steps"), [(0.8, 0.5, 1), (0.5, 0.8, 3), (0.9, 0.0, 4), (0.0, 0.9, 4)])
def test_it_is_both_iterations_on_the_whole_graph(
    planted: Planted, sources: str, a: float, b: float, steps: int
) -> None:
    cache = planted(NOISY)
    knobs = settings(correct=[a], smooth=[b], steps=steps, sources=sources)
    rival, train, judged = fit_rival(cache, knobs.with_probe), cache.images("train"), cache.images("test")
    p, n = mean_of_heard(cache, knobs), len(cache.paths)
    z = (predict(rival.probe, cache, torch.arange(n)) / rival.temperature).softmax(1).double()
    y = F.one_hot(cache.y, 3).double()
    wrong = torch.zeros(n, 3, dtype=torch.float64)
    wrong[train] = y[train] - rival.out_of_fold[train].softmax(1).double()
    size, e = wrong[train].abs().sum(1).mean(), wrong
    for _ in range(steps):
        e = a * p @ e + (1 - a) * wrong
    # What a judged image hears in the last step, as its own mistake is unknown, scaled to the size of a mistake.
    corrected = z + size * e / e.abs().sum(1, keepdim=True).clamp(min=1e-12)
    start = corrected.clone()
    start[train] = y[train]
    g = start
    for _ in range(steps):
        g = b * p @ g + (1 - b) * start
    expected = g[judged].clamp(min=0)
    found = predict(correct_smooth.fit(cache, knobs, 0).model, cache, judged).softmax(1)
    torch.testing.assert_close(found.double(), expected / expected.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_a_fit_that_explains_everything_leaves_mistakes_to_correct(planted: Planted) -> None:
    cache = planted(NOISY)
    knobs = Settings(with_probe={"method": "ridge", "settings": {"penalty": [1e-3]}}, correct=[0.8], smooth=[0.0])
    rival, train = fit_rival(cache, knobs.with_probe), cache.images("train")
    assert (predict(rival.probe, cache, train).argmax(1) == cache.y[train]).all()
    model = correct_smooth.fit(cache, knobs, 0).model
    assert isinstance(model, correct_smooth.CorrectSmooth)
    assert model.mistakes.abs().sum(1).mean() > 0.1


def test_without_two_images_of_a_class_it_is_not_possible(planted: Planted) -> None:
    with pytest.raises(NotPossible, match=r"no class has training images in two groups.*take more images a class"):
        correct_smooth.fit(planted(Plan(classes=3, train=1, val=4, test=3)), Settings(), 0)


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"method": "sgc"}, "input should be a probe"),
        ({"method": "ridge", "settings": {"features": ["again/zoom"]}}, "again/zoom cannot be among them"),
        (False, "with_probe"),
    ],
)
def test_what_cannot_be_corrected_is_refused(probe: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_settings("params.yaml", "runs.one", "correct_smooth", {"with_probe": probe})
    described = {"with_probe": {"method": "ridge", "settings": {"features": ["descriptions"]}}}
    assert read_settings("params.yaml", "runs.one", "correct_smooth", described)
