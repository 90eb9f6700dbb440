"""Val chooses among probes, each of which is fitted by its own method."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Cache
from training.folds import settle
from training.loop import assess_split, predict
from training.methods import grid, probes, read_settings, search_points, single_points
from training.methods.probes import FAMILY, Settings

Planted = Callable[[Plan], Cache]
HARD = Plan(classes=6, train=12, val=10, test=10, cue="global", noise=3.0, views=2)
ONLY_GLOBAL = {"features": ["global"]}
# Such that each probe is best in some of the cases below.
CASES: list[list[dict[str, Any]]] = [
    [{"method": "linear_probe", "settings": {"l2": [1.0, 0.01]}}, {"method": "ridge"}],
    [{"method": "linear_probe", "settings": {"l2": [100.0]}}, {"method": "ridge", "settings": {"penalty": [1.0, 0.1]}}],
    [{"method": "lda", "settings": {"shrinkage": [0.1, 0.5]}}, {"method": "rbf_ridge", "settings": {"width": [1.0]}}],
    [
        {"method": "linear_probe", "settings": {"l2": [1.0, 0.01], "transform": "signed_sqrt"}},
        {"method": "linear_probe", "settings": {"l2": [1.0, 0.01]}},
    ],
]


def settings_of(candidates: list[dict[str, Any]]) -> Settings:
    return Settings.model_validate({**ONLY_GLOBAL, "candidates": candidates})


@pytest.mark.slow
@pytest.mark.parametrize("candidates", CASES)
def test_the_probe_that_val_prefers_is_kept_as_its_own_method_fits_it(
    planted: Planted, candidates: list[dict[str, Any]]
) -> None:
    cache, settings = planted(HARD), settings_of(candidates)
    test, fitted = cache.images("test"), probes.fit(cache, settings, 0)
    alone = [FAMILY[candidate.method].fit(cache, candidate.of(["global"]), 0) for candidate in settings.candidates]
    scores = [assess_split(one.model, cache, "val") for one in alone]
    best = max(range(len(alone)), key=lambda place: (scores[place][0], -scores[place][1]))
    assert torch.equal(predict(fitted.model, cache, test), predict(alone[best].model, cache, test))
    candidate = settings.candidates[best]
    transform = candidate.settings.get("transform", "none")
    assert fitted.chosen == {"probe": candidate.method, "transform": transform, **alone[best].chosen}
    # A row a look: all that val chooses from, and one fit of a candidate that leaves out.
    assert [row["epoch"] for row in fitted.history] == list(range(1, search_points(settings) + 1))
    top = max(fitted.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert top["candidate"] == best
    assert (top["val_accuracy"], top["val_loss"]) == pytest.approx(scores[best], rel=1e-5)


@pytest.mark.parametrize("candidates", CASES)
def test_a_refit_has_the_probe_and_the_knobs_that_were_chosen(
    planted: Planted, candidates: list[dict[str, Any]]
) -> None:
    cache, settings = planted(HARD), settings_of(candidates)
    fitted = probes.fit(cache, settings, 0)
    settled = settle(settings, fitted.chosen)
    assert isinstance(settled, Settings)
    [candidate] = settled.candidates
    assert candidate.method == fitted.chosen["probe"]
    own = candidate.of(["global"])
    assert grid(own) == {knob: [fitted.chosen[knob]] for knob in grid(own)}
    assert search_points(settled) == 1
    assert settled.candidate(fitted.chosen) == own
    again = probes.fit(cache, settled, 0)
    assert {**again.chosen} == fitted.chosen
    test = cache.images("test")
    torch.testing.assert_close(
        predict(again.model, cache, test), predict(fitted.model, cache, test), atol=5e-3, rtol=5e-3
    )


def test_what_val_chooses_among_is_counted() -> None:
    points = single_points(Settings())
    assert search_points(Settings()) == len(points) == 11
    kinds = [point.candidates[0].method for point in points if isinstance(point, Settings)]
    assert [kinds.count(method) for method in FAMILY] == [6, 1, 1, 3]


def test_of_one_that_leaves_out_val_has_nothing_to_choose(planted: Planted) -> None:
    cache = planted(HARD)
    cache.split[cache.split == "val"] = "none"
    fitted = probes.fit(cache, settings_of([{"method": "ridge"}]), 0)
    assert math.isnan(fitted.history[0]["val_accuracy"])
    with pytest.raises(UserError, match="val holds no image, so nothing can choose among 2 settings of candidates"):
        probes.fit(cache, settings_of([{"method": "ridge"}, {"method": "rbf_ridge"}]), 0)


@pytest.mark.parametrize(
    ("candidates", "what"),
    [
        ([{"method": "ridge"}, {"method": "ridge"}], r"a\.settings\.candidates: .*twice with the same transform"),
        ([{"method": "ridge", "settings": {"features": ["nodes"]}}], r"candidates\.0: .*features stand beside"),
        ([{"method": "ridge", "settings": {"l2": [1.0]}}], r"candidates\.0: .*l2 of its settings: Extra inputs"),
        ([{"method": "ridge", "settings": {"penalty": [-1.0]}}], r"candidates\.0: .*penalty\.0 of its settings"),
        ([{"method": "knn"}], r"candidates\.0\.method: input should be 'linear_probe', 'ridge'"),
        ([{"method": "ridge", "setting": {}}], r"candidates\.0\.setting: unknown key; did you mean `settings`"),
    ],
)
def test_what_is_wrong_with_a_candidate_is_said(candidates: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(UserError, match=what) as raised:
        read_settings("p.yaml", "a", "probes", {"candidates": candidates})
    assert "\n" not in str(raised.value)


def test_a_method_may_stand_there_once_a_transform() -> None:
    given = [{"method": "ridge"}, {"method": "ridge", "settings": {"transform": "signed_sqrt"}}]
    settings = settings_of(given)
    assert [search_points(settings), len(settings.candidates)] == [2, 2]
    assert Settings.model_validate(settings.model_dump()) == settings
