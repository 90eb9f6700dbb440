"""What embed_tokens stored of the deepest layer of an image tower, before the projection: cells, CLS, rollout.

Where cells are more than memory holds they stay on the disk, and so they do where some of the images are taken alone.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import bucket_path, iterate_groups, read_buckets
from training.data.arrays import Arrays, Zeros
from training.data.part import Part
from training.data.rows import EncoderFiles, column, flat

SCHEMA = "embed.tokens/1"
# What to write in params.yaml so that embed_tokens stores a column.
REMEDIES = {
    "cls": "only a tower with a CLS token has one: read `tokens` or `pooled`",
    "rollout": "set tokens.{encoder}.rollout to true, with -2 among the layers",
}


class Layer(NamedTuple):
    """One of the layers that embed_tokens stored."""

    number: int
    grid: tuple[int, int]  # h, w


@dataclass(frozen=True)
class Tokens(Part):
    """A batch has `tokens` (B, T, d) float32, row by row of a grid, and `token_grid`, its (h, w) with T = h w."""

    provides: ClassVar[frozenset[str]] = frozenset({"tokens"})
    shows: ClassVar[tuple[str, ...]] = ("tokens", "token_grid")

    cells: Tensor  # (rows, T, d) float16
    places: Tensor  # (n V,) int64: which row of `cells` is whose
    grid: tuple[int, int]  # h, w

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"embed/{encoder}/tokens": SCHEMA}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        cells, grid = kept_column(source, "vectors")
        cells = cells.reshape(len(cells), grid[0] * grid[1], -1)
        return cls(torch.from_numpy(cells), torch.arange(len(cells)), grid)

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        places = self.places[rows.to(self.places.device)].to(self.cells.device)
        return {"tokens": self.cells.index_select(0, places), "token_grid": torch.tensor(self.grid)}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return replace(self, places=self.places[rows])


@dataclass(frozen=True)
class Cls(Part):
    provides: ClassVar[frozenset[str]] = frozenset({"cls"})
    shows: ClassVar[tuple[str, ...]] = ("cls",)

    cls: Tensor  # (n V, d) float16; a batch has float32 (B, d)

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Tokens.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        return cls(torch.from_numpy(kept_column(source, "cls")[0]))


@dataclass(frozen=True)
class Rollout(Part):
    """How much of each cell has reached CLS, head by head (fieldmark/encoders/layers.py), of the layer that has it."""

    provides: ClassVar[frozenset[str]] = frozenset({"rollout"})
    shows: ClassVar[tuple[str, ...]] = ("rollout",)

    rollout: Tensor  # (n V, heads, T) float16; a batch has float32 (B, heads, T)

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Tokens.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        values, (height, width) = kept_column(source, "rollout")
        return cls(torch.from_numpy(values.reshape(len(values), -1, height * width)))


def kept_column(source: EncoderFiles, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """(n V, numbers) float16 of the deepest layer that has this column, and the layer's grid (h, w)."""
    folder = source.folder / f"embed/{source.encoder}/tokens"
    kept = source.keep(name, [folder], partial(read_column, source, folder, name))
    height, width = kept["grid"].tolist()
    return kept["values"], (height, width)


def read_column(source: EncoderFiles, folder: Path, name: str, zeros: Zeros) -> Arrays:
    """`values` and `grid` of kept_column: one row group at a time beside them in memory."""
    rows = source.rows
    layer = deepest_layer(folder, source, name)
    wanted = (pc.field("layer") == layer.number) & pc.field(name).is_valid()
    values: np.ndarray | None = None
    present = np.zeros(rows.count, dtype=bool)
    for bucket in range(source.buckets):
        path = bucket_path(folder, bucket)
        for group in iterate_groups(path, SCHEMA, ["image_id", "view", "layer", name]):
            table, row = rows.place(group.filter(wanted), path)
            numbers, lengths = flat(table[name])
            if values is None and len(row):
                values = zeros((rows.count, int(lengths[0])))
            if values is None:
                continue
            if (lengths != values.shape[1]).any():
                raise unlike(path, layer.number)
            values[row] = numbers.reshape(len(row), values.shape[1])
            present[row] = True
    rows.require(present, folder, "embed_tokens")
    assert values is not None
    return {"values": values, "grid": np.array(layer.grid)}


def deepest_layer(folder: Path, source: EncoderFiles, name: str) -> Layer:
    """The deepest layer that has a column. Raises UserError where none has, or where its maps differ in size."""
    # Every layer has vectors, and they are not read to learn that.
    optional = [name] if name in REMEDIES else []
    table = read_buckets(folder, SCHEMA, source.buckets, ["layer", "grid_h", "grid_w", *optional])
    for each in optional:
        table = table.filter(pc.is_valid(table[each]))
        if not table.num_rows:
            raise UserError(f"{folder}: holds no {each}; {REMEDIES[each].format(encoder=source.encoder)}")
    number = int(column(table, "layer").max())
    table = table.filter(pc.field("layer") == number)
    grids = {(int(h), int(w)) for h, w in zip(column(table, "grid_h"), column(table, "grid_w"), strict=True)}
    if len(grids) > 1:
        raise unlike(folder, number)
    return Layer(number, *grids)


def unlike(path: Path, number: int) -> UserError:
    return UserError(f"{path}: maps of layer {number} differ in size; run embed_tokens again (dvc repro)")
