"""Distances to class means, by hand."""

import numpy as np

from evaluation.rejection import class_means, distance


def test_distances_by_hand() -> None:
    means = class_means(np.array([[2.0, 0, 0], [0, 3, 0], [0, 5, 0], [1, 0, 0]]), np.array([7, 2, 2, 7]))
    np.testing.assert_allclose(means, [[0, 1, 0], [1, 0, 0]])  # in the order of classes
    pictures = np.array([[4.0, 0, 0], [1, 1, 0], [0, 0, 2], [-1, -1, 0], [0, 0, 0]])
    np.testing.assert_allclose(distance(pictures, means), [0, 1 - np.sqrt(0.5), 1, 1 + np.sqrt(0.5), 1])


def test_a_class_counts_by_its_pictures_directions() -> None:
    """One long vector does not pull the mean of its class."""
    means = class_means(np.array([[100.0, 0], [0, 1]]), np.array([0, 0]))
    np.testing.assert_allclose(means, [[np.sqrt(0.5), np.sqrt(0.5)]])
