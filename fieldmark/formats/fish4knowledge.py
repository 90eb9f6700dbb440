"""Format `fish4knowledge`: Fish4Knowledge's ground truth for recognition (Huang, Boom and Fisher), 27,370 pictures.

root/fish_image/fish_01 to fish_23, a folder a species, in each fish_TRACK_FISH.png: TRACK the number of the trajectory
in 12 digits, FISH that of the picture [L: the names; D: that one tracking id is one trajectory]. `root` may be
fish_image/ itself. A trajectory is a group: its pictures are frames of one fish, and never stand in two splits. There
is no official split, and splits are drawn. Masks (mask_image/) are not read.

Which species a folder is was not seen in a file: names and the number of pictures of each are from memory [mem]; the
numbers add up to the published 27,370, and another number in a folder is a warning. classes.csv in root, with class_id
fish_01 and so on, goes first. The sets are very unequal, from 12,112 pictures to 16.
"""

import re
from pathlib import Path

from fieldmark.command import UserError, name_some
from fieldmark.formats.imagefolder import is_folder, visible
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset
from fieldmark.pictures.decode import IMAGE_SUFFIXES

NAME = re.compile(r"fish_(\d+)_(\d+)")
# By folder: the species, its family, and how many pictures of it were published.
SPECIES = {
    "fish_01": ("Dascyllus reticulatus", "Pomacentridae", 12_112),
    "fish_02": ("Plectroglyphidodon dickii", "Pomacentridae", 2_683),
    "fish_03": ("Chromis chrysura", "Pomacentridae", 3_593),
    "fish_04": ("Amphiprion clarkii", "Pomacentridae", 4_049),
    "fish_05": ("Chaetodon lunulatus", "Chaetodontidae", 2_534),
    "fish_06": ("Chaetodon trifascialis", "Chaetodontidae", 190),
    "fish_07": ("Myripristis kuntee", "Holocentridae", 450),
    "fish_08": ("Acanthurus nigrofuscus", "Acanthuridae", 218),
    "fish_09": ("Hemigymnus fasciatus", "Labridae", 241),
    "fish_10": ("Neoniphon sammara", "Holocentridae", 299),
    "fish_11": ("Abudefduf vaigiensis", "Pomacentridae", 98),
    "fish_12": ("Canthigaster valentini", "Tetraodontidae", 147),
    "fish_13": ("Pomacentrus moluccensis", "Pomacentridae", 181),
    "fish_14": ("Zebrasoma scopas", "Acanthuridae", 90),
    "fish_15": ("Hemigymnus melapterus", "Labridae", 42),
    "fish_16": ("Lutjanus fulvus", "Lutjanidae", 206),
    "fish_17": ("Scolopsis bilineata", "Nemipteridae", 49),
    "fish_18": ("Scaridae", "Scaridae", 56),
    "fish_19": ("Pempheris vanicolensis", "Pempheridae", 29),
    "fish_20": ("Zanclus cornutus", "Zanclidae", 21),
    "fish_21": ("Neoglyphidodon nigroris", "Pomacentridae", 16),
    "fish_22": ("Balistapus undulatus", "Balistidae", 41),
    "fish_23": ("Siganus fuscescens", "Siganidae", 25),
}


def read(dataset: Dataset) -> Listing:
    """List the pictures of every folder. Raises UserError where there is no folder fish_01, or no picture."""
    root = Path(dataset.root)
    base = next((each for each in (root / "fish_image", root) if any(each.glob("fish_[0-9]*/"))), None)
    if base is None:
        raise UserError(f"params.yaml: dataset.root: {root} holds no fish_image/fish_01; name the unpacked folder")
    listing = Listing([])
    differ = []
    for folder in visible(base):
        if not is_folder(folder) or not re.fullmatch(r"fish_\d+", folder.name):
            continue
        rows = []
        for entry in visible(folder.path):
            path = Path(entry.path).relative_to(root).as_posix()
            found = NAME.fullmatch(Path(entry.name).stem)
            if found is None or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES or is_folder(entry):
                listing.passed_over.append(path)
            else:
                rows.append({"path": path, "name": folder.name, "split": None, "group": found[1]})
        listing.images += rows
        if not rows:
            listing.empty.append(folder.name)
        published = SPECIES[folder.name][2] if folder.name in SPECIES else 0
        if len(rows) != published:
            differ.append(f"{folder.name} {len(rows)} of {published}")
    there = {row["name"] for row in listing.images}
    if not there:
        raise UserError(f"{base}: no folder holds a picture named fish_TRACK_FISH.png; unpack the archive again")
    missing = [name for name in SPECIES if name not in there]
    if missing:
        listing.warnings.append(f"{base}: {len(missing)} of {len(SPECIES)} folders are not there: {', '.join(missing)}")
    if differ:
        said = "other numbers of pictures than published"
        remedy = "look whether a folder shows the species that it is named"
        listing.warnings.append(f"{base}: {said}: {name_some(differ)}; {remedy}")
    listing.classes = merge_classes([class_row(name) for name in SPECIES if name in there], read_class_table(root))
    return listing


def class_row(folder: str) -> Row:
    species, family, _ = SPECIES[folder]
    lineage = [family] if species == family else [family, species.split()[0]]
    return {
        "class_id": folder, "name": species, "scientific_name": species, "lineage": lineage,
        "superclass": None if species == family else family,
    }  # fmt: skip
