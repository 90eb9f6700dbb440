"""Say what each node of each image shows, in concepts, and which nodes and concepts are worth a closer look.

Reads   data/embed/NAME/images/ and text.parquet (the encoder's scale), data/bank/NAME.parquet; `labels` of params.yaml.
        Where labels lean on training images (mode splice, density gaga or product) or on boxes of objects,
        data/index/images.parquet too; density pixel: data/thumbs/.
Writes  data/labels/NAME/bNNN.parquet (labels/1).
Costs   softmax: one matrix product of all nodes with the kept concepts, seconds for ten thousand images. splice: some
        0.2 ms a node and core. gaga: k-means over training nodes first, half a minute for 200 classes. pixel: some
        1 ms an image and 0.02 ms a box.

What is stored, and by which equations, stands in fieldmark/labels/labelling.py.

    python -m stages.label_patches --encoder reef
    python -m stages.label_patches --encoder reef --engine ray
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from fieldmark import cluster, store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.labels.labelling import (
    Labelled,
    Reference,
    label_images,
    leans_on_images,
    object_boxes,
    object_share,
    read_reference,
)
from fieldmark.labels.pixels import pixel_density
from fieldmark.labels.splits import read_split
from fieldmark.params import Labels, Params, load_params
from fieldmark.pictures.cuts import MARK

INDEX = Path("data/index/images.parquet")
EMBED = Path("data/embed")
BANK = Path("data/bank")
LABELS = Path("data/labels")
THUMBS = Path("data/thumbs")
SCHEMA = "labels/1"


def label(
    table: pa.Table,
    concepts: Tensor,
    numbers: np.ndarray,
    scale: float,
    settings: Labels,
    reference: Reference,
    index: pa.Table | None = None,
    thumbs: pa.Table | None = None,
) -> pa.Table:
    """The labels rows of a bucket's nodes; `numbers` (M,) are the concept_idx of `concepts` (M, D).

    `reference` is read_reference's, `index` has image_id and box where `settings.inside_object` asks for them, and
    `thumbs` image_id and webp where density is of pixels.
    """
    if len(table) == 0:
        return store.arrow_schema(SCHEMA).empty_table()
    keys = table.select(["image_id", "view", "node"])
    vectors = torch.from_numpy(store.vectors_of(table).astype(np.float32))
    corners = np.stack([table.column(name).to_numpy() for name in ("x0", "y0", "x1", "y1")], axis=1)
    # A view's nodes stand together and begin with node 0; every view of an encoder has the same number of them.
    starts = np.flatnonzero(table.column("node").to_numpy() == 0)
    size = len(table) // len(starts)
    if not np.array_equal(starts, np.arange(len(starts)) * size) or len(starts) * size != len(table):
        raise UserError("data/embed: views of one encoder differ in their nodes; run embed_images again")
    share = np.ones(len(table), dtype=np.float32)
    if index is not None:
        share = object_share(corners, object_boxes(table.column("image_id"), index))
    pixels = None
    if thumbs is not None:
        image_ids = table.column("image_id").take(starts).to_pylist()
        pixels = torch.from_numpy(pixel_density(thumbs, image_ids, corners.reshape(-1, size, 4)))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Labelled._fields}
    by_view = (len(starts), size, -1)
    for _, labelled in label_images(
        vectors.view(by_view), torch.from_numpy((corners[:, :2] + corners[:, 2:]) / 2).view(by_view),
        concepts, scale, settings, reference, torch.from_numpy(share).view(by_view[:2]), pixels,
    ):  # fmt: skip
        for name, found in labelled._asdict().items():
            parts[name].append(found.numpy())
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return pa.table({
        **{name: keys.column(name) for name in keys.column_names},
        "concept_idx": list_column(numbers[columns["idx"]].astype(np.int32).reshape(len(table), -1)),
        "concept_weight": list_column(columns["weight"].astype(np.float16).reshape(len(table), -1)),
        "entropy": columns["entropy"].astype(np.float32).reshape(-1),
        "density": columns["density"].astype(np.float32).reshape(-1),
        "selected": columns["selected"].reshape(-1),
        "ring_gains": first_node_column(columns["gains"].astype(np.float32), size),
        "selected_concepts": first_node_column(numbers[columns["shown"]].astype(np.int32), size),
    })


def list_column(values: np.ndarray) -> pa.Array:
    """A (n, k) array as a column of n lists of k."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def first_node_column(values: np.ndarray, size: int) -> pa.Array:
    """A (views, k) array as a column of lists of k on the first of each view's `size` nodes, null on the others."""
    row = np.arange(len(values) * size)
    return list_column(values).take(pa.array(row // size, mask=row % size > 0))


def reads_index(settings: Labels) -> bool:
    """Whether labels depend on which images train, or on boxes of objects."""
    return leans_on_images(settings) or settings.inside_object


class Labelling(NamedTuple):
    """What the nodes of one encoder are labelled with."""

    concepts: Tensor  # (M, D): those that are kept
    numbers: np.ndarray  # (M,): their concept_idx
    scale: float
    settings: Labels
    reference: Reference
    boxes: pa.Table | None  # image_id and box of the index, with `settings.inside_object`
    made_by: dict[str, Any]

    def label(self, table: pa.Table, thumbs: pa.Table | None = None) -> pa.Table:
        """`label` of a bucket's nodes."""
        return label(table, *self[:-1], thumbs)


def read_labelling(name: str, params: Params) -> Labelling:
    """What `labels` asks for, read. Raises UserError where the bank was made from other embeddings than are there."""
    params.encoder(name)
    buckets, settings = params.dataset.buckets, params.labels
    images, bank_path = EMBED / name / "images", BANK / f"{name}.parquet"
    embed_mark = store.read_folder_header(images, "embed.nodes/1", buckets).fingerprint
    bank_header = store.read_header(bank_path, "bank/1")
    if bank_header.params["embed"] != embed_mark:
        raise UserError(f"{bank_path}: was selected on other embeddings than {images} holds; run select_concepts again")
    text_header = store.read_header(EMBED / name / "text.parquet", "embed.text/1")
    bank = store.read_table(bank_path, "bank/1", ["concept_idx", "vector", "kept"]).filter(pc.field("kept"))
    made_by = {**settings.model_dump(), "embed": embed_mark, "bank": bank_header.fingerprint}
    if reads_index(settings):
        made_by["index"] = store.read_header(INDEX, "index.images/1").fingerprint
    if settings.density == "pixel":
        made_by["thumbs"] = store.read_folder_header(THUMBS, "thumbs/1", buckets).fingerprint
    train = read_split(INDEX, "train") if leans_on_images(settings) else {}
    boxes = read_objects() if settings.inside_object else None
    return Labelling(
        concepts=torch.from_numpy(store.vectors_of(bank).astype(np.float32)),
        numbers=bank.column("concept_idx").to_numpy(),
        scale=text_header.params["logit_scale"],
        settings=settings,
        reference=read_reference(images, train, buckets, settings),
        boxes=boxes,
        made_by=made_by,
    )


def read_objects() -> pa.Table:
    """The usable images with the boxes of their objects; not those that are a box of a file, in which none is known."""
    table = store.read_table(INDEX, "index.images/1", ["image_id", "path", "box", "status"])
    cut = pc.match_substring_regex(table.column("path"), MARK)
    return table.filter(pc.and_(pc.equal(table.column("status"), "ok"), pc.invert(cut)))


def label_buckets(name: str, params: Params, labelling: Labelling) -> Callable[[int], cluster.Bucket]:
    """What is done with a bucket of an encoder."""
    mark = store.fingerprint(SCHEMA, labelling.made_by)
    images, folder = EMBED / name / "images", LABELS / name
    columns = ["image_id", "view", "node", "x0", "y0", "x1", "y1", "vector"]
    by_pixels = params.labels.density == "pixel"

    def label_bucket(bucket: int) -> cluster.Bucket:
        nodes = store.read_table(store.bucket_path(images, bucket), "embed.nodes/1", columns)
        thumbs = store.read_table(store.bucket_path(THUMBS, bucket), "thumbs/1") if by_pixels else None
        labels = labelling.label(nodes, thumbs)
        store.write_table(labels, store.bucket_path(folder, bucket), SCHEMA, labelling.made_by, mark)
        images_there = pc.count_distinct(nodes.column("image_id")).as_py()
        return cluster.Bucket(images_there, images_there)

    return label_bucket


def open_buckets(arguments: Namespace, params: Params) -> Callable[[int], cluster.Bucket]:
    """What a worker of a cluster does with a bucket."""
    return label_buckets(arguments.encoder, params, read_labelling(arguments.encoder, params))


def main() -> None:
    arguments = cluster.add_bucket_engine(encoder_parser(__doc__)).parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    buckets, folder = params.dataset.buckets, LABELS / arguments.encoder
    if cluster.on_cluster(arguments):
        cluster.run_buckets(cluster.Job("stages.label_patches", "open_buckets", arguments, params), [folder])
        return
    labelling = read_labelling(arguments.encoder, params)
    label_bucket = label_buckets(arguments.encoder, params, labelling)
    for bucket in tqdm(range(buckets), desc=f"label {arguments.encoder}", unit="bucket"):
        label_bucket(bucket)
    store.remove_strays(folder, buckets)
    print(f"{folder}: nodes labelled with {len(labelling.concepts)} concepts, by {labelling.settings.mode}")


if __name__ == "__main__":
    run(main)
