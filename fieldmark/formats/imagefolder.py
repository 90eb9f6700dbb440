"""Format `imagefolder`: root/SPLIT/CLASS/IMAGE, SPLIT one of train, val and test; or root/CLASS/IMAGE without splits.

Beside the folders may stand classes.csv (see listing.read_class_table), parts.csv (path, part, x0, y0, x1, y1, visible
(1 or 0); in [0,1] of the image) and attributes.csv (class_id, attribute, value). What they say of classes and images
must fit the folders (see listing.check_listing). Hidden files and folders do not count.
A folder without an image is no class; a class without images is one that classes.csv names.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.listing import SPLITS, Listing, Row, read_class_table, read_csv, read_word
from fieldmark.params import Dataset
from fieldmark.pictures.decode import IMAGE_SUFFIXES

SIDES = ("x0", "y0", "x1", "y1")


def read(dataset: Dataset) -> Listing:
    """List the folders. Raises UserError where they are not laid out as above."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; run draw_reef first, or name your images")
    tops = [entry.name for entry in visible(root) if is_folder(entry)]
    listing = Listing([], read_class_table(root), read_parts(root), read_attributes(root))
    # A folder `train` that holds images and no folders is a class of vehicles.
    if any(name in SPLITS and any(is_folder(entry) for entry in visible(root / name)) for name in tops):
        check_splits(root, tops)
        found: set[str] = set()
        bare: set[str] = set()
        for split in tops:
            add_classes(listing, root, split, found, bare)
        listing.empty = sorted(bare - found)
        layout = f"{root}/train/CLASS/IMAGE"
    else:
        found, bare = set(), set()
        add_classes(listing, root, None, found, bare)
        listing.empty = sorted(bare)
        layout = f"{root}/CLASS/IMAGE"
    if not listing.images:
        raise UserError(f"params.yaml: dataset.root: {root} holds no image; expected {layout}")
    listing.images.sort(key=lambda row: row["path"])
    return listing


def check_splits(root: Path, tops: list[str]) -> None:
    """Raises UserError for a folder beside train/ that is no split, and where train/ or test/ is missing."""
    for name in tops:
        if name not in SPLITS:
            raise UserError(
                f"params.yaml: dataset.root: {root} has both splits and a folder {name}/; a split is named train, val"
                " or test, and every class stands in them"
            )
    for split in ("train", "test"):
        if split not in tops:
            remedy = f"name the images that are held out {split}/" if split == "test" else "lay it out as train/CLASS"
            raise UserError(
                f"params.yaml: dataset.root: {root} has {tops[0]}/, but no folder {split}/; {remedy}, or put every"
                " class directly under the root, and splits are drawn"
            )


def add_classes(listing: Listing, root: Path, split: str | None, found: set[str], bare: set[str]) -> None:
    """Add the images of the class folders in root/SPLIT, or in root; put the folders' names in `found` or `bare`."""
    for folder in visible(root / split if split else root):
        if not is_folder(folder):
            if Path(folder.name).suffix.lower() in IMAGE_SUFFIXES:
                listing.passed_over.append(Path(folder.path).relative_to(root).as_posix())
            continue
        before = len(listing.images)
        for entry in visible(folder.path):
            path = Path(entry.path).relative_to(root).as_posix()
            if is_folder(entry):
                deeper = sorted(each for each in Path(entry.path).rglob("[!.]*") if each.is_file())
                listing.passed_over += [each.relative_to(root).as_posix() for each in deeper]
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                listing.images.append({"path": path, "name": folder.name, "split": split})
            else:
                listing.passed_over.append(path)
        (found if len(listing.images) > before else bare).add(folder.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def visible(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        yield from sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def read_parts(root: Path) -> list[Row]:
    """parts.csv of a folder. Raises UserError for a box that is not in [0,1], and where `visible` is no yes or no."""
    path = root / "parts.csv"
    if not path.is_file():
        return []
    rows = []
    for row in read_csv(path, ["path", "part", *SIDES, "visible"]):
        where = f"{path}: part {row['part']!r} of {row['path']}"
        try:
            box = [float(row[side]) for side in SIDES]
        except ValueError as error:
            raise UserError(f"{where}: {error}; correct it") from None
        if not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
            said = ", ".join(row[side] for side in SIDES)
            raise UserError(
                f"{where}: x0, y0, x1, y1 are {said}; they are in [0,1] of the image's width and height, x0 <= x1 and"
                " y0 <= y1 (divide pixels by them)"
            )
        centre = {"x": (box[0] + box[2]) / 2, "y": (box[1] + box[3]) / 2}
        visible = read_word(row["visible"], f"{where}: visible")
        rows.append({"path": row["path"], "part": row["part"], "visible": visible, "box": box, **centre})
    return rows


def read_attributes(root: Path) -> list[Row]:
    path = root / "attributes.csv"
    return read_csv(path, ["class_id", "attribute", "value"]) if path.is_file() else []
