"""The nodes of a split's images, as the stages read them that learn something from training images.

Bucket by bucket: of all nodes in memory, only those asked for stay. View 0 alone: it is what evaluation reads.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.halves import halve


def read_split(index: Path, split: str) -> dict[str, str]:
    """The class_id of each usable image of a split, by image_id; val is in its halves, `choose` and `val`."""
    table = store.read_table(index, "index.images/1", ["path", "image_id", "class_id", "group", "split", "status"])
    of_val = split in ("choose", "val")
    own = (pc.field("status") == "ok") & (pc.field("split") == ("val" if of_val else split))
    table = table.filter(own).sort_by("path")
    # A name a class and not one an image: of a million images that is 100 MB.
    classes = table.column("class_id").combine_chunks().dictionary_encode()
    if of_val:
        groups = pc.coalesce(table.column("group"), table.column("image_id")).to_pylist()
        whole = np.full(len(table), "val", dtype="U6")
        halves = halve(whole, np.ones(len(table), dtype=bool), groups, classes.indices.to_numpy())
        kept = pa.array(halves == split)
        table, classes = table.filter(kept), classes.filter(kept)
    names = classes.dictionary.to_pylist()
    numbers = classes.indices.to_pylist()
    return {each: names[number] for each, number in zip(table["image_id"].to_pylist(), numbers, strict=True)}


def iterate_nodes(folder: Path, buckets: int, images: Mapping[str, str], columns: list[str]) -> Iterator[pa.Table]:
    """View 0 of these images in each bucket of data/embed/NAME/images: `columns`, with image_id and node among them.

    Raises UserError where a bucket has no row of an image.
    """
    split = store.split_buckets(list(images), buckets)
    absent: list[str] = []
    for bucket, wanted in enumerate(split):
        table = store.read_table(store.bucket_path(folder, bucket), "embed.nodes/1", [*columns, "view"])
        of_split = pc.is_in(pc.field("image_id"), pa.array(wanted, store.TEXT))
        table = table.filter((pc.field("view") == 0) & of_split).drop_columns("view")
        absent += sorted(set(wanted) - set(table.column("image_id").to_pylist()))
        yield table
    if absent:
        raise UserError(f"{folder}: has no row of image {absent[0]} (and {len(absent) - 1} more); run embed_images")


def read_globals(folder: Path, buckets: int, images: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Global vectors (n, D) float16, as they are stored, and class_ids (n,) of these images, by image_id."""
    ordered = sorted(images)
    # Made once: Arrow's index_in would hash all images anew for every bucket.
    place_of = {image_id: place for place, image_id in enumerate(ordered)}
    vectors = np.empty((0, 0), np.float16)
    for table in iterate_nodes(folder, buckets, images, ["image_id", "node", "vector"]):
        table = table.filter(pc.field("node") == 0)
        if not vectors.shape[1]:
            vectors = np.empty((len(ordered), table.schema.field("vector").type.list_size), np.float16)
        places = np.array([place_of[image_id] for image_id in table["image_id"].to_pylist()], dtype=np.int64)
        vectors[places] = store.vectors_of(table)
    return vectors, np.array([images[image_id] for image_id in ordered], dtype=object)


def sample_locals(
    folder: Path, buckets: int, images: Mapping[str, str], fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Local vectors (n, D) float32 and the class_ids (n,) of their images: a drawn share of these images' nodes.

    Node 0 is left out. What is drawn of a bucket depends on that bucket alone.
    """
    vectors, classes = [], []
    for bucket, table in enumerate(iterate_nodes(folder, buckets, images, ["image_id", "node", "vector"])):
        drawn = np.random.default_rng(bucket).random(len(table)) < fraction
        table = table.filter(pa.array(drawn & (table.column("node").to_numpy() > 0)))
        vectors.append(store.vectors_of(table))
        classes += [images[image_id] for image_id in table.column("image_id").to_pylist()]
    return np.concatenate(vectors).astype(np.float32), np.array(classes, dtype=object)


def count_locals(folder: Path, buckets: int, images: Mapping[str, str]) -> int:
    """How many local nodes these images have."""
    tables = iterate_nodes(folder, buckets, images, ["image_id", "node"])
    return sum(int((table.column("node").to_numpy() > 0).sum()) for table in tables)
