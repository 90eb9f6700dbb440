"""Format `hf_imagefolder`: pictures beside metadata.csv, .jsonl or .parquet, as Hugging Face's imagefolder takes them.

A row names a picture under `file_name`, relative to the metadata's own folder, and its class under `label`; without
such a column the class is the folder that the picture lies in. A split is a folder on the way to it, by the words that
Hugging Face knows: train or training; validation, valid, val or dev; test, testing, eval or evaluation. Read where a
row has them: split, group, box, captured_at, latitude, longitude, depth_m and licence, as in a manifest
(fieldmark/formats/manifest.py); and classes.csv in root. Other columns, captions and `objects` among them, are not
read, and named on stderr. A picture that no metadata name is passed over.

A label may be a number: names of numbers stand in a data set's card, which is not read; give them in classes.csv. Data
sets that keep pictures inside of Parquet files are of format hf_parquet. [web: Hugging Face's pages on image data sets]
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.command import UserError
from fieldmark.formats.manifest import OPTIONAL, image_of
from fieldmark.listing import Listing, Row, Spelling, check_columns, read_class_table, read_csv, read_lines
from fieldmark.params import Dataset
from fieldmark.pictures.decode import IMAGE_SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE, LABEL = "file_name", "label"
SPLIT = {
    "train": "train", "training": "train",
    "validation": "val", "valid": "val", "val": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def read(dataset: Dataset) -> Listing:
    """List what the metadata name. Raises UserError naming the file and the row that cannot stand."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name the one that holds the metadata")
    files = visible_files(root)
    tables = [path for path in files if path.name in METADATA]
    if not tables:
        said = f"{root} holds no {' or '.join(METADATA)}"
        raise UserError(f"params.yaml: dataset.root: {said}; without them the format is imagefolder")
    spelling = Spelling(root)
    images: dict[str, Row] = {}
    for table in tables:
        for where, row in read_rows(table):
            image = row_of(root, table, where, row)
            image["path"] = spelling.on_disk(image["path"])
            if image["path"] in images:
                raise UserError(f"{where}: {image['path']!r} is named by another row too; remove one")
            images[image["path"]] = image
    if not images:
        raise UserError(f"{tables[0]}: names no image")
    listing = Listing([images[path] for path in sorted(images)], read_class_table(root))
    pictures = [path.relative_to(root).as_posix() for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    listing.passed_over = [path for path in pictures if path not in images]
    return listing


def visible_files(root: Path) -> list[Path]:
    """The files in a folder and below it, sorted, without hidden ones."""
    paths = sorted(root.rglob("*"))
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    ]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a table, each with where it stands, in words."""
    if path.suffix == ".csv":
        rows, first, what = read_csv(path, [FILE], [LABEL, *OPTIONAL]), 2, "line"
    elif path.suffix == ".jsonl":
        rows, first, what = [parse(f"{path}: line {n}", line) for n, line in enumerate(read_lines(path), 1)], 1, "line"
    else:
        rows, first, what = read_parquet(path), 1, "row"
    if path.suffix != ".csv":
        check_columns(path, [FILE], [LABEL, *OPTIONAL], list(dict.fromkeys(column for row in rows for column in row)))
    for number, row in enumerate(rows, start=first):
        yield f"{path}: {what} {number}", row


def parse(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is no JSON ({error}); correct it") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object; a line of it is {{\"{FILE}\": ..., \"{LABEL}\": ...}}")
    return row


def read_parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pq.read_table(path, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: is not readable Parquet ({reason}); write it again") from None
    return rows


def row_of(root: Path, table: Path, where: str, row: Row) -> Row:
    """One row of the metadata as an image row. Raises UserError beginning with `where`."""
    name = str(row.get(FILE) or "").strip()
    if not name:
        raise UserError(f"{where}: {FILE} is empty; fill it in, or remove the row")
    place = PurePosixPath(name)
    if place.is_absolute() or PureWindowsPath(name).drive or ".." in place.parts:
        raise UserError(f"{where}: {FILE} is {name!r}; make it a path from {table.parent} to a file in it")
    path = PurePosixPath(table.parent.relative_to(root)) / place
    folders = path.parts[:-1]
    split = next((SPLIT[folder.lower()] for folder in folders if folder.lower() in SPLIT), None)
    label = row.get(LABEL)
    if LABEL not in row:
        if not folders or folders[-1].lower() in SPLIT:
            raise UserError(f"{where}: there is no column {LABEL}, and {path} lies in no folder of its class; add it")
        label = folders[-1]
    elif isinstance(label, list | dict | float | None) or label == "":
        raise UserError(f"{where}: {LABEL} is {label!r}; write the name or the number of one class")
    given = {key: value for key, value in row.items() if key in OPTIONAL}
    return image_of({**given, "path": path.as_posix(), "class": label, "split": row.get("split") or split}, where)
