"""List every image and class of a data set: what is there, in which split, and what is broken, double or leaking.

Reads   what `dataset.root` names, laid out as `dataset.format` says (fieldmark/formats/, a module a layout),
        and `dataset.val_list`, a file that names validation images: a path (or, in cub, a number) a line.
Writes  data/index/images.parquet, classes.parquet, parts.parquet, attributes.parquet, near_duplicates.parquet,
        links.parquet (edges that the data give), metrics.json (counts and health) and data/thumbs/ (192-px WebP a
        picture: all that report needs of the images). Warnings go to stderr, first of all where test is contaminated.
Costs   one decode an image: about 5 ms on one core at 500 px. A document of a text graph has no picture: its image_id
        is the sha256 of its text, it has neither size nor thumbnail, and all else here is as of an image.

A row is a file, or a box of one where the layout says so: its path is then `FILE#ID` and its picture what lies in the
box (fieldmark/pictures/cuts.py). Each such row is decoded by itself.

Byte-equal files: one is `ok` (test before val before train, then the lowest path), the others are `duplicate`; in two
classes, all are `conflict` and none is used. Where the data name no test images, each class's lowest round(f n) by
sha256(seed, group or image_id) are test, f `dataset.test_fraction`; where they name no validation images, the same of
its training images with `dataset.val_fraction`: one image more moves one image at most. A group stays whole, as near to
the fractions as it can, and a class keeps one image to train on at least.

Pictures taken one after the other of one thing (fieldmark/pictures/sequences.py) are named on stderr and counted in
metrics.json. With `dataset.group_by: sequence` each such sequence is a group, named by the image_id of its first
picture, and so drawn where that one is drawn: a picture more goes where its sequence is. One that comes before the
first takes the sequence with it, and one that joins two sequences moves the later one to the earlier one's split. Of
boxes, all those of the files that sequences join are one group, unless the data name groups other than files.

    python -m stages.index_images
"""

import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError, name_some, run, stage_parser
from fieldmark.formats import read_listing
from fieldmark.listing import SPLITS, Listing, Row, hint, list_classes, read_lines
from fieldmark.params import Dataset, Params, load_params
from fieldmark.pictures import health
from fieldmark.pictures.cuts import file_of, image_id_of, is_cut, part_of, place_of
from fieldmark.pictures.decode import BadImage, dhash, hash_file, map_ahead, open_file, open_place
from fieldmark.pictures.sequences import join, mark_sequences, natural, read_time, seconds

INDEX = Path("data/index")
THUMBS = Path("data/thumbs")
THUMB_PX = 192
OUTSIDE_PX = 1
# Formats whose pictures are frames of films.
OF_FILMS = ("clips", "mammalnet")


def refuse_marks(rows: list[Row], root: str) -> None:
    """Raises UserError for a path that says `FILE#ID`, a box of a file, and has no box."""
    for row in rows:
        if is_cut(row["path"]) and not row.get("box"):
            remedy = "give the row its box, or rename the file"
            raise UserError(f"{root}: {row['path']!r} names a box of a file by its `#`, and has none; {remedy}")


def hash_files(root: Path, rows: list[Row]) -> None:
    """Fill image_id, the sha256 of the bytes (and of the box: cuts.py), or status and error of an unreadable file."""

    def digest(file: Path, own: list[Row]) -> None:
        try:
            with open_file(file) as opened:
                found = hash_file(opened)
            for row in own:
                row["image_id"] = image_id_of(found, part_of(row["path"], row.get("box")))
        except BadImage as error:
            for row in own:
                row.update(image_id=None, status="broken", error=str(error))

    # Layouts list the boxes of one file together; where one does not, the file is read again.
    files = groupby(rows, key=lambda row: place_of(root, row["path"], row.get("box")).file)
    of_file = ((file, list(own)) for file, own in files)
    for _ in map_ahead(lambda each: digest(*each), of_file, workers=os.cpu_count() or 1, ahead=256):
        pass


