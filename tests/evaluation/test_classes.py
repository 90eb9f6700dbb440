"""Classes as the report tells them, on matrices small enough to read."""

import numpy as np

from evaluation.classes import confused_pairs, confusion, mean_doubt


def test_confused_pairs_count_both_ways() -> None:
    matrix = np.array([[9, 1, 0], [2, 8, 4], [0, 0, 5]])
    nothing = np.zeros((3, 3))
    assert confused_pairs(matrix, nothing) == [(1, 2, 4, 0), (0, 1, 1, 2)]
    assert confused_pairs(np.eye(3, dtype=int), nothing) == []


def test_of_pairs_with_as_many_mistakes_those_that_share_more_come_first() -> None:
    matrix = np.array([[3, 1, 0, 0], [0, 3, 1, 0], [0, 0, 4, 0], [0, 0, 0, 4]])
    doubt = np.zeros((4, 4))
    doubt[1, 2], doubt[0, 1], doubt[0, 3], doubt[2, 3] = 0.3, 0.1, 0.2, 0.05
    # The third has no mistake and is close; the fourth is not close.
    assert confused_pairs(matrix, doubt) == [(1, 2, 1, 0), (0, 1, 1, 0), (0, 3, 0, 0)]


def test_confusion_and_doubt() -> None:
    y, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    probabilities = np.array([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.1, 0.9, 0.0]])
    assert confusion(y, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    expected = [[0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 0.0]]
    assert np.allclose(mean_doubt(y, probabilities), expected)
