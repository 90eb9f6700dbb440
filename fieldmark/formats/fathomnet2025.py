"""Format `fathomnet2025`: the data of the FathomNet competition of 2025 (FGVC12), regions of pictures of the deep sea.

`dataset.root` holds dataset_train.json and, which is passed over, dataset_test.json: its categories are null [O: the
test file; the train file was not seen, and is taken to be alike]. They are of COCO's form (fieldmark/formats/coco.py):
a region is what lies in its box, boxes count pixels from 0. Splits are drawn from train.

Pictures are found as the competition's download.py writes them, by the id of the image: images/ID.SUFFIX in the folder
of `dataset.images`, or of root, or in train/images/ there, the suffix that of coco_url [D: download.py]; else under
their file_name as coco.py says. Test pictures have the same ids: download them into another folder. download.py's rois/
are the same regions once more and are not read.

The 79 categories are taxa of several ranks, from species up, and the file has no ranks: the competition scores by
distance in the tree of WoRMS, cut to seven ranks. Give lineages in classes.csv (docs/marine.md says how). A class is
its own scientific name. Frames of one dive are one group: the folder that coco_url names, where it is a number (the
dive, or the day of a year); other pictures are groups of their own.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from fieldmark.formats.coco import Table, find_tables, list_tables, name_pictures, read_table, warn_of_missing
from fieldmark.listing import Listing, merge_classes, read_class_table
from fieldmark.params import Dataset

CATEGORIES = 79


def read(dataset: Dataset) -> Listing:
    """List the regions that have a category. Raises UserError as coco.py does."""
    root = Path(dataset.root)
    tables = [read_table(path, split) for path, split in find_tables(root).items()]
    for table in tables:
        for image in table.content["images"]:
            dive = dive_of(image)
            if dive is not None:
                image["location"] = dive
    listing = list_tables(tables, dataset.folder, name_downloaded)
    warn_of_missing(listing, dataset.folder)
    if len(listing.classes) != CATEGORIES:
        listing.warnings.append(f"{root}: lists {len(listing.classes)} of {CATEGORIES} categories that were published")
    for row in listing.classes:
        row["scientific_name"] = row["class_id"]
    folder = root if root.is_dir() else root.parent
    listing.classes = merge_classes(listing.classes, read_class_table(folder))
    return listing


def dive_of(image: Any) -> str | None:
    """The folder of coco_url where it is named by a number, without the server; None elsewhere."""
    url = image.get("coco_url") if isinstance(image, dict) else None
    folder = PurePosixPath(unquote(urlsplit(str(url or "")).path)).parent
    return folder.as_posix().strip("/") if re.fullmatch(r"\d+", folder.name) else None


def name_downloaded(table: Table, folder: Path) -> dict[Any, str]:
    """The paths of images as download.py writes them, where any is there; else as coco.py names them."""
    suffixes = {
        image["id"]: str(image["coco_url"]).rpartition(".")[2]
        for image in table.content["images"]
        if isinstance(image, dict) and "id" in image and image.get("coco_url")
    }
    for base in ("images", f"{table.split}/images"):
        names = {number: f"{base}/{number}.{suffix}" for number, suffix in suffixes.items()}
        if len(names) == len(table.content["images"]) and any((folder / name).is_file() for name in names.values()):
            return names
    return name_pictures(table, folder)