def preference(split: str | None) -> int:
    """Which of byte-equal files is used: test before val before train before one whose split is yet to be drawn."""
    return -1 if split is None else SPLITS.index(split)


def mark_duplicates(rows: list[Row]) -> None:
    """Settle byte-equal files: fill status and duplicate_of of every row whose status is open."""
    # Most files are alone, as a number for each of them shows.
    numbers = np.fromiter((hash(row["image_id"]) for row in rows), dtype=np.int64, count=len(rows))
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    groups = defaultdict(list)
    for row, count in zip(rows, counts[places], strict=True):
        if row["image_id"] is not None:
            row["status"] = "ok"
            if count > 1:
                groups[row["image_id"]].append(row)
    for group in groups.values():
        if len({row["class_id"] for row in group}) > 1:
            for row in group:
                row.update(status="conflict", error="the same bytes stand under another class too")
            continue
        first, *others = sorted(group, key=lambda row: (-preference(row["split"]), row["path"]))
        for row in others:
            row.update(status="duplicate", duplicate_of=first["path"])


def look_at(root: Path, row: Row) -> bytes | None:
    """Decode one image: fill width, height, dhash and taken and return its thumbnail, or mark the row broken."""
    place = place_of(root, row["path"], row.get("box"))
    # Before the picture is held: metadata may take as much memory as pixels.
    taken = seconds(row.get("captured_at") or read_time(place.file))
    try:
        image, size = open_place(*place)
        check_stated(row.get("stated"), size)
    except BadImage as error:
        row.update(status="broken", error=str(error))
        return None
    row.update(width=image.width, height=image.height, dhash=dhash(image), taken=taken)
    image.thumbnail((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def check_stated(stated: tuple[int, int] | None, size: tuple[int, int]) -> None:
    """Raises BadImage where a file is of another shape than the table says that has its boxes: they lie elsewhere.

    A picture that was made smaller or larger as a whole, and rounded to whole pixels, is of the same shape.
    """
    if stated is None or abs(stated[0] * size[1] - stated[1] * size[0]) <= max(*stated, *size):
        return
    raise BadImage(f"is {size[0]} x {size[1]} pixels; the table of its boxes says {stated[0]} x {stated[1]}")


def hold_out(rows: list[Row], split: str, fraction: float, hash_of: Callable[[Row], str]) -> None:
    """Move round(fraction * n) of each class's n training images to `split`, the lowest by `hash_of` first.

    Images of one group have one hash and move together: a group goes where it brings the classes it holds closer to
    their numbers, and does not go where a class would keep no training image.
    """
    training = [row for row in rows if row["split"] == "train" and row["status"] == "ok"]
    left = Counter(row["class_id"] for row in training)
    wanted = {name: round(fraction * count) for name, count in left.items()}
    # A sha256 in hexadecimal a row; as a list of texts they would take twice as much.
    hashes = np.fromiter((hash_of(row).encode() for row in training), dtype="S64", count=len(training))
    for _, places in groupby(np.argsort(hashes, kind="stable"), key=lambda place: hashes[place]):
        unit = [training[place] for place in places]
        size = Counter(row["class_id"] for row in unit)
        gain = sum(abs(wanted[name]) - abs(wanted[name] - count) for name, count in size.items())
        if gain > 0 and all(left[name] > count for name, count in size.items()):
            for row in unit:
                row["split"] = split
            for name, count in size.items():
                wanted[name] -= count
                left[name] -= count


def name_validation(rows: list[Row], path: Path) -> None:
    """Put the images that a list names into val. Raises UserError for a line that names none, or a test image."""
    by_name = {store.nfc(row["path"]): row for row in rows} | {row["number"]: row for row in rows if "number" in row}
    for line in read_lines(path):
        row = by_name.get(store.nfc(line.strip()))
        if row is None:
            remedy = hint(line, by_name, "correct it")
            raise UserError(f"{path}: {line.strip()!r} is no image of the data set; {remedy}")
        if row["split"] == "test":
            raise UserError(f"{path}: {line.strip()!r} is a test image; val is taken from train")
        row["split"] = "val"


def group_sequences(rows: list[Row]) -> None:
    """Make a group of each sequence: of what the data name no group for, together with the one group named in it.

    A group that is a file, of the boxes in it, is no name: files that sequences join become one group.
    """
    sequences: dict[str, list[Row]] = defaultdict(list)
    of_file: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if is_cut(row["path"]) and row.get("group") == file_of(row["path"]):
            of_file[row["group"]].append(row)
        if row.get("sequence") is not None:
            sequences[row["sequence"]].append(row)
    names = list(sequences)
    places = {name: place for place, name in enumerate(names)}
    links: list[tuple[int, int]] = []
    for boxes in of_file.values():
        links += pairwise(places[row["sequence"]] for row in boxes if row.get("sequence") is not None)
    for part in join(len(names), links):
        members = [row for place in part for row in sequences[names[place]]]
        found = {row["group"] for row in members if row.get("group") is not None}
        files = sorted(found & of_file.keys())
        named = found - of_file.keys() or found
        first = min(members, key=lambda row: (natural(row["path"]), row["path"]))
        group = next(iter(named)) if len(named) == 1 else first["sequence"]
        for row in [*members, *(box for file in files for box in of_file[file])]:
            if row.get("group") is None or row["group"] in files:
                row["group"] = group


def split_rows(rows: list[Row], dataset: Dataset) -> None:
    """Settle the split of every row. Raises UserError where a split is left without an image."""

    def hash_by(salt: str) -> Callable[[Row], str]:
        return lambda row: store.sha256(f"{dataset.seed}:{salt}{row.get('group') or row['image_id']}")

    used = {row["duplicate_of"] for row in rows if row["status"] == "duplicate"}
    by_path = {row["path"]: row for row in rows if row["path"] in used}
    undecided = [row for row in rows if row["split"] is None]
    for row in undecided:
        row["split"] = "train"
    if undecided and not any(row["split"] == "test" for row in rows):
        hold_out(undecided, "test", dataset.test_fraction, hash_by("test:"))
    if not any(row["split"] == "val" for row in rows):
        hold_out(rows, "val", dataset.val_fraction, hash_by(""))
    # A copy whose split nobody named stands where the image stands that is used for it.
    for row in undecided:
        if row["status"] == "duplicate":
            row["split"] = by_path[row["duplicate_of"]]["split"]
    for split, remedy in (
        ("train", "add training images"),
        ("val", "raise dataset.val_fraction, name images in dataset.val_list, or add some"),
        ("test", "raise dataset.test_fraction, or add some"),
    ):
        if not any(row["split"] == split and row["status"] == "ok" for row in rows):
            reason = why_unused([row for row in rows if row["split"] == split], dataset.folder)
            raise UserError(f"{dataset.root}: {reason}no usable image is left for {split}; {remedy}")


def why_unused(rows: list[Row], folder: Path) -> str:
    """The commonest reason why images are not used, with the first of them, to stand before what follows from it."""
    broken = [row for row in rows if row["status"] == "broken"]
    if not broken:
        return ""
    [(error, count)] = Counter(row["error"] for row in broken).most_common(1)
    path = next(row["path"] for row in broken if row["error"] == error)
    backslash = ", with / for \\" if "\\" in path else ""
    return f"{count} of {len(rows)} images, {path!r} among them: {error} (paths start from {folder}{backslash}); "


def leave_out_imageless(classes: list[Row], dataset: Dataset) -> list[Row]:
    """The classes that are asked about and ranked: those with images, and others where dataset.without_images says so.

    A list of classes often names more than a data set has pictures of, and the inner nodes of a hierarchy.
    """
    left = [row["name"] for row in classes if not row["from_images"]]
    if not left or dataset.without_images:
        return classes
    verbs, them = ("has no image and is", "it") if len(left) == 1 else ("have no image and are", "them")
    print(
        f"{len(left)} of {len(classes)} classes {verbs} left out ({name_some(left)}); dataset.without_images: true"
        f" asks about {them} and ranks {them}, too",
        file=sys.stderr,
    )
    return [row for row in classes if row["from_images"]]


def scale_to_image(listing: Listing, root: str) -> None:
    """Boxes and part points in [0,1] of the image, where the data set has them in pixels; none where it is not used.

    What reaches out of its picture by over OUTSIDE_PX pixels is warned of: a box is cut at the border, a point is not
    visible. Raises UserError where that is so of most, and not of one alone: they belong to pictures of another size.
    """
    named = {part["path"] for part in listing.parts}
    by_path = {row["path"]: row for row in listing.images if row["path"] in named}
    listing.parts = [part for part in listing.parts if by_path[part["path"]]["status"] == "ok"]
    if not listing.in_pixels:
        return
    boxed = [row for row in listing.images if row.get("box") and row["status"] == "ok"]
    placed = [part for part in listing.parts if "x" in part]
    out = {
        "boxes": [(row["box"], row) for row in boxed if reaches_out(row["box"], row)],
        "part points": [
            ([part["x"], part["y"]], by_path[part["path"]])
            for part in placed
            if reaches_out([part["x"], part["y"]], by_path[part["path"]])
        ],
    }
    for (kind, found), count in zip(out.items(), (len(boxed), len(placed)), strict=True):
        if found:
            numbers, row = found[0]
            where = f"{' '.join(f'{number:g}' for number in numbers)} in {row['path']}"
            said = f"{len(found)} of {count} {kind} reach out of their picture, the first is {where}"
            said += f" ({row['width']} x {row['height']} pixels)"
            if 2 * len(found) > count > 1:
                remedy = "they are of pictures of another size: scale them, or use those pictures"
                raise UserError(f"{root}: {said}; {remedy}")
            listing.warnings.append(f"{said}; a box is cut at the border, a point counts as not visible")
    for part in placed:
        row = by_path[part["path"]]
        if part.get("box"):
            part["box"] = shares(part["box"], row)
        if reaches_out([part["x"], part["y"]], row):
            part.update(x=None, y=None, visible=False)
        else:
            part["x"], part["y"] = shares([part["x"], part["y"]], row)
    for row in listing.images:
        box = shares(row["box"], row) if row.get("box") and row["status"] == "ok" else None
        row["box"] = box if box is not None and box[0] < box[2] and box[1] < box[3] else None


def reaches_out(pixels: list[float], row: Row) -> bool:
    """Whether x, y, x, y, ... in pixels lie outside of an image. Some data sets count pixels from 1, some round up."""
    sides = (row["width"], row["height"])
    return any(not -OUTSIDE_PX <= value <= sides[place % 2] + OUTSIDE_PX for place, value in enumerate(pixels))


def shares(pixels: list[float], row: Row) -> list[float]:
    """x, y, x, y, ... in pixels as shares of an image's width and height, nothing outside of it."""
    sides = (row["width"], row["height"])
    return [min(max(value / sides[place % 2], 0.0), 1.0) for place, value in enumerate(pixels)]


def count_rows(rows: list[Row], classes: list[Row]) -> dict[str, Any]:
    usable = [row for row in rows if row["status"] == "ok"]
    return {
        "classes": len(classes),
        "images": {split: sum(row["split"] == split for row in usable) for split in SPLITS},
        "unused": {kind: sum(row["status"] == kind for row in rows) for kind in ("broken", "duplicate", "conflict")},
    }


def write_thumbs(folder: Path, rows: list[Row], buckets: int) -> None:
    """Look at every usable image and write its thumbnail; rows of images that cannot be decoded become `broken`."""
    by_bucket: list[list[Row]] = [[] for _ in range(buckets)]
    for row in rows:
        if row["status"] == "ok":
            by_bucket[store.bucket_of(row["image_id"], buckets)].append(row)
    settings = {"px": THUMB_PX}
    mark = store.fingerprint("thumbs/1", settings)
    with tqdm(total=sum(map(len, by_bucket)), desc="index", unit="img") as progress:
        for bucket, members in enumerate(by_bucket):
            thumbs = []
            looked = map_ahead(lambda row: look_at(folder, row), members, workers=os.cpu_count() or 1, ahead=64)
            for row, webp in zip(members, looked, strict=True):
                progress.update()
                if webp is not None:
                    thumbs.append({"image_id": row["image_id"], "webp": webp})
            path = store.bucket_path(THUMBS, bucket)
            store.write_table(store.make_table("thumbs/1", thumbs), path, "thumbs/1", settings, mark)
    store.remove_strays(THUMBS, buckets)


def index(params: Params) -> dict[str, Any]:
    """Write every table of the index and the thumbnails, warn on stderr; return the counts and the health."""
    dataset = params.dataset
    listing = read_listing(dataset)
    rows = listing.images
    for row in rows:
        try:
            row["path"].encode()
        except UnicodeEncodeError:
            raise UserError(f"{dataset.root}: the name {row['path']!r} is not UTF-8; rename it") from None
    classes = leave_out_imageless(list_classes(listing), dataset)
    for row in rows:
        row["class_id"] = store.class_id_of(row["name"])
    for attribute in listing.attributes:
        attribute["class_id"] = store.class_id_of(attribute["class_id"])
    name_validation(rows, Path(dataset.val_list))
    pictures = [] if listing.documents else rows
    refuse_marks(pictures, dataset.root)
    hash_files(dataset.folder, pictures)
    mark_duplicates(rows)
    write_thumbs(dataset.folder, pictures, dataset.buckets)
    mark_sequences(row for row in pictures if row["status"] == "ok")
    if dataset.group_by == "sequence":
        group_sequences(rows)
    split_rows(rows, dataset)
    scale_to_image(listing, dataset.root)
    found, near_duplicates = health.examine(rows, classes, listing)

    tables = {
        "index.classes/2": classes, "index.parts/1": listing.parts,
        "index.attributes/1": listing.attributes, "index.near_duplicates/1": near_duplicates,
        "index.links/1": listing.links,
    }
    made_by = {
        "format": dataset.format, "test_fraction": dataset.test_fraction, "val_fraction": dataset.val_fraction,
        "seed": dataset.seed, **({"without_images": True} if dataset.without_images else {}),
        **({"group_by": dataset.group_by} if dataset.group_by != "none" else {}),
        **({"frames_per_second": dataset.frames_per_second} if dataset.format in OF_FILMS else {}),
    }
    schema = "index.images/1"
    ordered = sorted(rows, key=lambda row: row["path"])
    store.write_rows(ordered, INDEX / "images.parquet", schema, made_by, store.fingerprint(schema, made_by))
    for schema, content in tables.items():
        path = INDEX / f"{schema.removeprefix('index.').partition('/')[0]}.parquet"
        store.write_table(store.make_table(schema, content), path, schema, made_by, store.fingerprint(schema, made_by))
    counts = {**count_rows(rows, classes), "health": found}
    for warning in [*health.warnings(found, rows, classes, listing), *listing.warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    return counts


def main() -> None:
    params = load_params(stage_parser(__doc__).parse_args().params)
    counts = index(params)
    store.write_text(INDEX / "metrics.json", json.dumps(counts, indent=2) + "\n")
    images = ", ".join(f"{count} {split}" for split, count in counts["images"].items())
    unused = ", ".join(f"{count} {kind}" for kind, count in counts["unused"].items())
    what = "documents" if params.dataset.format == "text_graph" else "images"
    print(f"{counts['classes']} classes; {what}: {images}; not used: {unused}")


if __name__ == "__main__":
    run(main)
