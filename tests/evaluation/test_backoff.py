"""Back-off by hand, its bound against scipy, and its promise over drawn splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from evaluation.backoff import THRESHOLDS, back_off, choose_threshold, upper_bound
from evaluation.calibration import calibrate
from evaluation.taxonomy import Taxonomy
from training.metrics import softmax

TREE = Taxonomy(("a", "b", "c", "d"), (("AB",), ("AB",), ("CD",), ("CD",)))
FLAT = Taxonomy(("a", "b", "c", "d"), ((), (), (), ()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 3000))
def test_the_bound_is_clopper_and_pearsons(wrong: int, of: int) -> None:
    expected = 1.0 if wrong >= of else beta.ppf(0.95, wrong + 1, of - wrong)
    assert upper_bound(min(wrong, of), of) == pytest.approx(expected, rel=1e-9)


def test_without_pictures_nothing_is_known() -> None:
    assert upper_bound(0, 0) == 1


def test_back_off_by_hand() -> None:
    p = np.array([[0.9, 0.05, 0.03, 0.02], [0.5, 0.45, 0.03, 0.02], [0.4, 0.1, 0.3, 0.2]])
    answers = back_off(p, TREE, 0.85)
    assert answers.rank.tolist() == [0, 1, -1]
    assert [TREE.names[node] for node in answers.node[:2]] == ["a", "AB"]
    np.testing.assert_allclose(answers.p[:2], [0.9, 0.95])
    assert answers.right(np.array([1, 1, 0]), TREE).tolist() == [False, True, False]
    assert back_off(p, FLAT, 0.85).rank.tolist() == [0, -1, -1]
    assert back_off(p, TREE, None).rank.tolist() == [-1, -1, -1]
    assert back_off(p, TREE, 0.0).rank.tolist() == [0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_a_lower_threshold_never_answers_at_a_higher_rank(seed: int) -> None:
    p = softmax(3 * np.random.default_rng(seed).standard_normal((40, 4)))
    ranks = [back_off(p, TREE, threshold).rank for threshold in THRESHOLDS]
    heights = np.where(np.array(ranks) < 0, 2, ranks)
    assert (np.diff(heights, axis=0) <= 0).all()
    assert list(THRESHOLDS) == sorted(THRESHOLDS, reverse=True)


def test_at_five_percent_it_takes_59_pictures() -> None:
    p, y = np.tile([0.997, 0.001, 0.001, 0.001], (59, 1)), np.zeros(59, int)
    assert choose_threshold(p[:58], y[:58], TREE, 0.05) is None
    found = choose_threshold(p, y, TREE, 0.05)
    assert found is not None
    assert (found.threshold, found.answered, found.wrong) == (0, 59, 0)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 59))
    # One mistake among the surest: no threshold passes, for the first that is tested fails.
    assert choose_threshold(p, np.r_[3, y[1:]], TREE, 0.05) is None
    # The sister class: at the taxon it is no mistake, but every threshold that asks for it names the class.
    assert choose_threshold(p, np.r_[1, y[1:]], TREE, 0.05) is None


def test_thresholds_are_tested_until_one_fails() -> None:
    """100 sure pictures, all right; 10 of 0.8, all wrong; 500 of 0.6, all right: the last are not reached."""
    top = np.repeat([0.996, 0.8, 0.6], [100, 10, 500])
    p = np.column_stack([top, *[(1 - top) / 3] * 3])
    y = np.repeat([0, 3, 0], [100, 10, 500])
    found = choose_threshold(p, y, FLAT, 0.05)
    assert found is not None
    assert (found.threshold, found.answered, found.wrong) == (0.85, 100, 0)


def population(images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure and classes, 12 of them in 4 taxa, of which siblings are the likelier mistake."""
    siblings = np.arange(12) // 3
    y = rng.integers(12, size=images)
    logits = 2.5 * (y[:, None] == np.arange(12)) + 1.5 * (siblings[y][:, None] == siblings)
    logits = logits + rng.standard_normal((images, 12))
    return 8 * logits, y


@pytest.mark.parametrize(("has_taxa", "error"), [(True, 0.05), pytest.param(False, 0.1, marks=pytest.mark.slow)])
def test_the_promise_is_broken_in_few_splits(has_taxa: bool, error: float) -> None:
    rng = np.random.default_rng(1)
    lineages = [(f"taxon {number // 3}",) for number in range(12)] if has_taxa else None
    new, truth = population(5000, rng)
    broken, answered = 0, []
    for _ in range(100):
        found = calibrate(*population(200, rng), None, [f"{number}" for number in range(12)], lineages, error=error)
        answers = found.back_off(found.probabilities(new))
        given = answers.rank >= 0
        answered.append(given.mean())
        broken += bool(given.any() and 1 - answers.right(truth, found.taxonomy)[given].mean() > error)
    assert broken <= 10
    assert np.mean(answered) > 0.4  # it is no promise to say nothing
