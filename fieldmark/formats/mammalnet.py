"""Format `mammalnet`: MammalNet (Chen et al., CVPR 2023), films of 173 genera of mammals and what they do.

root/annotation/{genus_to_id.txt,behavior_to_id.txt,composition/{train,val,test}.csv,detection_annotations.json} and
root/trimmed_videos/ID.mp4, or ID_K.mp4 where the film ID has several parts, K counted from 1. A line of a composition
is `trimmed_videos/FILE BEHAVIOUR GENUS` between spaces, both numbers from 0: the official split of the compositional
task [L: the authors' loader; another reader's comment has the two the other way round and is wrong]. A trimmed film
that is not there is cut out of root/full_videos/ID.mp4 by its segment, the K-th of the film's annotations (seconds)
[that they count alike was not seen]. No file of the data was seen: layout not verified.

A class is a genus. Pictures are frames of the films, `dataset.frames_per_second` of them (fieldmark/formats/clips.py).
A group is the whole film, whose id has 11 characters: its parts show one animal, or its kin, in one place. Order and
family of a genus are what most of its films are annotated with (`taxnomy`, so spelled), the family its superclass;
common names of its species are other names of it. Of behaviours, index.attributes has per genus the per cent of its
training films that show each (behaviour::NAME), as CUB's attributes are. detection_annotations.json may be missing:
then there are no ranks, and no segments.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fieldmark.annotations import fields, look_up, root_of
from fieldmark.command import UserError, name_some
from fieldmark.formats.clips import numbers_within
from fieldmark.formats.manifest import inside
from fieldmark.listing import SPLITS, Listing, Row, merge_classes, read_class_table, read_lines
from fieldmark.params import Dataset
from fieldmark.pictures.clips import MAX_SECONDS, frame_path, length_of
from fieldmark.pictures.files import BadImage

GENERA, BEHAVIOURS = 173, 12
ANNOTATIONS = "annotation/detection_annotations.json"
# The id of a film on YouTube, and which part of it a trimmed one is.
STEM = re.compile(r"(.{11})(?:_(\d+))?")
RANKS = ("order", "family")
COMMON = ("common_name", "common name", "commonname", "vernacular_name", "vernacular name")


def read(dataset: Dataset) -> Listing:
    """List the frames of all films that the compositions name. Raises UserError naming the file that cannot stand."""
    root = root_of(dataset.root, "annotation/genus_to_id.txt")
    genera, behaviours = (numbered(root / f"annotation/{name}_to_id.txt") for name in ("genus", "behavior"))
    annotated = read_annotations(root / ANNOTATIONS)
    listing = Listing([])
    gone: list[str] = []
    shown: dict[str, list[str]] = defaultdict(list)
    films: dict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        path = root / f"annotation/composition/{split}.csv"
        for file, behaviour, genus in fields(path, 3):
            clip, name = inside(file, str(path)), look_up(genera, genus, root / "annotation/genus_to_id.txt")
            doing = look_up(behaviours, behaviour, root / "annotation/behavior_to_id.txt")
            found = STEM.fullmatch(PurePosixPath(clip).stem)
            film, part = (found[1], int(found[2] or 1)) if found else (PurePosixPath(clip).stem, 1)
            films[name].add(film)
            if split == "train":
                shown[name].append(doing)
            about = {"name": name, "split": split, "group": film}
            whole, segment = f"full_videos/{film}.mp4", segment_of(annotated.get(film), part)
            if not (root / clip).is_file() and (root / whole).is_file() and segment is not None:
                paths = frames(root, whole, dataset.frames_per_second, *segment)
            else:
                paths = frames(root, clip, dataset.frames_per_second)
                gone += [] if (root / clip).is_file() else [clip]
            listing.images += [{"path": each, **about} for each in paths]
    if not listing.images:
        raise UserError(f"{root / 'annotation/composition'}: names no film; take the annotation of the data set again")
    listing.images = without_shared(listing, root)
    listing.attributes = [
        {"class_id": name, "attribute": f"behaviour::{each}", "value": f"{100 * of.count(each) / len(of):.4g}"}
        for name, of in sorted(shown.items())
        for each in behaviours.values()
    ]
    for what, count, published in (("genera", len(films), GENERA), ("behaviours", len(behaviours), BEHAVIOURS)):
        if count != published:
            listing.warnings.append(f"{root}: lists {count} of {published} {what} that the data set was published with")
    if gone:
        said = f"{len(gone)} films that are listed are not there"
        listing.warnings.append(f"{root}: {said}: {name_some(gone)}; unpack trimmed_videos, or full_videos, again")
    described = [describe(name, [annotated.get(film) for film in sorted(films[name])]) for name in sorted(films)]
    listing.classes = merge_classes(described, read_class_table(root))
    return listing


def without_shared(listing: Listing, root: Path) -> list[Row]:
    """The rows, sorted, without frames that two lines claim: of two parts that touch, or of a film named twice."""
    rows = sorted(listing.images, key=lambda row: (row["path"], -SPLITS.index(row["split"])))
    kept = {row["path"]: row for row in reversed(rows)}
    if len(kept) < len(rows):
        said = f"{len(rows) - len(kept)} frames are of two lines of the compositions, and are taken once"
        listing.warnings.append(f"{root}: {said}, for test before val before train")
    return sorted(kept.values(), key=lambda row: str(row["path"]))


def numbered(path: Path) -> dict[str, str]:
    """The names of a list of `name<TAB>number`, by number."""
    found: dict[str, str] = {}
    for line in read_lines(path):
        name, tab, number = line.rstrip().rpartition("\t")
        if not tab or not number.strip().isdigit() or not name.strip() or number.strip() in found:
            raise UserError(f"{path}: {line[:80]!r} is not a name, a tab and a number of its own; take the file again")
        found[number.strip()] = name.strip()
    return found


def read_annotations(path: Path) -> dict[str, Any]:
    """What is known of each film by its id; nothing where the file is not there."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path, or the data set") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); take it from the data set again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no table of films by their ids; take it from the data set again")
    return found


