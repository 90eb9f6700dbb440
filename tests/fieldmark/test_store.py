import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark import store
from fieldmark.command import UserError
from tests.project import image_id

DIMENSION = 4


def example(kind: pa.DataType, n: int) -> Any:
    """The n-th value of a type."""
    if pa.types.is_fixed_size_list(kind):
        return [np.float16(n + i / 4) for i in range(DIMENSION)]
    if pa.types.is_list(kind):
        return [example(kind.value_type, i) for i in range(n % 3)]
    if pa.types.is_string(kind):
        return f"ü{n}"
    if pa.types.is_binary(kind):
        return bytes([n, 0, 255])
    if pa.types.is_boolean(kind):
        return n % 2 == 0
    if pa.types.is_float16(kind):
        return np.float16(n / 8)
    return n / 8 if pa.types.is_floating(kind) else n


def examples(schema: str, count: int = 5) -> pa.Table:
    """Rows of every column's type; the odd ones have null wherever that may be."""
    arrow = store.arrow_schema(schema, DIMENSION)
    rows = [
        {field.name: None if field.nullable and n % 2 else example(field.type, n) for field in arrow}
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=arrow)


def one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.mark.parametrize("schema", sorted(store.COLUMNS))
def test_reading_and_rewriting_gives_the_same_bytes(schema: str, tmp_path: Path) -> None:
    first, again, shuffled, bare = (tmp_path / name for name in ("first", "again", "shuffled", "bare"))
    table = examples(schema)
    params = {"b": 1, "a": [0.5, None]}
    store.write_table(table, first, schema, params, "mark")
    store.write_table(store.read_table(first, schema), again, schema, params, "mark")
    store.write_table(pa.concat_tables([table.slice(3), table.slice(0, 3)]), shuffled, schema, params, "mark")
    # Columns as a stage makes them: nullable, in another order, list children named otherwise.
    loose = pa.Table.from_arrays(
        [
            pa.array(table.column(name).to_pylist(), loosen(table.schema.field(name).type))
            for name in table.column_names[::-1]
        ],
        names=table.column_names[::-1],
    )
    store.write_table(loose, bare, schema, params, "mark")
    assert first.read_bytes() == again.read_bytes() == shuffled.read_bytes() == bare.read_bytes()
    assert store.read_table(first, schema).equals(
        table.sort_by([(key, "ascending") for key in store.KEYS[schema]])
    )
    assert store.read_header(first, schema) == (schema, "mark", params)
    assert set(pq.read_schema(first).metadata) == {b"schema", b"fingerprint", b"params"}


def loosen(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_type, kind.list_size)
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


@pytest.mark.parametrize("schema", sorted(store.COLUMNS))
def test_a_table_without_rows_is_valid(schema: str, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    store.write_table(store.arrow_schema(schema, DIMENSION).empty_table(), path, schema, {}, "mark")
    table = store.read_table(path, schema)
    assert len(table) == 0
    if "vector" in table.column_names:
        assert store.vectors_of(table).shape == (0, DIMENSION)


def test_a_null_where_none_may_be_writes_nothing(tmp_path: Path) -> None:
    table = store.make_table("descriptions/1", [{"image_id": None, "rank": 0, "text": "a"}])
    with pytest.raises(ValueError, match="image_id"):
        store.write_table(table, tmp_path / "file", "descriptions/1", {}, "mark")
    assert list(tmp_path.iterdir()) == []


def test_vectors_survive_the_round_trip(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float16)
    table = pa.table({"vector": store.vector_column(vectors)})
    assert np.array_equal(store.vectors_of(table), vectors)
    assert np.array_equal(store.vectors_of(table.slice(2, 3)), vectors[2:5])
    assert np.array_equal(
        store.vectors_of(pa.concat_tables([table.slice(4), table.slice(0, 1)])), vectors[[4, 5, 0]]
    )


def test_a_schema_with_vectors_needs_their_dimension() -> None:
    with pytest.raises(ValueError, match="dimension"):
        store.arrow_schema("embed.text/1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.parquet"
    # Enough noise that a page of vectors is most of the file.
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    table = pa.table(
        {
            "text_id": [f"{n:04d}" for n in range(500)],
            "text": ["a"] * 500,
            "kind": ["name"] * 500,
            "n_tokens": [1] * 500,
            "truncated": [False] * 500,
            "vector": store.vector_column(vectors),
        }
    )
    store.write_table(table, path, "embed.text/1", {}, "mark")
    return path


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        store.read_table(tmp_path / "none.parquet", "bank/1")
    one_line(error, tmp_path / "none.parquet", "is missing", "dvc pull")


def test_another_schema_is_one_line(file: Path) -> None:
    with pytest.raises(UserError) as error:
        store.read_table(file, "bank/1")
    one_line(error, file, "embed.text/1", "bank/1")
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError) as error:
        store.read_table(file, "bank/1")
    one_line(error, file, "none", "bank/1")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bit", "folder"])
def test_a_broken_file_is_one_line(file: Path, damage: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"empty": b"", "text": b"no\n" * 50, "cut": content[:-20], "bit": flipped}[damage])
    with pytest.raises(UserError) as error:
        store.read_table(file, "embed.text/1")
    one_line(error, file, "not readable Parquet", "dvc pull")


