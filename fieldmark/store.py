"""The Parquet contracts: schemas, fingerprints, buckets, and one way to write and to read a table.

Bytes are a function of the rows and of what made them: rows are sorted by key, every table is cast to its schema before
it is written, and the file's metadata holds `schema`, `fingerprint` and `params` and nothing that changes from run to
run. A fingerprint hashes the schema, the parameters that change content and the fingerprints of what was read; never
rows, paths, modes, batch sizes, devices or limits.

A folder of buckets (`bNNN.parquet`) holds one row set an image, in bucket `int(image_id[:8], 16) % buckets`. All
buckets exist, empty ones too, so a missing one is seen. Everything is written to a temporary name and renamed: no
reader meets half a file. Pages carry checksums: a flipped bit is an error, not a number. Row groups are of ROW_GROUP
rows, those of wide rows of fewer (row_group_size), so that a file that is written row group by row group has the bytes
of one that is written at once.
"""

import errno
import functools
import hashlib
import itertools
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fieldmark.command import UserError

HALF, FLOAT, TEXT, INT = pa.float16(), pa.float32(), pa.string(), pa.int32()
# Rows in a row group: 4 MB of vectors at D = 512, which costs 1 % of the file and reads faster than one group does.
ROW_GROUP = 4096
# The same of rows that hold all vectors of a map, 0.3 MB each with 14 x 14 cells of 768.
WIDE_ROW_GROUP = 16
# Vectors of more than 2,048 numbers come in fewer rows, of as many numbers: 16 MB.
LONGEST_ROW_GROUP = 4096 * 2048
# How the name of a file ends that is not whole yet (partial_name), and how long its maker may write nothing.
PARTIAL = re.compile(r"\.(?P<process>\d+)@(?P<host>[^/]+)\.partial$")
STRAY_AFTER_S = 24 * 3600


def required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def items(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))


def vector(dimension: int) -> pa.DataType:
    return pa.list_(pa.field("element", HALF), dimension)


