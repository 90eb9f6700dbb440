import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.concepts import coverage
from fieldmark.concepts.coverage import choose_greedily, value
from tests.project import unit


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    return chance.random(count), unit(chance.standard_normal((count, 4))).astype(np.float64)


def plain_greedy(count: int, worth: np.ndarray, vectors: np.ndarray, weight: float) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < min(count, len(worth)):
        left = [i for i in range(len(worth)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (value([*chosen, i], worth, vectors, weight), -i)))
    return chosen


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.5, 5.0]))
def test_greedy_is_near_the_best(seed: int, weight: float) -> None:
    worth, vectors = drawn(8, seed)
    best = max(value(list(each), worth, vectors, weight) for each in itertools.combinations(range(8), 3))
    assert value(choose_greedily(3, worth, vectors, weight), worth, vectors, weight) >= (1 - 1 / math.e) * best


@pytest.mark.parametrize("block", [1, 3, 64])
def test_lazy_is_plain_greedy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "BLOCK", block)
    for seed, weight in itertools.product(range(15), (0.05, 0.5, 5.0)):
        worth, vectors = drawn(20, seed)
        assert choose_greedily(6, worth, vectors, weight) == plain_greedy(6, worth, vectors, weight)


def test_without_weight_the_most_worthy() -> None:
    worth, vectors = np.array([0.2, 0.9, 0.9, 0.5]), np.eye(4)
    assert choose_greedily(3, worth, vectors, 0.0) == [1, 2, 3]
    assert choose_greedily(9, worth, vectors, 0.0) == [1, 2, 3, 0]
    assert choose_greedily(9, worth, vectors, 1.0) == [1, 2, 3, 0]


def test_coverage_prefers_what_is_not_said_yet() -> None:
    vectors = unit([[1, 0], [1, 0.05], [0, 1]]).astype(np.float64)
    worth = np.array([0.9, 0.8, 0.1])
    assert choose_greedily(2, worth, vectors, 0.0) == [0, 1]
    assert choose_greedily(2, worth, vectors, 2.0) == [0, 2]


def test_similarities_under_zero_count_as_zero() -> None:
    vectors = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert value([0], np.zeros(2), vectors, 1.0) == 1
    assert value([0, 1], np.zeros(2), vectors, 1.0) == 2
    assert value([], np.zeros(2), vectors, 1.0) == 0
