"""Where the lines of a table belong among the images and views of a cache, and room for large arrays."""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark.command import UserError
from fieldmark.store import COLUMNS, bucket_of, bucket_path, read_buckets, read_table

MEMORY_SHARE = 0.5  # of the machine's memory, for vectors
# Who writes what is read of images, by schema.
STAGES = {
    "embed.nodes/1": "embed_images", "embed.moments/1": "pool_tokens", "embed.tokens/1": "embed_tokens",
    "graphs/1": "build_graphs", "labels/1": "label_patches", "safetensors": "pool_tokens",
}  # fmt: skip


class Rows:
    """Where the lines of a table belong: image i in view v is row i * V + v. Lines of other images are not read."""

    def __init__(self, image_ids: pa.Array, views: int, buckets: int) -> None:
        self.image_ids, self.views, self.buckets = image_ids, views, buckets
        self.count = len(image_ids) * views

    def place(self, table: pa.Table, path: Path) -> tuple[pa.Table, np.ndarray]:
        """The table without lines of other images, and the row that each of its lines belongs to.

        Raises UserError, naming the `path` it came from, where it has views that other tables lack.
        """
        table = table.filter(pc.is_in(table["image_id"], value_set=self.image_ids))
        image, view = pc.index_in(table["image_id"], value_set=self.image_ids).to_numpy(), column(table, "view")
        if view.max(initial=0) >= self.views:
            raise UserError(
                f"{path}: holds view {view.max()}, and what is read beside it has {self.views} views an image; run the"
                " stages that write them again (dvc repro)"
            )
        return table, image.astype(np.int64) * self.views + view

    def require(self, present: np.ndarray, folder: Path, stage: str) -> None:
        """Raise UserError for the first row that is not `present`."""
        if not present.all():
            image, view = divmod(int(np.argmin(present)), self.views)
            image_id = self.image_ids[image].as_py()
            raise UserError(
                f"{bucket_path(folder, bucket_of(image_id, self.buckets))}: lacks image {image_id} (view {view});"
                f" run {stage} again (dvc repro), or fetch the file again (dvc pull)"
            )


@dataclass(frozen=True)
class EncoderFiles:
    """What parts are read from: the files of one encoder under `folder` (data/), for the images of the index."""

    folder: Path
    encoder: str
    buckets: int
    classes: list[str]
    image_ids: pa.Array  # n, in the order of the cache
    views: int  # V
    reads: frozenset[str]  # what is read of it, in the words of READS

    @property
    def nodes_folder(self) -> Path:
        return self.folder / f"embed/{self.encoder}/images"

    @property
    def rows(self) -> Rows:
        return Rows(self.image_ids, self.views, self.buckets)

    @cached_property
    def nodes(self) -> int:
        """N+1: nodes a view at most."""
        found = read_buckets(self.nodes_folder, "embed.nodes/1", self.buckets, ["node"])
        return int(column(found, "node").max(initial=0)) + 1

    @cached_property
    def mask(self) -> np.ndarray:
        """(n V, N+1) bool: the nodes that each row has."""
        mask = np.zeros((self.rows.count, self.nodes), dtype=bool)
        for bucket in range(self.buckets):
            path = bucket_path(self.nodes_folder, bucket)
            table, row = self.rows.place(read_table(path, "embed.nodes/1", ["image_id", "view", "node"]), path)
            mask[row, column(table, "node")] = True
        self.rows.require(mask[:, 0], self.nodes_folder, "embed_images")
        return mask


def count_views(folder: Path, files: Mapping[str, str], buckets: int) -> int:
    """V as the first of these tables that has views says; 1 where none has. The others are held to it when placed.

    `files` are paths under `folder` and their schemas. Raises UserError where that table has no row.
    """
    for path, schema in files.items():
        if any(field.name == "view" for field in COLUMNS.get(schema, [])):
            views = column(read_buckets(folder / path, schema, buckets, ["view"]), "view")
            if not views.size:
                raise UserError(f"{folder / path}: holds no image; run {STAGES[schema]} (dvc repro)")
            return int(views.max()) + 1
    return 1


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a list column one behind another, and how many each line has."""
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def slots(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. length-1 for each length, one behind another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def make_room(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """Zeros, float16; what is more than MEMORY_SHARE of the machine's memory lies in a file, gone with the array.

    Batches are then read from the disk of `folder`.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * math.prod(shape) <= MEMORY_SHARE * memory:
        return np.zeros(shape, dtype=np.float16)
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        return np.memmap(file, np.float16, "w+", shape=shape)
