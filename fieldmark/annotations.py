"""What annotations come in: lists of fields between spaces, boxes in XML, MATLAB's files; and how many were published.

Every reader raises UserError, one line that names the file, for what is missing or cannot be read. None opens an image.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fieldmark.command import UserError, name_some
from fieldmark.listing import Listing, read_lines


def fields(path: Path, count: int) -> list[list[str]]:
    """The lines of a table without header: `count` fields between spaces, the last with whatever spaces it holds."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        row = line.split(maxsplit=count - 1)
        if len(row) != count:
            raise UserError(f"{path}: line {number} has not {count} fields: {line[:80]!r}; correct it")
        rows.append([each.strip() for each in row])
    return rows


def numbers(path: Path, row: list[str]) -> list[float]:
    try:
        found = [float(value) for value in row]
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(row)[:80]!r}: {error}; correct it") from None
    if not all(map(math.isfinite, found)):
        raise UserError(f"{path}: {' '.join(row)[:80]!r}: is no place in pixels; correct it")
    return found


def look_up(table: dict[str, str], key: str, path: Path) -> str:
    if key not in table:
        raise UserError(f"{path}: has no line for {key}; the files of this folder do not belong together")
    return table[key]


def table_of(path: Path) -> dict[str, str]:
    """A list of `key value` lines. Raises UserError for a key that stands there with two values."""
    found: dict[str, str] = {}
    for key, value in fields(path, 2):
        if found.setdefault(key, value) != value:
            raise UserError(f"{path}: {key} is {found[key]!r} and {value!r}; correct it")
    return found


def root_of(root: str, holds: str) -> Path:
    """dataset.root as a folder. Raises UserError where it is none, or has nothing of the name that it is known by."""
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"params.yaml: dataset.root: {path} is not a folder; name the one that holds {holds}")
    if not (path / holds).exists():
        inside = sorted(found.parent.name for found in path.glob(f"*/{holds}"))
        remedy = f"name {path / inside[0]}" if inside else "name the folder that the archive unpacks to"
        raise UserError(f"params.yaml: dataset.root: {path} holds no {holds}; {remedy}")
    return path


def from_one(corners: Iterable[float]) -> list[float]:
    """Corners x0, y0, x1, y1 that count pixels from 1 and lie in the box, as sides of the box that count from 0."""
    x0, y0, x1, y1 = corners
    return [x0 - 1, y0 - 1, x1, y1]


class Thing(NamedTuple):
    """What an XML of Pascal VOC's form marks: its name there, and x0, y0, x1, y1 as they stand there."""

    name: str
    corners: list[float]


def read_voc(path: Path) -> list[Thing]:
    """The objects that an XML of Pascal VOC's form marks; none of its other fields is read, they are often wrong."""
    try:
        tree = ElementTree.parse(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path}: is not XML ({error}); take it from the archive again") from None
    things = []
    for entry in tree.iter("object"):
        found = {side: entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")}
        missing = [side for side, text in found.items() if not (text or "").strip()]
        if missing:
            raise UserError(f"{path}: an object has no {missing[0]}; take it from the archive again")
        name = (entry.findtext("name") or "").strip()
        things.append(Thing(name, numbers(path, [str(text).strip() for text in found.values()])))
    return things


def largest(things: list[Thing]) -> list[float] | None:
    """The corners of the largest box: the index has one a picture."""

    def area(corners: list[float]) -> float:
        return max(0.0, corners[2] - corners[0]) * max(0.0, corners[3] - corners[1])

    return max((thing.corners for thing in things), key=area, default=None)


def read_matlab(path: Path, name: str) -> list[Any]:
    """A variable of a MATLAB file (version 5), in Python's own types and flat, whatever its shape.

    An array becomes a list of numbers, so that uint8 cannot overflow; a cell array a list; a struct array a list of
    dicts; a row of characters a text.
    """
    from scipy.io import loadmat  # half a second, and only three data sets come so

    try:
        found = loadmat(path, variable_names=[name])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    # Broken bytes raise many types there.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: is no MATLAB file of version 5 ({reason}); download it again") from None
    if name not in found:
        raise UserError(f"{path}: has no variable {name}; it is not the file of that name that the data set has")
    value: list[Any] = plain(found[name])
    return value


def plain(value: Any) -> Any:
    """An array of scipy.io in Python's own types."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.names:
        return [{field: plain(row[field]) for field in value.dtype.names} for row in value.ravel()]
    if value.dtype.kind == "U":
        return value.item() if value.size == 1 else value.ravel().tolist() or ""
    return [plain(each) for each in value.ravel()] if value.dtype == object else value.ravel().tolist()


class Published(NamedTuple):
    """How many classes, and images of each split, a data set has as it was published."""

    classes: int
    images: dict[str, int]


def check_published(listing: Listing, folder: Path, *published: Published) -> None:
    """Warn of other counts than the published ones, and of images that are listed and not there, by name.

    Of several data sets of one layout, that is meant which has as many classes. `folder` is where the paths of images
    start from.
    """
    found = Counter(str(row["split"]) for row in listing.images)
    count = len({row["name"] for row in listing.images})
    meant = next((each for each in published if each.classes == count), published[0] if len(published) == 1 else None)
    if meant is None:
        known = ", ".join(str(each.classes) for each in published)
        listing.warnings.append(f"{folder}: lists {count} classes; the data sets of this layout have {known}")
    else:
        pairs = [("classes", count, meant.classes), *((key, found[key], meant.images[key]) for key in meant.images)]
        differ = [f"{number} of {wanted} {what}" for what, number, wanted in pairs if number != wanted]
        if differ:
            listing.warnings.append(f"{folder}: lists {', '.join(differ)} that the data set was published with")
    gone = missing_files(folder, [row["path"] for row in listing.images])
    if gone:
        said = f"{len(gone)} of {len(listing.images)} images that are listed are not there"
        listing.warnings.append(f"{folder}: {said}: {name_some(gone)}; unpack the archive of images again")


def missing_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """The paths that name no file, by one look into each folder."""
    there: dict[str, set[str]] = {}
    gone = []
    for path in paths:
        parent, _, name = path.rpartition("/")
        if parent not in there:
            inside = folder / parent
            there[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
        if name not in there[parent]:
            gone.append(path)
    return gone
