"""Pictures as the report shows them: their thumbnails, answers, patches and concepts."""

import base64
from pathlib import Path

import numpy as np
import pytest

from evaluation.gallery import answer
from evaluation.report import report
from fieldmark.command import UserError
from fieldmark.store import bucket_path, make_table, read_table, write_table
from tests.evaluation.reported import PLAN, Page, Row, make_params, write_run
from tests.training.cache import ENCODER

FIRST = "val/class-00/0000.png"


def test_a_picture_has_its_thumbnail_answers_boxes_and_concepts(data: Path) -> None:
    write_run(data, "linear_probe", [{FIRST: "class-02"}])
    report(make_params(shown="linear_probe"), data)
    page = Page((data / "report/index.html").read_text())
    index = {row["path"]: row for row in read_table(data / "index/images.parquet", "index.images/1").to_pylist()}
    image_id = index[FIRST]["image_id"]
    bucket = int(image_id[:8], 16) % PLAN.buckets
    thumbs = {
        row["image_id"]: row["webp"] for row in read_table(bucket_path(data / "thumbs", bucket), "thumbs/1").to_pylist()
    }
    assert base64.b64decode(page.pictures[image_id[:16]]) == thumbs[image_id]

    [picture] = [picture for picture in page.data["pictures"] if picture["path"] == FIRST]
    assert picture["id"] == image_id[:16]
    assert picture["y"] == 0
    assert picture["top"] == [[2, 917], [0, 42], [1, 42]]  # calibrated: 11 of 12 are right
    assert picture["guesses"] == [1, 2]  # zero_shot and linear_probe
    assert picture["split"] == "val"

    def own(folder: str, schema: str) -> list[Row]:
        rows = read_table(bucket_path(data / folder, bucket), schema).to_pylist()
        return [row for row in rows if row["image_id"] == image_id and row["view"] == 0]

    labels = own(f"labels/{ENCODER}", "labels/1")
    selected = [row for row in labels if row["node"] and row["selected"]]
    densest = sorted(selected, key=lambda row: -row["density"])[:3]
    assert [patch["density"] for patch in picture["patches"]] == [round(row["density"], 3) for row in densest]
    node = own(f"embed/{ENCODER}/images", "embed.nodes/1")[densest[0]["node"]]
    assert picture["patches"][0]["box"] == [round(1000 * node[side]) for side in ("x0", "y0", "x1", "y1")]
    bank = read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()
    place, weight = picture["patches"][0]["concepts"][0]
    assert page.data["concepts"][place]["text"] == bank[densest[0]["concept_idx"][0]]["text"]
    assert weight == round(1000 * float(densest[0]["concept_weight"][0]))
    assert picture["selected"] == labels[0]["selected_concepts"]


def test_missing_thumbnail_is_named(data: Path) -> None:
    for bucket in range(PLAN.buckets):
        empty = make_table("thumbs/1", [])
        write_table(empty, bucket_path(data / "thumbs", bucket), "thumbs/1", {}, "thumbs")
    with pytest.raises(UserError, match=r"thumbs/b00\d\.parquet: lacks image"):
        report(make_params(), data)


def test_equal_answers_stand_in_the_order_of_classes() -> None:
    assert answer(np.array([0.1, 0.4, 0.1, 0.4]), 0) == [[1, 400], [3, 400], [0, 100]]
    assert answer(np.array([1.0]), 0) == [[0, 1000]]


def test_the_true_class_is_always_told() -> None:
    assert answer(np.array([0.1, 0.4, 0.1, 0.4]), 2) == [[1, 400], [3, 400], [0, 100], [2, 100]]
