"""Format `wildfishpp`: WildFish++ (Zhuang et al., TMM 2020), 103,034 pictures of 2,348 species [D: its abstract].

`dataset.root` is WildFish++_Release, or the folder that holds it: a folder Genus_species a class with its pictures [L];
splits are drawn. Or it is a folder with fine_grained/train.txt and val.txt, of pairs of species that look alike: lines
`Genus_species_NUMBER.jpg ID` of pictures in Pair_images/, here or beside fine_grained/ [L]. Its val is test, and val is
drawn from train; the id must go with the species and is not used.

Layout not verified: it is from loaders that read it. Not read, since no file of them was seen: the 3,817 descriptions,
the open-set lists, and fine_grained/pairwise_info.txt, in words what tells each pair apart (concepts.import takes such
sentences by class: docs/marine.md). A class is its scientific name, its superclass the genus.
"""

from pathlib import Path

from fieldmark.annotations import fields, missing_files
from fieldmark.command import UserError, name_some
from fieldmark.formats.imagefolder import is_folder, visible
from fieldmark.formats.manifest import inside
from fieldmark.formats.wildfish import species_of, species_rows, warn_of_counts
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset
from fieldmark.pictures.decode import IMAGE_SUFFIXES

RELEASE = "WildFish++_Release"
CLASSES, IMAGES = 2_348, 103_034
LISTS = {"train.txt": "train", "val.txt": "test"}


def read(dataset: Dataset) -> Listing:
    """List the release, or the pairs. Raises UserError where root holds neither."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name {RELEASE}, or the one that holds it")
    release = root / RELEASE if (root / RELEASE).is_dir() else root
    lists = next((each for each in (root / "fine_grained", root) if (each / "train.txt").is_file()), None)
    listing = read_pairs(root, lists) if lists and release == root else read_release(root, release)
    listing.images.sort(key=lambda row: row["path"])
    listing.classes = merge_classes(species_rows({row["name"] for row in listing.images}), read_class_table(root))
    return listing


def read_release(root: Path, release: Path) -> Listing:
    """A row a picture of each folder."""
    listing = Listing([])
    for folder in visible(release):
        if not is_folder(folder):
            continue
        before = len(listing.images)
        for entry in visible(folder.path):
            path = Path(entry.path).relative_to(root).as_posix()
            if is_folder(entry) or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                listing.passed_over.append(path)
            else:
                listing.images.append({"path": path, "name": folder.name, "split": None})
        if len(listing.images) == before:
            listing.empty.append(folder.name)
    if not listing.images:
        raise UserError(f"params.yaml: dataset.root: {root} holds no Genus_species/IMAGE; name the unpacked {RELEASE}")
    warn_of_counts(listing, release, CLASSES, IMAGES)
    return listing


def read_pairs(root: Path, lists: Path) -> Listing:
    """A row a line of both lists. Raises UserError where a species has two ids or an id two species, and for a picture
    without a species."""
    places = [each for each in (root / "Pair_images", lists / "Pair_images") if each.is_dir()]
    if not places:
        raise UserError(f"params.yaml: dataset.root: {root} has no Pair_images/; unpack it beside {lists.name}/")
    base = places[0].relative_to(root).as_posix()
    images: dict[str, Row] = {}
    species_by_id: dict[str, str] = {}
    id_of: dict[str, str] = {}
    for name, split in LISTS.items():
        path = lists / name
        for file, number in fields(path, 2):
            species = species_of(file)
            if species is None:
                raise UserError(f"{path}: {file!r} is not named Genus_species_1.jpg; correct it")
            if species_by_id.setdefault(number, species) != species:
                raise UserError(f"{path}: id {number} is {species_by_id[number]} and {species}; correct it")
            if id_of.setdefault(species, number) != number:
                raise UserError(f"{path}: {species} has the ids {id_of[species]} and {number}; correct it")
            picture = inside(f"{base}/{file}", str(path))
            if picture in images:
                raise UserError(f"{path}: names {file} twice, or {' and '.join(LISTS)} do; a picture has one split")
            images[picture] = {"path": picture, "name": species, "split": split}
    listing = Listing(list(images.values()))
    gone = missing_files(root, images)
    if gone:
        said = f"{len(gone)} of {len(images)} pictures that are listed are not there"
        listing.warnings.append(f"{root}: {said}: {name_some(gone)}; unpack the archive of images again")
    return listing
