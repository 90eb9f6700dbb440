import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from sklearn.metrics import log_loss as sklearn_log_loss

from training.evaluate import accuracy, confusion, log_loss, macro_accuracy, paired_difference, top_k_accuracy


@settings(max_examples=25, deadline=None)
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


def test_difference_is_paired_and_antisymmetric() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(20), 30)
    a = rng.random((3, 600)) < 0.8
    b = a & (rng.random((3, 600)) < 0.95)
    forward, backward = paired_difference(a, b, classes), paired_difference(b, a, classes)
    assert forward.difference == pytest.approx(a.mean() - b.mean()) == -backward.difference
    assert forward.images == pytest.approx((-backward.images[1], -backward.images[0]))
    assert 0 < forward.images[0] < forward.difference < forward.images[1]
    # Paired: far narrower than the two accuracies would be apart.
    assert forward.images[1] - forward.images[0] < 0.03
    assert paired_difference(a, a, classes).images == (0, 0) == paired_difference(a, a, classes).classes


def test_interval_over_images_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    gain = rng.random(2000) < 0.1
    low, high = paired_difference(gain, np.zeros_like(gain), np.zeros(2000, int)).images
    error = gain.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((gain.mean() - 1.96 * error, gain.mean() + 1.96 * error), abs=0.25 * error)


def test_classes_that_differ_widen_the_interval_over_classes() -> None:
    classes = np.repeat(np.arange(10), 50)
    a, b = classes < 5, classes >= 8
    images, whole = paired_difference(a, b, classes)[1:]
    assert whole[1] - whole[0] > 3 * (images[1] - images[0])


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    inside, draws = 0, 200
    for seed in range(draws):
        a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
        low, high = paired_difference(a, b, np.zeros(300, int), draws=500, seed=seed).images
        inside += low <= 0.1 <= high
    assert 0.90 <= inside / draws <= 0.99


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same images"):
        paired_difference(np.ones(3, bool), np.ones(4, bool), np.zeros(3, int))
