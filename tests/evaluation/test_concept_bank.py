"""What the page says of concepts, against sums and loops small enough to read."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation.concept_bank import Seen, area_under_roc, speaking, telling_apart


def test_area_under_roc_is_scikit_learn_s_ties_included() -> None:
    rng = np.random.default_rng(0)
    own, others = rng.integers(0, 5, 13).astype(float), rng.integers(0, 4, 29).astype(float)
    expected = roc_auc_score(np.repeat([1, 0], [13, 29]), np.concatenate([own, others]))
    assert area_under_roc(own, others) == pytest.approx(expected)
    assert area_under_roc(own, np.zeros(0)) is None


def test_two_classes_are_told_apart_in_standard_deviations() -> None:
    mean = np.array([[0.5, 0.1, 0.3, 0.9], [0.1, 0.3, 0.3, 0.0]])
    deviation = np.array([[0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]])
    seen = Seen(np.zeros((0, 4)), np.zeros((0, 4), int), mean, deviation)
    # The last concept is of both classes, or of neither: it is not allowed.
    assert telling_apart(seen, 0, 1, [0, 1, 2]) == ([{"concept": 0, "by": 4.0}], [{"concept": 1, "by": 2.0}])


def test_concepts_speak_for_the_one_class_that_owns_them() -> None:
    weight, owners = np.array([0.2, 0.5, 0.3, 0.0, 0.1]), [[0], [0, 1], [1], [0], [0]]
    assert speaking(weight, owners, 0, 1) == [[[0, 200], [4, 100]], [[2, 300]]]
