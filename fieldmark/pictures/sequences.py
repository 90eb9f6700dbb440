"""Pictures that were taken one after the other of one thing: frames of a film, a burst, a plant from several sides.

Whoever trains on some of them and tests on others measures how well a thing is found again. Two pictures belong
together where

    numbers          they are of one class, their names differ in one number alone, by at most NEXT, and their
                     difference hashes (decode.dhash) in at most ALIKE_BITS bits; at least FRAMES are joined so
    times            they are of one class and were taken at most TOGETHER_S seconds apart (`captured_at`, else EXIF)
    near duplicates  their hashes differ in at most health.NEAR_BITS bits

and a sequence is all that is joined so, directly or through others. Whether two belong together depends on nothing
else: one picture more may join sequences, and parts none.

Numbers alone are no evidence, since most data sets are numbered. With the pictures of CUB-200-2011 (5,902 squashed
crops) numbered within their classes, this joins four times three that only look alike, and none of reef's 1,560; under
their own names it finds three pairs, each of one photograph twice. Of 400 of these crops, each filmed in eight frames
between which the window moved by 3 %, 5 % or 8 % of its side, 99.8 %, 96 % and 72 % of the frames are found. A time of
exactly midnight is a date alone, and tells nothing.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, time
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image

from fieldmark.listing import Row
from fieldmark.pictures.decode import FORMATS, open_file
from fieldmark.pictures.health import by_hash, near_pairs

NEXT, ALIKE_BITS, FRAMES = 5, 14, 3
TOGETHER_S = 10.0
# Where many files have one name in many folders, each is compared with no more than so many of them.
MOST_COMPARED = 20
NUMBER = re.compile(r"(\d+)")
EXIF_DATE = re.compile(r"^(\d{4}):(\d\d):(\d\d)")
# Positions of two rows.
Link = tuple[int, int]


def mark_sequences(rows: Iterable[Row]) -> None:
    """Fill `sequence` of each row of index.images that is one of several: the image_id of the first by its path.

    A picture that comes to another's sequence behind it leaves its name as it is, so that what is drawn by that name
    (splits, halves, folds) stays where it was. The rows are those that are ok, with `taken` where that is known.
    """
    for members in find_sequences(rows):
        for row in members:
            row["sequence"] = members[0]["image_id"]


def find_sequences(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows (path, class_id, dhash, taken) of each sequence, in order of their paths, 9 before 10."""
    rows = list(rows)
    of_class: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        of_class[row["class_id"]].append(place)

    def by_path(place: int) -> tuple[list[str | int], str]:
        return natural(rows[place]["path"]), rows[place]["path"]

    links = list(near_links(rows))
    # Class by class: names taken apart, and what they have in common, take more memory than the rows.
    for places in of_class.values():
        places.sort(key=by_path)
        members = [rows[place] for place in places]
        numbered = [part for part in join(len(members), number_links(members)) if len(part) >= FRAMES]
        found = [*(link for part in numbered for link in pairwise(part)), *time_links(members)]
        links += [(places[one], places[other]) for one, other in found]
    linked = sorted({place for link in links for place in link}, key=by_path)
    numbers = {place: number for number, place in enumerate(linked)}
    parts = join(len(linked), ((numbers[one], numbers[other]) for one, other in links))
    return [[rows[linked[number]] for number in part] for part in parts]


def natural(path: str) -> list[str | int]:
    """A path as texts and numbers in turn, by which 9 comes before 10."""
    return [int(part) if place % 2 else part for place, part in enumerate(NUMBER.split(path))]


def number_links(rows: Sequence[Row]) -> Iterator[Link]:
    """Pictures of one class that are alike, and whose names differ in one number alone, by at most NEXT."""
    members: dict[tuple[str, str, str], list[Link]] = defaultdict(list)
    for place, row in enumerate(rows):
        name = PurePosixPath(row["path"]).stem
        for found in NUMBER.finditer(name):
            key = (row["class_id"], name[: found.start()], name[found.end() :])
            members[key].append((int(found[0]), place))
    for numbered in members.values():
        numbered.sort()
        for start, (number, place) in enumerate(numbered, start=1):
            for next_number, other in islice(numbered, start, start + MOST_COMPARED):
                if next_number - number > NEXT:
                    break
                if (rows[place]["dhash"] ^ rows[other]["dhash"]).bit_count() <= ALIKE_BITS:
                    yield place, other


def time_links(rows: Sequence[Row]) -> Iterator[Link]:
    """Pictures of one class that were taken one after the other, at most TOGETHER_S seconds apart."""
    taken: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row.get("taken") is not None:
            taken[row["class_id"]].append((row["taken"], place))
    for moments in taken.values():
        for (before, place), (after, other) in pairwise(sorted(moments)):
            if after - before <= TOGETHER_S:
                yield place, other


def near_links(rows: Sequence[Row]) -> Iterator[Link]:
    """Near duplicates, of any class: of pictures with one hash each with the next."""
    found = by_hash(rows)
    for number in np.flatnonzero(found.counts > 1).tolist():
        yield from pairwise(found.rows_of(number))
    first = found.places[found.starts]
    yield from zip(*(first[side].tolist() for side in near_pairs(found.hashes)), strict=True)


def join(count: int, links: Iterable[Link]) -> list[list[int]]:
    """The connected parts of so many things, each sorted, in the order of their first (Galler and Fischer, 1964)."""
    above = list(range(count))

    def top(place: int) -> int:
        while above[place] != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    for one, other in links:
        low, high = sorted((top(one), top(other)))
        above[high] = low
    parts: dict[int, list[int]] = defaultdict(list)
    for place in range(count):
        parts[top(place)].append(place)
    return list(parts.values())


def read_time(path: Path) -> str | None:
    """When a camera says that it took a picture (EXIF's DateTimeOriginal), as it writes it; None where none does."""
    try:
        with open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            # Of a PNG, getexif() would decode the picture, to look for a block behind it.
            if image.format == "PNG" and "exif" not in image.info:
                return None
            found = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
            return found if isinstance(found, str) else None
    # Pillow's parser of metadata raises as many types as its decoders; what is odd there makes no picture broken.
    except Exception:
        return None


def seconds(text: str | None) -> float | None:
    """A time in EXIF's form or ISO 8601 as seconds since 1970, without a zone in UTC; None: no time, or midnight."""
    try:
        moment = datetime.fromisoformat(EXIF_DATE.sub(r"\1-\2-\3", (text or "").strip(" \0")))
        return None if moment.time() == time() else moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except ValueError:
        return None
