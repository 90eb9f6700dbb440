
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from sklearn.metrics import log_loss as sklearn_log_loss

from training.metrics import (
    accuracy,
    calibration_error,
    class_accuracy,
    confusion,
    fit_temperature,
    log_loss,
    macro_accuracy,
    mean_and_deviation,
    softmax,
    tier_accuracy,
    tiers,
    top_k_accuracy,
)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_numbers_equal_scikit_learn(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((60, classes)).astype(np.float32)
    y = np.concatenate([np.arange(classes), rng.integers(classes, size=60 - classes)])
    predicted, labels = logits.argmax(1), np.arange(classes)
    assert accuracy(logits, y) == pytest.approx(accuracy_score(y, predicted))
    assert macro_accuracy(logits, y) == pytest.approx(balanced_accuracy_score(y, predicted))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert log_loss(logits, y) == pytest.approx(sklearn_log_loss(y, probabilities, labels=labels), rel=1e-5)
    np.testing.assert_array_equal(confusion(logits, y), confusion_matrix(y, predicted, labels=labels))
    if classes > 2:
        assert top_k_accuracy(logits, y, 2) == pytest.approx(top_k_accuracy_score(y, logits, k=2, labels=labels))
    assert top_k_accuracy(logits, y, 1) == accuracy(logits, y)
    assert top_k_accuracy(logits, y, classes) == 1


def test_a_tie_goes_to_the_first_class_at_every_k() -> None:
    logits, y = np.zeros((3, 3)), np.array([0, 1, 2])
    assert [top_k_accuracy(logits, y, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert accuracy(logits, y) == pytest.approx(1 / 3)


def test_macro_accuracy_leaves_absent_classes_out() -> None:
    logits = np.eye(4)[[0, 0, 3]]
    assert macro_accuracy(logits, np.array([0, 3, 3])) == pytest.approx((1 + 0.5) / 2)


def test_calibration_by_hand() -> None:
    # Confidences .9, .9, .6, .6 (classes of two), of which right: yes, no, yes, yes.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    y = np.array([0, 1, 0, 0])
    assert calibration_error(logits, y) == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6))
    assert calibration_error(logits, y, bins=1) == pytest.approx(0)  # 3 of 4 right, mean confidence .75
    assert calibration_error(1000 * np.eye(3), np.array([0, 1, 1])) == pytest.approx(1 / 3)


def test_the_temperature_is_the_one_the_logits_were_made_with() -> None:
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((4000, 5)) * 2
    y = (softmax(logits).cumsum(1) > rng.random((4000, 1))).argmax(1)
    found = fit_temperature(3 * logits, y)
    assert found == pytest.approx(3, rel=0.05)
    assert all(
        log_loss(3 * logits / found, y) <= log_loss(3 * logits / other, y) for other in (0.9 * found, 1.1 * found)
    )
    assert calibration_error(3 * logits / found, y) < 0.02 < calibration_error(3 * logits, y)
    assert fit_temperature(np.eye(3), np.arange(3)) < 1e-3  # all right: the sharper the better


def test_tiers_by_hand() -> None:
    assert tiers(np.array([5, 19, 20, 100, 101])).tolist() == [0, 0, 1, 1, 2]
    assert tiers(np.array([7, 1, 3, 9, 5, 11]), limits=None).tolist() == [1, 0, 0, 2, 1, 2]
    assert tiers(np.full(6, 4), limits=None).tolist() == [0] * 6  # equal counts stay together
    logits, y = np.eye(4)[[0, 0, 1, 3]], np.array([0, 1, 1, 2])
    np.testing.assert_array_equal(class_accuracy(logits, y), [1, 0.5, 0, np.nan])
    assert tier_accuracy(logits, y, np.array([0, 0, 1, 2])) == {"few": 0.75, "medium": 0.0}


def test_the_deviation_of_one_seed_is_zero() -> None:
    assert mean_and_deviation([0.5]) == (0.5, 0.0)
    assert mean_and_deviation([0.4, 0.6]) == pytest.approx((0.5, 0.1414), abs=1e-4)
