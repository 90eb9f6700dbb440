"""Format `coco`: annotation files of COCO's form, a row a box. COCO, LVIS, Roboflow's exports, COCO Camera Traps.

`dataset.root` is one JSON file, whose images are split here; or a folder that holds one JSON a split, or whose folders
do: the split is the first of the words train, val and test (valid, validation, dev, testing too) in the file's name
(instances_train2017.json, train_mini.json) or, where that has none, in its folder's (valid/_annotations.coco.json). Of
several files the `instances_` are read where there are any. Where only one split has labels, its images are split here;
where train and val have some and test has none, val is test and val is drawn from train. classes.csv in the folder of
`root` adds to the categories.

Pictures are found under `dataset.images`, else under the folder of `root`: file_name from there, from the JSON's own
folder, or from images/, train2017/ (as the JSON's name has it), train/, images/train2017/ or images/train/ there, the
first of these that has some of them.

Of an annotation with a bbox (x, y, width, height in pixels from 0 [web: cocodataset.org]) the picture is what lies in
the box: path `FILE#ID`, ID that of the annotation (fieldmark/pictures/cuts.py). Boxes of one file are one group, or all
of the images' `location`, else `seq_id` where they have one (COCO Camera Traps [mem]; layout not verified). Boxes
become shares of the width and height that the JSON states, so that pictures may be larger or smaller as a whole; a
picture of another shape is broken: it was turned by its EXIF, or is another one. An annotation without a bbox is of the
whole picture. Left out, and counted in a warning: crowds (iscrowd), boxes without area, annotations without a category,
pictures with none, and those with several categories and no boxes. Outlines and keypoints are not read.

A category is called by its name; its `supercategory` is the superclass, unless it is empty, "none" or the name itself.
Where it has kingdom, phylum, class, order, family and genus, as iNaturalist's have, they are its lineage, the family
its superclass, `name` its scientific name and `common_name` what it is called. Of an image, date_captured, date or
datetime is when it was taken (not in COCO's own files, where it is when it was downloaded [mem]); latitude, longitude
and license are read.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fieldmark.annotations import missing_files
from fieldmark.command import UserError, name_some
from fieldmark.formats.manifest import RANGES, inside, text
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset
from fieldmark.pictures.cuts import cut_path, file_of

SPLIT = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
DATES = ("date_captured", "date", "datetime")
GROUPS = ("location", "seq_id")
# So many pictures are looked for to find the folder that holds them.
TRIED = 50


class Table(NamedTuple):
    """One annotation file."""

    path: Path
    split: str | None
    content: dict[str, Any]


def read(dataset: Dataset) -> Listing:
    """List what the annotation files name. Raises UserError naming the file and what cannot stand there."""
    root = Path(dataset.root)
    tables = [read_table(path, split) for path, split in find_tables(root).items()]
    listing = list_tables(tables, dataset.folder, name_pictures)
    warn_of_missing(listing, dataset.folder)
    listing.classes = merge_classes(listing.classes, read_class_table(root if root.is_dir() else root.parent))
    return listing


def list_tables(
    tables: Sequence[Table], folder: Path, name_of: Callable[[Table, Path], dict[Any, str]]
) -> Listing:
    """The rows and categories of several files. `name_of` gives the path of each image of a file, by its id."""
    listing = Listing([])
    left_out: dict[str, list[str]] = defaultdict(list)
    labelled: dict[str | None, list[Row]] = {}
    categories: dict[str, Row] = {}
    for table in tables:
        named = read_categories(table)
        for row in named.values():
            other = categories.setdefault(row["class_id"], row)
            if other != row:
                where = f"{table.path}: category {row['class_id']!r}"
                raise UserError(f"{where}: another file says other things of it; take both from one release")
        if any(isinstance(each, dict) and each.get("category_id") is not None for each in table.content["annotations"]):
            labelled[table.split] = list_images(table, named, name_of(table, folder), left_out)
        else:
            listing.warnings.append(f"{table.path}: labels nothing and is passed over")
    listing.images = settle_splits(labelled, listing.warnings)
    listing.classes = call(list(categories.values()))
    if not listing.images:
        said = "; ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        raise UserError(f"{tables[0].path}: labels no picture{f' ({said})' if said else ''}; take the file with labels")
    paths = Counter(row["path"] for row in listing.images)
    [(path, most)] = paths.most_common(1)
    if most > 1:
        raise UserError(f"{tables[0].path.parent}: {path!r} is named {most} times, in one file or in two; correct it")
    for reason, names in left_out.items():
        listing.warnings.append(f"{tables[0].path.parent}: {len(names)} {reason}: {name_some(names)}")
    listing.images.sort(key=lambda row: row["path"])
    return listing


def warn_of_missing(listing: Listing, folder: Path) -> None:
    """Warn of files that are listed and not there, by name."""
    files = sorted({file_of(row["path"]) for row in listing.images})
    gone = missing_files(folder, files)
    if gone:
        said = f"{len(gone)} of {len(files)} pictures that are listed are not there"
        listing.warnings.append(f"{folder}: {said}: {name_some(gone)}; unpack the archive of images again")


def find_tables(root: Path) -> dict[Path, str | None]:
    """The annotation files of a data set with their splits. Raises UserError where it is not clear which they are."""
    if root.is_file():
        return {root: None}
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not there; name the annotation file, or its folder")
    found = [*root.glob("*.json"), *root.glob("*/*.json")]
    found = sorted(path for path in found if not path.name.startswith(".") and not path.parent.name.startswith("."))
    found = [path for path in found if path.stem.startswith("instances")] or found
    splits = {path: split_in(path.stem) or split_in(path.parent.relative_to(root).name) for path in found}
    if len(splits) > 1:
        splits = {path: split for path, split in splits.items() if split is not None} or splits
    count = Counter(splits.values())
    if not splits or max(count.values()) > 1:
        twice = [str(path) for path, split in splits.items() if count[split] > 1]
        said = f"holds several annotation files of one split: {name_some(twice)}" if twice else "holds no .json"
        remedy = "put those to be read into a folder of their own, and name the pictures' in dataset.images"
        raise UserError(f"params.yaml: dataset.root: {root} {said}; {remedy}")
    return splits


def split_in(name: str) -> str | None:
    """The split that a file or folder is named after; None where it is none."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT[word] for word in words if word in SPLIT), None)


