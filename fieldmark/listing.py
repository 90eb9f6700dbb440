"""What every layout gives: a row a file, the classes' names, what else is known; and how tables are read and checked.

Names of classes and paths are compared after NFC: an archive that a Mac made has its accents apart from their letters.
"""

import csv
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fieldmark.command import UserError
from fieldmark.store import class_id_of, nfc

SPLITS = ("train", "val", "test")
CLASS_COLUMNS = ("name", "superclass", "scientific_name", "lineage", "aliases", "note", "aphia_id")
# How WoRMS names a taxon for good: this and its AphiaID. Among `aliases`, it says which taxon a class is.
WORMS = "urn:lsid:marinespecies.org:taxname:"
# The words that stand for yes and no in a table, in any case.
WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
# Of more names than this, only so many are looked at for one that was meant: it takes seconds.
MOST_COMPARED = 20_000
# A field of a table may be a whole document: Python's csv refuses one of over 131,072 characters unless told otherwise.
LONGEST_FIELD = 2**31 - 1
Row = dict[str, Any]


@dataclass
class Listing:
    """A data set as its layout states it.

    An image row has path (relative to Dataset.folder), name (of its class, as given) and split (None where the data
    name none); it may have number, box and the columns of the same name in index.images. Boxes (x0, y0, x1, y1) and
    the x, y of parts are in [0,1] of the image, or in pixels where `in_pixels`. A row may be a box of a file: its path
    is `FILE#ID`, its box in [0,1] of FILE (fieldmark/pictures/cuts.py), and `stated` the width and height that its
    table says FILE has, if it does.
    """

    images: list[Row]
    classes: list[Row] = field(default_factory=list)  # class_id (the name as given), and any of CLASS_COLUMNS
    parts: list[Row] = field(default_factory=list)
    attributes: list[Row] = field(default_factory=list)
    links: list[Row] = field(default_factory=list)  # src and dst (paths), weight, kind
    documents: bool = False  # whether the rows are documents, with their image_id, and no file is opened
    in_pixels: bool = False
    passed_over: list[str] = field(default_factory=list)  # files that are no images, or not where images stand
    empty: list[str] = field(default_factory=list)  # class folders without an image
    warnings: list[str] = field(default_factory=list)  # what a person should know of the tables


class Same(NamedTuple):
    """Two names that differ only in case, in spaces at their ends or in how their accents are stored."""

    first: str
    second: str

    def __str__(self) -> str:
        if nfc(self.first) == nfc(self.second):
            # They look the same, so they are written by their code points.
            return f"{self.first!a} and {self.second!a} differ only in how accents are stored (Unicode)"
        what = "spaces" if self.first.strip() == self.second.strip() else "upper and lower case"
        return f"{self.first!r} and {self.second!r} differ only in {what}"


def find_same(names: Iterable[str]) -> Iterator[Same]:
    """Each name with the first one that differs from it only as Same says, sorted."""
    first: dict[str, str] = {}
    for name in sorted(set(names)):
        other = first.setdefault(nfc(name).casefold().strip(), name)
        if other != name:
            yield Same(other, name)


def hint(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """`did you mean ...?` with the known name that is closest to one that is not; `otherwise` where none is close."""
    by_key = {nfc(each).casefold(): each for each in islice(known, MOST_COMPARED)}
    close = difflib.get_close_matches(nfc(name).casefold().strip(), by_key, n=1, cutoff=cutoff)
    return f"did you mean {by_key[close[0]]!r}?" if close else otherwise


def read_csv(path: Path, columns: Iterable[str], optional: Iterable[str] = ()) -> list[Row]:
    """The rows of a CSV with a header, as texts, among them those of `columns` and, where it has them, `optional`.

    Other columns are named on stderr. Raises UserError where the file is malformed, lacks one of `columns`, or has one
    that looks like one of them misspelt.
    """
    rows = []
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file; correct the path, or put a CSV there")
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            check_columns(path, columns, optional, list(reader.fieldnames or []))
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}: line {reader.line_num} has not as many fields as the first; correct it")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV in UTF-8 ({error}); save it as that") from None
    return rows


