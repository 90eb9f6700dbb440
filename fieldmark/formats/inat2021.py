"""Format `inat2021`: iNaturalist 2021, as the competition ships it: 10,000 species in 11 groups [D: its README].

`dataset.root` is a folder of its JSON files: train.json (2,686,843 pictures) or train_mini.json (500,000), one of them;
and val.json (100,000), whose pictures are test: public_test.json has no labels and is not read. Validation images are
drawn from train. With one file alone, test is drawn as well. Pictures stand where file_name says from the folder of
`dataset.images`, or of root: train/, train_mini/, val/ and in them a folder a species.

The files are of COCO's form without boxes (fieldmark/formats/coco.py), category ids from 0. A class is called by its
common name where it has one, with its scientific name beside; its lineage goes from kingdom to genus, its superclass is
its family. `supercategory`, 11 groups such as Birds, is no rank and is not read where there is a family. Places that
are none are left out; a date at midnight has no time. Whether common names are ever empty is not known.

The whole file is read at once, 2.3 kB of memory a picture (bench/index_json.py): 6 GB for train.json. So that DVC does
not read millions of pictures, put the JSON files into a folder of their own, and name that of the pictures in
`dataset.images`.
"""

from pathlib import Path

from fieldmark.annotations import Published, check_published
from fieldmark.command import UserError
from fieldmark.formats.coco import list_tables, name_pictures, read_table
from fieldmark.listing import Listing, merge_classes, read_class_table
from fieldmark.params import Dataset

TRAIN = {"train.json": 2_686_843, "train_mini.json": 500_000}
VAL = {"val.json": 100_000}
CLASSES = 10_000


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where it is not clear which to read, or as coco.py does."""
    root = Path(dataset.root)
    there = [name for name in TRAIN if (root / name).is_file()]
    held = [name for name in VAL if (root / name).is_file()]
    if len(there) > 1:
        remedy = "put one of them with val.json into a folder of its own, and name the pictures' in dataset.images"
        raise UserError(f"params.yaml: dataset.root: {root} holds both {' and '.join(there)}; {remedy}")
    if not there and not held:
        raise UserError(f"params.yaml: dataset.root: {root} holds none of {', '.join(TRAIN | VAL)}; name their folder")
    tables = [read_table(root / name, split) for names, split in ((there, "train"), (held, "test")) for name in names]
    listing = list_tables(tables, dataset.folder, name_pictures)
    listing.classes = merge_classes(listing.classes, read_class_table(root))
    counts = {"train": TRAIN[there[0]], "test": VAL["val.json"]} if there and held else {}
    check_published(listing, dataset.folder, Published(CLASSES, counts))
    return listing
