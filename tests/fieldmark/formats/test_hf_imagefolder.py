from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import SHARES, index, listed, make_hugging, read, write
from tests.project import draw

EXPECTED = [
    ("test/0003.png", "kind 0", "test", None),
    ("test/0006.png", "kind 1", "test", None),
    ("test/0009.png", "kind 2", "test", None),
    ("train/0001.png", "kind 0", "train", None),
    ("train/0002.png", "kind 0", "train", None),
    ("train/0004.png", "kind 1", "train", None),
    ("train/0005.png", "kind 1", "train", None),
    ("train/0007.png", "kind 2", "train", None),
    ("train/0008.png", "kind 2", "train", None),
]


def test_the_layout(tmp_path: Path) -> None:
    make_hugging(tmp_path)
    draw(tmp_path / "test/other.png", 99)
    draw(tmp_path / ".cache/1.png", 98)
    listing = read("hf_imagefolder", tmp_path)
    assert listed(listing) == EXPECTED
    assert (listing.passed_over, listing.warnings, listing.in_pixels) == (["test/other.png"], [], False)


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_hugging(project / "hub")
    lines = [f'{{"file_name": "{n:04d}.png", "label": "kind {n // 3 - 1}", "box": {SHARES}}}' for n in (3, 6, 9)]
    write(project / "hub/test/metadata.jsonl", *lines)
    images, ranks, parts = index("hf_imagefolder", project / "hub", set_params, run_stage)
    assert images == [(path, name, split, SHARES if split == "test" else None) for path, name, split, _ in EXPECTED]
    assert ranks == {f"kind {number}": (None, None) for number in range(3)}
    assert parts == []


def test_one_table_at_the_root_and_folders_as_classes(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{split}/{name}/1.png", "group": 7, "caption": "no"}
        for split in ("training", "Validation", "eval")
        for name in ("a", "b")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    listing = read("hf_imagefolder", tmp_path)
    assert listed(listing) == [
        ("Validation/a/1.png", "a", "val", None),
        ("Validation/b/1.png", "b", "val", None),
        ("eval/a/1.png", "a", "test", None),
        ("eval/b/1.png", "b", "test", None),
        ("training/a/1.png", "a", "train", None),
        ("training/b/1.png", "b", "train", None),
    ]
    assert {row["group"] for row in listing.images} == {"7"}


def test_labels_may_be_numbers_that_classes_csv_names(tmp_path: Path) -> None:
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "label": 0}', '{"file_name": "b.png", "label": 12}')
    write(tmp_path / "classes.csv", "class_id,name", "0,Auk", "12,Dodo")
    listing = read("hf_imagefolder", tmp_path)
    assert listed(listing) == [("a.png", "0", None, None), ("b.png", "12", None, None)]
    assert [row["name"] for row in listing.classes] == ["Auk", "Dodo"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.csv", "", "holds no metadata.csv or metadata.jsonl or metadata.parquet"),
        ("metadata.csv", "image,label\na.png,a\n", "metadata.csv: has no column file_name; it has image, label"),
        ("metadata.csv", "file_name,label\n", "metadata.csv: names no image"),
        ("metadata.csv", "file_name,label\n,a\n", "line 2: file_name is empty"),
        ("metadata.csv", "file_name,label\na.png,\n", "line 2: label is ''; write the name"),
        ("metadata.csv", "file_name\na.png\n", "line 2: there is no column label, and a.png lies in no folder"),
        ("metadata.csv", "file_name\ntrain/a.png\n", "and train/a.png lies in no folder of its class"),
        ("metadata.csv", "file_name,label\n../a.png,a\n", "line 2: file_name is '../a.png'; make it a path from"),
        ("metadata.csv", "file_name,label\n/a.png,a\n", "line 2: file_name is '/a.png'"),
        ("metadata.csv", "file_name,label\nC:a.png,a\n", "line 2: file_name is 'C:a.png'"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": null}\n', "line 1: label is None; write the name"),
        ("metadata.csv", "file_name,label\na.png,a\na.png,b\n", "line 3: 'a.png' is named by another row too"),
        ("metadata.csv", "file_name,labl\na.png,a\n", "a column 'labl'; did you mean 'label'"),
        ("metadata.jsonl", '{"file_name": "a.png"\n', "metadata.jsonl: line 1: is no JSON"),
        ("metadata.jsonl", "[]\n", "line 1: is no JSON object"),
        ("metadata.jsonl", '{"image": "a.png"}\n', "metadata.jsonl: has no column file_name; it has image"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": ["a", "b"]}\n', r"line 1: label is \['a', 'b'\]"),
        ("metadata.parquet", "PAR1", "metadata.parquet: is not readable Parquet"),
    ],
)
def test_what_cannot_stand(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read("hf_imagefolder", tmp_path)
    assert "\n" not in str(error.value)