def check_columns(path: Path, wanted: Iterable[str], optional: Iterable[str], found: list[str]) -> None:
    """Say which columns are not read. Raises UserError for one that is missing, stands twice or looks misspelt."""
    wanted = list(wanted)
    known = [*wanted, *optional]
    missing = [column for column in wanted if column not in found]
    if missing:
        has = f"; it has {', '.join(found[:8])}" if found else ""
        raise UserError(f"{path}: has no column {missing[0]}{has}; its first line must name {', '.join(wanted)}")
    twice = [column for column in found if found.count(column) > 1]
    if twice:
        raise UserError(f"{path}: has two columns {twice[0]}; rename one")
    unread = [name for name in found if name not in known]
    for name in unread:
        meant = hint(name, [column for column in known if column not in found], "", cutoff=0.8)
        if meant:
            raise UserError(f"{path}: has a column {name!r}; {meant} Rename it, or remove it")
    if unread:
        print(f"{path}: columns that are not read: {', '.join(map(str, unread))}", file=sys.stderr)


def read_class_table(folder: Path) -> list[Row]:
    """classes.csv of a folder, one row a class; none where there is no such file.

    Columns: class_id (the class as its folder or the data name it), and any of name, superclass, scientific_name,
    lineage (ranks from the highest down, `Animalia > Chordata > Aves`), aliases (other names, `Erne; sea eagle`: what
    gives the class away beside its own), note, aphia_id (the number of the taxon in WoRMS; it becomes an alias, WORMS
    and the number). A row may stand for a group of classes:
    `superclass` may name its class_id or its name (see fold_groups). Raises UserError as read_csv does.
    """
    path = folder / "classes.csv"
    if not path.is_file():
        return []
    rows = read_csv(path, ["class_id"], CLASS_COLUMNS)
    seen: set[str] = set()
    for row in rows:
        name = nfc(row["class_id"])
        if not name or name in seen:
            what = f"names the class {name} twice" if name else "has a row without class_id"
            raise UserError(f"{path}: {what}; correct it")
        seen.add(name)
        aphia = (row.get("aphia_id") or "").strip().removeprefix(WORMS)
        if aphia and not (aphia.isascii() and aphia.isdigit()):
            raise UserError(f"{path}: aphia_id of {name} is {row['aphia_id']!r}; it is the number of a taxon in WoRMS")
        row["aphia_id"] = aphia or None
        ranks = [rank.strip() for rank in (row.get("lineage") or "").split(">")]
        row["lineage"] = [rank for rank in ranks if rank] or None
        row["aliases"] = [alias.strip() for alias in (row.get("aliases") or "").split(";") if alias.strip()] or None
    return rows


def merge_classes(classes: list[Row], table: list[Row]) -> list[Row]:
    """The rows of both, one a class; what classes.csv says goes first."""
    rows = {nfc(row["class_id"]): row for row in classes}
    for row in table:
        given = {key: value for key, value in row.items() if value}
        row = rows.get(nfc(row["class_id"]), {})
        rows[nfc(given["class_id"])] = row | given | ({"class_id": row["class_id"]} if row else {})
    return list(rows.values())


def check_listing(listing: Listing, root: str) -> None:
    """Match what the tables beside the images name with the images, in place, and take groups out of the classes.

    Raises UserError, naming the file in the folder `root`: two classes or paths whose names are the same but for case
    or the storing of accents, a class that a table of attributes names alone, parts most of which are of no image.
    """
    folder = Path(root)
    for same in find_same(row["name"] for row in listing.images):
        raise UserError(f"{root}: the classes {same}; give both the same name, or other ones")
    spelled = {nfc(name): name for name in {row["name"] for row in listing.images}}
    for row in listing.classes:
        row["class_id"] = spelled.get(nfc(row["class_id"]), row["class_id"])
    for same in find_same([*spelled.values(), *(row["class_id"] for row in listing.classes)]):
        raise UserError(f"{folder / 'classes.csv'}: the classes {same}, there or in the images; write it in one way")
    spelled |= {nfc(row["class_id"]): row["class_id"] for row in listing.classes}
    for row in listing.attributes:
        name = spelled.get(nfc(row["class_id"]))
        if name is None:
            remedy = hint(row["class_id"], spelled.values(), "correct it, or name the class in classes.csv too")
            raise UserError(f"{folder / 'attributes.csv'}: class_id {row['class_id']!r} is no class; {remedy}")
        row["class_id"] = name
    match_parts(listing, folder / "parts.csv")
    fold_groups(listing, folder / "classes.csv")


