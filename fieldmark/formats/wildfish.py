"""Format `wildfish`: WildFish (Zhuang et al., ACM MM 2018), 54,459 pictures of 1,000 species [D: its README].

root/images/WildFish_part1 to 4, in each Genus_species_NUMBER.jpg (.jpeg, .JPG, .png) without further folders; `root`
may also be the folder of the parts itself. All of it is from loaders that read it [L]; the layout is not verified. A
class is the first two words of a name.

The archive also carries the splits of the paper, whose names and form were not seen: splits are drawn. Broken pictures
among them become rows that say so.
"""

from pathlib import Path

from fieldmark.annotations import missing_files
from fieldmark.command import UserError
from fieldmark.formats.imagefolder import is_folder, visible
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset
from fieldmark.pictures.decode import IMAGE_SUFFIXES

CLASSES, IMAGES = 1_000, 54_459
PARTS = [f"WildFish_part{number}" for number in range(1, 5)]


def read(dataset: Dataset) -> Listing:
    """List the pictures of all parts. Raises UserError where there is no part, or none has a picture."""
    root = Path(dataset.root)
    base = next((each for each in (root / "images", root) if any((each / part).is_dir() for part in PARTS)), None)
    if base is None:
        remedy = "name the folder that WildFish_version1.zip unpacks to"
        raise UserError(f"params.yaml: dataset.root: {root} has no {PARTS[0]}/, nor in images/; {remedy}")
    listing = Listing([])
    for part in PARTS:
        for entry in visible(base / part) if (base / part).is_dir() else ():
            path = Path(entry.path).relative_to(root).as_posix()
            species = species_of(entry.name)
            if species is None or is_folder(entry):
                listing.passed_over.append(path)
            else:
                listing.images.append({"path": path, "name": species, "split": None})
    if not listing.images:
        raise UserError(f"{base}: no part has a picture named Genus_species_1.jpg; unpack the archive again")
    listing.images.sort(key=lambda row: row["path"])
    listing.classes = merge_classes(species_rows({row["name"] for row in listing.images}), read_class_table(root))
    gone = missing_files(base, PARTS)
    if gone:
        listing.warnings.append(f"{base}: {', '.join(gone)} of {len(PARTS)} parts are not there; unpack them too")
    warn_of_counts(listing, root, CLASSES, IMAGES)
    return listing


def species_of(name: str) -> str | None:
    """Genus_species of a picture named Genus_species_NUMBER.SUFFIX; None where a name is otherwise."""
    path = Path(name)
    words = path.stem.split("_")
    if path.suffix.lower() not in IMAGE_SUFFIXES or len(words) < 3 or not all(words[:2]):
        return None
    return "_".join(words[:2])


def species_rows(names: set[str]) -> list[Row]:
    """Classes that are called Genus_species: their names, and the genus as the group in which they have siblings."""
    rows = []
    for name in sorted(names):
        genus, _, species = name.partition("_")
        full = f"{genus} {species}".replace("_", " ").strip()
        rows.append({
            "class_id": name, "name": full, "scientific_name": full, "superclass": genus, "lineage": [genus],
        })  # fmt: skip
    return rows


def warn_of_counts(listing: Listing, root: Path, classes: int, images: int) -> None:
    """Warn of other counts than the published ones of a data set without an official split."""
    species = len({row["name"] for row in listing.images})
    found = ((species, classes, "species"), (len(listing.images), images, "pictures"))
    differ = [f"{count} of {wanted} {what}" for count, wanted, what in found if count != wanted]
    if differ:
        listing.warnings.append(f"{root}: holds {' and '.join(differ)} that the data set was published with")
