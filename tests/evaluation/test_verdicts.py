"""Verdicts and answers in plain words, on results whose answer is known."""

import re

import numpy as np
import pytest

from evaluation.plan import Question
from evaluation.verdicts import Answer, Result, Table, Verdict, answer, figures_of, figures_of_unseen, judge
from training.controls import Control
from training.regimes import Full

N, CLASSES = 400, 40
Y = np.repeat(np.arange(CLASSES), N // CLASSES)


def result(
    method: str, right: np.ndarray, control: str = "none", concepts: int | None = None, reads: bool = True
) -> Result:
    """Of a method that reads concepts, or does not."""
    applied = Control.model_validate({"name": control, "concepts": concepts})
    return Result(method, applied, Control(concepts=concepts if reads else None), np.atleast_2d(right), [{}])


def verdicts(*results: Result) -> dict[str, Verdict]:
    found = judge(Table("tiny", Full(), [f"{n}" for n in range(N)], Y, list(results)), None)
    return {f"{one.result.method} {one.result.control.label}": one for one in found}


def rate(share: float, seed: int = 0, like: np.ndarray | None = None) -> np.ndarray:
    """(n,): right on about `share` of the images; of those that `like` has wrong, where it is given."""
    drawn = np.random.default_rng(seed).random(N) < share
    return drawn if like is None else like | drawn


def swapped(right: np.ndarray, images: int) -> np.ndarray:
    """As many right, but so many of them others."""
    swapped = right.copy()
    swapped[np.flatnonzero(right)[::9][:images]] = False
    swapped[np.flatnonzero(~right)[::9][:images]] = True
    return swapped


PROBE = rate(0.6)
BETTER, SAME, WORSE = rate(0.3, 1, PROBE), swapped(PROBE, 10), PROBE & rate(0.8, 3)


def test_verdicts_against_the_probe() -> None:
    found = verdicts(result("linear_probe", PROBE), result("a", BETTER), result("b", SAME), result("c", WORSE))
    assert [one.words for one in found.values()] == [
        "the probe",
        "beats the probe",
        "no difference shown",
        "worse than the probe",
    ]
    assert [one.paired is None for one in found.values()] == [True, False, False, False]
    assert [one.p is None for one in found.values()] == [True, False, False, False]


def test_a_gain_that_hangs_on_a_few_classes_is_said_to_be_of_these() -> None:
    few = PROBE | (Y == 3) | (Y == 8)
    found = verdicts(result("linear_probe", PROBE), result("a", few))["a none"]
    assert found.words == "beats the probe on these classes"


def test_a_method_that_does_not_beat_its_control_is_said_so() -> None:
    found = verdicts(
        result("linear_probe", PROBE),
        result("a", BETTER),
        result("a", swapped(BETTER, 5), "random_vectors"),
        result("a", PROBE, "edges_removed"),
    )
    assert found["a none"].words == (
        "beats the probe; does not beat its control random_vectors: the texts do nothing here"
    )
    assert found["linear_probe none"].words == "the probe"
    shown, not_shown = found["a edges_removed"].words, found["a random_vectors"].words
    assert re.fullmatch(r"control: the method is \+\d+\.\d \[\+.*\] ahead, p <?0\.\d+", shown)
    assert not_shown.endswith(": not shown to be")


def test_a_control_stands_against_as_many_concepts() -> None:
    found = verdicts(
        result("linear_probe", PROBE),
        result("a", PROBE),
        result("a", BETTER, concepts=5),
        result("a", PROBE, "random_vectors", 5),
        result("a", PROBE, "random_vectors", 9),
        result("b", BETTER),
        result("b", PROBE, "random_vectors", 5, reads=False),
    )
    assert "ahead" in found["a random_vectors-5"].words
    assert "not shown" not in found["a random_vectors-5"].words
    assert found["a none"].words == "no difference shown"
    assert found["a random_vectors-9"].words == "control of none-9, which the table does not have"
    # What reads no concepts needs no run with fewer: its plain one is that.
    assert "ahead" in found["b random_vectors-5"].words


def test_many_methods_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:7]] = True
    a[np.flatnonzero(PROBE)[:1]] = False
    alone = verdicts(result("linear_probe", PROBE), result("a", a))
    among = verdicts(result("linear_probe", PROBE), result("a", a), *(result(f"b{n}", SAME) for n in range(8)))
    assert alone["a none"].words.startswith("beats the probe")
    assert among["a none"].words == "no difference shown"
    assert alone["a none"].paired == among["a none"].paired or alone["a none"].paired is not None


