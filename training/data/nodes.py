"""The vectors of an image's nodes, the whole picture first; and the pictures' own vectors without the other nodes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import bucket_path, read_table, vectors_of
from training.data.arrays import Arrays, Zeros
from training.data.part import Part
from training.data.rows import EncoderFiles, column

NEAR = 0.01  # of the image's side: the boxes that two encoders have of one node differ by no more


def mean_and_max(batch: Any) -> tuple[Tensor, Tensor]:
    """Mean and maximum by dimension (B, D) over the nodes of an image that exist, the global one among them."""
    gone = ~batch.mask[..., None]
    nodes = batch.nodes.float()
    mean = nodes.masked_fill(gone, 0.0).sum(1) / batch.mask.sum(1, keepdim=True)
    return mean, nodes.masked_fill(gone, float("-inf")).amax(1)


@dataclass(frozen=True)
class Nodes(Part):
    """Node 0 is the whole picture, nodes 1..N its local ones, zero and not in `mask` where an image has fewer."""

    provides: ClassVar[frozenset[str]] = frozenset({"nodes"})
    shows: ClassVar[tuple[str, ...]] = ("nodes", "mask")
    features: ClassVar[Mapping[str, Callable[[Any], tuple[Tensor, ...]]]] = {"nodes": mean_and_max}

    nodes: Tensor  # (n V, N+1, D) float16, unit length; a batch has float32
    mask: Tensor  # (n V, N+1) bool, true for node 0

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"embed/{encoder}/images": "embed.nodes/1"}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        kept = source.keep("nodes", [source.nodes_folder], partial(read_vectors, source, False))
        return cls(torch.from_numpy(kept["vectors"]), torch.from_numpy(source.mask))

    @classmethod
    def check_beside(cls, source: EncoderFiles, other: EncoderFiles) -> None:
        check_places(source, other)


@dataclass(frozen=True)
class Globals(Part):
    """The vectors of whole pictures: node 0 alone, a small part of the memory that all nodes take."""

    provides: ClassVar[frozenset[str]] = frozenset({"globals"})
    shows: ClassVar[tuple[str, ...]] = ("g",)
    features: ClassVar[Mapping[str, Callable[[Any], tuple[Tensor, ...]]]] = {"global": lambda batch: (batch.g.float(),)}

    g: Tensor  # (n V, D) float16, unit length; a batch has float32

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Nodes.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        kept = source.keep("globals", [source.nodes_folder], partial(read_vectors, source, True))
        return cls(torch.from_numpy(kept["vectors"][:, 0]))


def read_vectors(source: EncoderFiles, global_only: bool, zeros: Zeros) -> Arrays:
    """`vectors` (n V, N+1, D) float16, or (n V, 1, D) of node 0: one bucket at a time beside it in memory."""
    rows, nodes = source.rows, 1 if global_only else source.nodes
    vectors: np.ndarray | None = None
    present = np.zeros(rows.count, dtype=bool)
    for bucket in range(source.buckets):
        path = bucket_path(source.nodes_folder, bucket)
        table = read_table(path, "embed.nodes/1", ["image_id", "view", "node", "kind", "vector"])
        if vectors is None:
            shape = (rows.count, nodes, table.schema.field("vector").type.list_size)
            vectors = zeros(shape)
        if global_only:
            table = table.filter(pc.field("node") == 0)
        table, row = rows.place(table, path)
        node = column(table, "node")
        require_global_first(path, column(table, "kind")[node == 0])
        vectors[row, node] = vectors_of(table)
        present[row[node == 0]] = True
    assert vectors is not None
    rows.require(present, source.nodes_folder, "embed_images")
    return {"vectors": vectors}


def require_global_first(path: Path, kinds: np.ndarray) -> None:
    if (kinds != "global").any():
        raise UserError(f"{path}: node 0 is not the global one; run embed_images again")


def read_boxes(source: EncoderFiles) -> np.ndarray:
    """(n V, N+1, 4) float32."""
    return source.keep("boxes", [source.nodes_folder], lambda zeros: {"boxes": place_boxes(source)})["boxes"]


def place_boxes(source: EncoderFiles) -> np.ndarray:
    rows, sides = source.rows, ("x0", "y0", "x1", "y1")
    boxes = np.zeros((rows.count, source.nodes, 4), dtype=np.float32)
    for bucket in range(source.buckets):
        path = bucket_path(source.nodes_folder, bucket)
        table, row = rows.place(read_table(path, "embed.nodes/1", ["image_id", "view", "node", *sides]), path)
        boxes[row, column(table, "node")] = np.stack([column(table, side) for side in sides], axis=1)
    return boxes


def check_places(source: EncoderFiles, other: EncoderFiles) -> None:
    """Raises UserError where two encoders' nodes are not at the same places: they could not stand side by side."""
    same = source.mask.shape == other.mask.shape and (source.mask == other.mask).all()
    if not same or not np.allclose(read_boxes(source), read_boxes(other), atol=NEAR):
        raise UserError(
            f"{other.folder / 'embed' / other.encoder}: its nodes are not those of {source.encoder}, so that they"
            " cannot stand side by side; embed both with embed.grids of the same sizes or with the same crops, and"
            " embed.tokens false"
        )
