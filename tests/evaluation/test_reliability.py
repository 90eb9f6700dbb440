"""What a calibration is worth: the curve against a loop, cross-fitting against new images, and the words."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from evaluation.calibration import calibrate
from evaluation.reliability import cross_judge, describe, judge, risk_coverage
from fieldmark.command import UserError
from tests.evaluation.test_backoff import population

CLASSES = [f"{number}" for number in range(12)]
LINEAGES = [(f"taxon {number // 3}",) for number in range(12)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_the_curve_is_that_of_a_loop(seed: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, wrong = rng.permutation(images) / images, rng.random(images) < 0.3
    coverage, risk = risk_coverage(confidence, wrong)
    order = sorted(range(images), key=lambda image: -confidence[image])
    for k in range(1, images + 1):
        assert coverage[k - 1] == k / images
        assert risk[k - 1] == pytest.approx(sum(wrong[image] for image in order[:k]) / k)


def test_equally_sure_pictures_have_no_order() -> None:
    for wrong in ([0, 1, 0, 0], [0, 0, 0, 1]):
        risk = risk_coverage(np.array([0.9, 0.5, 0.5, 0.5]), np.array(wrong))[1]
        np.testing.assert_allclose(risk, [0, 1 / 6, 2 / 9, 1 / 4])


def test_cross_fitting_tells_what_new_images_show() -> None:
    rng = np.random.default_rng(3)
    logits, y = population(400, rng)
    new, truth = population(20_000, rng)
    told = cross_judge(logits, y, None, CLASSES, LINEAGES)
    shown = judge(calibrate(logits, y, None, CLASSES, LINEAGES), new, truth)
    assert (told.images, told.units, shown.images) == (400, 400, 20_000)
    for name in ("APS", "LAC"):
        low, high = binom(400, shown.sets[name].coverage).interval(0.999)
        assert low <= 400 * told.sets[name].coverage <= high
        assert told.sets[name].size == pytest.approx(shown.sets[name].size, rel=0.1)
    assert told.accuracy == pytest.approx(shown.accuracy, abs=0.06)
    assert told.aurc == pytest.approx(shown.aurc, abs=0.03)
    assert shown.calibration_error[0] > 0.05 > 0.02 > shown.calibration_error[1]
    assert told.calibration_error == pytest.approx(shown.calibration_error, abs=0.03)
    assert told.backoff.answered == pytest.approx(shown.backoff.answered, abs=0.1)
    assert sum(shown.backoff.ranks) == pytest.approx(shown.backoff.answered)
    assert shown.backoff.wrong is not None
    assert shown.backoff.wrong <= 0.05


def test_no_image_is_judged_by_itself() -> None:
    """Two images: each is judged by a calibration on the other, which promises nothing."""
    logits, y = population(2, np.random.default_rng(0))
    worth = cross_judge(logits, y, None, CLASSES)
    assert (worth.sets["APS"].coverage, worth.sets["APS"].size) == (1, 12)
    assert (worth.backoff.answered, worth.backoff.wrong) == (0, None)
    with pytest.raises(UserError, match="fewer than two images or groups"):
        cross_judge(logits, y, ["track", "track"], CLASSES)


def test_a_group_counts_once() -> None:
    """Ninety images that are right, and one group of ninety that is wrong: a ninety-first, and half of all."""
    logits, y = 10 * np.eye(12)[np.arange(180) % 12], np.arange(180) % 12
    wrong = np.r_[y[:90], (y[90:] + 1) % 12]
    groups = [*range(90), *[90] * 90]
    found = calibrate(*population(300, np.random.default_rng(0)), None, CLASSES, error=0.2)
    worth = judge(found, logits, wrong, groups)
    assert worth.accuracy == 0.5
    assert worth.sets["APS"].coverage == pytest.approx(90 / 91)
    assert worth.backoff.wrong == pytest.approx(1 / 91)


def test_errors_by_rank_and_distance() -> None:
    found = calibrate(*population(300, np.random.default_rng(0)), None, CLASSES, LINEAGES)
    y = np.array([0, 0, 0, 3])
    worth = judge(found, 10 * np.eye(12)[[0, 1, 3, 3]], y)
    assert [(row.rank, row.errors) for row in worth.ranks] == [(0, 0.5), (1, 0.25)]
    assert worth.taxonomic_distance == 1.5


def test_what_is_shown() -> None:
    logits, y = population(300, np.random.default_rng(0))
    found, worth = calibrate(logits, y, None, CLASSES, LINEAGES), cross_judge(logits, y, None, CLASSES, LINEAGES)
    shown = describe(found, worth)
    assert json.loads(json.dumps(shown))["reliability"]["images"] == 300
    rows = {row["label"]: (row["value"], row["meaning"]) for row in shown["rows"]}
    assert list(rows) == [
        "calibration error",
        "sets that hold the class, asked 90.0 %",
        "answers that are wrong, asked 5.0 % at most",
        "pictures with an answer",
        "AURC",
        "wrong at rank 0",
        "wrong at rank 1",
        "taxonomic distance",
    ]
    coverage = f"{100 * worth.sets['APS'].coverage:.1f} +- "
    assert rows["sets that hold the class, asked 90.0 %"][0].startswith(coverage)
    assert asdict(worth)["aurc"] == worth.aurc

    few = describe(calibrate(logits[:8], y[:8], None, CLASSES), cross_judge(logits[:8], y[:8], None, CLASSES))
    rows = {row["label"]: (row["value"], row["meaning"]) for row in few["rows"]}
    assert rows["sets that hold the class, asked 90.0 %"][0] == "never: too few with 8 images"
    wrong = ("no answer", "never sure enough at 5.0 % with 8 images")
    assert rows["answers that are wrong, asked 5.0 % at most"] == wrong
    assert rows["pictures with an answer"][0] == "none"
    assert "taxonomic distance" not in rows
