"""A Parquet data set as pandas, Polars and DuckDB open it, with what Hugging Face's `datasets` looks for."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from fieldmark.command import UserError
from tools.exports import dataset
from tools.exports.dataset import may_be_shared

Row = dict[str, Any]
Export = Callable[..., str]
SHARED = {"CC-BY-4.0", "CC0 1.0", "https://creativecommons.org/licenses/by-nc/4.0/"}


@pytest.fixture
def polars() -> Iterator[Any]:
    """Polars; after the test Python has its own handler of Ctrl-C back: that of Polars wakes no waiting thread."""
    import signal

    yield pytest.importorskip("polars")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_rows_hold_what_the_data_set_holds(made: list[Row], export: Export, tmp_path: Path) -> None:
    said = export("dataset", tmp_path / "set")
    assert "30 rows in 3 files, 18 with their picture; 12 without, 6 of which name no licence" in said
    assert "12 ask to name their author" in said
    files = sorted(path.name for path in (tmp_path / "set/data").iterdir())
    assert files == [f"{split}-00000-of-00001.parquet" for split in ("test", "train", "val")]
    by_id = {row["image_id"]: row for row in made}
    seen = set()
    for name in files:
        rows = pq.read_table(tmp_path / "set/data" / name).to_pylist()
        assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
        for row in rows:
            image = by_id[row["image_id"]]
            seen.add(row["image_id"])
            assert name.startswith(image["split"])
            assert {key: row[key] for key in dataset.COLUMNS} == {key: image[key] for key in dataset.COLUMNS}
            assert (row["path"], row["class_id"]) == (image["path"], image["class_id"])
            assert row["label"] == ["other", "tang", "wrasse"].index(image["class_id"])
            tang = ["a fish with a yellow tail", "a fish with a palette"]
            assert row["concepts"] == (tang if image["class_id"] == "tang" else [])
            told = "Sentence 0.\nSentence 1." if image is made[0] else None
            assert row["description"] == told
            if image["licence"] in SHARED:
                assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == row["image_id"]
                assert row["image"]["path"] == Path(image["path"]).name
                assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (80, 60)
            else:
                assert row["image"] is None
    assert seen == set(by_id)


def test_other_libraries_open_it(made: list[Row], export: Export, tmp_path: Path, polars: Any) -> None:
    said = export("dataset", tmp_path, "--with-images")
    assert "30 with their picture" in said
    assert "without" not in said
    pattern = f"{tmp_path}/data/*.parquet"
    rows = duckdb.sql(f"SELECT octet_length(image.bytes), concepts FROM '{pattern}' WHERE label = 1").fetchall()
    assert len(rows) == 10
    assert all(size > 0 and len(concepts) == 2 for size, concepts in rows)
    frame = pd.read_parquet(tmp_path / "data")
    assert {Image.open(io.BytesIO(image["bytes"])).size for image in frame["image"]} == {(80, 60)}
    assert set(polars.read_parquet(pattern)["image"].struct.field("path")) == {Path(row["path"]).name for row in made}


def test_hugging_face_finds_pictures_classes_and_splits(made: list[Row], export: Export, tmp_path: Path) -> None:
    """`datasets` (Features.from_arrow_schema) takes a feature of the metadata where its Arrow type is the column's."""
    export("dataset", tmp_path)
    schema = pq.read_schema(tmp_path / "data/val-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    names = ["Blue tang (other)", "Blue tang (tang)", "Wrasse | <b>"]
    assert features == {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    assert (schema.field("image"), schema.field("label")) == (image, pa.field("label", pa.int64()))
    card = DatasetCard.load(tmp_path / "README.md")
    [config] = card.data.to_dict()["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "data/train-*"},
        {"split": "validation", "path": "data/val-*"},
        {"split": "test", "path": "data/test-*"},
    ]
    assert "18 of the 30 rows" in card.text


def test_files_are_cut_where_they_are_full(
    made: list[Row], export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SHARD_ROWS", 4)
    monkeypatch.setattr(dataset, "GROUP", 2)
    export("dataset", tmp_path / "rows")
    names = sorted(path.name for path in (tmp_path / "rows/data").glob("train-*"))
    assert names == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    counts = [pq.read_metadata(tmp_path / "rows/data" / name) for name in names]
    assert [(each.num_rows, each.num_row_groups) for each in counts] == [(4, 2), (4, 2), (1, 1)]
    size = {row["image_id"]: (Path("images") / row["path"]).stat().st_size for row in made}
    monkeypatch.setattr(dataset, "SHARD_ROWS", 30)
    monkeypatch.setattr(dataset, "SHARD_BYTES", 5 * max(size.values()))
    export("dataset", tmp_path / "bytes", "--with-images")
    for path in sorted((tmp_path / "bytes/data").glob("train-*-of-*")):
        sizes = [size[image_id] for image_id in pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()]
        assert sum(sizes[:-1]) < dataset.SHARD_BYTES
        assert sum(sizes) >= dataset.SHARD_BYTES or path.name == "train-00001-of-00002.parquet"
    assert len(list((tmp_path / "bytes/data").iterdir())) == 6


def test_a_picture_that_is_another_is_refused(
    made: list[Row], export: Export, tmp_path: Path
) -> None:
    path = Path("images") / made[0]["path"]
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"x")
        with pytest.raises(UserError, match="is not the file that was indexed; run index_images again"):
            export("dataset", tmp_path / "set", "--with-images")
        path.unlink()
        with pytest.raises(UserError, match=r"cannot be read: .*; restore it, or run index_images again"):
            export("dataset", tmp_path / "set", "--with-images")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "licence",
    [
        "CC0", "cc0 1.0", "CC-BY-4.0", "CC BY-NC-ND 2.0", "cc-by-sa", "Creative Commons Attribution 4.0",
        "http://creativecommons.org/licenses/by/4.0/legalcode", "https://creativecommons.org/publicdomain/zero/1.0/",
        "Public Domain",
    ],
)  # fmt: skip
def test_licences_that_let_anyone_pass_a_picture_on(licence: str) -> None:
    assert may_be_shared(licence)


@pytest.mark.parametrize(
    "licence",
    [
        None, "", "all rights reserved", "no Creative Commons licence", "not public domain", "(c) A. Person",
        "ask me about CC BY", "CC", "research use only", "https://example.org/creativecommons.org/licenses/by/4.0",
    ],
)  # fmt: skip
def test_licences_that_do_not_or_are_not_known_to(licence: str | None) -> None:
    assert not may_be_shared(licence)
