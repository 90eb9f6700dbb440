"""The embeddings of one encoder or tower in one view: a safetensors file, or a folder of WebDataset shards.

safetensors: OUT is a file of n images sorted by path, of N nodes and D dimensions each:
  vectors  (n, N, D) float16, unit length; 0 where an image has fewer nodes
  norms    (n, N) float32, the length that a vector had
  boxes    (n, N, 4) float32, x0 y0 x1 y1 in [0,1] of the full image
  kinds    (n, N) int8, positions in `kinds`; -1 where an image has fewer nodes
  y        (n,) int64, positions in `classes`, those of the trainer
  split    (n,) int8, positions in `splits`
  image_id (n, 32) uint8, the sha256 of each file
and, as metadata, one JSON text `fieldmark`: schema, encoder, view, classes (ids), names, splits, kinds, fingerprints of
what was read, params of the embeddings, and the n paths.

webdataset: OUT is a folder of tar files SPLIT-NNN.tar, one a split and bucket, and dataset.json, the JSON above without
the paths. A sample an image, sorted by image_id, which is its key:
  KEY.npy   (N, D) float16
  KEY.json  path, class_id, y, split, kinds, norms, boxes
  KEY.webp  with --thumbs: the 192-px thumbnail

Memory: some copies of one bucket, and for safetensors all that is written, 2 N D bytes an image (400 MB for 11,788
images of 33 nodes of 512).
"""

import io
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.listing import SPLITS
from fieldmark.params import NodeKind
from tools.exports.index import Row, check_file, check_folder, read_index

NODES = "embed.nodes/1"
SCHEMA = "export.embeddings/1"
KINDS = get_args(NodeKind)
BOX = ("x0", "y0", "x1", "y1")


class Exported(NamedTuple):
    """What is exported: the embeddings of one encoder in one view."""

    data: Path
    folder: Path  # of the nodes
    buckets: int
    view: int
    nodes: int  # N
    dimension: int  # D
    images: list[Row]  # the usable images, sorted by path
    about: dict[str, Any]  # what holds for all of them


class Nodes(NamedTuple):
    """The nodes of one image: vectors (N, D) float16, norms (N,), boxes (N, 4) float32 and kinds (N,)."""

    vectors: np.ndarray
    norms: np.ndarray
    boxes: np.ndarray
    kinds: list[str]


def find_source(data: Path, encoder: str, view: int, buckets: int) -> Exported:
    """Look up what there is of an encoder. Raises UserError where a file is missing or the view does not exist."""
    folder = data / "embed" / encoder / "images"
    header = store.read_folder_header(folder, NODES, buckets)
    index = read_index(data)
    views, nodes = count_nodes(folder, buckets)
    if not 0 <= view < views:
        raise UserError(f"--view {view}: {folder} holds {views} (0 is the first); raise embed.views for more")
    about = {
        "schema": SCHEMA,
        "encoder": encoder,
        "view": view,
        "classes": [row["class_id"] for row in index.classes],
        "names": [row["name"] for row in index.classes],
        "splits": SPLITS,
        "kinds": KINDS,
        "fingerprints": {str(folder): header.fingerprint, **index.fingerprints},
        "params": header.params,
    }
    return Exported(
        data, folder, buckets, view,
        nodes=nodes,
        dimension=pq.read_schema(store.bucket_path(folder, 0)).field("vector").type.list_size,
        images=index.images,
        about=about,
    )  # fmt: skip


def count_nodes(folder: Path, buckets: int) -> tuple[int, int]:
    """How many views an image has, and how many nodes a view has at most. Raises UserError where there is no image."""
    views = nodes = 0
    for bucket in range(buckets):
        keys = store.read_table(store.bucket_path(folder, bucket), NODES, ["view", "node"])
        if len(keys):
            views = max(views, pc.max(keys.column("view")).as_py() + 1)
            nodes = max(nodes, pc.max(keys.column("node")).as_py() + 1)
    if not nodes:
        raise UserError(f"{folder}: holds no image; run embed_images (dvc repro)")
    return views, nodes


def read_nodes(source: Exported, bucket: int, image_ids: list[str]) -> dict[str, Nodes]:
    """The nodes of images that belong to a bucket. Raises UserError where it lacks one."""
    path = store.bucket_path(source.folder, bucket)
    table = store.read_images(path, NODES, image_ids)
    table = table.filter(pc.equal(table.column("view"), source.view)).combine_chunks()
    vectors, norms, kinds = store.vectors_of(table), table.column("norm").to_numpy(), table.column("kind").to_pylist()
    boxes = np.stack([table.column(side).to_numpy() for side in BOX], axis=1)
    starts = np.flatnonzero(table.column("node").to_numpy() == 0)
    owners = table.column("image_id").take(pa.array(starts, pa.int64())).to_pylist()
    found = {}
    for owner, start, end in zip(owners, starts, [*starts, len(table)][1:], strict=True):
        found[owner] = Nodes(vectors[start:end], norms[start:end], boxes[start:end], kinds[start:end])
    for image_id in image_ids:
        if image_id not in found:
            raise UserError(
                f"{path}: lacks image {image_id} (view {source.view}); run embed_images again (dvc repro), or fetch the"
                " file again (dvc pull)"
            )
    return found


