"""What tools.predict says of new pictures, as COCO and as Darwin Core."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fieldmark.command import UserError
from fieldmark.store import sha256
from tests.project import draw
from tests.tools.exports.test_darwin_core import rows_of
from tools.exports.new_pictures import read_manifest

pycocotools = pytest.importorskip("pycocotools.coco")
Row = dict[str, Any]
Export = Callable[..., str]


@pytest.fixture
def new(made: list[Row], tmp_path: Path) -> Path:
    """Four new pictures by a manifest beside them, one broken and one of no class; and a row of their group."""
    for number in range(2):
        draw(tmp_path / f"new/{number}.jpg", number, (40 + number, 30))
    (tmp_path / "new/manifest.csv").write_text(
        "path,class,captured_at,latitude,longitude,depth_m,licence,box\n"
        '0.jpg,,2025-01-02,1.5,2.5,7,CC0,"0 0 0.5 1"\n1.jpg,,,,,,,\n',
    )
    rows: list[Row] = [
        {"path": "0.jpg", "class_id": "tang", "p": 0.75, "top": [{"class_id": "tang", "p": 0.75}]},
        {"path": "1.jpg", "class_id": "wrasse", "p": 0.5, "none_of_these": False},
        {"path": "2.jpg", "class_id": "tang", "p": 0.9, "none_of_these": True},
        {"path": "3.jpg", "error": "not an image"},
        {"group": "dive 1", "class_id": "tang", "p": 0.8},
    ]
    for row in rows:
        row["image_id"] = sha256(row["path"]) if "path" in row and "error" not in row else None
    columns = ["path", "group", "image_id", "error", "class_id", "p", "top", "none_of_these"]
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    pq.write_table(table, tmp_path / "said.parquet")
    return tmp_path


def words_for(new: Path) -> list[str]:
    said, manifest = new / "said.parquet", new / "new/manifest.csv"
    return ["--run", "zero_shot", "--predictions", str(said), "--manifest", str(manifest)]


def test_coco_of_new_pictures(new: Path, export: Export) -> None:
    said = export("coco", new / "coco", *words_for(new))
    assert "2 images of 3 categories, 1 with a box of the object" in said
    assert "1 left out: none of the classes; 1 left out: without an answer; 1 left out: of a group" in said
    assert sorted(path.name for path in (new / "coco").iterdir()) == ["predictions.json", "results.json"]
    found = pycocotools.COCO(new / "coco/predictions.json")
    images = [(row["id"], row["file_name"], row["width"], row["height"]) for row in found.loadImgs([1, 2])]
    assert images == [(1, "0.jpg", 40, 30), (2, "1.jpg", 41, 30)]
    said_of = [(row["category_id"], row["bbox"], row["score"]) for row in found.loadAnns(found.getAnnIds())]
    assert said_of == [(2, [0, 0, 20, 30], 0.75), (3, [0, 0, 41, 30], 0.5)]


def test_occurrences_of_new_pictures(new: Path, export: Export) -> None:
    said = export("darwin-core", new / "x.zip", *words_for(new))
    assert "2 occurrences, 2 of them PredictedByMachine" in said
    rows, _ = rows_of(new / "x.zip")
    assert [row["occurrenceID"] for row in rows] == [sha256("0.jpg"), sha256("1.jpg")]
    first = rows[0]
    names = ("scientificName", "eventDate", "license", "decimalLatitude", "decimalLongitude", "minimumDepthInMeters")
    assert [first[name] for name in names] == ["Paracanthurus hepatus", "2025-01-02", "CC0", "1.5", "2.5", "7.0"]
    assert first["identifiedBy"] == "fieldmark run zero_shot (zero_shot on conv)"
    assert {row["identificationVerificationStatus"] for row in rows} == {"PredictedByMachine"}
    assert [json.loads(row["dynamicProperties"])["probability"] for row in rows] == [0.75, 0.5]
    assert rows[1]["scientificName"] == rows[1]["eventDate"] == rows[1]["decimalLatitude"] == ""


def test_what_does_not_belong_together_is_refused(new: Path, export: Export, tmp_path: Path) -> None:
    def refused(match: str, *words: str) -> None:
        with pytest.raises(UserError, match=match):
            export("coco", new / "coco", "--run", "zero_shot", "--predictions", *words)

    table = pq.read_table(new / "said.parquet")
    pq.write_table(table.set_column(4, "class_id", [["shark"] * 5]), new / "other.parquet")
    refused("names the class 'shark', which the run does not have", str(new / "other.parquet"))
    pq.write_table(table.drop_columns("p"), new / "other.parquet")
    refused("has no column p", str(new / "other.parquet"))
    (new / "other.parquet").write_text("path")
    refused(r"is no Parquet of tools\.predict", str(new / "other.parquet"))
    refused(r"0\.jpg: cannot be read: .*; run this where tools\.predict was run", str(new / "said.parquet"))
    (new / "new/manifest.csv").write_text("path,latitude\n0.jpg,100\n")
    with pytest.raises(UserError, match="line 2: latitude is '100'; it lies between -90 and 90"):
        read_manifest(new / "new/manifest.csv")
