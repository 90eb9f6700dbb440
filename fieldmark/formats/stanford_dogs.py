"""Format `stanford_dogs`: Stanford Dogs (Khosla et al., 2011), 120 breeds, as its authors ship it.

root/Images/n02085620-Chihuahua/IMAGE.jpg, root/Annotation/n02085620-Chihuahua/IMAGE (an XML without a suffix) and
train_list.mat and test_list.mat of lists.tar, whose file_list names the pictures in Images/ [code]. A class is the
folder behind its WordNet number. Read beside: classes.csv, for instance with breed groups as `superclass`: the files
name none.

Boxes are corners in pixels; whether they count from 0 or from 1 is not documented: they are taken as they stand. A
picture of several dogs has a box each, and the index has the largest [design]. Of the XML nothing else is read: its
name of file and folder is often the placeholder %s [mem]. One picture is a PNG named .jpg, and there are byte-equal
files [code]: the index reads the one and settles the others.
"""

from pathlib import Path, PurePosixPath

from fieldmark.annotations import Published, check_published, largest, read_matlab, read_voc, root_of
from fieldmark.command import UserError, name_some
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = Published(120, {"train": 12000, "test": 8580})
LISTS = {"train": "train_list.mat", "test": "test_list.mat"}


def read(dataset: Dataset) -> Listing:
    """List what the lists name. Raises UserError where one is missing, or an XML cannot be read."""
    root = root_of(dataset.root, "Images")
    images: list[Row] = []
    for split, name in LISTS.items():
        for path in map(PurePosixPath, map(str, read_matlab(root / name, "file_list"))):
            number, dash, breed = path.parent.name.partition("-")
            if len(path.parts) != 2 or not (number and dash and breed) or ".." in path.parts:
                raise UserError(f"{root / name}: {path.as_posix()!r} is not NUMBER-BREED/IMAGE; take it from lists.tar")
            images.append({"path": f"Images/{path}", "name": breed, "split": split})
    listing = Listing(images, merge_classes([], read_class_table(root)), in_pixels=True)
    add_boxes(root, listing)
    check_published(listing, root, PUBLISHED)
    return listing


def add_boxes(root: Path, listing: Listing) -> None:
    """Give each image its box, and warn of images that have no XML."""
    without = []
    for row in listing.images:
        path = root / PurePosixPath("Annotation", *PurePosixPath(row["path"]).with_suffix("").parts[1:])
        if path.is_file():
            row["box"] = largest(read_voc(path))
        else:
            without.append(path.relative_to(root).as_posix())
    if without:
        said = f"{len(without)} of {len(listing.images)} images have no box, since these are not there"
        listing.warnings.append(f"{root}: {said}: {name_some(without)}; unpack annotation.tar")
