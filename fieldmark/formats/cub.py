"""Format `cub`: the official layout of Caltech-UCSD Birds-200-2011, and of data sets that follow it.

root/images/CLASS/IMAGE with images.txt (number path), classes.txt (number class), image_class_labels.txt (number
class) and train_test_split.txt (number, 1 for training and 0 for test). Read where they are there:
bounding_boxes.txt (number x y width height, pixels), parts/parts.txt and parts/part_locs.txt (number part x y visible,
pixels), attributes/class_attribute_labels_continuous.txt (a row a class, per cent of its images) with attributes.txt
in the same folder, in root or beside root [mem: the official archive has it beside root], and classes.csv
(see listing.read_class_table). A class is called by its folder without the number: 001.Black_footed_Albatross is
"Black footed Albatross". A validation list may name images by number.
"""

from pathlib import Path

from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, read_class_table, read_lines, readable
from fieldmark.params import Dataset


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where one is missing, malformed or contradicts another."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name the one that holds images.txt")
    names = dict(fields(root / "classes.txt", 2))
    label = dict(fields(root / "image_class_labels.txt", 2))
    split = dict(fields(root / "train_test_split.txt", 2))
    images = []
    for number, path in fields(root / "images.txt", 2):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{root / 'images.txt'}: image {number}: {path} leads out of images/; correct it")
        row: Row = {"path": f"images/{path}", "number": number}
        row["name"] = look_up(names, look_up(label, number, root / "image_class_labels.txt"), root / "classes.txt")
        row["split"] = "train" if look_up(split, number, root / "train_test_split.txt") == "1" else "test"
        images.append(row)
    if not images:
        raise UserError(f"{root / 'images.txt'}: names no image")
    listing = Listing(sorted(images, key=lambda row: row["path"]), in_pixels=True)
    listing.classes = merge_classes(list(names.values()), read_class_table(root))
    by_number = {row["number"]: row for row in images}
    if len(by_number) < len(images) or len({row["path"] for row in images}) < len(images):
        raise UserError(f"{root / 'images.txt'}: names an image twice; correct it")
    add_boxes(root / "bounding_boxes.txt", by_number)
    listing.parts = read_parts(root / "parts", by_number)
    listing.attributes = read_attributes(root, list(names.values()))
    return listing


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
        return [float(value) for value in row]
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(row)[:80]!r}: {error}; correct it") from None


def look_up(table: dict[str, str], key: str, path: Path) -> str:
    if key not in table:
        raise UserError(f"{path}: has no line for {key}; the files of this folder do not belong together")
    return table[key]


def merge_classes(folders: list[str], table: list[Row]) -> list[Row]:
    """One row a class of classes.txt under its readable name; what classes.csv says goes first."""
    rows = {folder: {"class_id": folder, "name": readable(folder)} for folder in folders}
    for row in table:
        given = {key: value for key, value in row.items() if value}
        rows[row["class_id"]] = rows.get(row["class_id"], {}) | given
    return list(rows.values())


def add_boxes(path: Path, by_number: dict[str, Row]) -> None:
    if path.is_file():
        for number, *rest in fields(path, 5):
            x, y, width, height = numbers(path, rest)
            if number in by_number:
                by_number[number]["box"] = [x, y, x + width, y + height]


def read_parts(folder: Path, by_number: dict[str, Row]) -> list[Row]:
    """The points of the images' parts; an image that images.txt does not name is passed over."""
    path = folder / "part_locs.txt"
    if not path.is_file():
        return []
    part_names = dict(fields(folder / "parts.txt", 2))
    rows = []
    for number, part, *rest in fields(path, 5):
        x, y, visible = numbers(path, rest)
        if number in by_number:
            name = look_up(part_names, part, folder / "parts.txt")
            place = {"x": x, "y": y} if visible else {}
            rows.append({"path": by_number[number]["path"], "part": name, "visible": bool(visible), **place})
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
