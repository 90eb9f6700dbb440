"""What every layout gives: a row a file, the classes' names, what else is known; and how tables are read."""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fieldmark.command import UserError

SPLITS = ("train", "val", "test")
CLASS_COLUMNS = ("name", "superclass", "scientific_name", "lineage", "note")
Row = dict[str, Any]


@dataclass
class Listing:
    """A data set as its layout states it.

    An image row has path (relative to Dataset.folder), name (of its class, as given) and split (None where the data
    name none); it may have number, box and the columns of the same name in index.images. Boxes (x0, y0, x1, y1) and
    the x, y of parts are in [0,1] of the image, or in pixels where `in_pixels`.
    """

    images: list[Row]
    classes: list[Row] = field(default_factory=list)  # class_id (the name as given), and any of CLASS_COLUMNS
    parts: list[Row] = field(default_factory=list)
    attributes: list[Row] = field(default_factory=list)
    in_pixels: bool = False
    passed_over: int = 0  # files that are no images, or do not stand where images stand
    empty: list[str] = field(default_factory=list)  # class folders without an image


def read_csv(path: Path, columns: list[str]) -> list[Row]:
    """The rows of a CSV with a header, as texts. Raises UserError where it is malformed or lacks one of `columns`."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            check_columns(path, columns, list(reader.fieldnames or []))
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}: line {reader.line_num} has not as many fields as the first; correct it")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV in UTF-8 ({error}); save it as that") from None
    return rows


def check_columns(path: Path, wanted: list[str], found: list[str]) -> None:
    missing = [column for column in wanted if column not in found]
    if missing:
        has = f"; it has {', '.join(found[:8])}" if found else ""
        raise UserError(f"{path}: has no column {missing[0]}{has}; its first line must name {', '.join(wanted)}")
    twice = [column for column in found if found.count(column) > 1]
    if twice:
        raise UserError(f"{path}: has two columns {twice[0]}; rename one")


def read_class_table(folder: Path) -> list[Row]:
    """classes.csv of a folder, one row a class; none where there is no such file.

    Columns: class_id (the class as its folder or the data name it), and any of name, superclass, scientific_name,
    lineage (ranks from the highest down, `Animalia > Chordata > Aves`), note. Raises UserError as read_csv does.
    """
    path = folder / "classes.csv"
    if not path.is_file():
        return []
    rows = read_csv(path, ["class_id"])
    seen: set[str] = set()
    for row in rows:
        if not row["class_id"] or row["class_id"] in seen:
            what = f"names the class {row['class_id']} twice" if row["class_id"] else "has a row without class_id"
            raise UserError(f"{path}: {what}; correct it")
        seen.add(row["class_id"])
        ranks = [rank.strip() for rank in (row.get("lineage") or "").split(">")]
        row["lineage"] = [rank for rank in ranks if rank] or None
    return rows


def readable(name: str) -> str:
    """A class's folder as a person writes it: without CUB's running number (001.), underscores as spaces."""
    return re.sub(r"^\d{3}\.(?=\D)", "", name).replace("_", " ")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that hold something. Raises UserError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as that") from None
    return [line for line in lines if line.strip()]
