"""The health of a data set as the report and the tables of a study tell it: counts, contamination of test, near pairs.

The numbers come from data/index/metrics.json and data/index/near_duplicates.parquet, which index_images writes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from evaluation.gallery import short
from evaluation.runs import SPLITS, Row, query, read_json
from fieldmark import store
from fieldmark.command import UserError

NEAR_PAIRS = 6  # near duplicates shown
ODD_SIZES = 3  # images shown of each kind of odd size
INDEX_AGAIN = "run `python -m stages.index_images` again (dvc repro index_images)"


class Finding(NamedTuple):
    """A number of data/index/metrics.json, or a spread (min, median and max), and how the page words it."""

    label: str
    key: str  # its place in the file, names joined by dots
    meaning: str
    alarm: bool = False  # whether anything but 0 is a fault of the data set
    spread: bool = False


# What the page's table of health shows, by subject.
HEALTH = {
    "Contaminated test images": [
        Finding(
            "near duplicate",
            "health.contaminated_test.near_duplicates",
            "a picture like it is in train or val",
            alarm=True,
        ),
        Finding("group", "health.contaminated_test.groups", "train or val has pictures of the same group", alarm=True),
        Finding("in all", "health.contaminated_test.images", "for one reason or both", alarm=True),
    ],
    "Near-duplicate pairs": [
        Finding("within a split", "health.near_duplicates.within_split", "two of one class: one picture counts twice"),
        Finding(
            "across splits",
            "health.near_duplicates.across_splits",
            "two of one class: one gives away the other",
            alarm=True,
        ),
        Finding(
            "across classes",
            "health.near_duplicates.across_classes",
            "in any split; one label may be wrong",
            alarm=True,
        ),
    ],
    "Files with equal bytes": [
        Finding("within a split", "health.byte_duplicates.within_split", "left out; an equal file is used"),
        Finding(
            "across splits", "health.byte_duplicates.across_splits", "left out; a copy in test is used, else in val"
        ),
        Finding(
            "across classes", "health.byte_duplicates.across_classes", "none is used; one label is wrong", alarm=True
        ),
    ],
    "Other files": [
        Finding("broken", "unused.broken", "cannot be read as an image; left out"),
        Finding("passed over", "health.passed_over", "no images by their name, or too deep in the folder"),
    ],
    "Groups": [
        Finding("in all", "health.groups.count", "tracks, cameras or sites that the data set names"),
        Finding("across splits", "health.groups.across_splits", "one split gives away another", alarm=True),
    ],
    "Likely sequences, of no group": [
        Finding("in all", "health.sequences.count", "frames of one thing, by names, times and near duplicates"),
        Finding(
            "across splits",
            "health.sequences.across_splits",
            "dataset.group_by: sequence keeps each in one split that is drawn",
            alarm=True,
        ),
        Finding(
            "test images", "health.sequences.test_images", "train or val has pictures of the same sequence", alarm=True
        ),
    ],
    "Classes": [
        Finding("without images", "health.classes_without.images", "no usable one in any split"),
        Finding("missing in train", "health.classes_without.train", "images, but none to learn from", alarm=True),
        Finding("missing in val", "health.classes_without.val", "nothing is chosen for them"),
        Finding("missing in test", "health.classes_without.test", "test accuracy says nothing of them"),
    ],
    "Images a class": [
        Finding(split, f"health.images_a_class.{split}", "median (fewest to most)", spread=True) for split in SPLITS
    ],
    "Pixels": [
        Finding(f"{side} side", f"health.pixels.{side}_side", "median (least to most)", spread=True)
        for side in ("shorter", "longer")
    ],
}


def read_health(path: Path, images: Mapping[str, int]) -> dict[str, float | None]:
    """By key, the numbers that HEALTH asks for, from data/index/metrics.json (`path`).

    A spread has three keys: KEY.min, KEY.median and KEY.max, each None where there was nothing to measure. `images` is
    how many usable images each split has. Raises UserError where a number is missing, or where the file counts other
    images than these.
    """
    metrics = read_json(path, INDEX_AGAIN)

    def find(key: str, kinds: tuple[type, ...] = (int,)) -> Any:
        value = metrics
        for part in key.split("."):
            value = value.get(part, "missing") if isinstance(value, dict) else "missing"
        if not isinstance(value, kinds):
            raise UserError(f"{path}: has no number {key}; {INDEX_AGAIN}")
        return value

    if any(find(f"images.{split}") != count for split, count in images.items()):
        raise UserError(f"{path}: counts other images than images.parquet beside it holds; {INDEX_AGAIN}")
    health = {}
    for finding in (finding for findings in HEALTH.values() for finding in findings):
        if finding.spread:
            keys = [f"{finding.key}.{end}" for end in ("min", "median", "max")]
            health.update({key: find(key, (int, float, NoneType)) for key in keys})
        else:
            health[finding.key] = find(finding.key)
    return health


def contamination(health: Mapping[str, float | None], test_images: int) -> Row | None:
    """How many test images train or val give away, and for which reasons; None where they give away none."""
    found = {name: health[f"health.contaminated_test.{name}"] for name in ("images", "near_duplicates", "groups")}
    if not found["images"]:
        return None
    reasons = [
        (found["near_duplicates"], "with a near duplicate in train or val"),
        (found["groups"], "of a group that train or val has too"),
    ]
    return {"images": found["images"], "of": test_images, "reasons": [reason for reason in reasons if reason[0]]}


def near_pairs(data: Path, index: pa.Table, open_test: bool) -> Row:
    """How many pairs of near duplicates there are, and the NEAR_PAIRS that most need a look.

    Pairs of a test image and one of train or val come first, then those that differ in the fewest bits, then those of
    the lowest paths. `picture` is a short image_id, None for a test image that is not opened; `image_ids` are those to
    show. Raises UserError where a pair names an image that is not usable.
    """
    path = data / "index/near_duplicates.parquet"
    pairs = store.read_table(path, "index.near_duplicates/1")
    usable = index.filter(pc.field("status") == "ok").select(["path", "image_id", "class_id", "split"])
    [(stray,)] = query(
        """SELECT min(path) FROM (SELECT path FROM pairs UNION SELECT other FROM pairs)
           WHERE path NOT IN (SELECT path FROM usable)""",
        pairs=pairs,
        usable=usable,
    )
    if stray is not None:
        raise UserError(f"{path}: names {stray!r}, no usable image of images.parquet beside it; {INDEX_AGAIN}")
    chosen = query(
        f"""SELECT bits, (a.split = 'test') <> (b.split = 'test') AS leak, a, b
            FROM pairs JOIN usable a ON pairs.path = a.path JOIN usable b ON pairs.other = b.path
            ORDER BY leak DESC, bits, a.path, b.path LIMIT {NEAR_PAIRS}""",
        pairs=pairs,
        usable=usable,
    )
    shown = [
        {"bits": bits, "leak": leak, "images": [pictured(image, open_test) for image in both]}
        for bits, leak, *both in chosen
    ]
    images = [image for pair in shown for image in pair["images"]]
    return {"count": len(pairs), "shown": shown, "image_ids": to_show(images)}


def pictured(image: Row, open_test: bool) -> Row:
    """An image with the short id of its picture; a test image has none, unless test is open."""
    closed = image["split"] == "test" and not open_test
    return {**image, "picture": None if closed else short(image["image_id"])}


def to_show(images: Iterable[Row]) -> set[str]:
    return {image["image_id"] for image in images if image["picture"] is not None}


def odd_sizes(index: pa.Table, open_test: bool) -> Row:
    """The ODD_SIZES usable images of each kind: fewest pixels, most, and the most drawn out; none where all are alike.

    `image_ids` are those whose pictures are shown.
    """
    usable = index.filter(pc.field("status") == "ok")
    kinds = {
        "smallest": "least(width, height)",
        "largest": "-greatest(width, height)",
        "most drawn out": "-greatest(width, height) / least(width, height)",
    }
    shown = {}
    for kind, measure in kinds.items():
        rows = query(
            f"""SELECT path, image_id, class_id, split, width, height FROM t
                WHERE width > 0 AND height > 0 AND (SELECT min({measure}) < max({measure}) FROM t)
                ORDER BY {measure}, path LIMIT {ODD_SIZES}""",
            t=usable,
        )
        names = ("path", "image_id", "class_id", "split", "width", "height")
        if rows:
            shown[kind] = [pictured(dict(zip(names, row, strict=True)), open_test) for row in rows]
    return {"shown": shown, "image_ids": to_show(image for images in shown.values() for image in images)}
