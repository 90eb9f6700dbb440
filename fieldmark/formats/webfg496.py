"""Format `webfg496`: web-bird, web-aircraft or web-car of WebFG-496 (Sun et al., ICCV 2021), each a data set by itself.

root/train/CLASS/IMAGE, as search engines returned them: some are of another class, and some of none. root/val/CLASS/
IMAGE is the test set of CUB, FGVC-Aircraft or Stanford Cars, and is test here; validation images are drawn from train,
and so their labels are wrong as often. A class is its folder, without CUB's number. There are no boxes and no lists.
Read beside: classes.csv.

Layout not verified: folders of web-bird are known by a loader [code], those of the other two are not, and which of the
pictures are wrong nobody published. Counts are of [mem]; together they are the 53,339 of the publisher's README. Broken
files are among them [code]: the index marks them.
"""

from fieldmark.annotations import Published, check_published, root_of
from fieldmark.command import UserError, name_some
from fieldmark.formats.imagefolder import add_classes
from fieldmark.listing import Listing, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = [
    Published(200, {"train": 18388, "test": 5794}),  # web-bird
    Published(100, {"train": 13503, "test": 3333}),  # web-aircraft
    Published(196, {"train": 21448, "test": 8041}),  # web-car
]


def read(dataset: Dataset) -> Listing:
    """List the folders. Raises UserError where train/ and val/ have not the same classes."""
    root = root_of(dataset.root, "train")
    listing = Listing([], merge_classes([], read_class_table(root)))
    found: dict[str, set[str]] = {"train": set(), "val": set()}
    for split, names in found.items():
        if not (root / split).is_dir():
            raise UserError(f"params.yaml: dataset.root: {root} has no folder {split}/; unpack the archive again")
        add_classes(listing, root, split, names, set())
    differ = sorted(found["train"] ^ found["val"])
    if differ or not listing.images:
        said = f"have not the same classes: {name_some(differ)}" if differ else "hold no image"
        raise UserError(f"params.yaml: dataset.root: {root}/train and {root}/val {said}; unpack the archive again")
    for row in listing.images:
        row["split"] = {"train": "train", "val": "test"}[row["split"]]
    check_published(listing, root, *PUBLISHED)
    listing.warnings.append(f"{root}: train and val have labels of a search engine, some of them wrong; test is clean")
    return listing
