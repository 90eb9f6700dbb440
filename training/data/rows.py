"""Where the lines of a table belong among the images and views of a cache, and what parts are read from."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark.command import UserError
from fieldmark.store import (
    COLUMNS,
    are_documents,
    bucket_of,
    bucket_path,
    read_folder_header,
    read_table,
    sha256,
)
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
        own = table["image_id"].combine_chunks().dictionary_encode()
        image = self.positions(own.dictionary)[own.indices.to_numpy()]
        if (image < 0).any():
            table, image = table.filter(pa.array(image >= 0)), image[image >= 0]
        view = column(table, "view")
        if view.max(initial=0) >= self.views:
            raise UserError(
                f"{path}: holds view {view.max()}, and what is read beside it has {self.views} views an image; run the"
                " stages that write them again (dvc repro)"
            )
        return table, image * self.views + view

    def positions(self, image_ids: pa.Array) -> np.ndarray:
        """(m,) int64: where these stand among the images, -1 for others.

        Looked up in what was sorted once: a hash of all images for each bucket would make reading quadratic.
        """
        ordered, order = self.ordered
        asked = as_bytes(image_ids)
        at = np.searchsorted(ordered, asked).clip(max=len(ordered) - 1)
        return np.where(ordered[at] == asked, order[at], -1)

    @cached_property
    def ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """The image_ids in order, and the place of each."""
        names = as_bytes(self.image_ids)
        order = np.argsort(names)
        return names[order], order

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

    @cached_property
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
        folder = self.nodes_folder
        placed: list[tuple[np.ndarray, np.ndarray]] = []
        for table, row in self.tables(folder, "embed.nodes/1", ["image_id", "view", "node"]):
            placed.append((row, column(table, "node")))
        most = max(int(node.max(initial=0)) for _, node in placed)
        mask = np.zeros((self.rows.count, most + 1), dtype=bool)
        for row, node in placed:
            mask[row, node] = True
        self.rows.require(mask[:, 0], folder, "embed_images")
        return mask

    def tables(self, folder: Path, schema: str, columns: list[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """The lines of a folder of buckets, and the row that each belongs to: one bucket at a time is in memory."""
        read_folder_header(folder, schema, self.buckets)
        for bucket in range(self.buckets):
            path = bucket_path(folder, bucket)
            yield self.rows.place(read_table(path, schema, columns), path)

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
    read_folder_header(folder, schema, buckets)
    tables = (read_table(bucket_path(folder, bucket), schema, ["view"]) for bucket in range(buckets))
    return {"views": np.unique(np.concatenate([np.unique(column(table, "view")) for table in tables]))}


def files_in(source: Path, buckets: int) -> list[Path]:
    """A file, or the buckets of a folder."""
    return [source] if source.suffix else [bucket_path(source, bucket) for bucket in range(buckets)]


def as_bytes(names: pa.Array) -> np.ndarray:
    """(n,) fixed-width bytes, which numpy sorts and finds."""
    return np.array([name.encode() for name in names.to_pylist()], dtype=bytes)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a list column one behind another, and how many each line has."""
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def slots(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. length-1 for each length, one behind another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
