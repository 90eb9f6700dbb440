import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import image_id, unit, write_concepts, write_index, write_nodes, write_texts


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
    write_concepts([("of a", "a", "visual")])
    write_nodes(images, {image_id(0): unit(np.eye(3))})
    refused(r"has no row of image .* \(and 4 more\); run embed_images")
    write_index({image_id(0): ("a", "test")})
    refused("holds no training image")
    store.bucket_path(images, 2).unlink()
    refused(r"b002\.parquet: is missing")


@pytest.mark.parametrize("texts", [[], [("gone", "a", "dropped")]])
def test_without_a_concept_the_bank_holds_the_names(
    texts: list[tuple[str, str, str]],
    tables: Params,
    run_stage: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_concepts([("photo of a", "a", "name"), ("photo of b", "b", "name"), *texts])
    run_stage("select_concepts", "--encoder", "conv")
    message = capsys.readouterr().err
    assert message.startswith("warning: data/concepts/concepts.parquet: no concept was kept")
    assert message.count("\n") == 1
    assert all(word in message for word in ("gets a label", "drop_reason", "select.fallback"))
    rows, metrics = read_bank()
    assert [(row["text"], row["kind"], row["kept"]) for row in rows] == [
        ("photo of a", "name", False),
        ("photo of b", "name", False),
    ]
    np.testing.assert_allclose(rows[0]["vector"], unit([1, 1, 0]), atol=1e-3)
    assert {name: metrics[name] for name in ("candidates", "kept", "prototypes")} == {
        "candidates": 0, "kept": 0, "prototypes": 0,
    }  # fmt: skip
    assert metrics["judged"] == {"verdict": "unknown", "images": 0, "classes": 0, "concepts": 0}


LABELS = [f"c{number}" for number in range(7)]


@pytest.fixture
def seven(set_params: Callable[..., Params]) -> Callable[..., Params]:
    """Seven classes on seven axes: images with two local nodes, and a concept a class, along its axis or another's."""
    axes = dict(zip(LABELS, np.eye(8), strict=False))
    chance = np.random.default_rng(0)
    images = {image_id(n): LABELS[n % 7] for n in range(70)}
    split = {each: "val" if n % 5 == 4 else "train" for n, each in enumerate(images)}
    write_index({each: (name, split[each]) for each, name in images.items()})
    vectors = {
        each: unit(axes[name] + 0.05 * chance.standard_normal((3, 8))) for each, name in images.items()
    }
    write_nodes(Path("data/embed/conv/images"), vectors)
    names = [(f"photo of {name}", name, "name") for name in LABELS]
    write_concepts([*names, *((name, name, "visual") for name in LABELS)])

    def write(shift: int, **select: object) -> Params:
        texts = {f"photo of {name}": axes[name] for name in LABELS}
        texts |= {name: axes[LABELS[(n + shift) % 7]] for n, name in enumerate(LABELS)}
        write_texts(Path("data/embed/conv/text.parquet"), texts)
        return set_params(select={"per_class": 2, **select})

    return write


def read_bank() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = store.read_table("data/bank/conv.parquet", "bank/1").to_pylist()
    return rows, json.loads(Path("data/bank/conv.json").read_text())


def test_concepts_with_signal_stay(
    seven: Callable[..., Params], run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seven(0, fallback="auto")
    run_stage("select_concepts", "--encoder", "conv")
    rows, metrics = read_bank()
    assert metrics["judged"]["verdict"] == "signal"
    assert (metrics["candidates"], metrics["kept"], metrics["prototypes"]) == (7, 7, 0)
    assert {row["kind"] for row in rows} == {"name", "visual"}
    captured = capsys.readouterr()
    assert "these concepts carry signal" in captured.out
    assert "warning" not in captured.err


def test_concepts_without_signal_are_told(
    seven: Callable[..., Params], run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seven(1)
    run_stage("select_concepts", "--encoder", "conv")
    rows, metrics = read_bank()
    assert metrics["judged"]["verdict"] == "none"
    assert metrics["kept"] == 7
    assert sum(row["kept"] for row in rows) == 7
    message = capsys.readouterr().err
    assert "carry NO signal" in message
    assert "select.fallback" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("fallback", "shift"), [("auto", 1), ("prototypes", 0)])
def test_prototypes_stand_in(
    fallback: str, shift: int, seven: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    seven(shift, fallback=fallback)
    run_stage("select_concepts", "--encoder", "conv")
    rows, metrics = read_bank()
    # 112 local nodes of training images, and two prototypes a class at most of ten nodes each.
    assert (metrics["kept"], metrics["prototypes"]) == (0, 11)
    prototypes = [row for row in rows if row["kind"] == "proto"]
    assert len(prototypes) == 11
    assert all(row["kept"] for row in prototypes)
    assert {row["kept"] for row in rows if row["kind"] != "proto"} == {False}
    assert {row["drop_reason"] for row in rows if row["kind"] == "visual"} == {
        "visual prototypes stand in for named concepts"
    }
    for row in prototypes:
        assert row["text"] is None
        assert row["concept_id"] is None
        assert np.linalg.norm(np.array(row["vector"], dtype=float)) == pytest.approx(1, abs=1e-2)
        # Nodes of a class lie about its axis: who owns a prototype is the axis it lies along.
        assert row["class_ids"] == [LABELS[int(np.argmax(row["vector"]))]]
    assert {name for row in prototypes for name in row["class_ids"]} == set(LABELS)
    first = Path("data/bank/conv.parquet").read_bytes()
    run_stage("select_concepts", "--encoder", "conv")
    assert Path("data/bank/conv.parquet").read_bytes() == first
    run_stage("label_patches", "--encoder", "conv")
    labelled = store.read_buckets(Path("data/labels/conv"), "labels/1", 4).to_pylist()
    proto = {row["concept_idx"] for row in prototypes}
    assert all(set(row["concept_idx"]) <= proto for row in labelled)


def test_what_no_class_has_most_of_is_nobodys(seven: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    seven(0, fallback="prototypes")
    nodes = unit(np.eye(8)[:3])  # the same in every image of every class
    write_nodes(Path("data/embed/conv/images"), {image_id(n): nodes for n in range(70)})
    run_stage("select_concepts", "--encoder", "conv")
    prototypes = [row for row in read_bank()[0] if row["kind"] == "proto"]
    assert [row["class_ids"] for row in prototypes] == [[]] * 11


def test_prototypes_without_any_concept(seven: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    seven(0, fallback="auto")
    write_concepts([(f"photo of {name}", name, "name") for name in LABELS])
    run_stage("select_concepts", "--encoder", "conv")
    rows, metrics = read_bank()
    assert metrics["judged"]["verdict"] == "unknown"
    assert metrics["prototypes"] == 11
    assert len(rows) == 7 + 11


def test_words_of_no_class_stay_beside_prototypes(seven: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    """Cultivars: no class owns a word, so the gate has nothing to judge; auto makes prototypes and keeps the words."""
    names = [(f"photo of {name}", name, "name") for name in LABELS]
    for fallback, kept in (("auto", 7), ("prototypes", 0), ("none", 7)):
        seven(0, fallback=fallback)
        write_concepts([*names, *((name, None, "generic") for name in LABELS)])
        run_stage("select_concepts", "--encoder", "conv")
        rows, metrics = read_bank()
        assert metrics["judged"]["verdict"] == "unknown"
        assert (metrics["kept"], metrics["prototypes"]) == (kept, 0 if fallback == "none" else 11)
        assert {row["kept"] for row in rows if row["kind"] == "generic"} == {kept > 0}
    assert [row["class_ids"] for row in rows if row["kind"] == "generic"] == [[]] * 7


def test_prototypes_need_local_nodes(seven: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    seven(0, fallback="prototypes")
    write_nodes(Path("data/embed/conv/images"), {image_id(n): unit(np.eye(8)[:1]) for n in range(70)})
    with pytest.raises(UserError, match="no node but the global one, and prototypes"):
        run_stage("select_concepts", "--encoder", "conv")
