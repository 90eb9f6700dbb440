"""Format `ultra_fgvc`: leaves of cultivars, one set of Ultra-FGVC a folder: COTTON, soybean200, soybean_gene, R1, ...

root/images/IMAGE, root/anno/train.txt and test.txt (a path in images/ and the number of its cultivar, from 1) [code:
the loaders of MaskCOV and others]. A class is a number, called "cultivar 7"; classes.csv may give names, by the number
as `class_id`. anno/val.txt names validation images; where it names test images, as its authors' code would have it,
validation images are drawn from train and it is warned of. There are no boxes.

Layout not verified: no file of it was seen. Counts are of [mem], and known by the number of classes. SoyCultivar200,
older and other, is not read. Cotton80 and SoyLocal have three training pictures a class: with dataset.val_fraction 0.34
one of them is for validation.
"""

from pathlib import Path, PurePosixPath

from fieldmark.annotations import Published, check_published, fields, root_of
from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = [
    Published(80, {"train": 240, "test": 240}),  # Cotton80
    Published(200, {"train": 600, "test": 600}),  # SoyLocal
    Published(1110, {"train": 12763, "test": 11143}),  # SoyGene
    Published(198, {"train": 990, "test": 990}),  # a stage of SoyAgeing
    Published(1938, {"train": 5814, "test": 5814}),  # SoyGlobal
]


def read(dataset: Dataset) -> Listing:
    """List what the lists name. Raises UserError where one is missing or malformed."""
    root = root_of(dataset.root, "anno")
    rows = {split: read_list(root / f"anno/{split}.txt", split) for split in ("train", "test")}
    images = [*rows["train"], *rows["test"]]
    listing = Listing(images)
    path = root / "anno/val.txt"
    if path.is_file():
        val = read_list(path, "val")
        tested = {row["path"] for row in rows["test"]} & {row["path"] for row in val}
        if tested:
            said = f"names {len(tested)} test images; it is not read, and val is drawn from train"
            listing.warnings.append(f"{path}: {said}")
        else:
            named = {row["path"] for row in val}
            listing.images = [*(row for row in images if row["path"] not in named), *val]
    numbers = sorted({row["name"] for row in listing.images}, key=int)
    classes: list[Row] = [{"class_id": number, "name": f"cultivar {number}"} for number in numbers]
    listing.classes = merge_classes(classes, read_class_table(root))
    check_published(listing, root, *PUBLISHED)
    return listing


def read_list(path: Path, split: str) -> list[Row]:
    rows: list[Row] = []
    # The class stands last: a name with spaces would be read all the same.
    for [line] in fields(path, 1):
        name, _, number = line.rpartition(" ")
        place = PurePosixPath(name)
        if not name or not number.isdecimal() or number == "0" or place.is_absolute() or ".." in place.parts:
            raise UserError(f"{path}: {line[:80]!r} is no path in images/ and class from 1; correct it")
        rows.append({"path": f"images/{place}", "name": str(int(number)), "split": split})
    return rows
