"""What each node of an image is: the whole picture, its object, or one of the smaller places in it."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import bucket_path, read_table
from training.data.arrays import Arrays, Zeros
from training.data.nodes import Nodes
from training.data.part import Part
from training.data.rows import EncoderFiles, column

KINDS = ("none", "global", "object", "token", "grid", "crop")  # none: where an image has fewer nodes


@dataclass(frozen=True)
class Kinds(Part):
    """The kind of every node, as its position in KINDS."""

    provides: ClassVar[frozenset[str]] = frozenset({"kinds"})
    shows: ClassVar[tuple[str, ...]] = ("kinds",)

    kinds: Tensor  # (n V, N+1) int16; a batch has int64

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Nodes.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        return cls(torch.from_numpy(source.keep("kinds", [source.nodes_folder], partial(read_kinds, source))["kinds"]))


def read_kinds(source: EncoderFiles, zeros: Zeros) -> Arrays:
    kinds = np.zeros((source.rows.count, source.nodes), dtype=np.int16)
    for bucket in range(source.buckets):
        path = bucket_path(source.nodes_folder, bucket)
        table, row = source.rows.place(read_table(path, "embed.nodes/1", ["image_id", "view", "node", "kind"]), path)
        code = pc.index_in(table["kind"], value_set=pa.array(KINDS))
        if code.null_count:
            known = ", ".join(KINDS[1:])
            raise UserError(f"{path}: holds a kind of node that is none of {known}; run embed_images again")
        kinds[row, column(table, "node")] = code.to_numpy()
    return {"kinds": kinds}
