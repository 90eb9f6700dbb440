"""Format `oxford_pets`: Oxford-IIIT Pet (Parkhi et al., 2012), 37 breeds of cats and dogs, as it is shipped.

root/images/Abyssinian_1.jpg, root/annotations/trainval.txt and test.txt (picture, number of class, species: 1 cat and
2 dog, number of breed), annotations/xmls/Abyssinian_1.xml. A class is a picture's name without its number, its species
its superclass. What its authors call trainval is train here, and validation images are drawn from it. The trimaps are
not read. Read beside: classes.csv.

The box of an XML is of the head: it is the part `head`, and no picture has a box of its animal. It is named cat or dog
there, exists for trainval alone, and is missing for some of those; whether it counts from 0 or 1 is not documented:
it is taken as it stands. A few files under .jpg are of other formats or broken [code]: the index reads or marks them.
"""

from pathlib import Path

from fieldmark.annotations import Published, check_published, fields, largest, read_voc, root_of
from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = Published(37, {"train": 3680, "test": 3669})
LISTS = {"train": "trainval.txt", "test": "test.txt"}
SPECIES = {"1": "cat", "2": "dog"}


def read(dataset: Dataset) -> Listing:
    """List what the lists name. Raises UserError where one is missing or malformed, or a class is of two species."""
    root = root_of(dataset.root, "annotations")
    listing = Listing([], in_pixels=True)
    species: dict[str, str] = {}
    for split, name in LISTS.items():
        path = root / "annotations" / name
        for stem, _, kind, _ in fields(path, 4):
            breed, underscore, number = stem.rpartition("_")
            if kind not in SPECIES or not (breed and underscore and number) or "/" in stem:
                raise UserError(f"{path}: {stem!r} {kind!r} is no BREED_NUMBER with species 1 or 2; correct it")
            if species.setdefault(breed, SPECIES[kind]) != SPECIES[kind]:
                raise UserError(f"{path}: {stem}: {breed} is a cat and a dog; correct it")
            row: Row = {"path": f"images/{stem}.jpg", "number": stem, "name": breed, "split": split}
            listing.images.append(row)
            listing.parts += read_head(root / f"annotations/xmls/{stem}.xml", row["path"])
    classes: list[Row] = [
        {"class_id": breed, "superclass": kind, "lineage": [kind]} for breed, kind in species.items()
    ]
    listing.classes = merge_classes(classes, read_class_table(root))
    check_published(listing, root, PUBLISHED)
    return listing


def read_head(path: Path, image: str) -> list[Row]:
    """The part `head` of a picture that has an XML."""
    box = largest(read_voc(path)) if path.is_file() else None
    if box is None:
        return []
    centre = {"x": (box[0] + box[2]) / 2, "y": (box[1] + box[3]) / 2}
    return [{"path": image, "part": "head", "visible": True, "box": box, **centre}]
