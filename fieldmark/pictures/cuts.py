"""A picture that is a box of a file: a row of the index whose path is `FILE#ID`, as an annotation of COCO is.

Such a row's `box` says which part of FILE it is, in shares of the upright file. All else that is said of it (width,
height, dhash, thumbnail, nodes, moments, texts) is of what lies inside: nothing is known of an object within that. Its
image_id is the sha256 of the file's own sha256 and of the box, so that a corrected box is another picture.

ID holds none of `.`, `/` and `#`: a file `a#1.jpg` is a file, and `a.jpg#1` a box of `a.jpg`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fieldmark.pictures.boxes import Box, box_of
from fieldmark.store import sha256

# What stands behind FILE in the path of a box of it; RE2 and Python read it alike.
MARK = r"[^/]#[^#./]+$"
NOT_IN_ID = re.compile(r"[#./%]")


class Place(NamedTuple):
    """Where a picture is: a file, or a part of it."""

    file: Path
    part: Box | None = None


def is_cut(path: str) -> bool:
    return re.search(MARK, path) is not None


def file_of(path: str) -> str:
    """The path of the file in which the picture of a row of the index lies."""
    return path[: path.rindex("#")] if is_cut(path) else path


def cut_path(file: str, number: object) -> str:
    """The path of a box of a file; what an ID cannot hold is written as in an address (%2E for a dot)."""
    return f"{file}#{NOT_IN_ID.sub(lambda found: f'%{ord(found[0]):02X}', str(number))}"


def part_of(path: str, box: Sequence[float] | None) -> Box | None:
    """Which part of its file the picture of a row is, as the index stores it (float32); None: all of it.

    A box as its table has it and the same read back from the index so cut out the same pixels.
    """
    return box_of(np.array(box, dtype=np.float32).tolist()) if is_cut(path) and box is not None else None


def object_of(path: str, box: Sequence[float] | None) -> Box | None:
    """The box of the object in the picture of a row, where one is known."""
    return None if is_cut(path) else box_of(box)


def place_of(folder: Path, path: str, box: Sequence[float] | None) -> Place:
    part = part_of(path, box)
    return Place(folder / (path if part is None else file_of(path)), part)


class Places(Mapping[str, Place]):
    """Where the pictures of some rows of index.images/1 are, by image_id. A place is made when it is looked at: memory
    holds the columns path, image_id and box, and beside these each image_id as a key.
    """

    def __init__(self, folder: Path, rows: pa.Table) -> None:
        self.folder, self.rows = folder, rows.combine_chunks()
        self.numbers = {image_id: number for number, image_id in enumerate(rows["image_id"].to_pylist())}

    def path_of(self, image_id: str) -> Path:
        """The path of a picture's row, below the data set's folder."""
        return self.folder / self.rows["path"][self.numbers[image_id]].as_py()

    def __getitem__(self, image_id: str) -> Place:
        number = self.numbers[image_id]
        return place_of(self.folder, self.rows["path"][number].as_py(), self.rows["box"][number].as_py())

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def image_id_of(digest: str, part: Box | None) -> str:
    """The image_id of a picture, from the sha256 of its file: that itself where the picture is all of the file."""
    return digest if part is None else sha256(f"{digest} {np.array(part, dtype='<f4').tobytes().hex()}")
