"""Folds: who is held out, who chooses, and that what was chosen is what is fitted again."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Cache
from training.folds import HELD_OUT, deal, refit, settle, split_fold
from training.layers.logistic import STRENGTHS
from training.methods import borrows_others, load_method, method_names
from training.methods.attention_pool import Settings, fit
from training.regimes import Folds, Shots, hide_test
from training.start import starting_point

PLAN = Plan(classes=3, train=20, val=6, test=4, noise=1.5, seed=5)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(PLAN)


def tracks(cache: Cache) -> Cache:
    """Four images of a class to a track, of train and val alike."""
    return replace(cache, groups=[f"track {int(y)} {number % 7}" for number, y in enumerate(cache.y)])


def test_each_development_image_is_held_out_once_and_test_never(cache: Cache) -> None:
    splits = np.stack([Folds(folds=4).apply(cache, number).split for number in range(4)])
    development = np.isin(cache.split, ("train", "choose", "val"))
    assert ((splits == HELD_OUT).sum(0) == development).all()
    assert (splits[:, ~development] == "unused").all()
    assert np.isin(splits[:, development], ("train", "choose", HELD_OUT)).all()


def test_groups_stay_whole_in_both_splits(cache: Cache) -> None:
    grouped = tracks(cache)
    development = np.isin(cache.split, ("train", "choose", "val"))
    for number in range(3):
        split = split_fold(grouped, 3, number).split
        for group in set(grouped.groups):
            of_group = np.array([one == group for one in grouped.groups]) & development
            assert len(set(split[of_group])) <= 1


def test_an_image_more_moves_no_other(planted: Callable[[Plan], Cache], cache: Cache) -> None:
    more = planted(replace(PLAN, train=PLAN.train + 1))
    for number in range(5):
        before, after = (
            dict(zip(one.paths, (split_fold(one, 5, number).split == HELD_OUT).tolist(), strict=True))
            for one in (cache, more)
        )
        assert len(after) == len(before) + PLAN.classes
        assert {path: after[path] for path in before} == before


def test_the_deal_is_even_as_draws_are() -> None:
    counts = np.bincount([deal(f"fold {number}", 5) for number in range(5000)])
    assert np.abs(counts - 1000).max() < 4 * (5000 * 0.2 * 0.8) ** 0.5


def test_too_few_groups_are_refused(cache: Cache) -> None:
    one = replace(cache, groups=["the only one"] * len(cache.paths))
    with pytest.raises(UserError, match=r"folds-5: fold \d has no .* image: there are 1 groups or images to deal"):
        split_fold(one, 5, 0)


def test_fit_is_told_no_label_of_an_image_that_is_held_out(cache: Cache) -> None:
    told = hide_test(split_fold(cache, 3, 1))
    held = told.split == HELD_OUT
    assert held.any()
    assert (told.y[torch.from_numpy(held)] == -1).all()
    assert all(path.startswith("hidden/") for path, gone in zip(told.paths, held, strict=True) if gone)
    last = hide_test(refit(split_fold(cache, 3, 1)))
    assert last.images("val").numel() == 0
    assert last.images("train").numel() == told.images("train").numel() + told.images("val").numel()


@pytest.mark.parametrize("name", method_names())
def test_what_was_chosen_is_fitted_again_without_val(cache: Cache, name: str) -> None:
    module, fold = load_method(name), split_fold(replace(cache, others=cache if borrows_others(name) else None), 3, 0)
    settings = module.Settings()
    if hasattr(settings, "epochs"):
        settings = settings.model_copy(update={"epochs": 1, "lr": [1e-3, 1e-2]})
    if hasattr(settings, "max_iterations"):
        settings = settings.model_copy(update={"max_iterations": 5})
    chosen = module.fit(hide_test(fold), settings, 0).chosen
    # More than one point, without val, would raise. Temperatures and a predictor's AUC are measured, and not chosen.
    again = module.fit(hide_test(refit(fold)), settle(settings, chosen), 0).chosen
    measured = {key: chosen.get(key) for key in ("with_probe.temperature", "link_auc")}
    assert again.keys() == chosen.keys()
    assert again | measured == chosen | measured


def test_a_fit_that_does_not_say_what_val_chose_is_named() -> None:
    with pytest.raises(UserError, match=r"training\.methods\.attention_pool: fit does not say which weight_decay val"):
        settle(Settings(), {"epoch": 3, "lr": 0.1})


def test_a_schedule_that_stops_is_the_searched_one(cache: Cache) -> None:
    """The epochs before the stop are those of the whole cosine, and not of a shorter one."""
    few = Shots(shots=8).apply(cache, 0)
    whole, stopped, shorter = (
        fit(few, Settings(hidden=8, weight_decay=[0.1], batch_size=8, **knobs), 0).history
        for knobs in ({"epochs": 6}, {"epochs": 6, "stop": 3}, {"epochs": 3})
    )
    losses = [[row["train_loss"] for row in history[:4]] for history in (whole, stopped, shorter)]
    assert len(stopped) == len(shorter) == 4
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_val_has_no_say_in_a_start_of_a_given_strength(cache: Cache) -> None:
    free, given = starting_point(cache), starting_point(cache, 10.0)
    assert free.chosen["start_l2"] in STRENGTHS
    assert given.chosen == {"start_l2": 10.0}
    wrong = replace(cache, y=torch.where(torch.from_numpy(cache.split == "val"), (cache.y + 1) % 3, cache.y))
    assert torch.equal(given.probe.weight, starting_point(wrong, 10.0).probe.weight)
