"""Nearest-neighbour cleaning, against a loop, and on labels that are planted wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan, seen_twice
from training.data import Cache
from training.layers.told_labels import spare_classes
from training.loop import assess_split, predict
from training.methods import linear_probe, neighbour_cleaning
from training.regimes import Noise

Planted = Callable[[Plan], Cache]
PLAN = Plan(classes=6, train=40, val=20, test=50, cue="global", noise=1.5, dimension=32)


def test_votes_are_those_of_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_cleaning, "BLOCK", 7)  # in several blocks
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator)
    told = F.one_hot(torch.randint(3, (30,), generator=generator), 3).float()
    groups = [f"group-{number % 15}" for number in range(30)]
    found = neighbour_cleaning.votes(x, told, groups, 5).numpy()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for image in range(30):
        cosine = unit @ unit[image]
        near = [other for other in np.argsort(-cosine) if groups[other] != groups[image]][:5]
        np.testing.assert_allclose(found[image], told.numpy()[near].sum(0))
    assert neighbour_cleaning.votes(x[:3], told[:3], groups[:3], 5).sum(1).tolist() == [2, 2, 2]  # itself is none
    assert neighbour_cleaning.votes(x[:3], told[:3], ["a", "a", "b"], 5).sum(1).tolist() == [1, 1, 2]


def test_neighbours_are_looked_for_once_for_all_strengths(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, votes = [], neighbour_cleaning.votes

    def counted(x: Tensor, told: Tensor, groups: Sequence[str], k: int) -> Tensor:
        asked.append(k)
        return votes(x, told, groups, k)

    monkeypatch.setattr(neighbour_cleaning, "votes", counted)
    cache = planted(Plan(classes=3, train=6, val=2, test=2))
    neighbour_cleaning.fit(cache, neighbour_cleaning.Settings(k=[0, 2, 3], l2=[1.0, 0.1]), 0)
    assert sorted(asked) == [2, 3]


@pytest.mark.slow
def test_a_view_that_is_a_copy_changes_nothing(planted: Planted) -> None:
    cache = Noise(wrong="symmetric", share=0.4).apply(planted(PLAN), 0)
    twice, images, settings = seen_twice(cache), cache.images("test"), neighbour_cleaning.Settings(k=[10], l2=[0.1])
    once = predict(neighbour_cleaning.fit(cache, settings, 0).model, cache, images)
    again = predict(neighbour_cleaning.fit(twice, settings, 0).model, twice, images)
    torch.testing.assert_close(again, once, atol=1e-3, rtol=1e-3)


def test_a_class_that_would_vanish_keeps_its_images() -> None:
    kept = torch.tensor([True, False, False, False])
    assert spare_classes(kept, torch.tensor([0, 0, 1, 1])).tolist() == [True, False, True, True]


@pytest.mark.parametrize("clean", ["drop", "relabel"])
def test_the_probe_gains_where_labels_are_wrong(planted: Planted, clean: str) -> None:
    cache = Noise(wrong="symmetric", share=0.4).apply(planted(PLAN), 0)
    probe = assess_split(linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model, cache, "test")[0]
    settings = neighbour_cleaning.Settings(k=[10], l2=[0.1], clean=clean)
    assert assess_split(neighbour_cleaning.fit(cache, settings, 0).model, cache, "test")[0] > probe + 0.03


def test_without_neighbours_it_is_the_probe(planted: Planted) -> None:
    cache = planted(PLAN)
    images = cache.images("test")
    probe = predict(linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model, cache, images)
    none = neighbour_cleaning.fit(cache, neighbour_cleaning.Settings(k=[0], l2=[0.1]), 0)
    torch.testing.assert_close(predict(none.model, cache, images), probe, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_relabelling_tells_the_neighbours_class_and_dropping_leaves_it_out(planted: Planted) -> None:
    """One wrong label among clean classes far apart: told right again, the fit is the clean one; dropped, nearly."""
    clean = planted(replace(PLAN, noise=0.3))
    image = int(clean.images("train")[0])
    target = clean.target.clone()
    target[image] = (target[image] + 1) % 6
    cache = replace(clean, target=target)
    images = cache.images("test")
    whole = predict(linear_probe.fit(clean, linear_probe.Settings(l2=[0.1]), 0).model, clean, images)
    ours = predict(
        neighbour_cleaning.fit(cache, neighbour_cleaning.Settings(k=[5], l2=[0.1], clean="relabel"), 0).model,
        cache,
        images,
    )
    torch.testing.assert_close(ours, whole, atol=1e-3, rtol=1e-3)
    dropped = neighbour_cleaning.fit(cache, neighbour_cleaning.Settings(k=[5], l2=[0.1]), 0)
    split = clean.split.copy()
    split[image] = "unused"
    # The mean of the vectors is still that of all training images, so that the two differ in that alone.
    without = replace(clean, split=split)
    other = predict(linear_probe.fit(without, linear_probe.Settings(l2=[0.1]), 0).model, without, images)
    torch.testing.assert_close(predict(dropped.model, cache, images), other, atol=5e-2, rtol=5e-2)