@given(st.lists(st.integers(0, 10**6).map(image_id), unique=True), st.integers(1, 40))
def test_every_image_has_one_bucket(ids: list[str], buckets: int) -> None:
    split = store.split_buckets(ids, buckets)
    assert len(split) == buckets
    assert sorted(each for bucket in split for each in bucket) == sorted(ids)
    for bucket, members in enumerate(split):
        assert members == sorted(members)
        assert all(store.bucket_of(each, buckets) == bucket for each in members)


def test_bucket_of_counts_in_the_first_eight_digits() -> None:
    assert store.bucket_of("0000001f" + "f" * 56, 16) == 15
    assert store.bucket_of("ffffffff" + "0" * 56, 1000) == (2**32 - 1) % 1000
    assert store.bucket_path("data/x", 7) == Path("data/x/b007.parquet")


def test_an_atomic_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"

    def succeed(partial: Path) -> None:
        partial.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    store.write_atomic(path, succeed)
    with pytest.raises(OSError, match="disk full"):
        store.write_atomic(path, fail)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        partial.mkdir()
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write_atomic(tmp_path / "file", fail)


def test_a_file_and_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def note(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", note)
    store.write_text(tmp_path / "file", "text")
    assert [Path(each).name for each in synced] == [f".{store.partial_name('file')}", tmp_path.name]


def write_labels(folder: Path, ids: list[str], buckets: int, mark: str = "mark") -> None:
    for bucket, members in enumerate(store.split_buckets(ids, buckets)):
        rows = [{"image_id": each, "rank": rank, "text": f"{rank}"} for each in members for rank in range(2)]
        table = store.make_table("descriptions/1", rows)
        store.write_table(table, store.bucket_path(folder, bucket), "descriptions/1", {}, mark)


def test_a_folder_reads_as_one_table(tmp_path: Path) -> None:
    ids = [image_id(n) for n in range(20)]
    write_labels(tmp_path, ids, 4)
    table = store.read_buckets(tmp_path, "descriptions/1", 4, ["image_id"])
    assert sorted(table.column("image_id").to_pylist()) == sorted(ids * 2)


def test_a_folder_of_mixed_making_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, [image_id(0)], 3)
    table = store.make_table("descriptions/1", [])
    store.write_table(table, store.bucket_path(tmp_path, 2), "descriptions/1", {}, "another")
    with pytest.raises(UserError) as error:
        store.read_buckets(tmp_path, "descriptions/1", 3)
    one_line(error, store.bucket_path(tmp_path, 2), "another encoder")


def test_a_folder_of_another_number_of_buckets_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, [image_id(0)], 3)
    with pytest.raises(UserError) as error:
        store.read_folder_header(tmp_path, "descriptions/1", 4)
    one_line(error, store.bucket_path(tmp_path, 3), "is missing")
    with pytest.raises(UserError) as error:
        store.read_folder_header(tmp_path, "descriptions/1", 2)
    one_line(error, tmp_path, "dataset.buckets = 2")