def read_table(path: Path, split: str | None) -> Table:
    """One annotation file. Raises UserError where it is not JSON of COCO's form."""

    def without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
        # Most of COCO's bytes; kept until all is read, they would be most of the memory.
        entry.pop("segmentation", None)
        return entry

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=without_outlines)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); it may be cut off: take it from its archive again") from None
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list `{key}`; it is no annotation file of COCO's form")
    if not isinstance(content.setdefault("annotations", []), list):  # files of test images have none
        raise UserError(f"{path}: `annotations` is no list; correct it, or take it out where nothing is labelled")
    return Table(path, split, content)


def entry_ids(table: Table, key: str, needed: Iterable[str]) -> dict[Any, Row]:
    """The entries of a list by their id. Raises UserError for one without what is needed, or whose id stands twice."""
    entries: dict[Any, Row] = {}
    needed = ("id", *needed)
    for place, entry in enumerate(table.content[key]):
        for name in needed:
            if not isinstance(entry, dict) or entry.get(name) is None:
                raise UserError(f"{table.path}: {key}[{place}] has no `{name}`; correct it")
        if not isinstance(entry["id"], int | str) or entries.setdefault(entry["id"], entry) is not entry:
            where = f"{table.path}: {key}[{place}]"
            raise UserError(f"{where}: id {entry['id']!r} stands there twice or is no id; correct it")
    return entries


def is_among(number: Any, known: Mapping[Any, Any]) -> bool:
    """Whether what stands for an id is one of those known: a list or an object of JSON is none."""
    return not isinstance(number, list | dict) and number in known