def by_bucket(source: Exported) -> list[list[str]]:
    return store.split_buckets([row["image_id"] for row in source.images], source.buckets)


def make_tensors(source: Exported) -> dict[str, np.ndarray]:
    """The arrays of the safetensors file, filled bucket by bucket."""
    count, nodes = len(source.images), source.nodes
    place = {row["image_id"]: number for number, row in enumerate(source.images)}
    code = {kind: number for number, kind in enumerate(KINDS)}
    vectors = np.zeros((count, nodes, source.dimension), dtype=np.float16)
    norms = np.zeros((count, nodes), dtype=np.float32)
    boxes = np.zeros((count, nodes, 4), dtype=np.float32)
    kinds = np.full((count, nodes), -1, dtype=np.int8)
    for bucket, image_ids in enumerate(tqdm(by_bucket(source), desc="export", unit="bucket")):
        for image_id, image in read_nodes(source, bucket, image_ids).items():
            row, here = place[image_id], slice(len(image.kinds))
            vectors[row, here], norms[row, here], boxes[row, here] = image.vectors, image.norms, image.boxes
            kinds[row, here] = [code[kind] for kind in image.kinds]
    digests = b"".join(bytes.fromhex(row["image_id"]) for row in source.images)
    return {
        "vectors": vectors,
        "norms": norms,
        "boxes": boxes,
        "kinds": kinds,
        "y": np.array([row["y"] for row in source.images], dtype=np.int64),
        "split": np.array([SPLITS.index(row["split"]) for row in source.images], dtype=np.int8),
        "image_id": np.frombuffer(digests, dtype=np.uint8).reshape(count, 32),
    }


def write_safetensors(source: Exported, out: Path) -> None:
    check_file(out, f"{source.about['encoder']}.safetensors")
    # One key: safetensors writes several in an order of its own, another one each time.
    about = store.canonical_json({**source.about, "paths": [row["path"] for row in source.images]})
    tensors = make_tensors(source)
    try:
        store.write_atomic(out, lambda path: save_file(tensors, path, {"fieldmark": about}))
    except SafetensorError as error:  # its header holds 100 MB: the paths of a million images
        raise UserError(f"{out}: cannot be written ({error}); free some space, or export --to webdataset") from None


def shard_name(split: str, bucket: int) -> str:
    return f"{split}-{bucket:03d}.tar"


def write_shards(source: Exported, out: Path, *, thumbs: bool) -> None:
    """Write a tar file for each split and bucket: a bucket without images of a split is a shard without samples."""
    names = {shard_name(split, bucket) for split in SPLITS for bucket in range(source.buckets)} | {"dataset.json"}
    check_folder(out, names)
    rows = {row["image_id"]: row for row in source.images}
    for bucket, image_ids in enumerate(tqdm(by_bucket(source), desc="export", unit="bucket")):
        nodes = read_nodes(source, bucket, image_ids)
        pictures = read_thumbs(source.data, bucket, image_ids) if thumbs else {}
        for split in SPLITS:
            samples = {
                image_id: make_sample(rows[image_id], nodes[image_id], pictures.get(image_id))
                for image_id in image_ids
                if rows[image_id]["split"] == split
            }
            store.write_atomic(out / shard_name(split, bucket), partial(write_tar, samples))
    about = store.canonical_json(source.about) + "\n"
    store.write_text(out / "dataset.json", about)


def read_thumbs(data: Path, bucket: int, image_ids: list[str]) -> dict[str, bytes]:
    """The WebP bytes of images that belong to a bucket. Raises UserError where it lacks one."""
    path = store.bucket_path(data / "thumbs", bucket)
    table = store.read_images(path, "thumbs/1", image_ids)
    found = dict(zip(table.column("image_id").to_pylist(), table.column("webp").to_pylist(), strict=True))
    for image_id in image_ids:
        if image_id not in found:
            raise UserError(f"{path}: lacks image {image_id}; run index_images (dvc repro), or leave --thumbs out")
    return found


def make_sample(row: Row, nodes: Nodes, thumb: bytes | None) -> dict[str, bytes]:
    """The files of one image by extension."""
    array = io.BytesIO()
    np.save(array, nodes.vectors)
    about = {
        **{name: row[name] for name in ("path", "class_id", "y", "split")},
        "kinds": nodes.kinds,
        "norms": nodes.norms.tolist(),
        "boxes": nodes.boxes.tolist(),
    }
    sample = {"npy": array.getvalue(), "json": store.canonical_json(about).encode()}
    return sample if thumb is None else {**sample, "webp": thumb}


def write_tar(samples: dict[str, dict[str, bytes]], path: Path) -> None:
    """A tar file of KEY.EXTENSION members, the files of a sample one behind another, without times or owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # its time and owner are 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
