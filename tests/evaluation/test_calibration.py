"""A calibration as predict and the report use it: which images have a part in it, and what it answers."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation.calibration import calibrate, fit_calibrating_temperature, one_of_each, read_half
from fieldmark.command import UserError
from fieldmark.store import read_table
from tests.evaluation.reported import rewrite
from training.metrics import fit_temperature, softmax

CLASSES = ["a", "b", "c", "d"]
LINEAGES = [("AB",), ("AB",), ("CD",), ("CD",)]


def draw(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((images, 4))
    return 3 * logits, (softmax(logits).cumsum(1) > rng.random((images, 1))).argmax(1)


def test_only_the_half_that_chose_nothing_is_read(data: Path) -> None:
    half = read_half(data, "linear_probe")
    path = data / "runs/linear_probe/predictions.parquet"
    table = read_table(path, "run.predictions/1")
    rows = [row for row in table.to_pylist() if row["split"] == "val" and row["seed"] == 1]
    assert half.paths == [row["path"] for row in rows]
    assert [half.classes[label] for label in half.y] == [row["class_id"] for row in rows]
    np.testing.assert_array_equal(half.logits, np.array([row["logits"] for row in rows], dtype=np.float32))
    assert half.lineages is None
    # What stands in the other splits does not matter.
    rest = table.filter([row["split"] == "val" for row in table.to_pylist()])
    pq.write_table(rest.replace_schema_metadata(pq.read_schema(path).metadata), path)
    np.testing.assert_array_equal(read_half(data, "linear_probe").logits, half.logits)


def test_taxa_and_groups_come_from_the_index(data: Path) -> None:
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"superclass": "x"}, 1: {"lineage": ["y", "z"]}})
    rewrite(data / "index/images.parquet", "index.images/1", {0: {"group": "track"}})
    half = read_half(data, "linear_probe")
    assert half.lineages == (("x",), ("y", "z"), ())
    assert half.groups is not None
    assert len(half.groups) == len(half.paths)
    for group, path in zip(half.groups, half.paths, strict=True):
        assert group in (f"image {path}", "group track")


def test_runs_that_cannot_calibrate_are_named(data: Path) -> None:
    config = data / "runs/linear_probe/config.json"
    said = json.loads(config.read_text())
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"class_id": "another"}})
    with pytest.raises(UserError, match=r"linear_probe: was made from other images or classes .*train@linear_probe"):
        read_half(data, "linear_probe")
    config.write_text(json.dumps({**said, "not_possible": "no text"}))
    with pytest.raises(UserError, match=r"cannot work on this data \(no text\)"):
        read_half(data, "linear_probe")
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json: is missing; .*--run linear_probe"):
        read_half(data, "linear_probe")
    with pytest.raises(UserError, match="none of its images is in the half that calibrates"):
        calibrate(np.zeros((0, 4)), np.zeros(0, int), None, CLASSES)
    with pytest.raises(UserError, match=r"alpha 5 and error 0\.05: are shares"):
        calibrate(*draw(10), None, CLASSES, alpha=5)


def test_thirty_one_of_thirty_one_is_no_certainty() -> None:
    y = np.arange(31) % 4
    logits = 30 * np.eye(4)[y] + np.random.default_rng(0).standard_normal((31, 4))
    temperature = fit_calibrating_temperature(logits, y)
    assert softmax(logits / temperature).max(1).mean() == pytest.approx(32 / 33, abs=1e-6)
    assert fit_temperature(logits, y) < 0.01 < temperature
    logits, y = draw(50)
    assert fit_calibrating_temperature(logits, y) == fit_temperature(logits, y)


def test_answers() -> None:
    logits, y = draw(400)
    vectors = np.random.default_rng(1).random(400)
    found = calibrate(logits, y, None, CLASSES, LINEAGES, alpha=0.1, error=0.2, distances=vectors)
    rows = found.answer(logits[:100], vectors[:100])
    p = softmax(logits[:100] / found.temperature)
    assert json.loads(json.dumps(rows)) == rows
    assert json.loads(json.dumps(asdict(found)))["units"] == 400
    assert {row["rank"] for row in rows} == {0, 1} | ({None} if any(row["rank"] is None for row in rows) else set())
    for row, own, far in zip(rows, p, vectors[:100], strict=True):
        assert row["set"][0] == CLASSES[own.argmax()]
        inside = [own[CLASSES.index(name)] for name in row["set"]]
        assert inside == sorted(own, reverse=True)[: len(inside)]
        assert row["none_of_these"] == (far > np.sort(vectors)[360])  # ceil(401 * 0.9) = 361
        if row["rank"] == 0:
            assert (row["name"], row["p"]) == (CLASSES[own.argmax()], pytest.approx(own.max()))
        elif row["rank"] == 1:
            taxon = own.reshape(2, 2).sum(1)
            assert (row["name"], row["p"]) == (("AB", "CD")[own.argmax() // 2], pytest.approx(taxon[own.argmax() // 2]))
    assert found.answer(logits[:1])[0]["none_of_these"] is None


def test_too_few_pictures_answer_nothing() -> None:
    logits, y = draw(8)
    [row] = calibrate(logits, y, None, CLASSES, LINEAGES, distances=np.zeros(8)).answer(logits[:1], np.ones(1))
    assert row == {"set": None, "rank": None, "name": None, "p": None, "none_of_these": None}


def test_one_picture_alone_is_answered_as_among_others() -> None:
    logits, y = draw(300)
    found = calibrate(logits, y, None, CLASSES, LINEAGES)
    alone = [found.answer(logits[image : image + 1])[0]["set"] for image in range(50)]
    assert alone == [row["set"] for row in found.answer(logits)[:50]]


def test_copies_in_a_group_promise_no_more() -> None:
    logits, y = draw(12)
    copies = np.repeat(logits, 9, axis=0), np.repeat(y, 9)
    alone = calibrate(logits, y, None, CLASSES)
    grouped = calibrate(*copies, np.repeat(np.arange(12), 9).tolist(), CLASSES)
    assert grouped.temperature == pytest.approx(alone.temperature)
    assert (grouped.images, grouped.units, grouped.backoff) == (108, 12, alone.backoff)
    assert grouped.limits == pytest.approx(alone.limits)
    assert calibrate(*copies, None, CLASSES).limits["LAC"] < alone.limits["LAC"]


def test_one_of_each_group_is_drawn() -> None:
    units = np.array([0, 0, 0, 1, 2, 2])
    assert sorted(units[one_of_each(units)]) == [0, 1, 2]
    assert one_of_each(units).tolist() == one_of_each(units).tolist()
