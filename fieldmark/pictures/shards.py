"""Parquet files that hold the pictures themselves, as Hugging Face's `datasets` and its hub have them.

A row is a picture, and its path goes on behind that of the file: `SHARD.parquet/ROW`, ROW counted from 0. The pictures
are in the first column of type Image, as the metadata `huggingface` of the schema says; without them in the first that
is a struct of `bytes` and `path`, else in a column of bytes named image or img.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fieldmark.pictures.files import MAX_BYTES, BadImage, open_plain

SUFFIX = ".parquet"
NAMES = ("image", "img")
BYTES = (pa.binary(), pa.large_binary())
# So many rows are held at a time, fewer where they would have more than ROOM bytes if each was as large as its group.
ROWS = 1000
ROOM = 2**28
# A column of a row group of more bytes than this, as it states itself, is refused.
MOST_BYTES = 8 * MAX_BYTES
# Pictures are compressed already. A file whose pictures have more bytes than this, and than so many times its own, has
# the same one again and again.
FEW_BYTES, TIMES = 2**30, 4
# No picture is smaller. A file may state any number of rows, but not more than this many or its bytes can hold.
FEW_ROWS, LEAST_BYTES = 100_000, 32
# Raised when the bytes that the rules of this module give for the same file change.
RULES = 1


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """What the metadata `huggingface` say of each column; nothing where there are none, or they cannot be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def picture_column(schema: pa.Schema) -> str | None:
    """The column that holds pictures; None where none does. One whose name another has too cannot be read."""
    features = features_of(schema)
    own = [column for column in schema if schema.names.count(column.name) == 1 and holds_bytes(column.type)]
    stated = [column.name for column in own if features.get(column.name, {}).get("_type") == "Image"]
    structs = [column.name for column in own if fields_of(column.type) == {"bytes", "path"}]
    plain = [column.name for column in own if column.name in NAMES and column.type in BYTES]
    return next(iter([*stated, *structs, *plain]), None)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether it is bytes, or a struct of `bytes` and what else there is."""
    return (kind.field("bytes").type if "bytes" in fields_of(kind) else kind) in BYTES


def fields_of(kind: pa.DataType) -> set[str]:
    """The names in a struct; none of any other type."""
    return {kind.field(place).name for place in range(kind.num_fields)} if pa.types.is_struct(kind) else set()


def has_pictures(path: Path) -> bool:
    """Whether a file is Parquet that holds pictures, and no manifest, which has a column `path`."""
    try:
        # A read from a pipe would wait.
        schema = pq.read_schema(path) if path.is_file() else pa.schema([])
    except (OSError, ValueError, pa.ArrowException):
        return False
    return "path" not in schema.names and picture_column(schema) is not None


def count_rows(path: Path) -> int:
    """How many rows a file has. Raises BadImage where it states more than it can hold pictures."""
    return check_rows(pq.read_metadata(path).num_rows, os.path.getsize(path))


def check_rows(rows: int, size: int) -> int:
    if rows > max(FEW_ROWS, size // LEAST_BYTES):
        raise BadImage(f"states {rows} rows, more pictures than its {size} bytes can hold")
    return rows


def write_rows(path: str | Path, folder: Path) -> str | None:
    """Write each picture of a file into a folder under the number of its row, a row group at a time.

    Returns what ends them, None where all rows were read; a row without bytes has no file. Raises BadImage where it is
    no Parquet with pictures, and OSError where the folder cannot be written.
    """
    try:
        with open_plain(path, math.inf) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            size = os.fstat(opened.fileno()).st_size
            column = picture_column(file.schema_arrow)
            if column is None:
                raise BadImage("holds no column of pictures, or several of one name")
            check_rows(file.metadata.num_rows, size)
            sizes = group_bytes(file, column)
            largest = max(sizes, default=0)
            if largest > MOST_BYTES:
                raise BadImage(f"has row groups of {largest} bytes, more than {MOST_BYTES}; write it again with fewer")
            most, written, number = max(FEW_BYTES, TIMES * size), 0, 0
            for rows in read_rows(file, column, sizes):
                if isinstance(rows, str):
                    return f"cannot be read from row {number} on: {rows}"
                lengths = pc.binary_length(rows).fill_null(0).to_pylist()
                for length, content in zip(lengths, rows, strict=True):
                    written += length
                    if length > MAX_BYTES:
                        return f"cannot be read from row {number} on: it has {length} bytes, more than {MAX_BYTES}"
                    if written > most:
                        return f"cannot be read from row {number} on: its pictures have more than {most} bytes"
                    if content.is_valid:
                        (folder / str(number)).write_bytes(content.as_buffer())
                    number += 1
        return None
    except pa.ArrowException as error:
        raise BadImage(f"is no readable Parquet: {' '.join(str(error).split())[:120]}") from None


def read_rows(file: pq.ParquetFile, column: str, sizes: list[int]) -> Iterator[pa.Array | str]:
    """The bytes of a column, some rows at a time; at its end, if it cannot be read to the end, why."""
    try:
        for group, size in enumerate(sizes):
            # One value of a dictionary may stand in all rows.
            rows = max(1, min(ROWS, ROOM // max(1, size)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                read = batch[column]
                yield pc.struct_field(read, "bytes") if pa.types.is_struct(read.type) else read
    except (OSError, pa.ArrowException) as error:
        yield " ".join(str(error).split())[:120]


def group_bytes(file: pq.ParquetFile, column: str) -> list[int]:
    """How many bytes the pictures of each row group have, as it states."""
    sizes = []
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        own = [each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] == column]
        sizes.append(sum(own))
    return sizes
