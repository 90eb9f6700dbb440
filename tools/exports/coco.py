"""What a run predicts as COCO files, which pycocotools, FiftyOne and LightlyStudio open.

OUT is a folder of three JSON files over the same images and categories:
  truth.json        COCO instances: images, categories, licenses, and an annotation an image with its own class; where
                    the data set marks parts, these are the annotation's keypoints
  predictions.json  the same with the class that the run holds most probable, and `score`, its probability
  results.json      these annotations alone, the list that pycocotools' loadRes takes
Of new pictures there is no truth.json.

The run says what is in a picture and not where. So the box of an annotation is that of the object where the data set
has it, else the whole picture, in truth and prediction alike: average precision of these files judges names, never
places. An image's id is its place among all usable images by path, a category's that of its class, both from 1: files
of two splits or runs have the same ids. A picture that is a box of a file (`FILE#ID`) is an image of its own here, of
that name and of the size of the box. Memory: an image's row in JSON, about 1 kB.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.pictures.cuts import object_of
from tools.exports.index import Index, Row, check_folder, unique_names
from tools.exports.predictions import Said, Source

NAMES = ("truth.json", "predictions.json", "results.json")
COLUMNS = ("width", "height", "box", "captured_at", "licence")
NOT_MARKED, HIDDEN, SEEN = 0, 1, 2  # COCO's v of a keypoint


def box_of(image: Row) -> list[float]:
    """x, y, width and height in pixels: of the object where the index has it, else of the picture."""
    x0, y0, x1, y1 = object_of(image["path"], image["box"]) or (0, 0, 1, 1)
    width, height = image["width"], image["height"]
    return [round(side, 2) for side in (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)]


def read_parts(data: Path, paths: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Row]]]:
    """The names of all parts, and those of each of these images by name."""
    table = store.read_table(data / "index/parts.parquet", "index.parts/1", ["path", "part", "x", "y", "visible"])
    names = sorted(table.column("part").unique().to_pylist())
    found: dict[str, dict[str, Row]] = {}
    for row in table.filter(pc.is_in(table.column("path"), pa.array(paths, pa.string()))).to_pylist():
        found.setdefault(row["path"], {})[row["part"]] = row
    return names, found


def keypoints_of(image: Row, names: Sequence[str], parts: dict[str, Row]) -> dict[str, Any]:
    """COCO's x, y, v of each part, one behind another, and how many are marked."""
    points: list[float] = []
    marked = 0
    for name in names:
        part = parts.get(name)
        if part is None or part["x"] is None or part["y"] is None:
            points += [0, 0, NOT_MARKED]
        else:
            place = [round(part["x"] * image["width"], 2), round(part["y"] * image["height"], 2)]
            points += [*place, SEEN if part["visible"] else HIDDEN]
            marked += 1
    return {"keypoints": points, "num_keypoints": marked}


def describe(index: Index, said: Sequence[Said], parts: Sequence[str], source: Source) -> Row:
    """What truth and predictions share: info, licenses, categories and the images that something is said of."""
    licences = sorted({each.image["licence"] for each in said if each.image["licence"]})
    numbers = {name: number for number, name in enumerate(licences, start=1)}
    categories = [
        {
            "id": number,
            "name": name,
            "supercategory": row["superclass"] or "",
            "class_id": row["class_id"],
            **({"keypoints": list(parts), "skeleton": []} if parts else {}),
        }
        for number, (name, row) in enumerate(zip(unique_names(index.classes), index.classes, strict=True), start=1)
    ]
    images = [
        {
            "id": each.number,
            "file_name": each.image["path"],
            "width": each.image["width"],
            "height": each.image["height"],
            "license": numbers.get(each.image["licence"]),
            "date_captured": each.image["captured_at"],
            "fieldmark_image_id": each.image["image_id"],
            "split": each.split,
        }
        for each in said
    ]
    return {
        "info": {"description": str(source), "version": source.mark},
        "licenses": [{"id": number, "name": name, "url": ""} for name, number in numbers.items()],
        "categories": categories,
        "images": images,
    }


def annotation(number: int, image_number: int, category: int, box: list[float]) -> Row:
    return {
        "id": number,
        "image_id": image_number,
        "category_id": category,
        "bbox": box,
        "area": round(box[2] * box[3], 2),
        "iscrowd": 0,
    }


def write_coco(data: Path, out: Path, index: Index, source: Source, said: Sequence[Said]) -> str:
    """Write the files; truth.json where there are labels. Returns what there is to say of them."""
    known = all(each.of_label is not None for each in said)
    check_folder(out, NAMES if known else NAMES[1:])
    categories = {row["class_id"]: number for number, row in enumerate(index.classes, start=1)}
    names, parts = read_parts(data, [each.image["path"] for each in said]) if known else ([], {})
    shared = describe(index, said, names, source)
    truth, predicted = [], []
    for number, each in enumerate(said, start=1):
        box = box_of(each.image)
        if known:
            points = keypoints_of(each.image, names, parts.get(each.image["path"], {})) if names else {}
            truth.append({**annotation(number, each.number, categories[each.image["class_id"]], box), **points})
        label = annotation(number, each.number, categories[each.class_id], box)
        predicted.append({**label, "score": round(each.probability, 6)})
    results = [{key: row[key] for key in ("image_id", "category_id", "bbox", "score")} for row in predicted]
    contents = ({**shared, "annotations": truth}, {**shared, "annotations": predicted}, results)
    for name, content in list(zip(NAMES, contents, strict=True))[0 if known else 1 :]:
        store.write_text(out / name, json.dumps(content, ensure_ascii=False) + "\n")
    boxed = sum(object_of(each.image["path"], each.image["box"]) is not None for each in said)
    return f"{len(said)} images of {len(categories)} categories, {boxed} with a box of the object, {len(names)} parts"
