"""The patch graphs of one encoder or tower: a folder of safetensors files, from which PyG's `Data` objects are cut.

OUT holds dataset.json (encoder, view, classes, names, splits, kinds, fingerprints, params) and a file bNNN.safetensors
a bucket. A file holds the graphs of its n images, sorted by image_id, one behind another: M nodes and E edges in all.
  x          (M, D) float16, the vectors of the nodes, of unit length
  pos        (M, 2) float32, the centres of their boxes, x and y in [0,1] of the full image
  kind       (M,) int8, positions in `kinds`
  edge_index (2, E) int16, the nodes that an edge starts from and leads to, counted from 0 in each graph
  edge_attr  (E, 2) float16, spatial and semantic weight
  node_ptr   (n + 1,) int64: graph i has the nodes node_ptr[i] .. node_ptr[i + 1]
  edge_ptr   (n + 1,) int64, alike
  y          (n,) int64, positions in `classes`, those of the trainer
  split      (n,) int8, positions in `splits`
  image_id   (n, 32) uint8, the sha256 of each file

PyG keeps data sets by `torch.save`, which is pickle, and its own loader falls back to one that runs what the file says.
A file that people share must not run code, so these are tensors alone; tools/exports/pyg.py reads them, a graph at a
time. Memory: some copies of one bucket.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from safetensors.numpy import save_file
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.listing import SPLITS
from tools.exports.embeddings import KINDS, Exported, by_bucket, read_nodes
from tools.exports.index import check_folder

GRAPHS = "graphs/1"
SCHEMA = "export.graphs/1"
Arrays = dict[str, np.ndarray]


def graphs_folder(source: Exported) -> Path:
    """Where the graphs of these nodes lie. Raises UserError where they are missing, or were made of other nodes."""
    folder = source.data / "graphs" / source.about["encoder"]
    header = store.read_folder_header(folder, GRAPHS, source.buckets)
    if header.params["embed"] != source.about["fingerprints"][str(source.folder)]:
        raise UserError(f"{folder}: was made from other embeddings; run build_graphs again (dvc repro)")
    return folder


def read_graphs(source: Exported) -> Iterator[Arrays]:
    """The arrays of each bucket. Raises UserError where a graph is missing."""
    folder = graphs_folder(source)
    rows = {row["image_id"]: row for row in source.images}
    for bucket, image_ids in enumerate(by_bucket(source)):
        nodes = read_nodes(source, bucket, image_ids)
        images = [nodes[image_id] for image_id in image_ids]
        path = store.bucket_path(folder, bucket)
        table = store.read_images(path, GRAPHS, image_ids)
        table = table.filter(pc.equal(table.column("view"), source.view)).sort_by("image_id").combine_chunks()
        if table.column("image_id").to_pylist() != image_ids:
            raise UserError(f"{path}: lacks an image (view {source.view}); run build_graphs again (dvc repro)")
        flat = {name: pc.list_flatten(table.column(name)).to_numpy() for name in ("src", "dst", "spatial", "semantic")}
        boxes = stack([image.boxes for image in images], (0, 4), np.float32)
        kinds = [KINDS.index(kind) for image in images for kind in image.kinds]
        digests = b"".join(map(bytes.fromhex, image_ids))
        yield {
            "x": stack([image.vectors for image in images], (0, source.dimension), np.float16),
            "pos": (boxes[:, :2] + boxes[:, 2:]) / 2,
            "kind": np.array(kinds, dtype=np.int8),
            "edge_index": np.stack([flat["src"], flat["dst"]]),
            "edge_attr": np.stack([flat["spatial"], flat["semantic"]], axis=1),
            "node_ptr": ends([len(image.kinds) for image in images]),
            "edge_ptr": ends(pc.list_value_length(table.column("src")).to_pylist()),
            "y": np.array([rows[image_id]["y"] for image_id in image_ids], dtype=np.int64),
            "split": np.array([SPLITS.index(rows[image_id]["split"]) for image_id in image_ids], dtype=np.int8),
            "image_id": np.frombuffer(bytearray(digests), dtype=np.uint8).reshape(-1, 32),
        }


def stack(arrays: list[np.ndarray], empty: tuple[int, ...], kind: type) -> np.ndarray:
    """The arrays one behind another, or one of the shape `empty` where there is none."""
    return np.concatenate([np.zeros(empty, dtype=kind), *arrays])


def ends(counts: list[int]) -> np.ndarray:
    """Where each of these many items begins, and where the last one ends."""
    return np.cumsum([0, *counts], dtype=np.int64)


def write_graphs(source: Exported, out: Path) -> None:
    names = [f"b{bucket:03d}.safetensors" for bucket in range(source.buckets)]
    check_folder(out, [*names, "dataset.json"])
    bar = tqdm(read_graphs(source), desc="export", unit="bucket", total=source.buckets)
    for name, arrays in zip(names, bar, strict=True):
        store.write_atomic(out / name, partial(save_file, arrays))
    about = {**source.about, "schema": SCHEMA, "images": len(source.images), "files": names}
    store.write_text(out / "dataset.json", store.canonical_json(about) + "\n")
