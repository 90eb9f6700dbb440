import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import store
from stages.command import UserError
from stages.params import Params, Select
from stages.select_concepts import choose, class_means, discriminability, merge_candidates
from tests.stages.project import image_id, unit, write_concepts, write_index, write_nodes, write_texts


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
    choose(rows, vectors, np.array([0.2, 0.9, 0.5]), Select(per_class=8, max_cosine=0.95))
    assert [row["kept"] for row in rows] == [False, True, True]
    assert rows[0]["drop_reason"] == "near duplicate of: text 1"
    assert rows[1]["class_ids"] == {"a", "b"}
    assert rows[1]["drop_reason"] is None


def test_each_class_keeps_its_best() -> None:
    rows = candidates([{"a"}, {"a"}, {"a", "b"}, {"b"}, set()])
    gains = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    choose(rows, np.eye(5, dtype=np.float32), gains, Select(per_class=1))
    # The third is second in `a` but best in `b`; what no class owns stays.
    assert [row["kept"] for row in rows] == [True, False, True, False, True]
    assert "more telling" in rows[1]["drop_reason"]


@given(
    st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_every_class_with_a_candidate_keeps_one(owners: list[set[str]], per_class: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = candidates(owners)
    vectors = unit(chance.standard_normal((len(rows), 2)))
    choose(rows, vectors, chance.uniform(size=len(rows)), Select(per_class=per_class, max_cosine=0.9))
    kept = [row for row in rows if row["kept"]]
    assert {name for row in kept for name in row["class_ids"]} == set().union(*owners)
    assert all((row["drop_reason"] is None) == row["kept"] for row in rows)
    cosines = np.triu(vectors @ vectors.T, 1)
    for i, j in zip(*np.nonzero(cosines > 0.9), strict=True):
        assert not (rows[i]["kept"] and rows[j]["kept"])


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


@pytest.fixture
def tables(set_params: Callable[..., Params]) -> Params:
    """Two classes on two axes, a concept along each, one between, and a name each."""
    axes = {"a": unit([1, 0, 0]), "b": unit([0, 1, 0])}
    images = {image_id(n): name for n, name in enumerate("aabbab")}
    vectors = {each: np.stack([axes[name], unit([0, 0, 1])]) for each, name in images.items()}
    # Test images must not be looked at: these lie the other way round.
    test = {image_id(n): name for n, name in enumerate("ab", 6)}
    vectors |= {each: np.stack([axes["b" if name == "a" else "a"]] * 2) for each, name in test.items()}
    write_nodes(Path("data/embed/conv/images"), vectors)
    write_index(
        {
            **{each: (name, "train") for each, name in images.items()},
            **{each: (name, "test") for each, name in test.items()},
        }
    )
    write_concepts(
        [
            ("photo of a", "a", "name"),
            ("photo of b", "b", "name"),
            ("of a", "a", "visual"),
            ("of b", "b", "visual"),
            ("of both", "a", "visual"),
            ("of a indeed", "a", "visual"),
            ("gone", "a", "dropped"),
        ]
    )
    write_texts(
        Path("data/embed/conv/text.parquet"),
        {
            "photo of a": unit([1, 1, 0]),
            "photo of b": unit([1, 2, 0]),
            "of a": axes["a"],
            "of b": axes["b"],
            "of both": unit([1, 1, 1]),
            "of a indeed": unit([1, 0.01, 0]),
        },
    )
    return set_params(select={"per_class": 1, "max_cosine": 0.95})


def test_the_bank(tables: Params, run_stage: Callable[..., None]) -> None:
    np.testing.assert_allclose(class_means(Path("data/embed/conv/images"), 4), [[1, 0, 0], [0, 1, 0]])
    run_stage("select_concepts", "--encoder", "conv")
    path = Path("data/bank/conv.parquet")
    rows = store.read_table(path, "bank/1").to_pylist()
    assert [row["concept_idx"] for row in rows] == list(range(6))
    assert [row["text"] for row in rows[:2]] == ["photo of a", "photo of b"]
    bank = {row["text"]: row for row in rows}
    assert all(
        bank[name]["kind"] == "name" and not bank[name]["kept"] for name in ("photo of a", "photo of b")
    )
    assert bank["photo of a"]["discriminability"] is None
    assert {text for text, row in bank.items() if row["kept"]} == {"of a", "of b"}
    assert bank["of a"]["class_ids"] == ["a"]
    assert bank["of a indeed"]["drop_reason"] == "near duplicate of: of a"
    assert bank["of both"]["discriminability"] == pytest.approx(0, abs=1e-6)
    p = 1 / (1 + math.exp(-10))
    assert bank["of b"]["discriminability"] == pytest.approx(
        math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-5
    )
    np.testing.assert_allclose(bank["of both"]["vector"], unit([1, 1, 1]), atol=1e-3)
    first = path.read_bytes()
    run_stage("select_concepts", "--encoder", "conv")
    assert path.read_bytes() == first


def test_the_mark_of_the_bank_is_of_what_was_read(tables: Params, run_stage: Callable[..., None]) -> None:
    def mark() -> str:
        run_stage("select_concepts", "--encoder", "conv")
        return store.read_header("data/bank/conv.parquet", "bank/1").fingerprint

    first = mark()
    index = store.read_table("data/index/images.parquet", "index.images/1")
    store.write_table(index, "data/index/images.parquet", "index.images/1", {"seed": 1}, "another split")
    assert mark() != first


def test_what_cannot_be_is_one_line(tables: Params, run_stage: Callable[..., None]) -> None:
    images, text = Path("data/embed/conv/images"), Path("data/embed/conv/text.parquet")

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            run_stage("select_concepts", "--encoder", "conv")
        assert "\n" not in str(error.value)
        assert not Path("data/bank").exists()

    vectors = {"of a": unit([1, 0, 0]), "photo of a": unit([1, 0, 0])}
    write_texts(text, vectors, encoder="another")
    refused("is of another encoder than data/embed/conv/images")
    write_texts(text, vectors)
    refused("has no vector of 'of .*'; run embed_text again")
    write_concepts([("photo of a", "a", "name")])
    refused("no concept was kept")
    write_concepts([("of a", "a", "visual")])
    write_nodes(images, {image_id(0): unit(np.eye(3))})
    refused(r"has no row of image .* \(and 4 more\); run embed_images")
    write_index({image_id(0): ("a", "test")})
    refused("holds no training image")
    store.bucket_path(images, 2).unlink()
    refused(r"b002\.parquet: is missing")
