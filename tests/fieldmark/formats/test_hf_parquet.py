"""Parquet files with pictures in them, against the same pictures unpacked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from fieldmark.pictures.decode import BadImage, open_file, open_rgb
from tests.project import draw

NAMES = ["blue tang", "clown fish"]


def write_shard(
    path: Path, pictures: Sequence[bytes | None], labels: Sequence[Any], rows: int = 3, **more: Any
) -> None:
    """A file as `datasets` writes it: a struct of bytes and path, and the features in the schema's metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", struct), pa.field("label", pa.int64() if type(labels[0]) is int else pa.string())]
    fields += [pa.field(name, pa.array(values).type) for name, values in more.items()]
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    images = [{"bytes": each, "path": f"{number}.png"} for number, each in enumerate(pictures)]
    table = pa.table({"image": images, "label": list(labels), **more}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def drawn(folder: Path, seeds: Sequence[int]) -> list[bytes]:
    return [draw(folder / f"{seed}.png", seed).read_bytes() for seed in seeds]


def make(root: Path, count: int = 8) -> None:
    """Two shards of train and one of test, both classes in turn."""
    other = root.parent / "drawn"
    for part in range(2):
        seeds = range(part * count, (part + 1) * count)
        write_shard(root / f"data/train-0000{part}-of-00002.parquet", drawn(other, seeds), [seed % 2 for seed in seeds])
    seeds = range(100, 100 + count)
    write_shard(root / "data/test-00000-of-00001.parquet", drawn(other, seeds), [seed % 2 for seed in seeds])


def read(root: Path) -> Listing:
    return read_listing(Dataset(format="hf_parquet", root=str(root)))


def test_the_layout(tmp_path: Path) -> None:
    make(tmp_path / "set", 3)
    listing = read(tmp_path / "set")
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        (f"data/{file}/{row}", NAMES[label], split)
        for file, split, labels in (
            ("test-00000-of-00001.parquet", "test", (0, 1, 0)),
            ("train-00000-of-00002.parquet", "train", (0, 1, 0)),
            ("train-00001-of-00002.parquet", "train", (1, 0, 1)),
        )
        for row, label in enumerate(labels)
    ]
    assert (listing.warnings, listing.passed_over) == ([], [])


def test_labels_splits_and_other_columns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures = drawn(tmp_path / "drawn", range(3))
    write_shard(tmp_path / "validation/0000.parquet", pictures, ["a", "", "b"], group=[1, 2, 3], url=["x", "y", "z"])
    write_shard(tmp_path / "other.parquet", pictures, [1, -1, 0])
    listing = read(tmp_path)
    assert [(row["path"], row["name"], row["split"], row.get("group")) for row in listing.images] == [
        ("other.parquet/0", "clown fish", None, None),
        ("other.parquet/2", "blue tang", None, None),
        ("validation/0000.parquet/0", "a", "val", "1"),
        ("validation/0000.parquet/2", "b", "val", "3"),
    ]
    assert listing.warnings == [
        f"{tmp_path}: 2 rows have no label and are left out: other.parquet/1, validation/0000.parquet/1"
    ]


def test_a_shard_gives_what_the_unpacked_files_give(
    project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """image_ids, thumbnails and embeddings, byte by byte."""
    monkeypatch.setenv("FIELDMARK_CACHE", str(project / "cache"))
    make(project / "set")
    unpacked = project / "unpacked"
    for row in read(project / "set").images:
        file = unpacked / row["split"] / row["name"] / f"{row['path'].replace('/', '-')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(open_file(project / "set" / row["path"]).read())
    found = []
    for kind, root in (("hf_parquet", project / "set"), ("imagefolder", unpacked)):
        set_params(dataset={"format": kind, "root": str(root), "val_fraction": 0.3})
        run_stage("index_images")
        run_stage("embed_images", "--encoder", "conv")
        rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
        ids = {(row["image_id"], row["class_id"], row["split"], row["status"], row["width"]) for row in rows}
        tables = [path for name in ("thumbs", "embed") for path in sorted((project / "data" / name).rglob("*.parquet"))]
        found.append((ids, [path.read_bytes() for path in tables]))
        assert len(ids) == 24
        assert len(tables) >= 4
    assert found[0] == found[1]


def test_a_shard_is_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that hardly compress: memory in Arrow's pool stays under a few groups, however many there are."""
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    pictures = [bytes([number]) * 2**20 for number in range(64)]
    write_shard(tmp_path / "train.parquet", pictures, [0] * 64, rows=4)
    before, most = pa.total_allocated_bytes(), 0
    whole = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    assert [open_file(tmp_path / f"train.parquet/{row}").read(1)[0] for row in range(64)] == list(range(64))
    assert most < 24 * 2**20


def test_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    good = drawn(tmp_path / "drawn", [1])[0]
    path = tmp_path / "set/train.parquet"
    write_shard(path, [good, None, b"no picture"], [0, 1, 0])
    assert len(read(tmp_path / "set").images) == 3
    assert open_rgb(path / "0").size == (80, 60)
    no_bytes = "its row holds no bytes of a picture"
    for row, said in (("1", no_bytes), ("2", "is none of"), ("7", no_bytes), ("x/y", no_bytes)):
        with pytest.raises(BadImage, match=said):
            open_rgb(path / row)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadImage, match="is no readable Parquet"):
        open_rgb(path / "0")
    with pytest.raises(UserError, match=r"train\.parquet: is not readable Parquet .*; download it again") as error:
        read(tmp_path / "set")
    assert "\n" not in str(error.value)
    pq.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(UserError, match="no column holds pictures"):
        read(tmp_path / "set")
    pq.write_table(pa.table({"image": [good], "kind": ["a"]}), path)
    with pytest.raises(UserError, match="there is no column `label`"):
        read(tmp_path / "set")
    with pytest.raises(UserError, match=r"holds no \.parquet"):
        read(tmp_path / "drawn")


def test_broken_bytes_in_a_shard_end_it_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.parquet"
    write_shard(path, drawn(tmp_path / "drawn", range(6)), [0] * 6, rows=2)
    content = bytearray(path.read_bytes())
    place = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    assert open_rgb(path / "1").size == (80, 60)
    with pytest.raises(BadImage, match="cannot be read from row 4 on"):
        open_rgb(path / "5")


def test_rows_that_are_only_stated_and_names_that_stand_twice(tmp_path: Path) -> None:
    path, good = tmp_path / "set/train.parquet", drawn(tmp_path / "drawn", [1])[0]
    write_shard(path, [good] * 13, [0] + [-1] * 12, rows=13)
    [said] = read(tmp_path / "set").warnings
    assert said.partition(" rows have no label and are left out: ")[0].endswith(": 12")
    assert said.endswith("train.parquet/9, train.parquet/10 and 2 more")
    write_shard(path, [None] * 100_001, [0] * 100_001, rows=100_001)
    with pytest.raises(UserError, match=r"train\.parquet: states 100001 rows, more pictures than its") as error:
        read(tmp_path / "set")
    assert "\n" not in str(error.value)
    image = pa.array([{"bytes": good, "path": None}])
    pq.write_table(pa.Table.from_arrays([image, pa.array([1]), pa.array([1])], names=["image", "label", "label"]), path)
    with pytest.raises(UserError, match="several columns are called 'label'"):
        read(tmp_path / "set")
