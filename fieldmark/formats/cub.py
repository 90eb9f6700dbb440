"""Format `cub`: the official layout of Caltech-UCSD Birds-200-2011, and of data sets that follow it.

root/images/CLASS/IMAGE with images.txt (number path), classes.txt (number class), image_class_labels.txt (number
class) and train_test_split.txt (number, 1 for training and 0 for test). Read where they are there:
bounding_boxes.txt (number x y width height, pixels), parts/parts.txt and parts/part_locs.txt (number part x y visible,
pixels), attributes/class_attribute_labels_continuous.txt (a row a class, per cent of its images) with attributes.txt
in the same folder, in root or beside root [mem: the official archive has it beside root], and classes.csv
(see listing.read_class_table). A class is called by its folder without the number: 001.Black_footed_Albatross is
"Black footed Albatross". A validation list may name images by number.

hierarchy.txt (number of a class, number of the group it lies in), which NABirds has, tells classes from groups: what
classes.txt names and some class lies in is a superclass and no class, unless an image is labelled with it. NABirds has
its parts in parts/ too, and its numbers of images are texts with dashes.
"""

from pathlib import Path

from fieldmark.annotations import fields, look_up, numbers
from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, Spelling, merge_classes, read_class_table, read_lines, readable
from fieldmark.params import Dataset

# What train_test_split.txt says of an image.
SPLIT = {"1": "train", "0": "test"}


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where one is missing, malformed or contradicts another."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name the one that holds images.txt")
    names = dict(fields(root / "classes.txt", 2))
    label = dict(fields(root / "image_class_labels.txt", 2))
    split = dict(fields(root / "train_test_split.txt", 2))
    spelling = Spelling(root)
    images = []
    for number, path in fields(root / "images.txt", 2):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{root / 'images.txt'}: image {number}: {path} leads out of images/; correct it")
        row: Row = {"path": spelling.on_disk(f"images/{path}"), "number": number}
        row["name"] = look_up(names, look_up(label, number, root / "image_class_labels.txt"), root / "classes.txt")
        training = look_up(split, number, root / "train_test_split.txt")
        if training not in SPLIT:
            where = f"{root / 'train_test_split.txt'}: image {number}"
            raise UserError(f"{where}: {training!r} is neither 1 nor 0; correct it")
        row["split"] = SPLIT[training]
        images.append(row)
    if not images:
        raise UserError(f"{root / 'images.txt'}: names no image")
    listing = Listing(sorted(images, key=lambda row: row["path"]), in_pixels=True)
    above = read_hierarchy(root / "hierarchy.txt", names)
    used = {number for number in names if number not in set(above.values())} | set(label.values())
    listing.classes = merge_classes(describe(names, above, used, root / "classes.txt"), read_class_table(root))
    by_number = {row["number"]: row for row in images}
    if len(by_number) < len(images) or len({row["path"] for row in images}) < len(images):
        raise UserError(f"{root / 'images.txt'}: names an image twice; correct it")
    add_boxes(root / "bounding_boxes.txt", by_number)
    listing.parts = read_parts(root / "parts", by_number)
    kept = {row["class_id"] for row in listing.classes}
    attributes = read_attributes(root, list(names.values()))
    listing.attributes = [row for row in attributes if row["class_id"] in kept]
    return listing


def read_hierarchy(path: Path, names: dict[str, str]) -> dict[str, str]:
    """The group that each class or group lies in, by number; nothing where there is no such file.

    Raises UserError for a number that classes.txt does not have, one in two groups, and a group that lies in itself.
    """
    above: dict[str, str] = {}
    if not path.is_file():
        return above
    for child, parent in fields(path, 2):
        for number in (child, parent):
            look_up(names, number, path.with_name("classes.txt"))
        if above.setdefault(child, parent) != parent:
            raise UserError(f"{path}: {child} lies in {above[child]} and in {parent}; correct it")
    for number in above:
        seen = set()
        while number in above:
            if number in seen:
                raise UserError(f"{path}: {number} lies in itself; correct it")
            seen.add(number)
            number = above[number]
    return above


def describe(names: dict[str, str], above: dict[str, str], used: set[str], path: Path) -> list[Row]:
    """One row a class of classes.txt, with its groups where there are any. Raises UserError for one name twice."""
    rows: dict[str, Row] = {}
    for number, name in names.items():
        if number not in used:
            continue
        if name in rows:
            raise UserError(f"{path}: names two classes {name!r}; give one of them another name")
        groups = []
        group = number
        while group in above:
            group = above[group]
            groups.append(readable(names[group]))
        rows[name] = {"class_id": name, "name": readable(name)}
        if groups:
            # A group may have the name of a class in it.
            other = [each for each in groups if each != readable(name)]
            rows[name] |= {"superclass": other[0] if other else None, "lineage": groups[::-1]}
    return list(rows.values())


def add_boxes(path: Path, by_number: dict[str, Row]) -> None:
    """Give each image its box. Raises UserError where they are in [0,1], or of no image; some may be of others."""
    if not path.is_file():
        return
    boxes = [(number, numbers(path, rest)) for number, *rest in fields(path, 5)]
    for number, (x, y, width, height) in boxes:
        if width < 0 or height < 0:
            raise UserError(f"{path}: image {number}: the box is {width:g} wide and {height:g} high; correct it")
        if number in by_number:
            by_number[number]["box"] = [x, y, x + width, y + height]
    if boxes and all(max(box) <= 1 for _, box in boxes):
        raise UserError(f"{path}: every box lies in [0,1]; multiply by the width and height of the images, in pixels")
    check_known(path, [number for number, _ in boxes], by_number)


def check_known(path: Path, given: list[str], by_number: dict[str, Row]) -> None:
    """Raises UserError where a table is of other images than images.txt, all of it."""
    if given and not any(number in by_number for number in given):
        raise UserError(f"{path}: names no image of images.txt, the first is {given[0]!r}; they do not belong together")


def read_parts(folder: Path, by_number: dict[str, Row]) -> list[Row]:
    """The points of the images' parts; an image that images.txt does not name is passed over."""
    path = folder / "part_locs.txt"
    if not path.is_file():
        return []
    part_names = dict(fields(folder / "parts.txt", 2))
    rows = []
    lines = fields(path, 5)
    for number, part, *rest in lines:
        x, y, visible = numbers(path, rest)
        if visible not in (0, 1):
            raise UserError(f"{path}: image {number}, part {part}: visible is {rest[2]!r}, neither 0 nor 1; correct it")
        if number in by_number:
            name = look_up(part_names, part, folder / "parts.txt")
            place = {"x": x, "y": y} if visible else {}
            rows.append({"path": by_number[number]["path"], "part": name, "visible": bool(visible), **place})
    check_known(path, [number for number, *_ in lines], by_number)
    return rows


def read_attributes(root: Path, classes: list[str]) -> list[Row]:
    """One row a class and attribute, its value the per cent of the class's images that show it."""
    path = root / "attributes" / "class_attribute_labels_continuous.txt"
    if not path.is_file():
        return []
    places = [folder / "attributes.txt" for folder in (path.parent, root, root.parent)]
    names = [row[1] for row in fields(next((place for place in places if place.is_file()), places[0]), 2)]
    table = [line.split() for line in read_lines(path)]
    if len(table) != len(classes) or any(len(row) != len(names) for row in table):
        raise UserError(f"{path}: is not a row for each of {len(classes)} classes with {len(names)} values; correct it")
    return [
        {"class_id": name, "attribute": attribute, "value": value}
        for name, row in zip(classes, table, strict=True)
        for attribute, value in zip(names, row, strict=True)
    ]
