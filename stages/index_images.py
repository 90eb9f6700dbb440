"""List every image and class of a data set: what is there, in which split, and what is broken or double.

Reads   the folder `dataset.root`: `train/CLASS/*`, `test/CLASS/*` and, if there, `val/CLASS/*`; hidden files and
        folders are passed over. Beside them may stand classes.csv (class_id, name, superclass, scientific_name, note),
        parts.csv (path, part, x0, y0, x1, y1, visible (1 or 0); in [0,1] of the image) and attributes.csv (class_id,
        attribute, value). In these class_id is the folder.
Writes  data/index/images.parquet, classes.parquet, parts.parquet, attributes.parquet, metrics.json and data/thumbs/
        (192-px WebP a picture: all that report needs of the images).
Costs   one decode an image: about 5 ms on one core at 500 px.

Byte-equal files: one is `ok` (test before val before train, then the lowest path), the others are `duplicate`; in two
classes, all are `conflict` and none is used. Without val/, val is the lowest round(f n) of a class's n training images
by sha256(seed, image_id), so that one image more moves one image at most.

    python -m stages.index_images
"""

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from stages import store
from stages.command import UserError, run, stage_parser
from stages.images import IMAGE_SUFFIXES, BadImage, dhash, map_ahead, open_rgb
from stages.params import Params, load_params

INDEX = Path("data/index")
THUMBS = Path("data/thumbs")
THUMB_PX = 192
SPLITS = ("train", "val", "test")
Row = dict[str, Any]


def class_id_of(name: str) -> str:
    """A folder-safe id that never collides: the name itself where it is one, else its slug and a hash of it."""
    if re.fullmatch(r"[a-z0-9_-]+", name):
        return name
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
    return f"{slug}-{store.sha256(name)[:8]}"


def list_folder(root: Path) -> list[Row]:
    """One row a file under root/SPLIT/CLASS/, sorted by path. Raises UserError where the layout is not that."""
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; run draw_reef first, or name your images")
    for split in ("train", "test"):
        if not (root / split).is_dir():
            layout = f"lay it out as {split}/CLASS/IMAGE"
            raise UserError(f"params.yaml: dataset.root: {root} has no folder {split}/; {layout}")
    rows = []
    for split in SPLITS:
        for path in (root / split).glob("[!.]*/[!.]*"):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                relative = path.relative_to(root).as_posix()
                rows.append({"path": relative, "folder": path.parent.name, "split": split})
    for row in rows:
        try:
            row["path"].encode()
        except UnicodeEncodeError:
            raise UserError(f"{root}: the name {row['path']!r} is not UTF-8; rename it") from None
    if not rows:
        raise UserError(f"params.yaml: dataset.root: {root} holds no image; expected {root}/train/CLASS/IMAGE")
    return sorted(rows, key=lambda row: row["path"])


def name_classes(folders: set[str]) -> dict[str, str]:
    """The class_id of each folder. Raises UserError where a folder is named as another one's id."""
    ids: dict[str, str] = {}
    for folder in sorted(folders):
        other = ids.setdefault(class_id_of(folder), folder)
        if other != folder:
            both = f"the classes {other!r} and {folder!r}"
            raise UserError(f"dataset.root: {both} have one class_id, {class_id_of(folder)}; rename one")
    return {folder: class_id for class_id, folder in ids.items()}


def hash_files(root: Path, rows: list[Row]) -> None:
    """Fill image_id, the sha256 of the bytes, or status and error of a file that cannot be read."""

    def digest(row: Row) -> None:
        try:
            with open(root / row["path"], "rb") as file:
                row["image_id"] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            row.update(image_id=None, status="broken", error=f"cannot be read: {error.strerror}")

    for _ in map_ahead(digest, rows, workers=os.cpu_count() or 1, ahead=256):
        pass


def mark_duplicates(rows: list[Row]) -> None:
    """Settle byte-equal files: fill status and duplicate_of of every row whose status is open."""
    groups = defaultdict(list)
    for row in rows:
        if row["image_id"] is not None:
            groups[row["image_id"]].append(row)
    for group in groups.values():
        if len({row["class_id"] for row in group}) > 1:
            for row in group:
                row.update(status="conflict", error="the same bytes stand under another class too")
            continue
        first, *others = sorted(group, key=lambda row: (-SPLITS.index(row["split"]), row["path"]))
        first["status"] = "ok"
        for row in others:
            row.update(status="duplicate", duplicate_of=first["path"])