def test_what_is_no_bucket_is_removed(tmp_path: Path) -> None:
    write_labels(tmp_path, [], 3)
    (tmp_path / ".b000.parquet.17.partial").write_text("half")
    store.remove_strays(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b000.parquet", "b001.parquet"]
    store.remove_strays(tmp_path / "none", 2)


def test_what_another_process_writes_is_no_stray(tmp_path: Path) -> None:
    """It goes when its process is gone; of another machine, whose processes are not known here, after a day."""
    with subprocess.Popen(["sleep", "60"]) as other:
        alive = tmp_path / f".b000.parquet.{other.pid}@{os.uname().nodename}.partial"
        far, old = tmp_path / ".b001.parquet.1@a.far.host.partial", tmp_path / ".b002.parquet.1@a.far.host.partial"
        for path in (alive, far, old):
            path.write_text("half")
        os.utime(old, (0, 0))
        store.remove_strays(tmp_path, 3)
        assert {*tmp_path.iterdir()} == {alive, far}
        other.kill()
    store.remove_strays(tmp_path, 3)
    assert [*tmp_path.iterdir()] == [far]


def test_a_partial_name_is_of_this_process() -> None:
    assert store.in_use(store.partial_name("b000.parquet"), time.time)
    assert not store.in_use("b000.parquet", time.time)


def test_more_than_a_thousand_buckets(tmp_path: Path) -> None:
    """Names have three digits, and four where three are too few; so they are told apart, and none is left over."""
    count, ids = 1_002, [image_id(n) for n in range(20)]
    write_labels(tmp_path / "one", [], 1)
    empty = store.bucket_path(tmp_path / "one", 0).read_bytes()
    folder = tmp_path / "many"
    folder.mkdir()
    for bucket in range(count + 2):
        store.bucket_path(folder, bucket).write_bytes(empty)
    with pytest.raises(UserError, match=r"more than dataset\.buckets = 1002"):
        store.read_folder_header(folder, "descriptions/1", count)
    store.remove_strays(folder, count)
    assert len(list(folder.iterdir())) == count
    assert store.bucket_path(folder, 1_001).name == "b1001.parquet"
    assert len(store.read_buckets(folder, "descriptions/1", count)) == 0
    split = store.split_buckets(ids, count)
    assert sum(map(len, split)) == len(ids)
    assert all(store.bucket_of(each, count) == bucket for bucket, held in enumerate(split) for each in held)


def test_what_a_bucket_keeps(tmp_path: Path) -> None:
    old, new = [image_id(n) for n in range(3)], image_id(3)
    write_labels(tmp_path, old, 1)
    path = store.bucket_path(tmp_path, 0)

    def find(wanted: list[str], mark: str = "mark") -> tuple[list[str], list[str], bool, bool]:
        kept = store.find_kept(path, "descriptions/1", mark, wanted)
        return kept.present, kept.missing, kept.stale, kept.changes

    assert find(old) == (old, [], False, False)
    assert find([*old, new]) == (old, [new], False, True)
    assert find(old[:2]) == (old[:2], [], True, True)
    assert find([]) == ([], [], True, True)
    assert find(old, "other mark") == ([], old, True, True)
    table = store.read_images(path, "descriptions/1", old[:2], ["image_id", "rank"])
    assert table.column("image_id").to_pylist() == sorted(old[:2] * 2)
    assert len(store.read_images(path, "descriptions/1", [])) == 0
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable"):
        find(old)
    path.unlink()
    assert find(old) == ([], old, True, True)


def description_rows(counts: list[int]) -> pa.Table:
    """So many rows of each image, sorted by key."""
    rows = [
        {"image_id": image, "rank": rank, "text": f"{rank}"}
        for image, count in zip(sorted(image_id(n) for n in range(len(counts))), counts, strict=True)
        for rank in range(count)
    ]
    return store.make_table("descriptions/1", rows)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_pieces_give_the_bytes_of_the_whole(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROW_GROUP", 4)
    table = description_rows([count])
    store.write_table(table, tmp_path / "whole", "descriptions/1", {"a": 1}, "mark")
    assert pq.ParquetFile(tmp_path / "whole").num_row_groups == max(1, -(-count // 4))
    for size in (1, 3, 4, 5, 100):
        pieces = [table.slice(start, size) for start in range(0, count, size)]
        store.write_sorted(pieces, tmp_path / "pieces", "descriptions/1", table.schema, {"a": 1}, "mark")
        assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    again = store.read_table(tmp_path / "whole", "descriptions/1")
    store.write_table(again, tmp_path / "again", "descriptions/1", {"a": 1}, "mark")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_one_row_group_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROW_GROUP", 10)
    table = description_rows([100])
    groups, taken, written = store.RowGroups(table.schema), 0, 0
    for start in range(0, 100, 3):
        taken += 3
        written += sum(len(group) for group in groups.add(table.slice(start, 3)))
        # One row at least is left for the last group.
        assert written < min(taken, 100) <= written + 10
    assert written + len(groups.rest()) == 100


def test_long_vectors_come_in_smaller_row_groups() -> None:
    for length, rows in ((2048, 4096), (8256, 1016), (10**6, 16)):
        assert store.row_group_size(store.arrow_schema("embed.moments/1", length)) == rows
    assert store.row_group_size(store.arrow_schema("embed.nodes/1", 512)) == 4096
    assert store.row_group_size(store.arrow_schema("embed.tokens/1")) == 16


def test_files_written_side_by_side_have_the_bytes_of_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROW_GROUP", 4)
    tables = [description_rows([1] * 30), description_rows([2] * 30)]
    for name, table in zip("ab", tables, strict=True):
        store.write_table(table, tmp_path / f"{name}-alone", "descriptions/1", {"a": 1}, name)
    targets = [
        store.Target(tmp_path / name, "descriptions/1", table.schema, {"a": 1}, name)
        for name, table in zip("ab", tables, strict=True)
    ]
    pieces = [(tables[0].slice(number, 1), tables[1].slice(2 * number, 2)) for number in range(30)]
    store.write_side_by_side(pieces, targets)
    for name in "ab":
        assert (tmp_path / name).read_bytes() == (tmp_path / f"{name}-alone").read_bytes()

    def broken() -> Iterator[tuple[pa.Table, pa.Table]]:
        yield pieces[0]
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        store.write_side_by_side(broken(), targets)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_of_a_bucket_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROW_GROUP", 4)
    path = tmp_path / "bucket"
    # Images that end with a row group, within one, and after a whole one.
    table = description_rows([4, 1, 9, 1, 1, 3])
    store.write_table(table, path, "descriptions/1", {}, "mark")
    ids = table.column("image_id").unique().to_pylist()
    for wanted in (ids, ids[::2], [ids[5]], [ids[2], image_id(99)], []):
        images = list(store.iterate_images(path, "descriptions/1", wanted))
        assert [store.image_of(image) for image in images] == [each for each in ids if each in wanted]
        for image in images:
            assert image.to_pylist() == [row for row in table.to_pylist() if row["image_id"] == store.image_of(image)]
    store.write_table(table.slice(0, 0), path, "descriptions/1", {}, "mark")
    assert list(store.iterate_images(path, "descriptions/1", ids)) == []


def test_a_flipped_bit_is_told_while_images_come(tmp_path: Path) -> None:
    path = tmp_path / "bucket"
    chance = np.random.default_rng(0)
    rows = [{"image_id": image_id(n), "rank": 0, "text": chance.bytes(40).hex()} for n in range(500)]
    store.write_table(store.make_table("descriptions/1", rows), path, "descriptions/1", {}, "mark")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError) as error:
        list(store.iterate_images(path, "descriptions/1", [image_id(0)]))
    one_line(error, path, "not readable Parquet")


def test_a_fingerprint_is_of_schema_parameters_and_upstream() -> None:
    marks = [
        store.fingerprint("a/1", {"x": 1, "y": 2}, ["up"]),
        store.fingerprint("a/2", {"x": 1, "y": 2}, ["up"]),
        store.fingerprint("a/1", {"x": 1, "y": 3}, ["up"]),
        store.fingerprint("a/1", {"x": 1, "y": 2}, ["down"]),
        store.fingerprint("a/1", {"x": 1, "y": 2}),
    ]
    assert len(set(marks)) == len(marks)
    assert store.fingerprint("a/1", {"y": 2, "x": 1}, ["up"]) == marks[0]
    with pytest.raises(ValueError, match="JSON"):
        store.canonical_json(float("nan"))
