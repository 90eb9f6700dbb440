"""Parquet files that hold the pictures themselves, as Hugging Face's `datasets` and its hub have them.

A row is a picture, and its path goes on behind that of the file: `SHARD.parquet/ROW`, ROW counted from 0. The pictures
are in the first column of type Image, as the metadata `huggingface` of the schema says; without them in the first that
is a struct of `bytes` and `path`, else in a column of bytes named image or img.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.pictures.files import MAX_BYTES, BadImage

SUFFIX = ".parquet"
NAMES = ("image", "img")
BYTES = (pa.binary(), pa.large_binary())
# So many pictures are held at a time, beside what a row group takes while it is read.
ROWS = 8
# A column of a row group of more bytes than this, as it states itself, is refused; the hub's have 100 to 1,000 rows.
MOST_BYTES = 8 * MAX_BYTES


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """What the metadata `huggingface` say of each column; nothing where there are none, or they cannot be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def picture_column(schema: pa.Schema) -> str | None:
    """The column that holds pictures; None where none does."""
    features = features_of(schema)
    stated = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    structs = [column.name for column in schema if holds_bytes(column.type)]
    plain = [column.name for column in schema if column.name in NAMES and column.type in BYTES]
    return next(iter([*stated, *structs, *plain]), None)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether it is a struct of `bytes` and `path`."""
    if not pa.types.is_struct(kind):
        return False
    inside = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
    return set(inside) == {"bytes", "path"} and inside["bytes"] in BYTES


def has_pictures(path: Path) -> bool:
    """Whether a file is Parquet that holds pictures, and no manifest, which has a column `path`."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    return "path" not in schema.names and picture_column(schema) is not None


def count_rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def write_rows(path: str | Path, folder: Path) -> str | None:
    """Write each picture of a file into a folder under the number of its row, a row group at a time.

    Returns what ends them, None where all rows were read; a row without bytes has no file. Raises BadImage where it is
    no Parquet with pictures, and OSError where the folder cannot be written.
    """
    try:
        with pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True) as file:
            column = picture_column(file.schema_arrow)
            if column is None:
                raise BadImage("holds no pictures")
            largest = max(map(group_bytes(file, column), range(file.num_row_groups)), default=0)
            if largest > MOST_BYTES:
                raise BadImage(f"has row groups of {largest} bytes, more than {MOST_BYTES}; write it again with fewer")
            number = 0
            for rows in read_rows(file, column):
                if isinstance(rows, str):
                    return f"cannot be read from row {number} on: {rows}"
                for row in rows:
                    content = row["bytes"] if isinstance(row, dict) else row
                    if content is not None:
                        (folder / str(number)).write_bytes(content)
                    number += 1
        return None
    except pa.ArrowException as error:
        raise BadImage(f"is no readable Parquet: {' '.join(str(error).split())[:120]}") from None


def read_rows(file: pq.ParquetFile, column: str) -> Iterator[list[Any] | str]:
    """A column, some rows at a time; at its end, if it cannot be read to the end, why."""
    try:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column], use_threads=False):
                yield batch[column].to_pylist()
    except (OSError, pa.ArrowException) as error:
        yield " ".join(str(error).split())[:120]


def group_bytes(file: pq.ParquetFile, column: str) -> Callable[[int], int]:
    """How many bytes the pictures of a row group have, as it states, by its number."""

    def size(number: int) -> int:
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        return sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] == column)

    return size
