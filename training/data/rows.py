"""Where the lines of a table belong among the images and views of a cache, and what parts are read from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark.command import UserError
from fieldmark.store import COLUMNS, are_documents, bucket_of, bucket_path, read_buckets, sha256
from training.data.arrays import Arrays, Make, Zeros, keep

# Who writes what is read of images, by schema.
STAGES = {
    "embed.nodes/1": "embed_images", "embed.moments/1": "pool_tokens", "embed.tokens/1": "embed_tokens",
    "graphs/1": "build_graphs", "labels/1": "label_patches", "safetensors": "pool_tokens",
    "again/1": "look_again",
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

    @property
    def nodes(self) -> int:
        """N+1: nodes a view at most."""
        return self.mask.shape[1]

    @cached_property
    def mask(self) -> np.ndarray:
        """(n V, N+1) bool: the nodes that each row has."""
        return self.keep("mask", [self.nodes_folder], lambda zeros: {"mask": self.read_mask()})["mask"]

    def read_mask(self) -> np.ndarray:
        columns, folder = ["image_id", "view", "node"], self.nodes_folder
        table, row = self.rows.place(read_buckets(folder, "embed.nodes/1", self.buckets, columns), folder)
        node = column(table, "node")
        mask = np.zeros((self.rows.count, int(node.max(initial=0)) + 1), dtype=bool)
        mask[row, node] = True
        self.rows.require(mask[:, 0], folder, "embed_images")
        return mask

    def keep(self, what: str, sources: Collection[Path], make: Make) -> Arrays:
        """The arrays that `make` reads from these files and folders of buckets for the images here (arrays.py)."""
        files = [file for source in sources for file in files_in(source, self.buckets)]
        return keep([what, self.views, self.images_mark], files, make)

    @cached_property
    def images_mark(self) -> str:
        return sha256("\n".join(self.image_ids.to_pylist()))


def count_views(folder: Path, files: Mapping[str, str], buckets: int) -> int:
    """V as the first of these tables that has views says; 1 where none has. The others are held to it when placed.

    `files` are paths under `folder` and their schemas. Raises UserError where that table has no row.
    """
    for path, schema in files.items():
        if any(field.name == "view" for field in COLUMNS.get(schema, [])):
            kept = keep("views", files_in(folder / path, buckets), partial(read_views, folder / path, schema, buckets))
            if not kept["views"].size and are_documents(folder / "index/images.parquet"):
                remedy = "let runs read what is said in them (features: [descriptions])"
                raise UserError(f"{folder / path}: is of pictures, and documents have none; {remedy}")
            if not kept["views"].size:
                raise UserError(f"{folder / path}: holds no image; run {STAGES[schema]} (dvc repro)")
            return int(kept["views"].max()) + 1
    return 1


def read_views(folder: Path, schema: str, buckets: int, zeros: Zeros) -> Arrays:
    """The `views` that there are, by their numbers."""
    return {"views": np.unique(column(read_buckets(folder, schema, buckets, ["view"]), "view"))}


def files_in(source: Path, buckets: int) -> list[Path]:
    """A file, or the buckets of a folder."""
    return [source] if source.suffix else [bucket_path(source, bucket) for bucket in range(buckets)]


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a list column one behind another, and how many each line has."""
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def slots(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. length-1 for each length, one behind another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