def match_parts(listing: Listing, path: Path) -> None:
    """Keep the parts of images that are listed, and warn of others. Raises UserError where two paths are the same."""
    paths: dict[str, str] = {}
    for row in listing.images:
        key = nfc(row["path"])
        if key in paths:
            same = f"the images {Same(paths[key], row['path'])}; remove or rename one"
            what = f"the image {row['path']!r} is listed twice; correct it" if paths[key] == row["path"] else same
            raise UserError(f"{path.parent}: {what}")
        paths[key] = row["path"]
    unknown = [part for part in listing.parts if nfc(part["path"]) not in paths]
    if unknown:
        name = unknown[0]["path"]
        said = f"{path}: {len(unknown)} of {len(listing.parts)} parts are of no image, the first of {name!r}"
        remedy = hint(name, paths, "paths start from the folder of the images", cutoff=0.8)
        if 2 * len(unknown) > len(listing.parts):
            raise UserError(f"{said}; correct them, or remove the file ({remedy})")
        listing.warnings.append(f"{said}; they are left out ({remedy})")
        listing.parts = [part for part in listing.parts if nfc(part["path"]) in paths]
    for part in listing.parts:
        part["path"] = paths[nfc(part["path"])]


def fold_groups(listing: Listing, path: Path) -> None:
    """Take out of the classes the rows that only group others, in place, and give the others their lineage.

    Such a row has no image, and is the superclass or in the lineage of another row, by its class_id or its name. Where
    a group and a class in it have one name, the class is the one that lies in a group of that name. Raises UserError
    for a row that lies in itself.
    """
    above = groups_above(listing.classes)
    by_id = {nfc(row["class_id"]): row for row in listing.classes}
    by_name: dict[str, list[Row]] = {}
    for row in listing.classes:
        by_name.setdefault(own_name(row), []).append(row)

    def find(group: str, of: Row) -> Row | None:
        """The row that another one means by the name of a group."""
        rows = [*([by_id[group]] if group in by_id else []), *by_name.get(group, [])]
        return next((row for row in rows if row is not of and group not in above[row["class_id"]]), None)

    with_images = {row["name"] for row in listing.images}
    parents: dict[str, Row] = {}
    groups: set[str] = set()
    for row in listing.classes:
        found = [find(group, row) for group in above[row["class_id"]]]
        groups |= {each["class_id"] for each in found if each is not None}
        parent = find(nfc(row.get("superclass") or ""), row)
        if parent is not None:
            parents[row["class_id"]] = parent
    # Of three of one name, in each other, the one with images is the class.
    for name, rows in by_name.items():
        within = {row["class_id"] for row in rows if name in above[row["class_id"]]}
        if within & with_images:
            groups |= within
    groups -= with_images
    for row in listing.classes:
        if row["class_id"] in parents and row["class_id"] not in groups:
            chain = list(chain_of(row, parents, path))
            row["superclass"] = chain[0]
            row["lineage"] = row.get("lineage") or chain[::-1]
    listing.classes = [row for row in listing.classes if row["class_id"] not in groups]
    if groups:
        print(f"{path}: {len(groups)} rows without images group others: superclasses, no classes", file=sys.stderr)


