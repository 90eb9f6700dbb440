"""Votes against a loop."""

import numpy as np

from evaluation.votes import vote
from training.metrics import softmax


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
