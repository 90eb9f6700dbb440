import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark import store
from fieldmark.concepts import selection
from fieldmark.concepts.selection import choose, class_means, discriminability, find_duplicates, merge_candidates
from fieldmark.params import Select
from tests.project import unit


def test_a_concept_all_classes_share_says_nothing() -> None:
    assert discriminability(np.full((2, 5), 0.3), 100.0) == pytest.approx([0, 0], abs=1e-12)
    assert discriminability(np.array([[0.3]]), 100.0) == pytest.approx([0])


def test_a_concept_of_one_class_says_all() -> None:
    similarity = np.array([[0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    assert discriminability(similarity, 1000.0) == pytest.approx([math.log(4), math.log(2)])


def test_discriminability_by_a_loop() -> None:
    similarity = np.random.default_rng(0).uniform(-1, 1, (6, 4))
    for row, found in zip(similarity, discriminability(similarity, 3.0), strict=True):
        weights = [math.exp(3.0 * value) for value in row]
        p = [weight / sum(weights) for weight in weights]
        assert found == pytest.approx(math.log(4) + sum(value * math.log(value) for value in p))


def candidates(owners: list[set[str]]) -> list[dict[str, Any]]:
    return [
        {"concept_id": f"{n}", "text": f"text {n}", "kind": "visual", "class_ids": set(each)}
        for n, each in enumerate(owners)
    ]


def test_a_near_duplicate_hands_its_classes_over() -> None:
    rows = candidates([{"a"}, {"b"}, {"c"}])
    vectors = unit([[1, 0, 0], [1, 0.1, 0], [0, 1, 0]])
    choose(rows, vectors, np.array([0.2, 0.9, 0.5]), Select(per_class=8, max_cosine=0.95), 3)
    assert [row["kept"] for row in rows] == [False, True, True]
    assert rows[0]["drop_reason"] == "near duplicate of: text 1"
    assert rows[1]["class_ids"] == {"a", "b"}
    assert rows[1]["drop_reason"] is None


def test_each_class_keeps_its_best() -> None:
    rows = candidates([{"a"}, {"a"}, {"a", "b"}, {"b"}, set()])
    gains = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    choose(rows, np.eye(5, dtype=np.float32), gains, Select(per_class=1), 2)
    # The third is second in `a` but best in `b`; what no class owns stays.
    assert [row["kept"] for row in rows] == [True, False, True, False, True]
    assert "more telling" in rows[1]["drop_reason"]


@given(
    st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 99),
)
def test_every_class_with_a_candidate_keeps_one(
    owners: list[set[str]], per_class: int, weight: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    rows = candidates(owners)
    vectors = unit(chance.standard_normal((len(rows), 2)))
    settings = Select(per_class=per_class, max_cosine=0.9, coverage=weight)
    choose(rows, vectors, chance.uniform(size=len(rows)), settings, 4)
    kept = [row for row in rows if row["kept"]]
    assert {name for row in kept for name in row["class_ids"]} == set().union(*owners)
    assert all((row["drop_reason"] is None) == row["kept"] for row in rows)
    cosines = np.triu(vectors @ vectors.T, 1)
    for i, j in zip(*np.nonzero(cosines > 0.9), strict=True):
        assert not (rows[i]["kept"] and rows[j]["kept"])


def one_by_one(vectors: np.ndarray, order: list[int], max_cosine: float) -> dict[int, int]:
    taken: list[int] = []
    twin_of: dict[int, int] = {}
    for i in order:
        nearest = max(taken, key=lambda j: float(vectors[i] @ vectors[j]), default=None)
        if nearest is not None and vectors[i] @ vectors[nearest] > max_cosine:
            twin_of[i] = nearest
        else:
            taken.append(i)
    return twin_of


@pytest.mark.parametrize("block", [1, 3, 512])
def test_duplicates_by_a_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK", block)
    for seed in range(20):
        chance = np.random.default_rng(seed)
        vectors = unit(chance.standard_normal((25, 3))).astype(np.float64)
        order = chance.permutation(25).tolist()
        expected = one_by_one(vectors, order, 0.9)
        assert expected
        assert find_duplicates(vectors, order, 0.9) == expected


def test_coverage_keeps_what_is_not_said_yet() -> None:
    # The second says what the first does and some of the third; with it, only the third is left to say.
    vectors, gains = unit([[1, 0, 0], [1, 0.4, 0], [0, 1, 1]]), np.array([1.0, 0.9, 0.2])
    for weight, expected in ((0.0, [True, True, False]), (2.0, [False, True, True])):
        rows = candidates([{"a"}, {"a"}, {"a"}])
        choose(rows, vectors, gains, Select(per_class=2, coverage=weight), 3)
        assert [row["kept"] for row in rows] == expected


def test_class_means() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(class_means(vectors, np.array(["b", "a", "b"])), [[0, 1], [0.5, 0]])


def test_one_candidate_a_text() -> None:
    rows = [
        {"concept_id": store.sha256(text), "text": text, "class_id": name, "rank": rank, "kind": kind}
        for rank, (text, name, kind) in enumerate(
            [
                ("x", "b", "visual"),
                ("x", "a", "visual"),
                ("y", None, "generic"),
                ("photo of b", "b", "name"),
            ]
        )
    ]
    names, merged = merge_candidates(rows)
    assert [(row["text"], row["class_ids"], row["kept"]) for row in names] == [("photo of b", {"b"}, False)]
    assert {row["text"]: row["class_ids"] for row in merged} == {"x": {"a", "b"}, "y": set()}
