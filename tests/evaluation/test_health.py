"""The health of the data set on the page: what warns, what does not, and which near pairs are drawn."""

import base64
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from evaluation.report import report
from fieldmark.command import UserError
from fieldmark.store import bucket_path, make_table, read_table, write_table
from tests.evaluation.reported import NASTY, PLAN, RUNS, Page, make_params, rewrite, write_health, write_run


class Drawn(NamedTuple):
    """A pair of near duplicates as the page draws it: bits, chips, and the caption of either picture."""

    bits: str
    chips: str
    name: str
    split: str
    path: str
    other_name: str
    other_split: str
    other: str


def drawn(page: Page) -> list[Drawn]:
    caption = r"(?:a test picture closed, see Pictures )?(Class-\d\d) , (\w+) (\S+\.png)"
    return [Drawn(*found) for found in re.findall(rf"(\d+) of 64 bits differ (.*?) ?{caption} {caption}", page.text)]


def test_healthy_data_warn_nowhere(data: Path) -> None:
    summary = report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "warning" not in summary
    assert "contaminated:" not in page.text
    assert not page.of_class("warning")
    assert not page.of_class("alarm")
    assert not page.of_class("near")
    assert len(page.of_class("nil")) == 19  # of 20 counts; one file is broken
    assert "broken 1 cannot be read as an image" in page.text
    assert "test 4 (4 to 4) median (fewest to most)" in page.text
    assert "shorter side – (– to –)" in page.text


def test_contaminated_test_is_warned_of(data: Path) -> None:
    pair = ("test/class-00/0001.png", "train/class-00/0002.png", 3)
    write_health(
        data,
        [pair],
        contaminated_test={"near_duplicates": 3, "groups": 5, "images": 7},
        near_duplicates={"within_split": 11, "across_splits": 13, "across_classes": 0},
        groups={"count": 17, "across_splits": 2},
        images_a_class={split: {"min": 1, "median": 3.5, "max": 6} for split in ("train", "val", "test")},
    )
    lines = report(make_params(), data).splitlines()
    assert lines[-2:] == [
        "warning: test is contaminated: 7 of 12 images (3 with a near duplicate in train or val,"
        " 5 of a group that train or val has too); test accuracy is optimistic",
        f"report: {data}/report/index.html",
    ]
    page = Page((data / "report/index.html").read_text())
    assert len(page.of_class("warning")) == 1
    box = page.text[page.text.index("Test is contaminated") : page.text.index("Accuracy run")]
    assert box.startswith(
        "Test is contaminated: 7 of 12 test images (58.3 %) 3 with a near duplicate in train or val"
        " 5 of a group that train or val has too An image can be both."
    )
    for expected in ("test accuracy on this page is optimistic", "dataset.val_list", "near_duplicates.parquet"):
        assert expected in box
    assert len(page.of_class("alarm")) == 5  # three of contaminated test, pairs across splits, groups across splits
    for expected in ("within a split 11 ", "across splits 13 ", "Groups in all 17 ", "val 3.5 (1 to 6)"):
        assert expected in page.text
    assert drawn(page) == [Drawn("3", "test and train", "Class-00", "test", pair[0], "Class-00", "train", pair[1])]


def test_warning_names_only_the_reason_there_is(data: Path) -> None:
    write_health(data, contaminated_test={"near_duplicates": 0, "groups": 1, "images": 1})
    summary = report(make_params(), data)
    assert "1 of 12 images (1 of a group that train or val has too);" in summary
    page = Page((data / "report/index.html").read_text())
    assert "with a near duplicate in train or val An" not in page.text
    assert "An image can be both" not in page.text
    assert not page.of_class("near")
    assert "#near" not in {attrs.get("href") for _, attrs in page.tags}


