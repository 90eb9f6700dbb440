"""Verdicts and answers in plain words, on results whose answer is known."""

import re
from functools import partial

import numpy as np
import pytest

from evaluation import verdicts as module
from evaluation.plan import Question
from evaluation.statistics import UNITS, paired_differences
from evaluation.verdicts import Answer, Result, Table, Verdict, answer, figures_of, judge, read_unseen
from training.controls import Control
from training.regimes import Full, Regime, Shots, Unseen, harmonic_mean

N, CLASSES = 400, 40
Y = np.repeat(np.arange(CLASSES), N // CLASSES)


def result(
    method: str, right: np.ndarray, control: str = "none", concepts: int | None = None, reads: bool = True
) -> Result:
    """Of a method that reads concepts, or does not."""
    applied = Control.model_validate({"name": control, "concepts": concepts})
    return Result(method, applied, Control(concepts=concepts if reads else None), np.atleast_2d(right), [{}])


def table_of(*results: Result, groups: np.ndarray | None = None, regime: Regime | None = None) -> Table:
    return Table("tiny", regime or Full(), [f"{n}" for n in range(N)], Y, list(results), groups)


def verdicts(*results: Result, groups: np.ndarray | None = None, regime: Regime | None = None) -> dict[str, Verdict]:
    [found] = judge([table_of(*results, groups=groups, regime=regime)])
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
        result("a", BETTER | rate(0.5, 5), "owners_permuted"),
    )
    assert found["a none"].words == (
        "beats the probe; not shown to beat its control random_vectors: not shown that the texts do anything here;"
        " worse than its control owners_permuted"
    )
    assert found["linear_probe none"].words == "the probe"
    shown, not_shown = found["a edges_removed"].words, found["a random_vectors"].words
    assert re.fullmatch(r"control: the method is \+\d+\.\d \[\+.*\] ahead, p <?0\.\d+", shown)
    assert not_shown.endswith(": not shown to be")
    assert found["a owners_permuted"].words.endswith(": it is behind")


def test_nothing_is_said_to_do_nothing_but_within_the_margin() -> None:
    few, many = swapped(BETTER, 1), swapped(BETTER, 25)
    found = verdicts(
        result("linear_probe", PROBE),
        result("a", BETTER),
        result("a", few, "random_vectors"),
        result("a", many, "unrelated_texts"),
        result("b", swapped(PROBE, 1)),
        result("c", swapped(PROBE, 25)),
    )
    assert found["a none"].words == (
        "beats the probe; equivalent to its control random_vectors within 1 point: the texts do nothing here;"
        " not shown to beat its control unrelated_texts: not shown that what the texts say does anything here"
    )
    assert found["a random_vectors"].words.endswith(": equivalent within 1 point")
    assert found["b none"].words == "equivalent to the probe within 1 point"
    assert found["c none"].words == "no difference shown"
    paired = found["c none"].paired
    assert paired is not None
    assert paired.half_width > 0.03 > abs(paired.difference)  # so much could have been there


def test_a_difference_that_is_shown_and_small_is_said_to_be_small() -> None:
    n = 4000
    probe = np.random.default_rng(0).random(n) < 0.8
    more = probe.copy()
    more[np.flatnonzero(~probe)[:24]] = True
    classes = np.arange(n) % 50
    paths = [f"{image}" for image in range(n)]
    table = Table("tiny", Full(), paths, classes, [result("linear_probe", probe), result("a", more)])
    [[_, found]] = judge([table])
    assert found.words == "beats the probe, by less than 1 point"
    [[answered]] = answer([table], [Question(ask="a?", of="a", against="linear_probe")])
    assert answered.words == "yes, by less than 1 point"


