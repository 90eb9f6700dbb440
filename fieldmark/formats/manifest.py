"""Format `manifest`: a table of images, CSV or Parquet, one row an image.

Columns: path (relative to dataset.images, or to the manifest's folder) and class; and, where known, split (train, val,
test or empty), group (track, camera or site: never split between train and val), box (x0 y0 x1 y1 of the object,
in [0,1] of the image, between spaces; a list in Parquet), captured_at, latitude, longitude, depth_m, licence. Other
columns are not read, and named on stderr. A path `FILE#ID` with a box is what lies in that box of FILE, a picture of
its own (fieldmark/pictures/cuts.py).

`dataset.root` is the manifest itself, or a folder that holds manifest.csv or manifest.parquet and, if there are any,
classes.csv (see listing.read_class_table). DVC sees a change of what dataset.root names, not of the images that the
manifest points at: after replacing an image under its old name, run `dvc repro --force --single-item index_images`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.command import UserError
from fieldmark.listing import SPLITS, Listing, Row, Spelling, check_columns, read_class_table, read_csv
from fieldmark.params import Dataset

TEXTS = ("group", "captured_at", "licence")
NUMBERS = ("latitude", "longitude", "depth_m")
REQUIRED = ["path", "class"]
OPTIONAL = ["split", "box", *TEXTS, *NUMBERS]
# Within these the numbers make sense; some count longitudes from 0 to 360.
RANGES = {"latitude": (-90, 90), "longitude": (-180, 360)}


def read(dataset: Dataset) -> Listing:
    """List the rows. Raises UserError naming the file and the row that cannot stand."""
    path = find(Path(dataset.root))
    table = read_rows(path)
    if not table:
        raise UserError(f"{path}: names no image")
    spelling = Spelling(dataset.folder)
    images: list[Row] = []
    lines: dict[str, int] = {}
    for line, where, row in numbered(path, table):
        image = image_of(row, where)
        image["path"] = spelling.on_disk(image["path"])
        first = lines.setdefault(image["path"], line)
        if first != line:
            raise UserError(f"{where}: path {image['path']!r} stands in {first} too; remove one")
        images.append(image)
    classes = read_class_table(path.parent) if Path(dataset.root).is_dir() else []
    return Listing(sorted(images, key=lambda image: image["path"]), classes)


def find(root: Path) -> Path:
    """The manifest that dataset.root names. Raises UserError where there is none."""
    if not root.is_dir():
        if root.suffix not in (".csv", ".parquet"):
            raise UserError(f"params.yaml: dataset.root: {root} is neither .csv nor .parquet; name the manifest")
        return root
    found = [root / name for name in ("manifest.csv", "manifest.parquet") if (root / name).is_file()]
    if len(found) != 1:
        what = "both" if found else "neither of"
        raise UserError(f"params.yaml: dataset.root: {root} holds {what} manifest.csv and manifest.parquet; name one")
    return found[0]


def is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def numbered(path: Path, rows: Iterable[Row]) -> Iterator[tuple[int, str, Row]]:
    """The rows, each with the number of its line (CSV) or row (Parquet), and with where it stands, in words."""
    first, what = (2, "line") if is_csv(path) else (1, "row")
    for line, row in enumerate(rows, start=first):
        yield line, f"{path}: {what} {line}", row


def read_rows(path: Path, required: Sequence[str] = REQUIRED, named_by: str = "dataset.root") -> list[Row]:
    """The rows of a manifest that has to have some columns. Raises UserError, which says what names the file."""
    optional = [*OPTIONAL, *(name for name in REQUIRED if name not in required)]
    if is_csv(path):
        return read_csv(path, required, optional)
    if not path.is_file():
        raise UserError(f"{path}: is no file; correct {named_by}")
    try:
        table = pq.read_table(path, partitioning=None)
        check_columns(path, required, optional, table.column_names)
        for column in table.schema:
            if column.name in (*REQUIRED, "split", *TEXTS) and column.type in (pa.binary(), pa.large_binary()):
                raise UserError(f"{path}: column {column.name} holds bytes; write it as text")
        rows: list[Row] = table.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: is not readable Parquet ({reason}); correct {named_by} or the file") from None
    return rows


def image_of(row: Row, where: str) -> Row:
    """One line of the manifest as an image row. Raises UserError beginning with `where`."""
    path, name = text(row["path"]), text(row["class"])
    if path is None or name is None:
        raise UserError(f"{where}: {'path' if path is None else 'class'} is empty; fill it in, or remove the row")
    split = text(row.get("split"))
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: split is {split!r}; use train, val, test, or nothing")
    image: Row = {"path": inside(path, where), "name": name, "split": split, "box": box_of(row.get("box"), where)}
    for column in TEXTS:
        image[column] = text(row.get(column))
    for column in NUMBERS:
        image[column] = number(row.get(column), column, where)
    return image


def text(value: Any) -> str | None:
    """A cell as text; None where it is empty."""
    return str(value).strip() or None if value is not None else None


def inside(path: str, where: str) -> str:
    """A path in its one form. Raises UserError where it is absolute or leads out of the folder of images."""
    # Most are in it already, and of a million of them this saves minutes.
    if path.isprintable() and not {":", "\\"} & set(path) and not {"", ".", ".."} & set(path.split("/")):
        return path
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
        raise UserError(f"{where}: path {path!r} is absolute; make it relative to the folder dataset.images names")
    parts = PurePosixPath(path).parts
    if ".." in parts or not parts:
        raise UserError(f"{where}: path {path!r} leads out of the folder of images; set dataset.images to one above")
    return PurePosixPath(*parts).as_posix()


def number(value: Any, column: str, where: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: {column} is {value!r}, which is no number; correct it, or leave it empty")
    low, high = RANGES.get(column, (-math.inf, math.inf))
    if not low <= found <= high:
        raise UserError(f"{where}: {column} is {value!r}; it lies between {low} and {high}; correct it")
    return found


def box_of(value: Any, where: str) -> list[float] | None:
    """x0, y0, x1, y1 in [0,1]. Raises UserError for anything else, pixels too."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    sides = value.replace(",", " ").split() if isinstance(value, str) else list(value)
    box = [side for side in (number(each, "box", where) for each in sides) if side is not None]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UserError(
            f"{where}: box is {value!r}; it is x0 y0 x1 y1 with x0 < x1 and y0 < y1, in [0,1] of the image's width and"
            " height (divide pixels by them)"
        )
    return box