def segment_of(film: Any, part: int) -> tuple[float, float] | None:
    """Start and end in seconds of an annotated part of a film, counted from 1; None where it has no such."""
    try:
        start, end = (float(side) for side in film["annotations"][part - 1]["segment"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return (start, end) if part > 0 and 0 <= start < end <= MAX_SECONDS else None


def frames(root: Path, clip: str, rate: float, start: float | None = None, end: float | None = None) -> Iterable[str]:
    """The paths of the frames of a film or of a part of it; the first alone of one that cannot be read."""
    try:
        return [frame_path(clip, rate, each) for each in numbers_within(length_of(root / clip), rate, start, end)]
    except BadImage:
        return [frame_path(clip, rate, 0)]


def taxa(film: Any) -> Iterator[dict[str, str]]:
    """What a film is annotated with, a dict of ranks an animal; ranks that stand one by one are of one animal."""
    entries = film.get("taxnomy") or [] if isinstance(film, dict) else []
    found = [
        {str(rank).lower(): str(name).strip() for rank, name in entry.items() if isinstance(name, str)}
        for entry in (entries if isinstance(entries, list) else [entries])
        if isinstance(entry, dict)
    ]
    if len(found) > 1 and all(len(entry) == 1 for entry in found):
        found = [{rank: name for entry in found for rank, name in entry.items()}]
    yield from found


def describe(genus: str, annotated: Iterable[Any]) -> Row:
    """The row of a genus: what most of its films say of its order and family, and what its species are called."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for film in annotated:
        for taxon in taxa(film):
            if taxon.get("genus", genus).casefold() == genus.casefold():
                for rank in (*RANKS, *COMMON):
                    if taxon.get(rank):
                        said["common" if rank in COMMON else rank][taxon[rank]] += 1
    ranks = [max(sorted(said[rank]), key=said[rank].__getitem__).capitalize() for rank in RANKS if said[rank]]
    name = genus[:1].upper() + genus[1:]
    return {
        "class_id": genus, "name": name, "scientific_name": name,
        "superclass": ranks[-1] if said["family"] else None, "lineage": ranks or None,
        "aliases": sorted(said["common"]) or None,
    }  # fmt: skip