def test_four_of_400_images_show_nothing() -> None:
    more = PROBE.copy()
    more[np.flatnonzero(~PROBE)[:4]] = True
    found = verdicts(result("linear_probe", PROBE), result("a", more))["a none"]
    assert (found.words, found.p) == ("no difference shown", 0.125)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of intervals, where many tables are judged and p matters alone."""
    monkeypatch.setattr(module, "paired_differences", partial(paired_differences, draws=200))


def noise(groups: np.ndarray, seed: int, rows: int = 1) -> list[Result]:
    """The probe and one other, both right on 7 of 10 groups whatever is in them."""
    rng = np.random.default_rng(seed)
    right = rng.random((2, rows, groups.max() + 1)) < 0.7
    return [result("linear_probe", right[0][:, groups]), result("a", right[1][:, groups])]


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(
    ("frames", "runs"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (1, 3), pytest.param(16, 1, marks=pytest.mark.slow), (16, 3)],
)
def test_of_200_tables_of_noise_at_most_10_beat_the_probe(frames: int, runs: int) -> None:
    """Of images, and of tracks whose frames are right or wrong together."""
    of_image = np.arange(N) // frames
    groups = of_image if frames > 1 else None
    beats = 0
    for seed in range(200):
        [[_, found]] = judge([table_of(*noise(of_image, seed, runs), groups=groups)])
        assert found.paired is not None
        assert found.paired.unit == ("groups" if frames > 1 else "images")
        beats += "beats" in found.words
    assert beats <= 10


@pytest.mark.usefixtures("few_draws")
def test_fifty_frames_of_a_track_are_one_unit() -> None:
    track = np.arange(24 * 50) // 50
    beats, by_images = 0, 0
    for seed in range(200):
        results = noise(track, seed)
        table = Table("tiny", Full(), [f"{n}" for n in range(1200)], track, results)
        [[_, wrong]], [[_, found]] = judge([table]), judge([table._replace(groups=track)])
        beats += "beats" in found.words
        by_images += wrong.p is not None and wrong.p < 0.05
    assert beats <= 10
    assert by_images > 100  # what the images would say, were they the unit


def test_the_coarsest_unit_decides() -> None:
    gain = PROBE | (np.arange(N) < 40)  # in one group of 40, or four classes
    groups = np.arange(N) // 10

    def unit(found: dict[str, Verdict]) -> tuple[str, int]:
        paired = found["a none"].paired
        assert paired is not None
        return paired.unit, paired.units

    methods = result("linear_probe", PROBE), result("a", gain)
    assert unit(verdicts(*methods)) == ("images", N)
    assert unit(verdicts(*methods, groups=groups)) == ("groups", 40)
    assert unit(verdicts(*methods, groups=np.arange(N))) == ("images", N)
    shots = Shots(shots=1)
    assert unit(verdicts(*methods, regime=shots)) == ("classes", CLASSES)
    assert unit(verdicts(*methods, groups=np.arange(N) // 4, regime=shots)) == ("classes", CLASSES)
    assert unit(verdicts(*methods, groups=np.arange(N) // 16, regime=shots)) == ("groups", 25)
    assert verdicts(*methods)["a none"].words == "beats the probe on these classes"
    assert verdicts(*methods, regime=shots)["a none"].words == "no difference shown"


def test_under_20_units_there_is_no_verdict() -> None:
    methods = result("linear_probe", PROBE), result("a", BETTER), result("a", PROBE, "random_vectors")
    for units in (UNITS - 1, UNITS):
        groups = np.arange(N) % units
        found = verdicts(*methods, groups=groups)
        paired = found["a none"].paired
        assert paired is not None
        assert paired.groups is not None
        assert paired.groups[0] > 0
        [[answered]] = answer([table_of(*methods, groups=groups)], [Question(ask="a?", of="a", against="linear_probe")])
        if units == UNITS:
            assert found["a none"].words == "beats the probe"
            assert answered.words == "yes"
        else:
            assert found["a none"].words == "no verdict: 19 groups, and it takes 20"
            assert found["a random_vectors"].words.endswith(" ahead; no verdict: 19 groups, and it takes 20")
            assert found["a none"].p is found["a random_vectors"].p is answered.p is None
            assert answered.words == "no verdict: 19 groups, and it takes 20"


def test_what_is_published_together_is_corrected_together() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:9]] = True
    methods = result("linear_probe", PROBE), result("a", a), result("a", PROBE, "random_vectors")
    table, other = table_of(*methods), table_of(result("linear_probe", PROBE), result("b", SAME))
    [[_, alone, control]] = judge([table])
    assert (alone.p, control.p) == (2 / 2**9, 2 / 2**9)
    (_, among, control), *_ = judge([table, *[other] * 8])
    assert among.p == pytest.approx(9 * 2 / 2**9)
    assert control.p == 2 / 2**9  # a family of its own
    question = Question(ask="a?", of="a", against="linear_probe")
    [[once]], [[twice], _] = answer([table], [question]), answer([table] * 2, [question])
    assert (once.p, twice.p) == (2 / 2**9, 4 / 2**9)


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
    assert found["a none"].words == "equivalent to the probe within 1 point"
    assert found["a random_vectors-9"].words == "control of none-9, which the table does not have"
    # What reads no concepts needs no run with fewer: its plain one is that.
    assert "ahead" in found["b random_vectors-5"].words


def test_many_methods_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:8]] = True
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
    return answer([table_of(*results)], [Question(ask=f"{of}?", of=of, against=against) for of, against in pairs])[0]


def test_questions_are_answered_in_plain_words() -> None:
    results = [result("p", PROBE), result("a", BETTER), result("b", SAME), result("c", PROBE | (Y == 3) | (Y == 8))]
    results.append(result("a", WORSE, "random_vectors"))  # no part of an answer
    better, worse, same, few = answers(*results, pairs=[("a", "p"), ("p", "a"), ("b", "p"), ("c", "p")])
    assert better.words == "yes"
    assert worse.words == "no: the other way round"
    assert re.fullmatch(r"not shown: the interval holds \[-\d\.\d, \+\d\.\d\]", same.words)
    assert few.words == "yes on these classes"
    assert better.paired.difference == pytest.approx(BETTER.mean() - PROBE.mean())
    assert better.paired.difference == -worse.paired.difference


def test_nothing_is_said_of_a_row_whose_tower_stands_in() -> None:
    """Its figures are there, and no verdict on it, nor an answer that has it on either side."""
    results = [result("linear_probe", PROBE), result("a", BETTER), result("b", BETTER)]
    table = table_of(*results)._replace(stand_ins=frozenset("a"))
    [[_, stands_in, judged]] = judge([table])
    assert stands_in.words == "no verdict: its tower stands in for that of the system"
    assert stands_in.paired is not None
    assert judged.words == "beats the probe"
    pairs = [("a", "linear_probe"), ("linear_probe", "a"), ("b", "linear_probe")]
    [found] = answer([table], [Question(ask="?", of=of, against=against) for of, against in pairs])
    assert [one.words for one in found] == [stands_in.words, stands_in.words, "yes"]


def test_many_questions_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:8]] = True
    a[np.flatnonzero(PROBE)[:1]] = False
    results = [result("p", PROBE), result("a", a), result("b", SAME)]
    (alone,) = answers(*results, pairs=[("a", "p")])
    among = answers(*results, pairs=[("a", "p"), *[("b", "p")] * 8])[0]
    assert alone.words.startswith("yes")
    assert among.words.startswith("not shown")
    assert alone.p is not None
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
    found = read_unseen(logits, y, splits, "test")
    assert found.figures == {"seen": 1.0, "unseen": 1.0, "harmonic": 0.5}
    assert found.part.tolist() == [0, 0, 1, 1, -1]
    assert found.among_unseen[:4].tolist() == [False, False, True, True]
    assert np.isneginf(found.joint[:, 2]).all()
    assert figures_of(found.joint, y, splits, "test")["accuracy"] == 0.5


def test_unseen_classes_are_judged_by_their_own_and_by_the_harmonic_mean() -> None:
    """A method that knows unseen classes at some cost to the many seen ones: worse over images, and far better."""
    rng = np.random.default_rng(7)
    seen = Y < 20
    probe = np.where(seen, rng.random((3, N)) < 0.9, rng.random((3, N)) < 0.1)
    other = np.where(seen, rng.random((3, N)) < 0.6, rng.random((3, N)) < 0.3)
    part = np.where(seen, 0, 1)[None]
    table = table_of(result("linear_probe", probe), result("a", other), regime=Unseen(seen=0.5))
    unseen = table._replace(measure="unseen", part=np.where(part == 1, 0, -1))
    harmonic = table._replace(measure="harmonic", part=part)
    [[_, by_all], [_, by_unseen], [_, by_harmonic]] = judge([table, unseen, harmonic])
    found = [one.paired for one in (by_all, by_unseen, by_harmonic)]
    differences = [one.difference for one in found if one is not None]
    assert [(one.unit, one.units) for one in found if one is not None] == [
        ("classes", 40),
        ("classes", 20),
        ("classes", 20),
    ]
    of = [[method[:, where].mean() for where in (seen, ~seen)] for method in (probe, other)]
    assert differences[0] < 0
    assert differences[1] == pytest.approx(of[1][1] - of[0][1])
    assert differences[2] == pytest.approx(harmonic_mean(*of[1]) - harmonic_mean(*of[0]))
    assert by_unseen.words == by_harmonic.words == "beats the probe"


def test_a_transductive_row_against_an_inductive_one_is_said_to_be() -> None:
    hears = result("spread", BETTER)._replace(transductive=True)
    other = result("smooth", BETTER)._replace(transductive=True)
    control = result("spread", SAME, "links_removed", reads=False)._replace(transductive=True, plain=Control())
    table = table_of(result("linear_probe", PROBE), hears, other, control, result("knn", SAME))
    words = [one.words for one in judge([table])[0]]
    assert words[1] == "beats the probe; spread is transductive, linear_probe is not"
    assert "transductive" not in words[3]
    assert "transductive" not in words[4]
    pairs = [("spread", "knn"), ("knn", "spread"), ("spread", "smooth")]
    asked = [Question(ask="?", of=of, against=against) for of, against in pairs]
    first, second, third = answer([table], asked)[0]
    assert first.words == "yes; spread is transductive, knn is not"
    assert second.words == "no: the other way round; spread is transductive, knn is not"
    assert "transductive" not in third.words