def test_pairs_drawn_are_those_of_test_and_fewest_bits(data: Path) -> None:
    folders = ("test/class-00", "train/class-00", "val/class-01")
    test, train, val = ([f"{folder}/{number:04d}.png" for number in range(4)] for folder in folders)
    pairs = [
        (test[0], train[0], 4),
        (test[0], val[0], 2),
        (test[1], train[1], 2),
        (test[2], test[3], 0),  # no leak: nothing learns from either
        (train[0], train[1], 1),
        (train[0], val[3], 0),
        (train[2], train[3], 0),
        (train[2], val[3], 9),
    ]
    write_health(data, pairs)
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "6 of 8 pairs" in page.text
    rows = drawn(page)
    assert [(row.path, row.other, int(row.bits)) for row in rows] == [pairs[place] for place in (1, 2, 0, 3, 5, 6)]
    chips = ["test and val two classes", "test and train", "test and train", "", "two classes", ""]
    assert [row.chips for row in rows] == chips
    # The pictures are those of the paths, side by side.
    thumbs = {}
    for bucket in range(PLAN.buckets):
        for row in read_table(bucket_path(data / "thumbs", bucket), "thumbs/1").to_pylist():
            thumbs[row["image_id"]] = base64.b64encode(row["webp"]).decode()
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    image_id = {row["path"]: row["image_id"] for row in index}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    paths = [path for row in rows for path in (row.path, row.other)]
    # Those of test stay closed until they are asked for.
    expected = [thumbs[image_id[path]] for path in paths if not path.startswith("test")]
    assert sources == [f"data:image/webp;base64,{webp}" for webp in expected]
    assert len(page.of_class("closed")) == len(paths) - len(expected) == 5
    report(make_params(), data, open_test=True)
    page = Page((data / "report/index.html").read_text())
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources == [f"data:image/webp;base64,{thumbs[image_id[path]]}" for path in paths]
    assert not page.of_class("closed")


def test_paths_and_names_of_pairs_are_escaped(data: Path) -> None:
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"name": NASTY}})
    hostile = f"test/class-00/{NASTY}.png"
    rewrite(data / "index/images.parquet", "index.images/1", {0: {"path": hostile}})
    for name in RUNS:
        write_run(data, name, [{}])
    write_health(data, [(hostile, "train/class-00/0000.png", 1)])
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert len(page.scripts) == 3
    assert len(page.of_class("near")) == 1
    closed = "a test picture closed, see Pictures"
    assert f"{closed} {NASTY} , test {hostile} {NASTY} , train train/class-00/0000.png" in page.text


def test_health_that_cannot_stand_is_named(data: Path) -> None:
    path = data / "index/metrics.json"
    again = r"run `python -m stages\.index_images` again"
    whole = json.loads(path.read_text())
    lacking = json.loads(path.read_text())
    del lacking["health"]["pixels"]["longer_side"]["max"]
    broken = {
        "": "is not readable JSON",
        "{": "is not readable JSON",
        "[]": r"has no number images\.train",
        json.dumps({**whole, "health": {}}): r"has no number health\.contaminated_test",
        json.dumps({name: value for name, value in whole.items() if name != "health"}): r"has no number health\.",
        json.dumps({**whole, "unused": {"broken": NASTY}}): r"has no number unused\.broken",
        json.dumps(lacking): r"has no number health\.pixels\.longer_side\.max",
        json.dumps({**whole, "images": {**whole["images"], "test": 13}}): r"counts other images than images\.parquet",
    }
    for text, problem in broken.items():
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^\S+metrics\.json: {problem}.*; {again}[^\n]*$"):
            report(make_params(), data)
    path.unlink()
    with pytest.raises(UserError, match=rf"^\S+metrics\.json: is missing; {again}"):
        report(make_params(), data)

    write_health(data, [("test/class-00/0000.png", "train/broken.png", 0)])
    with pytest.raises(UserError, match=rf"near_duplicates\.parquet: names 'train/broken\.png', no usable .*{again}"):
        report(make_params(), data)
    (data / "index/near_duplicates.parquet").unlink()
    with pytest.raises(UserError, match=r"near_duplicates\.parquet: is missing"):
        report(make_params(), data)
    assert not (data / "report").exists()


def test_missing_thumbnail_of_a_pair_is_named(data: Path) -> None:
    gone, other = "train/class-00/0000.png", "train/class-00/0001.png"
    write_health(data, [(gone, other, 0)])
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    image_id = next(row["image_id"] for row in index if row["path"] == gone)
    path = bucket_path(data / "thumbs", int(image_id[:8], 16) % PLAN.buckets)
    kept = [row for row in read_table(path, "thumbs/1").to_pylist() if row["image_id"] != image_id]
    write_table(make_table("thumbs/1", kept), path, "thumbs/1", {}, "thumbs")
    with pytest.raises(UserError, match=rf"thumbs/b00\d\.parquet: lacks image {image_id}; run the stage that writes"):
        report(make_params(), data)