def groups_above(classes: list[Row]) -> dict[str, set[str]]:
    """What each row of a class table lies in, by its superclass and lineage; a lineage may end with the row itself."""
    ranked = [row for row in classes if row.get("lineage")]
    ends = sum(nfc(row["lineage"][-1]) in (own_name(row), nfc(row["class_id"])) for row in ranked)
    # In a lineage that ends with the group, a class may have the name of its group; most do not.
    with_itself = 2 * ends > len(ranked)
    above = {}
    for row in classes:
        lineage = row.get("lineage") or []
        groups = [*(lineage[:-1] if with_itself else lineage), row.get("superclass") or ""]
        above[row["class_id"]] = {nfc(group) for group in groups} - {""}
    return above


def own_name(row: Row) -> str:
    """What a row of a class table is called, in the form in which names are compared."""
    return nfc(row.get("name") or readable(row["class_id"]))


def chain_of(row: Row, parents: dict[str, Row], path: Path) -> Iterator[str]:
    """The names of the groups that a row lies in, from the nearest up."""
    seen = {row["class_id"]}
    while row["class_id"] in parents:
        row = parents[row["class_id"]]
        if row["class_id"] in seen:
            raise UserError(f"{path}: {row['class_id']!r} lies in itself, by the column superclass; correct it")
        seen.add(row["class_id"])
        yield row.get("name") or readable(row["class_id"])
    if row.get("superclass"):
        yield row["superclass"]


class Spelling:
    """Finds files whose names have their accents stored otherwise than a table has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[Path, dict[str, str]] = {}  # of each folder, its entries by the NFC of their names

    def on_disk(self, path: str) -> str:
        """The path of a file as the disk has it; the path itself where there is no such file."""
        if path.isascii() or (self.folder / path).exists():
            return path
        found = Path()
        for part in PurePosixPath(path).parts:
            folder = self.folder / found
            if folder not in self.names:
                names = os.listdir(folder) if folder.is_dir() else []
                self.names[folder] = {nfc(name): name for name in names}
            if nfc(part) not in self.names[folder]:
                return path
            found /= self.names[folder][nfc(part)]
        return found.as_posix()


def list_classes(listing: Listing) -> list[Row]:
    """Rows of index.classes: the classes with images, and those that only the data set's own list of classes names."""
    folders = {row["name"] for row in listing.images}
    described = {row["class_id"]: row for row in listing.classes}
    classes = []
    for folder, class_id in name_classes(folders | set(described)).items():
        row = described.get(folder, {})
        texts = {column: row.get(column) or None for column in ("superclass", "scientific_name", "note")}
        classes.append({
            "class_id": class_id,
            "name": nfc(row.get("name") or readable(folder)),
            **{column: nfc(text) if text else None for column, text in texts.items()},
            "lineage": [nfc(rank) for rank in row.get("lineage") or []] or None,
            "aliases": [*map(nfc, row.get("aliases") or []), *worms_name(row)] or None,
            "from_images": folder in folders,
        })
    return classes


def worms_name(row: Row) -> list[str]:
    """The name that WoRMS gives the taxon of a class for good; none where its AphiaID is not known."""
    return [f"{WORMS}{row['aphia_id']}"] if row.get("aphia_id") else []


def name_classes(folders: set[str]) -> dict[str, str]:
    """The class_id of each folder. Raises UserError where a folder is named as another one's id."""
    ids: dict[str, str] = {}
    for folder in sorted(folders):
        other = ids.setdefault(class_id_of(folder), folder)
        if other != folder:
            both = f"the classes {other!r} and {folder!r}"
            raise UserError(f"dataset.root: {both} have one class_id, {class_id_of(folder)}; rename one")
    return {folder: class_id for class_id, folder in ids.items()}


def read_word(value: str, where: str) -> bool:
    """Whether a cell says yes. Raises UserError, beginning with `where`, for what is no word for yes or no."""
    if value.strip().lower() not in WORDS:
        raise UserError(f"{where} is {value!r}; write 1 or 0 (true and false, yes and no will do)")
    return WORDS[value.strip().lower()]


def readable(name: str) -> str:
    """A class's folder as a person writes it: without CUB's running number (001.), underscores as spaces."""
    return re.sub(r"^\d{3}\.(?=\D)", "", name).replace("_", " ")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that hold something. Raises UserError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file; correct the path, or the data set")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as that") from None
    return [line for line in lines if line.strip()]
