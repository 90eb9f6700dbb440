"""Format `fgvc_aircraft`: FGVC-Aircraft 2013b (Maji et al., 2013), 100 variants of 70 families of 30 manufacturers.

root (fgvc-aircraft-2013b) has data/images/ID.jpg and, of each of train, val and test, data/images_variant_SPLIT.txt,
images_family_SPLIT.txt and images_manufacturer_SPLIT.txt (an id, which is a text: 0787226, and a label with spaces);
data/images_box.txt (id xmin ymin xmax ymax) where it is there; and classes.csv. A class is a variant; its family, or
its manufacturer where the family has the same name, is its superclass, and both are its lineage. Its README counts
pixels from 1, yet some boxes begin at 0: the index cuts them at the border; that xmax and ymax lie in the box is
MATLAB's custom [mem]. The README counts 102 variants and 10,200 images, the files 100 and 10,000 [code].

The last 20 rows of pixels of every picture are a banner with its photographer. `python -m tools.cut_banner` writes the
data set without them, with BANNER to say so; boxes stay valid, since they count from the top. It is warned of pictures
that have theirs.
"""

from collections.abc import Iterable
from pathlib import Path

from fieldmark.annotations import Published, check_published, fields, from_one, look_up, numbers, root_of, table_of
from fieldmark.command import UserError
from fieldmark.listing import SPLITS, Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = Published(100, {"train": 3334, "val": 3333, "test": 3333})
# Written beside data/ by tools/cut_banner.py: how many rows of pixels were cut off each picture.
BANNER = "banner_px.txt"


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where one is missing, or contradicts another."""
    root = root_of(dataset.root, "data")
    images: list[Row] = []
    above: dict[str, list[str]] = {}
    for split in SPLITS:
        variants, *ranks = (root / f"data/images_{rank}_{split}.txt" for rank in ("variant", "family", "manufacturer"))
        tables = [(path, table_of(path)) for path in ranks]
        for number, name in table_of(variants).items():
            images.append({"path": f"data/images/{number}.jpg", "number": number, "name": name, "split": split})
            lineage = [look_up(table, number, path) for path, table in reversed(tables)]
            if above.setdefault(name, lineage) != lineage:
                both = f"{' > '.join(above[name])} and {' > '.join(lineage)}"
                raise UserError(f"{ranks[0]}: image {number}: {name} lies in {both}; correct it")
    add_boxes(root / "data/images_box.txt", images)
    listing = Listing(images, merge_classes(list(describe(above)), read_class_table(root)), in_pixels=True)
    check_published(listing, root, PUBLISHED)
    if not (root / BANNER).is_file():
        remedy = f"`python -m tools.cut_banner {root} FOLDER` writes a copy without it: name that as dataset.root"
        listing.warnings.append(f"{root}: every picture has a banner with its photographer, 20 pixels high; {remedy}")
    return listing


def describe(above: dict[str, list[str]]) -> Iterable[Row]:
    """One row a variant, with what it lies in."""
    for name, (manufacturer, family) in above.items():
        nearest = family if family != name else manufacturer
        yield {"class_id": name, "superclass": nearest, "lineage": [manufacturer, family]}


def add_boxes(path: Path, images: list[Row]) -> None:
    """Give each image its box, where there is such a file; boxes of other images are passed over."""
    if not path.is_file():
        return
    boxes = {number: from_one(numbers(path, corners)) for number, *corners in fields(path, 5)}
    for row in images:
        row["box"] = boxes.get(row["number"])