def read_categories(table: Table) -> dict[Any, Row]:
    """Rows of classes by the ids of their categories: class_id is the name."""
    rows: dict[Any, Row] = {}
    names: dict[str, Any] = {}
    for number, entry in entry_ids(table, "categories", ["name"]).items():
        name = str(entry["name"])
        if names.setdefault(name, number) != number:
            raise UserError(f"{table.path}: categories {names[name]} and {number} are both {name!r}; rename one")
        rows[number] = {"class_id": name, **ranks_of(entry)}
    return rows


def ranks_of(entry: Row) -> Row:
    """What a category says of itself beside its name: superclass, and lineage where it has ranks."""
    lineage = [str(entry[rank]) for rank in RANKS if entry.get(rank)]
    above = entry.get("family") or entry.get("supercategory")
    above = None if above in (None, "", "none", entry["name"]) else str(above)
    if not lineage:
        return {"superclass": above}
    return {
        "superclass": above, "lineage": lineage, "scientific_name": str(entry["name"]),
        "name": str(entry.get("common_name") or entry["name"]),
    }  # fmt: skip


def call(classes: list[Row]) -> list[Row]:
    """Classes of one common name get their scientific names behind it."""
    count = Counter(row.get("name") for row in classes)
    for row in classes:
        if "name" in row and count[row["name"]] > 1 and row["name"] != row["class_id"]:
            row["name"] = f"{row['name']} ({row['class_id']})"
    return classes


