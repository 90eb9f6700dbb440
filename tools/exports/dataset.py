"""Pictures, labels, descriptions and concepts as a Parquet data set in the layout of the Hugging Face hub.

OUT is a folder: README.md, which tells the hub what is where, and data/SPLIT-NNNNN-of-NNNNN.parquet for train, val and
test, each of at most 500 MB of pictures. A row an image, sorted by image_id:
  image        struct<bytes, path>: the file as it is, and its name; null where the picture is left out
  label        int64, a position among the classes, whose names stand in the file's metadata, where `datasets` looks
  class_id, name
  description  the sentences about the image, a line each; null where there are none
  concepts     list<string>, the texts of its class that clean_concepts kept, without the names of the class
  image_id, path, width, height, box, group, captured_at, latitude, longitude, depth_m, licence: as in the index

Pictures belong to whoever took them. A picture goes in where its own licence lets anyone pass it on: a Creative Commons
licence or the public domain (`may_be_shared`). Others, and those that name none, are rows without a picture, unless
--with-images says that you may pass them on. Files go in as they are, with what their cameras wrote into them, places
too; nothing is decoded, but for a picture that is a box of a file (`FILE#ID`), which goes in as a PNG. Memory: a
hundred pictures, and the texts of the images of a file.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.listing import SPLITS
from fieldmark.pictures.cuts import image_id_of, place_of
from fieldmark.pictures.decode import BadImage, open_file, open_part
from tools.exports.index import Index, Row, check_folder, unique_names
from tools.exports.markdown import render

COLUMNS = (
    "width", "height", "box", "group", "captured_at", "latitude", "longitude", "depth_m", "licence",
)  # fmt: skip
# Rows in a row group, each with a picture: what a reader holds at once. The hub's own choice for images.
GROUP = 100
# The hub's own size of a file, and how many rows without a picture one has.
SHARD_BYTES, SHARD_ROWS = 500_000_000, 20_000
# The names under which the hub knows splits.
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
RESTORE = "restore it, or run index_images again (dvc repro)"
Texts = dict[str, list[str]]  # by class_id
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Every Creative Commons licence, NC and ND too, lets anyone pass the unchanged file on (for NC: without gain). What is
# not written like one of these is left out, so that no odd wording is taken for a permission.
FREE = r"cc[ -]?(0|zero)\b.*|creative commons zero.*|(https?://)?creativecommons\.org/publicdomain/.*|public domain.*"
BY = r"cc[ -]?by\b.*|creative commons attribution.*|(https?://)?creativecommons\.org/licenses/by.*"


def is_written(pattern: str, licence: str | None) -> bool:
    return licence is not None and re.fullmatch(pattern, licence.strip(), re.IGNORECASE) is not None


def may_be_shared(licence: str | None) -> bool:
    """Whether a licence, as a person writes it, is one of those that let anyone pass the picture on."""
    return is_written(f"{FREE}|{BY}", licence)


def schema_of(index: Index) -> pa.Schema:
    """The columns. `datasets` reads from the metadata that image is a picture and label a class; the rest it infers."""
    names = unique_names(index.classes)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return pa.schema(
        [
            ("image", IMAGE), ("label", pa.int64()), ("class_id", pa.string()), ("name", pa.string()),
            ("description", pa.string()), ("concepts", pa.list_(pa.string())), ("image_id", pa.string()),
            ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("box", pa.list_(pa.float32())),
            ("group", pa.string()), ("captured_at", pa.string()), ("latitude", pa.float64()),
            ("longitude", pa.float64()), ("depth_m", pa.float64()), ("licence", pa.string()),
        ],
        {"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=False)},
    )  # fmt: skip


def read_concepts(data: Path) -> Texts:
    """By class_id, the kept texts of a class in their order, without class names."""
    table = store.read_table(data / "concepts/concepts.parquet", "concepts/1", ["text", "class_id", "kind", "kept"])
    found: Texts = {}
    for row in table.to_pylist():
        if row["kept"] and row["kind"] != "name" and row["class_id"] is not None:
            texts = found.setdefault(row["class_id"], [])
            if row["text"] not in texts:
                texts.append(row["text"])
    return found


def read_descriptions(data: Path, image_ids: list[str]) -> dict[str, str]:
    """The sentences about each of these images, a line each."""
    table = store.read_images(data / "descriptions/descriptions.parquet", "descriptions/1", image_ids)
    found: dict[str, list[str]] = {}
    for row in table.to_pylist():
        found.setdefault(row["image_id"], []).append(row["text"])
    return {image_id: "\n".join(texts) for image_id, texts in found.items()}


def read_picture(folder: Path, image: Row) -> bytes:
    """The file of an image, or the part of it that is one. Raises UserError where it is not what was indexed."""
    path, part = place_of(folder, image["path"], image["box"])
    try:
        with open_file(path) as file:
            content = file.read()
        if image_id_of(store.sha256(content), part) != image["image_id"]:
            raise UserError(f"{path}: is not the file that was indexed; run index_images again (dvc repro)")
        if part is None:
            return content
        buffer = io.BytesIO()
        open_part(io.BytesIO(content), part)[0].save(buffer, "PNG")
        return buffer.getvalue()
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: {error}; {RESTORE}") from None


def shards(folder: Path, index: Index, *, all_pictures: bool) -> dict[str, list[Row]]:
    """The images of each file by its name, sorted by image_id: a file is full at SHARD_BYTES or SHARD_ROWS."""
    files = {}
    for split in SPLITS:
        filled: list[list[Row]] = []
        size = SHARD_BYTES
        for row in sorted((row for row in index.images if row["split"] == split), key=lambda row: row["image_id"]):
            if size >= SHARD_BYTES or len(filled[-1]) >= SHARD_ROWS:
                filled.append([])
                size = 0
            filled[-1].append(row)
            if all_pictures or may_be_shared(row["licence"]):
                size += size_of(place_of(folder, row["path"], row["box"]).file)
        for number, rows in enumerate(filled):
            files[f"data/{split}-{number:05d}-of-{len(filled):05d}.parquet"] = rows
    return files


def size_of(path: Path) -> int:
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size
    except BadImage as error:
        raise UserError(f"{path}: {error}; {RESTORE}") from None


def make_rows(
    folder: Path, index: Index, images: list[Row], concepts: Texts, descriptions: dict[str, str], *, all_pictures: bool
) -> Iterator[Row]:
    """The rows of these images; a picture is read when its row is asked for."""
    for image in images:
        shown = all_pictures or may_be_shared(image["licence"])
        yield {
            **image,
            "image": {"bytes": read_picture(folder, image), "path": Path(image["path"]).name} if shown else None,
            "label": image["y"],
            "name": index.classes[image["y"]]["name"],
            "description": descriptions.get(image["image_id"]),
            "concepts": concepts.get(image["class_id"], []),
        }


def write_rows(rows: Iterator[Row], schema: pa.Schema, path: Path) -> None:
    """A Parquet file, written row group by row group."""
    repeated = ["class_id", "name", "group", "licence", "concepts.list.element"]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated, write_page_checksum=True) as file:
        while group := list(islice(rows, GROUP)):
            file.write_table(pa.Table.from_pylist(group, schema=schema))


def card(index: Index, files: dict[str, list[Row]], held: int) -> str:
    """README.md: where the splits are, and what whoever publishes has to know."""
    splits = [split for split in SPLITS if any(name.startswith(f"data/{split}-") for name in files)]
    data_files = [{"split": HUB_SPLITS[split], "path": f"data/{split}-*"} for split in splits]
    front = {
        "task_categories": ["image-classification"],
        "tags": ["fine-grained", "fieldmark"],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    licences = Counter(row["licence"] or "none stated" for row in index.images).most_common()
    images, classes = len(index.images), len(index.classes)
    return render("dataset.jinja", front, images=images, classes=classes, held=held, licences=licences)


def write_dataset(data: Path, out: Path, folder: Path, index: Index, *, all_pictures: bool) -> str:
    """Write the folder; `folder` is where the pictures are. Returns what there is to say of it."""
    files, schema = shards(folder, index, all_pictures=all_pictures), schema_of(index)
    check_folder(out, [*files, "README.md"])
    concepts = read_concepts(data)
    for name, images in tqdm(files.items(), desc="export", unit="file"):
        descriptions = read_descriptions(data, [image["image_id"] for image in images])
        rows = make_rows(folder, index, images, concepts, descriptions, all_pictures=all_pictures)
        store.write_atomic(out / name, partial(write_rows, rows, schema))
    shared = [row for row in index.images if all_pictures or may_be_shared(row["licence"])]
    store.write_text(out / "README.md", card(index, files, len(shared)))
    said = [f"{len(index.images)} rows in {len(files)} files, {len(shared)} with their picture"]
    if len(shared) < len(index.images):
        unnamed = sum(row["licence"] is None for row in index.images)
        without = len(index.images) - len(shared)
        said.append(f"{without} without, {unnamed} of which name no licence (--with-images: you may pass them on)")
    named = sum(is_written(BY, row["licence"]) for row in shared)
    if named:
        said.append(f"{named} ask to name their author")
    return "; ".join(said)