def test_draws_are_paired_and_one_run_stands_for_all() -> None:
    draws = np.stack([rate(0.5, seed) for seed in range(20)])
    found = verdicts(result("linear_probe", draws), result("a", draws | (np.arange(N) % 20 == 0)))["a none"]
    assert found.words == "beats the probe"
    assert found.paired is not None
    assert found.paired.images[1] - found.paired.images[0] < 0.04  # draws differ by far more
    assert verdicts(result("linear_probe", draws), result("a", BETTER))["a none"].words == "beats the probe"


def answers(*results: Result, pairs: list[tuple[str, str]]) -> list[Answer]:
    table = Table("tiny", Full(), [f"{n}" for n in range(N)], Y, list(results))
    return answer(table, [Question(ask=f"{of}?", of=of, against=against) for of, against in pairs], None)


def test_questions_are_answered_in_plain_words() -> None:
    results = [result("p", PROBE), result("a", BETTER), result("b", SAME), result("c", PROBE | (Y == 3) | (Y == 8))]
    results.append(result("a", WORSE, "random_vectors"))  # no part of an answer
    better, worse, same, few = answers(*results, pairs=[("a", "p"), ("p", "a"), ("b", "p"), ("c", "p")])
    assert better.words == "yes"
    assert worse.words == "no: the other way round"
    assert re.fullmatch(r"no difference shown: the interval holds \[-\d\.\d, \+\d\.\d\]", same.words)
    assert few.words == "yes on these classes"
    assert better.paired.difference == pytest.approx(BETTER.mean() - PROBE.mean())
    assert better.paired.difference == -worse.paired.difference


def test_many_questions_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:7]] = True
    a[np.flatnonzero(PROBE)[:1]] = False
    results = [result("p", PROBE), result("a", a), result("b", SAME)]
    (alone,) = answers(*results, pairs=[("a", "p")])
    among = answers(*results, pairs=[("a", "p"), *[("b", "p")] * 8])[0]
    assert alone.words.startswith("yes")
    assert among.words.startswith("no difference shown")
    assert among.p == pytest.approx(9 * alone.p)
    assert among.paired == alone.paired


def test_a_question_pairs_draws_and_one_run_stands_for_all() -> None:
    draws = np.stack([rate(0.5, seed) for seed in range(20)])
    results = [result("p", draws), result("a", draws | (np.arange(N) % 20 == 0)), result("b", BETTER)]
    gain, once = answers(*results, pairs=[("a", "p"), ("b", "p")])
    assert gain.words == once.words == "yes"
    assert gain.paired.images[1] - gain.paired.images[0] < 0.04  # draws differ by far more


def test_seen_and_unseen_label_spaces_by_hand() -> None:
    # Class 0 was trained on, 1 is unseen, 2 is in neither.
    logits = np.array([[3, 2, 9], [1, 2, 9], [2, 1, 9], [0, 5, 9], [0, 0, 0]], dtype=np.float32)
    y, splits = np.array([0, 0, 1, 1, 0]), np.array(["test", "test", "test", "test", "train"])
    joint, found = figures_of_unseen(logits, y, splits, "test")
    assert found == {"seen": 1.0, "unseen": 1.0, "harmonic": 0.5}
    assert np.isneginf(joint[:, 2]).all()
    assert figures_of(joint, y, splits, "test")["accuracy"] == 0.5
