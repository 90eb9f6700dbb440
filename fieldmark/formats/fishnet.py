"""Format `fishnet`: FishNet (Khan et al., ICCV 2023), 94,532 pictures of 463 families of fish and other water life.

root/anns/train.csv and test.csv, the official split [O: test.csv; train.csv was not seen, its header is taken to be the
same], anns/train_full_meta_new.csv, and root/Images/FAMILY/FILE with FILE's box in FAMILY/STEM.txt (bbox.zip, whose own
split is not known). FILE is the last part of `image`: an address in rows from FishBase, a file's name in those from
iNaturalist. Validation images are drawn from train.

A class is a family, as in the paper's first task. Its superclass is its order, one of the 83 of Order_new in the label
map. The publisher's loader gives each picture the order of its own row, `Order` up to the slash of such as
"Eupercaria/misc", looked up in Order_new [L]; rows of one family may differ, and a class has one superclass, so it is
what most rows of the family name. Where that is no Order_new (12 rows of Acanthuridae say Acanthuriformes, which the
excerpt's map lacks [O]), the map's own order of the family is taken. `NewOrder` has yet other names and is not read.
Above it stands the class that most rows of a family name (Actinopteri and Actinopterygii both occur). Species and
genera are not read: `species` is empty in every row from iNaturalist. Nor are the 22 traits, which are of species and
cannot be seen.

Boxes are corners in pixels from 0, one object a line, its family first; of several the largest is the picture's. 18,324
of 18,901 test pictures have one. Published: 75,631 for training (the difference of two counts), 18,901 for test.
"""

from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from fieldmark.annotations import Published, Thing, check_published, largest, numbers
from fieldmark.command import UserError, name_some
from fieldmark.formats.manifest import inside
from fieldmark.listing import Listing, Row, merge_classes, read_class_table, read_csv, read_lines
from fieldmark.params import Dataset

PUBLISHED = Published(463, {"train": 75_631, "test": 18_901})
NEEDED = ("image", "Family", "Folder")
READ = ("Order", "Class")
# Columns that are there and say nothing to an index.
OTHERS = (
    "", "Unnamed: 0", "species", "SpecCode", "Genus", "Subfamily", "SuperClass", "source", "Troph", "FeedingPath",
    "Tropical", "Temperate", "Subtropical", "Boreal", "Polar", "freshwater", "saltwater", "brackish", "NewOrder",
    "Frequency",
)  # fmt: skip
META = "anns/train_full_meta_new.csv"
META_OTHERS = ("", "Unnamed: 0", "Family_cls", "Order", "fam_info", "ord_info", "Order_cls")


def read(dataset: Dataset) -> Listing:
    """List what both tables name. Raises UserError naming the file and the row that cannot stand."""
    root = Path(dataset.root)
    if not (root / "anns").is_dir():
        remedy = "name the folder that holds it and Images/"
        raise UserError(f"params.yaml: dataset.root: {root} has no folder anns/; {remedy}")
    images: dict[str, Row] = {}
    twice: list[str] = []
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    orders: dict[str, Counter[str]] = defaultdict(Counter)
    # A picture of both tables is kept for test.
    for split in ("test", "train"):
        path = root / f"anns/{split}.csv"
        for line, row in enumerate(read_csv(path, NEEDED, (*READ, *OTHERS)), start=2):
            where = f"{path}: line {line}"
            family, name = row["Family"].strip(), PurePosixPath(row["image"].strip()).name
            if not family or not name:
                what = "Family" if not family else "image"
                raise UserError(f"{where}: {what} is empty; take the file from its repository")
            place = inside(f"Images/{row['Folder'].strip()}/{name}", where)
            if place in images:
                twice.append(place)
                continue
            images[place] = {"path": place, "name": family, "split": split}
            classes[family][row.get("Class", "").strip()] += 1
            orders[family][row.get("Order", "").partition("/")[0].strip()] += 1
    if not images:
        raise UserError(f"{root / 'anns'}: names no picture; take train.csv and test.csv from the repository")
    for row in images.values():
        box = read_box(root / PurePosixPath(row["path"]).with_suffix(".txt"))
        if box is not None:
            row["box"] = box
    listing = Listing([images[place] for place in sorted(images)], in_pixels=True)
    if twice:
        said = f"{len(twice)} rows name a picture again and are left out"
        listing.warnings.append(f"{root / 'anns'}: {said}: {name_some(twice)}")
    listing.classes = merge_classes(describe(root / META, classes, orders), read_class_table(root))
    check_published(listing, dataset.folder, PUBLISHED)
    return listing


def describe(path: Path, classes: dict[str, Counter[str]], orders: dict[str, Counter[str]]) -> list[Row]:
    """A row a family of the pictures: its order, and the class above that. Both are counted in the rows of pictures."""
    of_map = {row["Family"]: row["Order_new"] for row in read_csv(path, ("Family", "Order_new"), META_OTHERS)}
    known = set(of_map.values()) - {""}
    rows = []
    for family in sorted(classes):
        if family not in of_map:
            raise UserError(f"{path}: has no family {family}; the files of anns/ are not of one release")
        [(name, _)], [(order, _)] = classes[family].most_common(1), orders[family].most_common(1)
        order = order if order in known else of_map[family]
        lineage = [each for each in (name, order) if each]
        rows.append({
            "class_id": family, "name": family, "superclass": order or None, "scientific_name": family,
            "lineage": lineage or None,
        })  # fmt: skip
    return rows


def read_box(path: Path) -> list[float] | None:
    """The box of the largest object that a file names; None where there is no such file."""
    if not path.is_file():
        return None
    things = []
    for line in read_lines(path):
        name, *corners = line.split()
        if len(corners) != 4:
            raise UserError(f"{path}: {line[:80]!r} is not a family and four corners; take bbox.zip again")
        things.append(Thing(name, numbers(path, corners)))
    return largest(things)