# Columns by schema. `vector` stands for vector(D), D known when written.
COLUMNS: dict[str, list[pa.Field]] = {
    "index.images/1": [
        required("path", TEXT), pa.field("image_id", TEXT), required("class_id", TEXT), required("split", TEXT),
        pa.field("width", INT), pa.field("height", INT), required("status", TEXT), pa.field("error", TEXT),
        pa.field("dhash", pa.uint64()), pa.field("duplicate_of", TEXT), pa.field("box", items(FLOAT)),
        pa.field("group", TEXT), pa.field("captured_at", TEXT), pa.field("latitude", pa.float64()),
        pa.field("longitude", pa.float64()), pa.field("depth_m", pa.float64()), pa.field("licence", TEXT),
    ],
    "index.classes/2": [
        required("class_id", TEXT), required("name", TEXT), pa.field("superclass", TEXT),
        pa.field("scientific_name", TEXT), pa.field("lineage", items(TEXT)), pa.field("aliases", items(TEXT)),
        pa.field("note", TEXT),
        required("from_images", pa.bool_()),
    ],
    "index.parts/1": [
        required("path", TEXT), required("part", TEXT), pa.field("x", FLOAT), pa.field("y", FLOAT),
        required("visible", pa.bool_()), pa.field("box", items(FLOAT)),
    ],
    "index.attributes/1": [required("class_id", TEXT), required("attribute", TEXT), required("value", TEXT)],
    "index.near_duplicates/1": [required("path", TEXT), required("other", TEXT), required("bits", INT)],
    "index.links/1": [
        required("src", TEXT), required("dst", TEXT), required("weight", FLOAT), required("kind", TEXT),
    ],
    "thumbs/1": [required("image_id", TEXT), required("webp", pa.binary())],
    "llm.answers/1": [
        required("item_key", TEXT), required("subject_id", TEXT), required("sample", INT), required("prompt_sha", TEXT),
        required("status", TEXT), pa.field("response_json", TEXT), required("model_requested", TEXT),
        pa.field("model_reported", TEXT), pa.field("response_id", TEXT), pa.field("finish_reason", TEXT),
        pa.field("input_tokens", pa.int64()), pa.field("output_tokens", pa.int64()), pa.field("cost_usd", pa.float64()),
        required("attempts", INT), required("source", TEXT), required("created_at", TEXT),
    ],
    "descriptions/1": [required("image_id", TEXT), required("rank", INT), required("text", TEXT)],
    "descriptions.cells/1": [
        required("image_id", TEXT), required("cell", INT), required("x0", FLOAT), required("y0", FLOAT),
        required("x1", FLOAT), required("y1", FLOAT), required("rank", INT), required("text", TEXT),
    ],
    "asked/1": [
        required("subject_id", TEXT), required("sample", INT), required("field", TEXT), required("rank", INT),
        required("text", TEXT),
    ],
    "concepts/1": [
        required("concept_id", TEXT), required("text", TEXT), pa.field("class_id", TEXT), required("kind", TEXT),
        pa.field("part", TEXT), required("rank", INT), required("kept", pa.bool_()), pa.field("drop_reason", TEXT),
        pa.field("item_key", TEXT),
    ],
    "embed.nodes/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("node", pa.int16()), required("kind", TEXT),
        required("x0", FLOAT), required("y0", FLOAT), required("x1", FLOAT), required("y1", FLOAT),
        required("flip", pa.bool_()), required("norm", FLOAT), required("vector", HALF),
    ],
    "embed.tokens/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("layer", pa.int16()),
        required("grid_h", pa.int16()), required("grid_w", pa.int16()), required("width", INT),
        required("vectors", items(HALF)), pa.field("cls", items(HALF)), pa.field("rollout", items(HALF)),
    ],
    "embed.moments/1": [
        required("image_id", TEXT), required("view", pa.int16()), pa.field("layer", pa.int16()), required("kind", TEXT),
        required("vector", HALF),
    ],
    "maps/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("branch", TEXT),
        required("side", pa.int16()), required("values", items(HALF)),
    ],
    "again/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("branch", TEXT), required("vector", HALF),
    ],
    "embed.text/1": [
        required("text_id", TEXT), required("text", TEXT), required("kind", TEXT), required("n_tokens", INT),
        required("truncated", pa.bool_()), required("vector", HALF),
    ],
    "embed.controls/1": [
        required("kind", TEXT), pa.field("class_id", TEXT), required("rank", INT), required("text", TEXT),
        required("vector", HALF),
    ],
    "bank/1": [
        required("concept_idx", INT), pa.field("concept_id", TEXT), pa.field("text", TEXT),
        required("class_ids", items(TEXT)), required("kind", TEXT), pa.field("discriminability", FLOAT),
        required("vector", HALF), required("kept", pa.bool_()), pa.field("drop_reason", TEXT),
    ],
    "labels/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("node", pa.int16()),
        required("concept_idx", items(INT)), required("concept_weight", items(HALF)), required("entropy", FLOAT),
        required("density", FLOAT), required("selected", pa.bool_()), pa.field("ring_gains", items(FLOAT)),
        pa.field("selected_concepts", items(INT)),
    ],
    "options/1": [
        required("image_id", TEXT), required("path", TEXT), required("options", items(TEXT)),
        required("names", items(TEXT)), required("answer", pa.int16()), required("miner_says", TEXT),
    ],
    "graphs/1": [
        required("image_id", TEXT), required("view", pa.int16()), required("src", items(pa.int16())),
        required("dst", items(pa.int16())), required("spatial", items(HALF)), required("semantic", items(HALF)),
    ],
    "links/1": [required("src", TEXT), required("dst", TEXT), required("weight", FLOAT), required("kind", TEXT)],
}
# The columns that order a schema's rows.
KEYS: dict[str, list[str]] = {
    "index.images/1": ["path"],
    "index.classes/2": ["class_id"],
    "index.parts/1": ["path", "part"],
    "index.attributes/1": ["class_id", "attribute", "value"],
    "index.near_duplicates/1": ["path", "other"],
    "index.links/1": ["dst", "src", "kind"],
    "thumbs/1": ["image_id"],
    "llm.answers/1": ["subject_id", "sample", "item_key"],
    "descriptions/1": ["image_id", "rank"],
    "descriptions.cells/1": ["image_id", "cell", "rank"],
    "asked/1": ["subject_id", "sample", "field", "rank"],
    "concepts/1": ["class_id", "kind", "rank", "concept_id", "item_key"],
    "embed.nodes/1": ["image_id", "view", "node"],
    "embed.tokens/1": ["image_id", "view", "layer"],
    "embed.moments/1": ["image_id", "view"],
    "maps/1": ["image_id", "view", "branch"],
    "again/1": ["image_id", "view", "branch"],
    "embed.text/1": ["text_id"],
    "embed.controls/1": ["kind", "class_id", "rank"],
    "bank/1": ["concept_idx"],
    "labels/1": ["image_id", "view", "node"],
    "options/1": ["image_id"],
    "graphs/1": ["image_id", "view"],
    "links/1": ["dst", "kind", "src"],
}


