"""Prediction sets against MAPIE, against the formula, and against the law that their coverage follows."""

from math import ceil

import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from mapie.conformity_scores import APSConformityScore, LACConformityScore
from scipy.stats import betabinom
from sklearn.base import BaseEstimator, ClassifierMixin

from evaluation.calibration import calibrate
from evaluation.conformal import SCORES, aps, lac, prediction_sets, quantile
from training.metrics import softmax


class Told(ClassifierMixin, BaseEstimator):
    """A classifier for MAPIE whose input is already its output."""

    def __init__(self, classes: int = 2) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Told":
        return self

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return x

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x.argmax(1)


class Ones(np.random.RandomState):
    """Draws u = 1, so that MAPIE's APS is not random."""

    def uniform(self, *_: object, size: int) -> np.ndarray:  # type: ignore[override]
        return np.ones(size)


def draw(seed: int, images: int, classes: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (images, classes) that are too sure, and classes."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((images, classes))
    y = (softmax(logits).cumsum(1) > rng.random((images, 1))).argmax(1)
    return softmax(2 * logits), y


@pytest.mark.parametrize("name", ["LAC", "APS"])
@pytest.mark.parametrize(("images", "alpha"), [(30, 0.1), (100, 0.1), (99, 0.05), (57, 0.3)])
def test_sets_are_those_of_mapie(name: str, images: int, alpha: float) -> None:
    p, y = draw(images, images + 200)
    score = LACConformityScore() if name == "LAC" else APSConformityScore()
    theirs = SplitConformalClassifier(Told(8), 1 - alpha, score, random_state=Ones(0))
    theirs.conformalize(p[:images], y[:images])
    scores = SCORES[name](p)
    limit = quantile(scores[np.arange(images), y[:images]], np.arange(images), alpha)
    expected = theirs.predict_set(p[images:])[1][:, :, 0]
    np.testing.assert_array_equal(prediction_sets(scores[images:], limit), expected)


def test_scores_by_hand() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    np.testing.assert_allclose(lac(p), [[0.8, 0.5, 0.7], [0.6, 0.8, 0.6]])
    np.testing.assert_allclose(aps(p), [[0.8, 0, 0.5], [0, 0.8, 0.4]], atol=1e-12)  # of equals the first is ahead
    assert prediction_sets(aps(p), 0.0).sum(1).tolist() == [1, 1]  # never empty
    assert prediction_sets(lac(p), 0.3).sum(1).tolist() == [0, 0]


def test_the_quantile_is_of_n_plus_one() -> None:
    for images in range(1, 120):
        scores = np.random.default_rng(images).permutation(images) + 1.0  # a score is its rank
        for alpha in (0.05, 0.1, 0.2, 1 / 3):
            rank = ceil(round((images + 1) * (1 - alpha), 9))
            assert quantile(scores, np.arange(images), alpha) == (rank if rank <= images else None)
    assert prediction_sets(np.ones((2, 3)), None).all()


def test_a_group_counts_once() -> None:
    scores = np.arange(1.0, 13)
    assert quantile(scores, np.arange(12), 0.1) == 12
    assert quantile(np.repeat(scores, 5), np.repeat(np.arange(12), 5), 0.1) == 12
    # Without groups, sixty pictures would promise with the eleventh.
    assert quantile(np.repeat(scores, 5), np.arange(60), 0.1) == 11
    # Weights 1/4 for each of three groups, of which one has two pictures: 1/8, 1/8, 1/4, 1/4, and 1/4 at infinity.
    unequal = np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 2])
    assert [quantile(*unequal, alpha) for alpha in (0.9, 0.8, 0.5, 0.3, 0.2)] == [1, 2, 3, 4, None]


def test_coverage_follows_the_beta_binomial() -> None:
    """Of k = ceil((n + 1)(1 - alpha)) and continuous scores, it is the law of (k, n + 1 - k) (Vovk 2012 [mem]).

    So it is with a temperature that was fitted on the same images.
    """
    images, new, alpha, draws = 60, 300, 0.1, 200
    k = ceil((images + 1) * (1 - alpha))
    law = betabinom(new, k, images + 1 - k)
    low, high = law.interval(0.95)
    covered: dict[str, list[int]] = {name: [] for name in SCORES}
    for seed in range(draws):
        p, y = draw(seed, images + new)
        found = calibrate(np.log(p[:images]), y[:images], None, list("abcdefgh"), alpha=alpha)
        assert found.temperature > 1
        for name in SCORES:
            sets = found.sets(found.probabilities(np.log(p[images:])), name)
            covered[name].append(sets[np.arange(new), y[images:]].sum())
    for counts in covered.values():
        inside = np.mean((low <= np.array(counts)) & (np.array(counts) <= high))
        assert 0.91 <= inside <= 0.99
        assert np.mean(counts) == pytest.approx(law.mean(), abs=4 * law.std() / np.sqrt(draws))


def test_pictures_of_a_new_group_are_covered() -> None:
    """Twelve tracks of ten frames that are nearly one picture: frames taken for independent would promise too much."""
    rng = np.random.default_rng(0)
    grouped, alone = [], []
    for _ in range(2000):
        scores = rng.random((13, 1)) + 1e-3 * rng.random((13, 10))
        told, unit = scores[:12].ravel(), np.repeat(np.arange(12), 10)
        grouped.append((scores[12] <= quantile(told, unit, 0.1)).mean())
        alone.append((scores[12] <= quantile(told, np.arange(120), 0.1)).mean())
    assert np.mean(alone) < 0.88 < 0.9 < np.mean(grouped) < 0.95