def name_pictures(table: Table, folder: Path) -> dict[Any, str]:
    """The path of each image from `folder`, by its id. Raises UserError where no folder that may hold them has any."""
    images = entry_ids(table, "images", ["file_name"])
    where = f"{table.path}: file_name"
    names = {number: inside(str(entry["file_name"]), where) for number, entry in images.items()}
    if not names:
        return {}
    token = next((token for token in table.path.stem.split("_") if split_in(token)), "")
    own = table.path.parent.relative_to(folder).as_posix() if table.path.parent.is_relative_to(folder) else ""
    word = table.split or ""
    bases = dict.fromkeys(["", own, "images", token, word, f"images/{token}", f"images/{word}"])
    tried = list(names.values())[:: max(1, len(names) // TRIED)]
    for base in bases:
        if any((folder / base / name).is_file() for name in tried):
            prefix = f"{base}/" if base not in ("", ".") else ""
            return {number: prefix + name for number, name in names.items()}
    looked = ", ".join(sorted({str(folder / base) for base in bases}))
    raise UserError(f"{table.path}: its pictures, {tried[0]} among them, are in none of {looked}; set dataset.images")


def list_images(
    table: Table, categories: dict[Any, Row], paths: dict[Any, str], left_out: dict[str, list[str]]
) -> list[Row]:
    """A row a box, or a picture without boxes, that has a category; why others have no row goes to `left_out`."""
    images = {entry["id"]: entry for entry in table.content["images"]}
    licences = read_licences(table)
    downloaded = "cocodataset.org" in str(table.content.get("info", ""))
    whole: dict[Any, set[str]] = defaultdict(set)
    seen: set[Any] = set()
    rows, about = [], {}
    for number, entry in entry_ids(table, "annotations", ["image_id"]).items():
        where = f"{table.path}: annotation {number}"
        if not is_among(entry["image_id"], paths):
            raise UserError(f"{where}: names image {entry['image_id']!r}, which is not listed; take a whole file")
        path = paths[entry["image_id"]]
        image = images[entry["image_id"]]
        seen.add(entry["image_id"])
        if entry.get("category_id") is None:
            left_out["annotations have no category and are left out"].append(f"{path} {number}")
            continue
        if not is_among(entry["category_id"], categories):
            raise UserError(f"{where}: category {entry['category_id']!r} is not listed; take a whole file")
        name = categories[entry["category_id"]]["class_id"]
        if entry.get("iscrowd"):
            left_out["annotations are of crowds and left out"].append(f"{path} {number}")
            continue
        if entry["image_id"] not in about:
            about[entry["image_id"]] = facts_of(image, path, licences, downloaded, left_out)
        if not entry.get("bbox"):
            whole[entry["image_id"]].add(name)
            continue
        size = size_of(image, f"{table.path}: image {image['id']}")
        box = box_of(entry["bbox"], size, where)
        if box is None:
            left_out["boxes have no area in their picture and are left out"].append(f"{path} {number}")
            continue
        facts = about[entry["image_id"]]
        group = facts.get("group") or path
        rows.append({"path": cut_path(path, number), "name": name, "split": None, "box": box, "stated": size, **facts})
        rows[-1]["group"] = group
    for image_id, names in whole.items():
        if len(names) > 1:
            left_out["pictures have several categories, no boxes, and are left out"].append(paths[image_id])
        else:
            rows.append({"path": paths[image_id], "name": next(iter(names)), "split": None, **about[image_id]})
    if table.content["annotations"] and len(seen) < len(images):
        bare = [paths[number] for number in images if number not in seen]
        left_out["pictures have no annotation and are left out"] += bare
    return rows


def size_of(image: Row, where: str) -> tuple[int, int]:
    """Width and height that the file states of an image, a pixel at least. Raises UserError where it has none."""
    size = image.get("width"), image.get("height")
    if not all(isinstance(side, int | float) and 1 <= side < math.inf for side in size):
        said = f"width and height are {size[0]!r} and {size[1]!r}"
        raise UserError(f"{where}: {said}; boxes need them in pixels, correct them")
    return int(image["width"]), int(image["height"])


def box_of(sides: Any, size: tuple[int, int], where: str) -> list[float] | None:
    """x, y, width and height in pixels as x0, y0, x1, y1 in [0,1], cut at the border; None where nothing is left."""
    try:
        x, y, width, height = map(float, sides)
    except (TypeError, ValueError):
        raise UserError(f"{where}: bbox is {sides!r}; it is x, y, width, height in pixels, correct it") from None
    sides = (x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    box = [min(max(side, 0.0), 1.0) for side in sides]
    return box if box[0] < box[2] and box[1] < box[3] else None


def read_licences(table: Table) -> dict[Any, str]:
    entries = table.content.get("licenses")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {
        entry.get("id"): str(entry.get("name") or entry.get("url") or "")
        for entry in entries
        if not isinstance(entry.get("id"), list | dict)
    }


def facts_of(
    image: Row, path: str, licences: dict[Any, str], downloaded: bool, left_out: dict[str, list[str]]
) -> Row:
    """What an image says of when, where, by whose leave and in which series it was taken."""
    facts: Row = {}
    date = next((image[key] for key in DATES if image.get(key)), None)
    if date is not None and not downloaded:
        facts["captured_at"] = text(date)
    group = next((image[key] for key in GROUPS if image.get(key) is not None), None)
    if group is not None:
        facts["group"] = str(group)
    if is_among(image.get("license"), licences) and licences[image["license"]]:
        facts["licence"] = licences[image["license"]]
    place = {key: image.get(key) for key in ("latitude", "longitude")}
    if any(value is not None for value in place.values()):
        # Some of iNaturalist's are bogus, as its publishers say: no reason to lose the picture.
        limits = [(place[key], *RANGES[key]) for key in place]
        if all(isinstance(value, int | float) and low <= value <= high for value, low, high in limits):
            facts |= place
        else:
            left_out["pictures have a latitude and longitude that are none; these are left out"].append(path)
    return facts


def settle_splits(labelled: dict[str | None, list[Row]], warnings: list[str]) -> list[Row]:
    """Give the rows of each file its split, as the module's docstring says."""
    named = {split: rows for split, rows in labelled.items() if rows}
    if len(named) > 1:
        moves = {"val": "test"} if "test" not in named else {}
        if moves:
            warnings.append("no labelled test file: the images of val are test, and val is drawn from train")
        for split, rows in named.items():
            for row in rows:
                row["split"] = moves.get(str(split), split)
    return [row for rows in named.values() for row in rows]
