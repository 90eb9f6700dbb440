"""The usable images of the index and the classes, as every export goes through them; and the folder that one writes."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError

IMAGES = "index.images/1"
CLASSES = "index.classes/2"
Row = dict[str, Any]


class Index(NamedTuple):
    """What there is to export."""

    images: list[Row]  # the usable images, sorted by path: what was asked for, and y, a position in classes
    classes: list[Row]  # sorted by class_id: the columns of index.classes
    fingerprints: dict[str, str]  # of both files, by path


def read_index(data: Path, columns: Sequence[str] = ()) -> Index:
    """The index, of each image with `columns` beside path, image_id, class_id and split.

    Raises UserError where a file is missing, or where the classes lack one of the images'.
    """
    images_path, classes_path = data / "index/images.parquet", data / "index/classes.parquet"
    images = store.read_table(images_path, IMAGES, ["path", "image_id", "class_id", "split", "status", *columns])
    images = images.filter(pc.equal(images.column("status"), "ok")).drop_columns("status").sort_by("path")
    classes = store.read_table(classes_path, CLASSES).sort_by("class_id")
    y = pc.index_in(images.column("class_id"), value_set=pa.array(classes.column("class_id").to_pylist(), pa.string()))
    if y.null_count:
        raise UserError(f"{classes_path}: lacks a class of images.parquet; run index_images again")
    return Index(
        images.append_column("y", y).to_pylist(),
        classes.to_pylist(),
        {
            str(images_path): store.read_header(images_path, IMAGES).fingerprint,
            str(classes_path): store.read_header(classes_path, CLASSES).fingerprint,
        },
    )


def unique_names(classes: Sequence[Row]) -> list[str]:
    """The names of the classes, with their class_id where several share one: tools know a class by its name."""
    count = Counter(row["name"] for row in classes)
    return [row["name"] if count[row["name"]] == 1 else f"{row['name']} ({row['class_id']})" for row in classes]


def check_folder(out: Path, names: Collection[str]) -> None:
    """Raises UserError where `out` cannot be the folder of an export of these files: it is a file, or holds others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder")
    found = [path.relative_to(out) for path in out.rglob("*") if not path.is_dir()] if out.exists() else []
    foreign = sorted(path.as_posix() for path in found if path.as_posix() not in names)
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which this export does not write; name an empty folder")


def check_file(out: Path, example: str) -> None:
    """Raises UserError where `out`, which is to be a file, is a folder."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file, {out / example} for one")