class Header(NamedTuple):
    """What a file says of itself."""

    schema: str
    fingerprint: str
    params: dict[str, Any]


def nfc(name: str) -> str:
    """A name with each accent on its letter (Unicode's NFC): the form in which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def class_id_of(name: str) -> str:
    """A folder-safe id that never collides: the name itself where it is one, else its slug and a hash of its NFC."""
    name = nfc(name)
    if re.fullmatch(r"[a-z0-9_-]+", name):
        return name
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
    return f"{slug}-{sha256(name)[:8]}"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def fingerprint(schema: str, params: dict[str, Any], upstream: Sequence[str] = ()) -> str:
    """The identity of a table's making: its schema, the parameters that change content, what it was made from."""
    return sha256(canonical_json([schema, params, list(upstream)]))


def arrow_schema(schema: str, dimension: int | None = None) -> pa.Schema:
    """The Arrow schema of a contract; `dimension` is the length D of its vectors where it has any."""
    columns = COLUMNS[schema]
    if dimension is None and any(field.name == "vector" for field in columns):
        raise ValueError(f"{schema} holds vectors: give their dimension")
    return pa.schema([
        required("vector", vector(dimension)) if dimension is not None and field.name == "vector" else field
        for field in columns
    ])


def make_table(schema: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table without vectors from a list of rows; absent nullable columns become null."""
    return pa.Table.from_pylist(list(rows), schema=arrow_schema(schema))


def vector_column(vectors: Any) -> pa.Array:
    """A float array (n, D) as a fixed_size_list<float16>[D] column."""
    flat = pa.array(vectors.astype("float16", copy=False).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=vector(vectors.shape[1]))


def vectors_of(table: pa.Table, column: str = "vector") -> Any:
    """The vectors of a table as a float16 array (n, D)."""
    lists = table.column(column).combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), lists.type.list_size)


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, then rename it: a reader sees the old file or the new one.

    Both the bytes and the name are on the disk when it returns, so that a loss of power leaves no empty file either.
    Raises what `write` raised, whatever then happens to the temporary file.
    """
    write_atomics([Path(path)], lambda partials: write(partials[0]))


def write_atomics(paths: Sequence[Path], write: Callable[[list[Path]], None]) -> None:
    """write_atomic for several files that are written side by side; each of them is whole, but all are not one."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    partials = [path.with_name(f".{partial_name(path.name)}") for path in paths]
    try:
        write(partials)
        for partial in partials:
            sync(partial)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except BaseException:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()
        raise
    for path in paths:
        sync(path.parent)


def partial_name(name: str) -> str:
    """What this process calls a file of that name until it is whole: machines that share a disk share numbers."""
    return f"{name}.{os.getpid()}@{os.uname().nodename}.partial"


def in_use(name: str, written: Callable[[], float]) -> bool:
    """Whether a file of a partial_name may still be written. One whose process is gone is not, nor one a day old.

    `written` says when it was written, in seconds since 1970; it is asked only where that matters.
    """
    if not (maker := PARTIAL.search(name)):
        return False
    if maker["host"] == os.uname().nodename:
        try:
            os.kill(int(maker["process"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it is another user's
    return time.time() - written() < STRAY_AFTER_S


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems, most of them network ones, have no such thing for a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""

    def write(partial: Path) -> None:
        partial.write_bytes(content)

    write_atomic(path, write)


def write_table(table: pa.Table, path: str | Path, schema: str, params: dict[str, Any], mark: str) -> None:
    """Write rows sorted by key under a contract; `mark` is their fingerprint. Raises ValueError on a forbidden null."""
    dimension = table.schema.field("vector").type.list_size if "vector" in table.schema.names else None
    columns = arrow_schema(schema, dimension)
    table = table.select(columns.names).cast(columns)
    # One chunk, of which rows are taken fast. Of the sorted table a row group is held, beside the one that was given.
    table = table.combine_chunks()
    order = pc.sort_indices(table, [(key, "ascending") for key in KEYS[schema]])
    size = row_group_size(columns)
    pieces = (table.take(order.slice(start, size)) for start in range(0, len(table), size))
    write_sorted(pieces, path, schema, columns, params, mark)


def write_sorted(
    pieces: Iterable[pa.Table], path: str | Path, schema: str, columns: pa.Schema, params: dict[str, Any], mark: str
) -> None:
    """write_table for rows that come piece by piece, sorted by key, in `columns`; one row group is held at a time."""
    write_side_by_side(((piece,) for piece in pieces), [Target(Path(path), schema, columns, params, mark)])


def write_rows(
    rows: Iterable[dict[str, Any]], path: str | Path, schema: str, params: dict[str, Any], mark: str
) -> None:
    """write_table for rows without vectors that come one by one, sorted by key; memory holds a row group of them."""
    columns, left = arrow_schema(schema), iter(rows)
    chunks = iter(lambda: list(itertools.islice(left, ROW_GROUP)), [])
    write_sorted((make_table(schema, chunk).cast(columns) for chunk in chunks), path, schema, columns, params, mark)


class Target(NamedTuple):
    """A file to be written, and what it says of itself."""

    path: Path
    schema: str
    columns: pa.Schema
    params: dict[str, Any]
    mark: str

    @property
    def described(self) -> pa.Schema:
        """The columns with the header."""
        header = {"schema": self.schema, "fingerprint": self.mark, "params": canonical_json(self.params)}
        return self.columns.with_metadata(header)


def write_side_by_side(pieces: Iterable[Sequence[pa.Table]], targets: Sequence[Target]) -> None:
    """write_sorted for several files at once: every item of `pieces` holds a table for each of them."""
    columns = [target.described for target in targets]
    write_atomics([target.path for target in targets], lambda partials: write_parquets(pieces, partials, columns))


def write_parquet(pieces: Iterable[pa.Table], sink: Path | IO[bytes], columns: pa.Schema) -> None:
    """Write tables, one after the other, as one Parquet file: how every file here is encoded."""
    write_parquets(((piece,) for piece in pieces), [sink], [columns])


def write_parquets(
    pieces: Iterable[Sequence[pa.Table]], sinks: Sequence[Path | IO[bytes]], columns: Sequence[pa.Schema]
) -> None:
    """write_parquet for several files at once: every item of `pieces` holds a table for each of them."""
    groups = [RowGroups(each) for each in columns]
    with ExitStack() as stack:
        writers = [
            # Texts repeat; numbers hardly do, and a dictionary of them takes three times as long and makes the file
            # larger.
            stack.enter_context(pq.ParquetWriter(
                sink, each, compression="zstd", write_page_checksum=True,
                use_dictionary=[field.name for field in each if field.type == TEXT],
            ))
            for sink, each in zip(sinks, columns, strict=True)
        ]  # fmt: skip
        for tables in pieces:
            for writer, group, table in zip(writers, groups, tables, strict=True):
                for full in group.add(table):
                    writer.write_table(full)
        for writer, group in zip(writers, groups, strict=True):
            writer.write_table(group.rest())


class RowGroups:
    """Rows that come piece by piece, in tables of one size, the last of one row or more, or of none without a row."""

    def __init__(self, columns: pa.Schema, size: int | None = None) -> None:
        """`size` in rows; by default row_group_size."""
        self.columns, self.size = columns, row_group_size(columns) if size is None else size
        self.waiting, self.count = [columns.empty_table()], 0

    def add(self, piece: pa.Table) -> Iterator[pa.Table]:
        """Take more rows; the tables that are full and not the last."""
        self.waiting.append(piece.replace_schema_metadata(self.columns.metadata))
        self.count += len(piece)
        while self.count > self.size:
            table = pa.concat_tables(self.waiting)
            # One chunk: Arrow keeps the chunks it was given, and they would show in the bytes.
            yield table.slice(0, self.size).combine_chunks()
            self.waiting, self.count = [table.slice(self.size)], self.count - self.size

    def rest(self) -> pa.Table:
        """The last table."""
        return pa.concat_tables(self.waiting).combine_chunks()


def row_group_size(columns: pa.Schema) -> int:
    """How many rows a row group of these columns has."""
    if "vectors" in columns.names:
        return WIDE_ROW_GROUP
    length = columns.field("vector").type.list_size if "vector" in columns.names else 1
    return min(ROW_GROUP, max(WIDE_ROW_GROUP, LONGEST_ROW_GROUP // length))


def read_header(path: str | Path, schema: str) -> Header:
    """What a file says of itself. Raises UserError where it is missing, broken or of another schema."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        remedy = "run the stage that writes it (dvc repro), or fetch it (dvc pull)"
        raise UserError(f"{path}: is missing; {remedy}") from None
    except (OSError, pa.ArrowException) as error:
        raise broken(path, error) from None
    found = metadata.get(b"schema", b"none").decode()
    if found != schema:
        raise UserError(f"{path}: holds schema {found}, not {schema}; remove it and run the stage that writes it again")
    return Header(found, metadata[b"fingerprint"].decode(), json.loads(metadata[b"params"]))


def read_table(path: str | Path, schema: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table of a known schema. Raises UserError where it is missing, broken or of another schema."""
    read_header(path, schema)
    try:
        return pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise broken(path, error) from None


def are_documents(index: str | Path, schema: str = "index.images/1") -> bool:
    """Whether a table of data/index is of documents of a text graph: none of them has a picture."""
    return bool(read_header(index, schema).params.get("format") == "text_graph")


def iterate_groups(path: str | Path, schema: str, columns: list[str]) -> Iterator[pa.Table]:
    """read_table row group by row group, one of them held at a time."""
    read_header(path, schema)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from (file.read_row_group(number, columns) for number in range(file.num_row_groups))
    except (OSError, pa.ArrowException) as error:
        raise broken(path, error) from None


def broken(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{path}: is not readable Parquet ({reason}); remove it and run again (dvc repro), or dvc pull it")


def bucket_of(image_id: str, buckets: int) -> int:
    return int(image_id[:8], 16) % buckets


def buckets_of(image_ids: pa.Array, buckets: int) -> np.ndarray:
    """bucket_of each of these, (n,) int64."""
    heads = pc.utf8_slice_codeunits(image_ids, 0, 8).to_pylist()
    return np.fromiter((bucket_of(head, buckets) for head in heads), dtype=np.int64, count=len(heads))


def bucket_path(folder: str | Path, bucket: int) -> Path:
    return Path(folder) / f"b{bucket:03d}.parquet"


def split_buckets(image_ids: Sequence[str], buckets: int) -> list[list[str]]:
    """The sorted image_ids of each bucket."""
    split: list[list[str]] = [[] for _ in range(buckets)]
    for image_id in sorted(image_ids):
        split[bucket_of(image_id, buckets)].append(image_id)
    return split


def read_folder_header(folder: str | Path, schema: str, buckets: int) -> Header:
    """The header that all buckets of a folder share. Raises UserError where one is missing, too many or differs."""
    if bucket_path(folder, buckets).exists():
        raise UserError(f"{folder}: holds more than dataset.buckets = {buckets}; run the stage that writes it again")
    headers = [read_header(bucket_path(folder, bucket), schema) for bucket in range(buckets)]
    for bucket, header in enumerate(headers):
        if header.fingerprint != headers[0].fingerprint:
            raise UserError(
                f"{bucket_path(folder, bucket)}: was made with other parameters or another encoder than"
                f" {bucket_path(folder, 0)}; run the stage that writes {folder} again"
            )
    return headers[0]


def read_buckets(folder: str | Path, schema: str, buckets: int, columns: list[str] | None = None) -> pa.Table:
    """All rows of a folder of buckets, in bucket order. Raises UserError as read_folder_header does."""
    read_folder_header(folder, schema, buckets)
    return pa.concat_tables([read_table(bucket_path(folder, bucket), schema, columns) for bucket in range(buckets)])


def remove_strays(folder: str | Path, buckets: int) -> None:
    """Remove what is not one of a folder's buckets: those of a former count, and what a killed run left.

    What another process is writing stays (in_use).
    """
    wanted = {bucket_path(folder, bucket).name for bucket in range(buckets)}
    for path in Path(folder).glob("*.p*"):
        # Another process may rename or remove its own meanwhile.
        with suppress(FileNotFoundError):
            if path.name not in wanted and not in_use(path.name, functools.partial(os.path.getmtime, path)):
                path.unlink()


class Kept(NamedTuple):
    """What a bucket on disk already holds of what it should hold, as image_ids."""

    present: list[str]
    missing: list[str]
    stale: bool

    @property
    def changes(self) -> bool:
        """Whether the bucket must be written anew."""
        return self.stale or bool(self.missing)

    def without(self, image_ids: Collection[str]) -> "Kept":
        """The same, but for some of those present, which have to be made anew."""
        present = [image_id for image_id in self.present if image_id not in image_ids]
        return Kept(present, sorted({*self.missing, *self.present}.difference(present)), self.stale or bool(image_ids))


def find_kept(path: str | Path, schema: str, mark: str, wanted: Sequence[str]) -> Kept:
    """Which of the `wanted` image_ids a bucket holds under the fingerprint `mark`; stale if it holds anything else.

    A bucket that is not there, or was made otherwise, holds nothing. A broken one is a UserError, not a fresh start:
    somebody should know.
    """
    if not Path(path).is_file() or read_header(path, schema).fingerprint != mark:
        return Kept([], list(wanted), True)
    held = held_ids(path)
    present = [image_id for image_id in wanted if image_id in held]
    missing = [image_id for image_id in wanted if image_id not in held]
    return Kept(present, missing, len(present) < len(held))


def held_ids(path: str | Path) -> set[str]:
    """The image_ids in a bucket."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            groups = (file.read_row_group(number, ["image_id"]) for number in range(file.num_row_groups))
            return {image_id for group in groups for image_id in group.column("image_id").unique().to_pylist()}
    except (OSError, pa.ArrowException) as error:
        raise broken(path, error) from None


def read_images(
    path: str | Path, schema: str, image_ids: Sequence[str], columns: list[str] | None = None
) -> pa.Table:
    """The rows of a bucket that belong to `image_ids`; `columns` must hold image_id."""
    table = read_table(path, schema, columns)
    return table.filter(pc.is_in(table.column("image_id"), pa.array(image_ids, TEXT)))


def iterate_images(path: str | Path, schema: str, image_ids: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a bucket that belong to `image_ids`, a table an image, in order; one row group is held at a time."""
    read_header(path, schema)
    wanted = set(image_ids)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            groups = (file.read_row_group(number) for number in range(file.num_row_groups))
            yield from (image for image in split_images(groups) if image_of(image) in wanted)
    except (OSError, pa.ArrowException) as error:
        raise broken(path, error) from None


def split_images(groups: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of rows sorted by image_id as one table an image."""
    rest: list[pa.Table] = []
    for group in groups:
        table = pa.concat_tables([*rest, group])
        ends = pc.run_end_encode(table.column("image_id").combine_chunks()).run_ends.to_pylist()
        images = [table.slice(start, end - start) for start, end in itertools.pairwise([0, *ends])]
        yield from images[:-1]
        # The next row group may go on with the last image.
        rest = images[-1:]
    yield from rest


def image_of(table: pa.Table) -> str:
    """The image_id of a table that holds one image's rows."""
    return table.column("image_id")[0].as_py()