def look_at(root: Path, row: Row) -> bytes | None:
    """Decode one image: fill width, height and dhash and return its thumbnail, or mark the row broken."""
    try:
        image = open_rgb(root / row["path"])
    except BadImage as error:
        row.update(status="broken", error=str(error))
        return None
    row.update(width=image.width, height=image.height, dhash=dhash(image))
    image.thumbnail((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def split_validation(rows: list[Row], fraction: float, seed: int) -> None:
    """Move round(fraction * n) of each class's usable training rows to val, the lowest by sha256(seed, image_id)."""
    by_class = defaultdict(list)
    for row in rows:
        if row["split"] == "train" and row["status"] == "ok":
            by_class[row["class_id"]].append(row)
    for members in by_class.values():
        members.sort(key=lambda row: store.sha256(f"{seed}:{row['image_id']}"))
        for row in members[: round(fraction * len(members))]:
            row["split"] = "val"


def read_side_table(root: Path, name: str, columns: list[str]) -> list[Row]:
    """The rows of a CSV beside the images, or none where there is none. Raises UserError where it is malformed."""
    path = root / name
    if not path.is_file():
        return []
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: has no column {missing[0]}; its first line must name {', '.join(columns)}")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}: line {reader.line_num} has not as many fields as the first; correct it")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV in UTF-8 ({error}); save it as that") from None
    return rows


def list_classes(folders: set[str], table: list[Row]) -> list[Row]:
    """One row a class: those with a folder of images, and those that only classes.csv names."""
    ids = name_classes(folders | {row["class_id"] for row in table})
    described = {row["class_id"]: row for row in table}
    classes = []
    for folder, class_id in ids.items():
        row = described.get(folder, {})
        classes.append({
            "class_id": class_id,
            "name": row.get("name") or folder.replace("_", " "),
            "superclass": row.get("superclass") or None,
            "scientific_name": row.get("scientific_name") or None,
            "note": row.get("note") or None,
            "lineage": None,
            "from_images": folder in folders,
        })
    return classes


def part_rows(root: Path) -> list[Row]:
    columns = ["path", "part", "x0", "y0", "x1", "y1", "visible"]
    rows = []
    for row in read_side_table(root, "parts.csv", columns):
        try:
            box = [float(row[side]) for side in ("x0", "y0", "x1", "y1")]
        except ValueError as error:
            where = f"{root / 'parts.csv'}: part {row['part']!r} of {row['path']}"
            raise UserError(f"{where}: {error}; correct it") from None
        centre = {"x": (box[0] + box[2]) / 2, "y": (box[1] + box[3]) / 2}
        rows.append({"path": row["path"], "part": row["part"], "visible": row["visible"] == "1", "box": box, **centre})
    return rows


def count_rows(rows: list[Row], classes: list[Row]) -> dict[str, Any]:
    usable = [row for row in rows if row["status"] == "ok"]
    return {
        "classes": len(classes),
        "images": {split: sum(row["split"] == split for row in usable) for split in SPLITS},
        "unused": {kind: sum(row["status"] == kind for row in rows) for kind in ("broken", "duplicate", "conflict")},
    }


def index(params: Params) -> dict[str, Any]:
    """Write every table of the index and the thumbnails; return the counts."""
    root, buckets = Path(params.dataset.root), params.dataset.buckets
    rows = list_folder(root)
    described = read_side_table(root, "classes.csv", ["class_id", "name"])
    classes = list_classes({row["folder"] for row in rows}, described)
    parts, attributes = part_rows(root), read_side_table(root, "attributes.csv", ["class_id", "attribute", "value"])
    for row in rows:
        row["class_id"] = class_id_of(row["folder"])
    for attribute in attributes:
        attribute["class_id"] = class_id_of(attribute["class_id"])
    hash_files(root, rows)
    mark_duplicates(rows)

    by_bucket: list[list[Row]] = [[] for _ in range(buckets)]
    for row in rows:
        if row["status"] == "ok":
            by_bucket[store.bucket_of(row["image_id"], buckets)].append(row)
    settings = {"px": THUMB_PX}
    mark = store.fingerprint("thumbs/1", settings)
    with tqdm(total=sum(map(len, by_bucket)), desc="index", unit="img") as progress:
        for bucket, members in enumerate(by_bucket):
            thumbs = []
            looked = map_ahead(lambda row: look_at(root, row), members, workers=os.cpu_count() or 1, ahead=64)
            for row, webp in zip(members, looked, strict=True):
                progress.update()
                if webp is not None:
                    thumbs.append({"image_id": row["image_id"], "webp": webp})
            path = store.bucket_path(THUMBS, bucket)
            store.write_table(store.make_table("thumbs/1", thumbs), path, "thumbs/1", settings, mark)
    store.remove_strays(THUMBS, buckets)

    if not any(row["split"] == "val" for row in rows):
        split_validation(rows, params.dataset.val_fraction, params.dataset.seed)
    tables = {"images": rows, "classes": classes, "parts": parts, "attributes": attributes}
    dataset = params.dataset
    made_by = {"format": dataset.format, "val_fraction": dataset.val_fraction, "seed": dataset.seed}
    for name, content in tables.items():
        schema = f"index.{name}/1"
        mark = store.fingerprint(schema, made_by)
        store.write_table(store.make_table(schema, content), INDEX / f"{name}.parquet", schema, made_by, mark)
    return count_rows(rows, classes)


def main() -> None:
    counts = index(load_params(stage_parser(__doc__).parse_args().params))

    def write_counts(path: Path) -> None:
        path.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")

    store.write_atomic(INDEX / "metrics.json", write_counts)
    images = ", ".join(f"{count} {split}" for split, count in counts["images"].items())
    unused = ", ".join(f"{count} {kind}" for kind, count in counts["unused"].items())
    print(f"{counts['classes']} classes; images: {images}; not used: {unused}")


if __name__ == "__main__":
    run(main)
