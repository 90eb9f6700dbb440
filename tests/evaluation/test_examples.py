"""Test images as the report shows them: which are chosen, their thumbnails, patches and concepts."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from evaluation.examples import choose_examples
from evaluation.report import report
from fieldmark.command import UserError
from fieldmark.store import bucket_path, make_table, read_table, write_table
from tests.evaluation.reported import PLAN, Page, Row, make_params
from tests.training.cache import ENCODER


def test_example_shows_thumbnail_boxes_and_concepts(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    index = {row["path"]: row for row in read_table(data / "index/images.parquet", "index.images/1").to_pylist()}
    shown = index["test/class-00/0000.png"]  # the only one that is wrong, so it comes first
    bucket = int(shown["image_id"][:8], 16) % PLAN.buckets
    thumbs = {
        row["image_id"]: row["webp"] for row in read_table(bucket_path(data / "thumbs", bucket), "thumbs/1").to_pylist()
    }
    source = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert source is not None
    assert base64.b64decode(source.split(",")[1]) == thumbs[shown["image_id"]]

    def own(folder: str, schema: str) -> list[Row]:
        rows = read_table(bucket_path(data / folder, bucket), schema).to_pylist()
        return [row for row in rows if row["image_id"] == shown["image_id"] and row["view"] == 0]

    labels = own(f"labels/{ENCODER}", "labels/1")
    best = max((row for row in labels if row["node"] and row["selected"]), key=lambda row: row["density"])
    node = own(f"embed/{ENCODER}/images", "embed.nodes/1")[best["node"]]
    style = page.of_class("p1")[0]["style"]
    assert style is not None
    sizes = [float(value) for value in re.findall(r"[\d.]+", style)]
    expected = [node["x0"], node["y0"], node["x1"] - node["x0"], node["y1"] - node["y0"]]
    assert np.allclose(sizes, 100 * np.array(expected), atol=0.06)
    bank = read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()
    weight, text = float(best["concept_weight"][0]), bank[best["concept_idx"][0]]["text"]
    assert f"{100 * weight:.1f} % {text}" in page.text
    assert f"density {best['density']:.3f}" in page.text


def test_missing_thumbnail_is_named(data: Path) -> None:
    for bucket in range(PLAN.buckets):
        empty = make_table("thumbs/1", [])
        write_table(empty, bucket_path(data / "thumbs", bucket), "thumbs/1", {}, "thumbs")
    with pytest.raises(UserError, match=r"thumbs/b00\d\.parquet: lacks image"):
        report(make_params(), data)


def test_choose_examples_takes_both_kinds() -> None:
    right = np.array([True, False, True, False, True])
    assert choose_examples(["c", "d", "a", "b", "e"], right, 2) == [3, 2]
    assert choose_examples(["c", "d", "a", "b", "e"], right, 4) == [3, 1, 2, 0]
    assert choose_examples(["c", "d", "a", "b", "e"], right, 99) == [3, 1, 2, 0, 4]
    assert choose_examples(["b", "a"], np.array([False, False]), 3) == [1, 0]
    assert choose_examples(["b", "a"], np.array([True, True]), 1) == [1]
