"""The pictures that are asked about: one file, all of a folder, or the rows of a manifest; and their files, opened.

Frames of a film, and pictures in a Parquet file, are pictures as others are (fieldmark/pictures/held.py). A film is the
group of its frames.
"""

import os
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fieldmark.command import UserError, counted
from fieldmark.formats import manifest
from fieldmark.formats.imagefolder import visible
from fieldmark.listing import Spelling
from fieldmark.pictures import clips, shards
from fieldmark.pictures.boxes import Box, box_of
from fieldmark.pictures.cuts import file_of, image_id_of, object_of, part_of
from fieldmark.pictures.decode import IMAGE_SUFFIXES, BadImage, hash_file, map_ahead, open_file, processors
from fieldmark.pictures.views import Source, View
from stages.index_images import look_at

TABLES = (".csv", ".parquet")
# Frames of a film that are asked about, a second, where nothing else is said.
RATE = 1.0
# View 0 of a picture for each way in which it is shown to an encoder.
Views = tuple[list[View], ...]


class Picture(NamedTuple):
    """One that is asked about. It is small: of 100,000 the list is all that is held at once."""

    path: str  # as answers name it: below the folder as that was given, or as the manifest has it
    group: str | None = None
    box: Sequence[float] | None = None  # of the object, x0 y0 x1 y1 in [0,1] of the picture
    part: Box | None = None  # of the file, where the picture is not all of it: the path is `FILE#ID` then


class Question(NamedTuple):
    """All pictures that are asked about, in order, and the folder that their paths start from."""

    folder: Path
    pictures: list[Picture]
    passed_over: int = 0  # files in a folder that are no pictures by their names

    def file(self, picture: Picture) -> Path:
        return self.folder / (picture.path if picture.part is None else file_of(picture.path))


def read_question(asked: str, rate: float = RATE) -> Question:
    """The pictures of a file, a folder or a manifest (.csv, .parquet), and of films, `rate` frames a second.

    Raises UserError where there is none.
    """
    path = Path(asked)
    if path.is_dir():
        return list_folder(path, rate)
    inside = pictures_in(asked, rate)
    if inside is not None:
        return Question(Path(), inside)
    if path.suffix.lower() in TABLES:
        return list_manifest(path)
    if not os.path.lexists(path):
        raise UserError(f"{asked}: is not there; name a picture, a folder of pictures, or a manifest (.csv, .parquet)")
    return Question(Path(), [Picture(asked)])


def pictures_in(path: str, rate: float) -> list[Picture] | None:
    """The frames of a film, or the rows of a Parquet file with pictures; None where it is neither.

    A film that cannot be read has one frame, which says why. Raises UserError where a Parquet file states more rows
    than it can hold, and where PyAV is missing.
    """
    if is_film(path):
        try:
            count = clips.count_frames(clips.length_of(path), rate)
        except BadImage:
            count = 1
        return [Picture(clips.frame_path(path, rate, number), group=path) for number in range(count)]
    if path.lower().endswith(shards.SUFFIX) and shards.has_pictures(Path(path)):
        try:
            return [Picture(f"{path}/{number}") for number in range(shards.count_rows(Path(path)))]
        except BadImage as error:
            raise UserError(f"{path}: {error}; leave it out") from None
    return None


def is_film(path: str) -> bool:
    """Whether it is a file that is a film by its name; .ts, which is TypeScript too, by its first bytes as well."""
    if not clips.is_film(path) or not os.path.isfile(path):
        return False
    return not path.lower().endswith(".ts") or clips.begins_as_film(path)


def list_folder(folder: Path, rate: float) -> Question:
    """All pictures in a folder and the folders in it, by their names; hidden ones do not count."""
    pictures, others, films, readable = [], 0, 0, clips.can_read()
    for path in files_below(folder):
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            pictures.append(Picture(path))
        elif not readable and is_film(path):
            films += 1
        elif (inside := pictures_in(path, rate)) is not None:
            pictures += inside
        else:
            others += 1
    if films:
        remedy = "install the extra (pip install -c constraints.txt '.[video]')"
        said = f"{counted(films, 'film is', 'films are')} passed over, since PyAV is not installed; {remedy}"
        if not pictures:
            raise UserError(f"{folder}: holds no picture: {said}")
        print(f"{folder}: {said}", file=sys.stderr)
    if not pictures:
        has = f"{counted(others, 'file is', 'files are')} none by the name" if others else "it is empty"
        raise UserError(f"{folder}: holds no picture ({has}); name a folder of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return Question(Path(), pictures, others)


def files_below(folder: Path) -> Iterator[str]:
    """The paths of all files in a folder and below, by name. Links to folders are not followed: they may lead back."""
    for entry in visible(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(Path(entry.path))
        else:
            yield entry.path


def list_manifest(path: Path) -> Question:
    """The rows of a manifest, whose paths start from its own folder.

    Columns: path; group and box where there are any, as in fieldmark/formats/manifest.py, a row `FILE#ID` too. Others
    are not read. Raises UserError for a file that is not readable, has no row, or has a row without a path or with a
    box that is none.
    """
    pictures, spelling = [], Spelling(path.parent)
    for _, where, row in manifest.numbered(path, manifest.read_rows(path, ["path"], "the path")):
        name = manifest.text(row["path"])
        if name is None:
            raise UserError(f"{where}: path is empty; fill it in, or remove the row")
        box = manifest.box_of(row.get("box"), where)
        group = manifest.text(row.get("group"))
        pictures.append(Picture(spelling.on_disk(name), group, object_of(name, box), part_of(name, box)))
    if not pictures:
        raise UserError(f"{path}: names no picture")
    return Question(path.parent, pictures)


class Looked(NamedTuple):
    """A picture once its file was opened."""

    picture: Picture
    image_id: str = ""  # empty where it cannot be read
    views: Views = ()  # none of a picture that is stored or broken
    error: str | None = None  # why it cannot be used


def look(
    question: Question, stored: Container[str], prepare: Callable[[IO[bytes], Source], Views], ahead: int
) -> Iterator[Looked]:
    """Every picture, in order; those whose image_id is not `stored` are prepared, some of them `ahead` of time."""

    def look_at_one(picture: Picture) -> Looked:
        image_id = ""
        try:
            with open_file(path := question.file(picture)) as file:
                image_id = image_id_of(hash_file(file), picture.part)
                source = Source(image_id, path, box_of(picture.box), part=picture.part)
                views = () if image_id in stored else prepare(file, source)
                return Looked(picture, image_id, views)
        except BadImage as error:
            return Looked(picture, image_id, error=str(error))

    return map_ahead(look_at_one, question.pictures, processors(), ahead)


def thumbnail(question: Question, picture: Picture) -> bytes | None:
    """A picture as a WebP of 192 px, as index_images makes it; None where it is broken."""
    return look_at(question.folder, {"path": picture.path, "box": picture.part})
