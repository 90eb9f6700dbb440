"""Format `stanford_cars`: Stanford Cars (Krause et al., 2013), 196 models of 49 makes, as its authors shipped it.

root/cars_train/IMAGE, root/cars_test/IMAGE, devkit/cars_meta.mat (class_names) and devkit/cars_train_annos.mat; and
cars_test_annos_withlabels.mat, a download of its own, in root or in devkit/ [code]: the file of test boxes in devkit/
has no labels. Annotations are a structure of bbox_x1, bbox_y1, bbox_x2, bbox_y2, class and fname, classes and pixels
counted from 1, as its files show; that x2 and y2 lie in the box is MATLAB's custom [mem]. Picture names repeat in train
and test. Read beside: classes.csv.

The files name no makes. The superclass is the first word of a class's name, or the first two of TWO_WORDS [design].
The other archive that goes about, car_ims/ with cars_annos.mat, is not read.
"""

from pathlib import Path

from fieldmark.annotations import Published, check_published, from_one, read_matlab, root_of
from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

META, TRAIN, TEST = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"
SIDES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
PUBLISHED = Published(196, {"train": 8144, "test": 8041})
TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")


def read(dataset: Dataset) -> Listing:
    """List what the annotations name. Raises UserError where a file is missing or names a class that is none."""
    root = root_of(dataset.root, "devkit")
    names = [str(name) for name in read_matlab(root / META, "class_names")]
    images = [*read_split(root, "train", root / TRAIN, names), *read_split(root, "test", find_test(root), names)]
    classes: list[Row] = [{"class_id": name, "superclass": make_of(name), "lineage": [make_of(name)]} for name in names]
    listing = Listing(images, merge_classes(classes, read_class_table(root)), in_pixels=True)
    check_published(listing, root, PUBLISHED)
    return listing


def find_test(root: Path) -> Path:
    """The annotations of test images with their classes. Raises UserError where they are in neither place."""
    places = [root / TEST, root / "devkit" / TEST]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{places[0]}: is not there, and devkit/ has no labels of test images; download it into {root}")
    return found


def read_split(root: Path, split: str, path: Path, names: list[str]) -> list[Row]:
    rows = []
    for place, entry in enumerate(read_matlab(path, "annotations"), start=1):
        missing = [field for field in (*SIDES, "class", "fname") if field not in entry]
        if missing:
            raise UserError(f"{path}: has no field {missing[0]}; take {TEST} for test, {TRAIN} for train")
        [number] = entry["class"]
        if not 1 <= number <= len(names):
            raise UserError(f"{path}: annotation {place}: class {number}; {root / META} has 1 to {len(names)}")
        box = from_one(float(entry[side][0]) for side in SIDES)
        rows.append({"path": f"cars_{split}/{entry['fname']}", "name": names[number - 1], "split": split, "box": box})
    return rows


def make_of(name: str) -> str:
    return next((make for make in TWO_WORDS if name.startswith(f"{make} ")), name.split()[0])
