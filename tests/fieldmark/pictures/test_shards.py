"""Parquet files with pictures that are hostile: bytes that grow, rows that are only stated, columns of other types."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fieldmark.pictures import shards
from fieldmark.pictures.decode import open_file, open_rgb
from fieldmark.pictures.files import BadImage

KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STATED = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def write_same(value: bytes, rows: int) -> None:
    """A file whose rows all hold one value of a dictionary."""
    table = pa.table({"image": pa.array([{"bytes": value, "path": None}] * rows, KIND)})
    pq.write_table(table, "a.parquet", compression="zstd", dictionary_pagesize_limit=2**30)


def test_one_value_in_many_rows_does_not_fill_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FEW_BYTES", 10 * 2**20)
    write_same(bytes(2**20), 50)
    assert os.path.getsize("a.parquet") < 2**12
    assert len(open_file("a.parquet/9").read()) == 2**20
    with pytest.raises(BadImage, match=r"^cannot be read from row 10 on: its pictures have more than 10485760 bytes$"):
        open_file("a.parquet/10")
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 11 * 2**20


def test_large_values_are_held_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROOM", 2**21)
    write_same(bytes(2**21), 40)
    before, most, write = pa.total_allocated_bytes(), 0, Path.write_bytes

    def watch(path: Path, content: bytes) -> int:
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", watch)
    open_file("a.parquet/39")
    assert 0 < most < 12 * 2**20


def test_a_value_that_is_no_picture_by_its_size_is_not_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_BYTES", 1000)
    values = [{"bytes": each, "path": None} for each in (png(), bytes(1001))]
    pq.write_table(pa.table({"image": pa.array(values, KIND)}), "a.parquet")
    assert open_rgb("a.parquet/0").size == (5, 4)
    with pytest.raises(BadImage, match=r"^cannot be read from row 1 on: it has 1001 bytes, more than 1000$"):
        open_file("a.parquet/1")
    assert not list(cache.glob("pictures/*/*/rows/1"))


def test_rows_that_are_only_stated() -> None:
    pq.write_table(pa.table({"image": pa.nulls(100_001, KIND)}), "a.parquet")
    said = "states 100001 rows, more pictures than its [0-9]+ bytes can hold"
    with pytest.raises(BadImage, match=said):
        shards.count_rows(Path("a.parquet"))
    with pytest.raises(BadImage, match=said):
        open_file("a.parquet/0")


@pytest.mark.parametrize("values", [[1, 2], ["x", "y"]])
def test_a_column_that_says_it_holds_pictures_and_does_not(values: list[int | str]) -> None:
    pq.write_table(pa.table({"image": values}).replace_schema_metadata(STATED), "a.parquet")
    assert not shards.has_pictures(Path("a.parquet"))
    with pytest.raises(BadImage, match=r"^holds no column of pictures, or several of one name$"):
        open_file("a.parquet/0")


def test_two_columns_of_one_name() -> None:
    images = pa.array([{"bytes": png(), "path": None}], KIND)
    pq.write_table(pa.Table.from_arrays([images, images], names=["image", "image"]), "a.parquet")
    assert not shards.has_pictures(Path("a.parquet"))
    with pytest.raises(BadImage, match="several of one name"):
        open_file("a.parquet/0")


def test_a_broken_footer_is_a_broken_picture() -> None:
    pq.write_table(pa.table({"image": pa.array([{"bytes": png(), "path": None}], KIND)}), "a.parquet")
    content = bytearray(Path("a.parquet").read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    content[-8 - size : -8 - size // 2] = b"\xff" * (size - size // 2)
    Path("a.parquet").write_bytes(content)
    assert not shards.has_pictures(Path("a.parquet"))
    with pytest.raises(BadImage) as error:
        open_file("a.parquet/0")
    assert str(error.value).startswith(("cannot be unpacked: ", "is no readable Parquet: "))
    assert "\n" not in str(error.value)
