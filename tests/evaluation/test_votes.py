"""Votes against a loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation import accuracies
from evaluation.calibration import SETS, calibrate
from evaluation.runs import Run, read_logits, read_run
from evaluation.votes import calibrate_votes, vote
from tests.training.cache import ENCODER
from training.metrics import Floats, softmax


def test_votes_are_the_mean_of_log_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits, groups = rng.standard_normal((30, 4)), rng.integers(7, size=30)
    names, voted = vote(logits, groups)
    assert names.tolist() == sorted(set(groups.tolist()))
    for name, one in zip(names, voted, strict=True):
        for temperature in (1.0, 3.0):
            expected = np.exp(np.log(softmax(logits[groups == name] / temperature)).mean(0))
            np.testing.assert_allclose(softmax(one[None] / temperature)[0], expected / expected.sum())


def test_a_sure_picture_outvotes_two_unsure_ones() -> None:
    logits = np.log([[0.45, 0.55], [0.45, 0.55], [0.95, 0.05]])
    assert vote(logits, np.zeros(3, int))[1].argmax(1).tolist() == [0]


def test_a_picture_alone_and_copies_of_it_are_as_sure() -> None:
    logits = np.log([[0.7, 0.2, 0.1]])
    voted = vote(np.repeat(logits, 4, axis=0), np.array([1, 1, 1, 2]))[1]
    np.testing.assert_allclose(softmax(voted), np.repeat(softmax(logits), 2, axis=0))


def test_limits_of_votes_hold_for_groups_and_those_of_pictures_do_not() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(5, size=600)
    # Frames of a group share what is hard about it: 6 frames are hardly surer than one, whatever their number.
    shared = 2 * np.eye(5)[y] + 1.5 * rng.standard_normal((600, 5))
    logits = np.repeat(shared, 6, axis=0) + 2.5 * rng.standard_normal((3600, 5))
    labels, groups, half = np.repeat(y, 6), np.repeat(np.arange(600), 6), np.arange(3600) < 1800
    classes = list("abcde")
    found = calibrate_votes(logits[half], labels[half], groups[half], classes)
    assert found is not None
    assert found.units == 300
    votes = vote(logits[~half], groups[~half])[1]
    covered = found.sets(found.probabilities(votes))[np.arange(300), y[300:]].mean()
    one = calibrate(logits[half], labels[half], groups[half], classes)
    by_pictures = one.sets(one.probabilities(votes))[np.arange(300), y[300:]].mean()
    assert found.limits[SETS] is not None
    assert 0.85 < covered < 0.95  # 0.9, and three deviations of 300 groups after 300
    assert abs(by_pictures - 0.9) > abs(covered - 0.9)


def test_a_group_of_two_classes_has_no_class_to_be_right_about() -> None:
    logits = np.log([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    found = calibrate_votes(logits, np.array([0, 0, 1, 0]), ["a", "b", "b", "a"], ["x", "y"])
    assert found is not None
    assert found.images == found.units == 1
    assert calibrate_votes(logits[:2], np.array([0, 1]), ["a", "a"], ["x", "y"]) is None


def test_logits_of_one_split_are_read_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def read(data: Path, run: Run, splits: Sequence[str] = ()) -> Floats:
        asked.append(splits)
        return read_logits(data, run, splits)

    monkeypatch.setattr(accuracies, "read_logits", read)
    found = read_run(data, "linear_probe", ENCODER)
    assert isinstance(found, Run)
    # Tracks of two pictures; of test, one picture of class-00 is taken for another: its track may go either way.
    [row] = accuracies.vote_rows(data, [found], {path: f"{path[:-5]}{int(path[-5]) // 2}" for path in found.paths})
    assert asked == [["val"], ["test"]]
    assert row["val"] == (1.0, 6)
    assert row["test"][1] == 6
