"""Which classes and images a stage may learn from: those of a file, training images alone, some held out to choose."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.listing import read_lines
from fieldmark.params import NONE

INDEX = Path("data/index/images.parquet")


class Image(NamedTuple):
    """A usable image of the index."""

    path: str  # relative to the data set's folder
    class_id: str
    box: list[float] | None = None  # as in the index


def read_images(split: str | None = None) -> dict[str, Image]:
    """The usable images of the index by image_id, or those of one of its splits."""
    table = store.read_table(INDEX, "index.images/1", ["image_id", "path", "class_id", "split", "status", "box"])
    table = table.filter(pc.field("status") == "ok").sort_by("image_id")
    rows = [row for row in table.to_pylist() if split in (None, row["split"])]
    return {row["image_id"]: Image(row["path"], row["class_id"], row["box"]) for row in rows}


def named_in(file: str) -> list[str] | None:
    """The lines of a file of classes, as an identity holds them; None for data/none, which names none."""
    return None if file == NONE else sorted(set(read_lines(Path(file))))


def choose_classes(file: str, known: set[str], key: str) -> list[str]:
    """The classes that a file names, one a line by folder or class_id; of data/none all that are known.

    Raises UserError, under `key`, for a line that names no class with training images.
    """
    if file == NONE:
        return sorted(known)
    found = set()
    for number, line in enumerate(read_lines(Path(file)), start=1):
        name = line.strip()
        ids = {name, store.class_id_of(name)} & known
        if not ids:
            remedy = "write a class's folder or class_id"
            raise UserError(f"{key}: {file}, line {number}: {name!r} has no training image; {remedy}")
        found |= ids
    return sorted(found)


def hold_out(classes: list[str], share: float, seed: int, key: str) -> tuple[list[str], list[str]]:
    """Classes to learn from, and those of the lowest hashes, which say when to stop: two of each at least.

    Raises UserError, under `key`, for fewer than four.
    """
    if len(classes) < 4:
        raise UserError(f"{key}: {len(classes)} classes are too few, two to learn from and two that choose; name more")
    count = min(max(2, round(share * len(classes))), len(classes) - 2)
    held = set(sorted(classes, key=lambda name: store.sha256(f"held out {seed} {name}"))[:count])
    return [name for name in classes if name not in held], sorted(held)


def of_classes(images: Mapping[str, Image], classes: list[str]) -> dict[str, Image]:
    """The images of these classes."""
    wanted = set(classes)
    return {image_id: image for image_id, image in images.items() if image.class_id in wanted}
