"""Edges between images: who sends to whom, by the NAME of a table that link_images wrote.

An image is known by its key, the first 60 bits of its image_id, and not by its position: so a method that was fitted on
some of the images finds the others of a later cache, and images that a regime leaves out send nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.links import refuse_stale
from fieldmark.store import read_table
from training.data.arrays import Arrays
from training.data.part import Part
from training.data.rows import EncoderFiles
from training.layers.gather import spans

WORD, WEIGHT = "links", "link_weight"
DIGITS = 15  # of an image_id, in base 16: what int64 holds


class Incoming(NamedTuple):
    """The edges into each of n images, one image after the other, those of the largest weight first."""

    start: Tensor  # (n + 1,) int64: edges start[i] .. start[i + 1] enter image i
    source: Tensor  # (E,) int64: keys of the images that send
    weight: Tensor  # (E,) float32

    def of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The edges (E',) into these images (B,), and the place 0 .. B-1 of the image that each enters."""
        return spans(self.start, images.to(self.start.device))


@dataclass(frozen=True)
class Links(Part):
    """A batch has `key` (B,) and, of links/NAME, edges (2, E) in `batch.of("links/NAME")`, link_weight/NAME (E,).

    The first row of edges is the key of the image that sends, the second the place in the batch, 0 .. B-1, that it
    sends to.
    """

    provides: ClassVar[frozenset[str]] = frozenset({WORD})
    named: ClassVar[str] = WORD
    shows: ClassVar[tuple[str, ...]] = (WORD, WEIGHT, "key")
    by_image: ClassVar[bool] = True

    key: Tensor  # (n,) int64
    incoming: Mapping[str, Incoming]  # by NAME

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"links/{name}.parquet": "links/1" for name in names_in(words)}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        key = torch.from_numpy(keys_of(source.image_ids.to_pylist()))
        return cls(key, {name: kept_links(source, name) for name in names_in(source.reads)})

    def tensors(self) -> dict[str, Tensor]:
        named = ((name, *each) for name, edges in self.incoming.items() for each in edges._asdict().items())
        return {"key": self.key, **{f"{name}/{field}": value for name, field, value in named}}

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        incoming = {
            name: Incoming(*(values[f"{name}/{field}"] for field in Incoming._fields)) for name in self.incoming
        }
        return replace(self, key=values["key"], incoming=incoming)

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        values = {"key": self.key[images.to(self.key.device)]}
        for name, edges in self.incoming.items():
            edge, row = edges.of(images)
            values[f"{WORD}/{name}"] = torch.stack([edges.source[edge], row])
            values[f"{WEIGHT}/{name}"] = edges.weight[edge]
        return values

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return replace(
            self, key=self.key[images], incoming={name: take(edges, images) for name, edges in self.incoming.items()}
        )

    def only(self, names: Collection[str]) -> Self:
        if WORD in names:
            return self
        kept = names_in(names)
        return replace(self, incoming={name: edges for name, edges in self.incoming.items() if name in kept})


def take(edges: Incoming, images: Tensor) -> Incoming:
    """The edges into these images (m,), in their order; whoever sends them."""
    edge, row = edges.of(images)
    count = torch.bincount(row, minlength=len(images))
    return Incoming(torch.cat([count.new_zeros(1), count.cumsum(0)]), edges.source[edge], edges.weight[edge])


def names_in(words: Collection[str]) -> list[str]:
    """The NAMEs of links that words of READS name."""
    return sorted(word.partition("/")[2] for word in words if word.startswith(f"{WORD}/"))


def keys_of(image_ids: Sequence[str]) -> np.ndarray:
    """(n,) int64: the keys of images."""
    return np.array([int(image_id[:DIGITS], 16) for image_id in image_ids], dtype=np.int64)


def kept_links(source: EncoderFiles, name: str) -> Incoming:
    """Raises UserError where the vectors that made these links are others by now."""
    path = source.folder / f"links/{name}.parquet"
    refuse_stale(path, source.folder)
    kept = source.keep("links", [path], lambda zeros: read_links(path, source.image_ids))
    return Incoming(*(torch.from_numpy(kept[field]) for field in Incoming._fields))


def read_links(path: Path, image_ids: pa.Array) -> Arrays:
    """The fields of `Incoming` by name. Of equal weights the sources stand in the order of their ids."""
    table = read_table(path, "links/1", ["src", "dst", "weight"])
    table = table.filter(pc.is_in(table["dst"], value_set=image_ids))
    table = table.append_column("place", pc.index_in(table["dst"], value_set=image_ids))
    table = table.sort_by([("place", "ascending"), ("weight", "descending"), ("src", "ascending")])
    count = np.bincount(table["place"].to_numpy(), minlength=len(image_ids))
    sources = table["src"].combine_chunks().dictionary_encode()
    keys = keys_of(sources.dictionary.to_pylist())
    return {
        "start": np.concatenate([[0], count.cumsum()]).astype(np.int64),
        "source": keys[sources.indices.to_numpy()] if len(keys) else keys,
        "weight": table["weight"].to_numpy().astype(np.float32),
    }
