"""What embed_tokens stored of layers of an image tower, before the projection: cells, CLS, rollout.

READS names a layer behind a slash: `tokens/4` and `cls/4` are those of layer 4, by the number that embed_tokens gave
it, and `tokens/rollout` and `cls/rollout` those of the layer that has rollout. The word alone is the deepest layer that
has the column. Where cells are more than memory holds they stay on the disk, and so they do where some of the images
are taken alone.
"""

from collections.abc import Collection, Mapping
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
from training.data.part import Part, word_of
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


class Cells(NamedTuple):
    """The cells of one layer, of all rows that the files have."""

    vectors: Tensor  # (rows, T, d) float16, row by row of a grid
    grid: tuple[int, int]  # h, w with T = h w


@dataclass(frozen=True)
class Tokens(Part):
    """A batch has under each word, `tokens` or tokens/LAYER, (B, T, d) float32, and its grid (`Fields.grid_of`)."""

    provides: ClassVar[frozenset[str]] = frozenset({"tokens"})
    named: ClassVar[str] = "tokens"
    shows: ClassVar[tuple[str, ...]] = ("tokens", "token_grid")

    layers: dict[str, Cells]  # by the word of READS
    places: Tensor  # (n V,) int64: which row of the cells is whose

    @classmethod
    def of(cls, layers: Mapping[str, Cells]) -> Self:
        """Of cells with a row for each row of the cache."""
        rows = len(next(iter(layers.values())).vectors)
        return cls(dict(layers), torch.arange(rows))

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"embed/{encoder}/tokens": SCHEMA}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        layers = {}
        for word in words_in(source.reads, "tokens"):
            values, grid = kept_column(source, "vectors", layer_in(word))
            layers[word] = Cells(torch.from_numpy(values.reshape(len(values), grid[0] * grid[1], -1)), grid)
        return cls.of(layers)

    def tensors(self) -> dict[str, Tensor]:
        return {word: cells.vectors for word, cells in self.layers.items()} | {"places": self.places}

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        layers = {word: Cells(values[word], cells.grid) for word, cells in self.layers.items()}
        return replace(self, layers=layers, places=values["places"])

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        places, found = self.places[rows.to(self.places.device)], {}
        for word, (vectors, grid) in self.layers.items():
            found[word] = vectors.index_select(0, places.to(vectors.device))
            found[grid_word(word)] = as_shape(grid)
        return found

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return replace(self, places=self.places[rows])

    def only(self, names: Collection[str]) -> Self:
        if "tokens" in names:  # as moments: the word alone stands for whatever layers there are
            return self
        return replace(self, layers={word: cells for word, cells in self.layers.items() if word in names})


def as_shape(grid: tuple[int, int]) -> Tensor:
    """An empty tensor (h, w, 0): a batch on a GPU tells its shape without being waited for, as numbers would be."""
    return torch.empty(*grid, 0)


def grid_word(word: str) -> str:
    """The field of a batch that has the grid of what READS calls `word`: token_grid, or token_grid/LAYER."""
    return word.replace("tokens", "token_grid", 1)


def layer_in(word: str) -> str:
    """LAYER of tokens/LAYER; empty for the word alone."""
    return word.partition("/")[2]


def words_in(words: Collection[str], word: str) -> list[str]:
    """Those of READS that name this part."""
    return sorted(name for name in words if word_of(name) == word)


@dataclass(frozen=True)
class Cls(Part):
    """A batch has under each word, `cls` or cls/LAYER, (B, d) float32."""

    provides: ClassVar[frozenset[str]] = frozenset({"cls"})
    named: ClassVar[str] = "cls"
    shows: ClassVar[tuple[str, ...]] = ("cls",)

    layers: dict[str, Tensor]  # by the word of READS (n V, d) float16

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Tokens.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        words = words_in(source.reads, "cls")
        return cls({word: torch.from_numpy(kept_column(source, "cls", layer_in(word))[0]) for word in words})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.layers)

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        return replace(self, layers=dict(values))

    def only(self, names: Collection[str]) -> Self:
        if "cls" in names:
            return self
        return replace(self, layers={word: value for word, value in self.layers.items() if word in names})


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


def kept_column(source: EncoderFiles, name: str, layer: str = "") -> tuple[np.ndarray, tuple[int, int]]:
    """(n V, numbers) float16 of a layer, and its grid (h, w).

    `layer` is a number, `rollout` for the one that has rollout, or empty for the deepest that has this column.
    """
    folder = source.folder / f"embed/{source.encoder}/tokens"
    kept = source.keep(f"{name} {layer}", [folder], partial(read_column, source, folder, name, layer))
    height, width = kept["grid"].tolist()
    return kept["values"], (height, width)


def read_column(source: EncoderFiles, folder: Path, name: str, asked: str, zeros: Zeros) -> Arrays:
    """`values` and `grid` of kept_column: one row group at a time beside them in memory."""
    rows = source.rows
    layer = find_layer(folder, source, name, asked)
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


def find_layer(folder: Path, source: EncoderFiles, name: str, asked: str) -> Layer:
    """The layer that is `asked` for as in kept_column.

    Raises UserError where none has the column, where it is not stored, or where its maps differ in size.
    """
    # Every layer has vectors, and they are not read to learn that.
    optional = sorted({name, asked} & REMEDIES.keys())
    table = read_buckets(folder, SCHEMA, source.buckets, ["layer", "grid_h", "grid_w", *optional])
    stored = sorted(set(column(table, "layer").tolist()))
    for each in optional:
        table = table.filter(pc.is_valid(table[each]))
        if not table.num_rows:
            raise UserError(f"{folder}: holds no {each}; {REMEDIES[each].format(encoder=source.encoder)}")
    number = int(asked) if asked.isdecimal() else int(column(table, "layer").max())
    if number not in stored:
        held = ", ".join(map(str, stored))
        what = f"holds no layer {asked}, but {held}; name one of these as the layer, or add it to"
        raise UserError(f"{folder}: {what} tokens.{source.encoder}.layers")
    table = table.filter(pc.field("layer") == number)
    grids = {(int(h), int(w)) for h, w in zip(column(table, "grid_h"), column(table, "grid_w"), strict=True)}
    if len(grids) > 1:
        raise unlike(folder, number)
    return Layer(number, *grids)


def unlike(path: Path, number: int) -> UserError:
    return UserError(f"{path}: maps of layer {number} differ in size; run embed_tokens again (dvc repro)")
