"""A second look at every image: the pooled vectors of two pictures of it that a first look had resampled.

Each has a NAME, its key under `train.first_looks` in params.yaml, and a folder. READS names one as `again/NAME`. It is
of one encoder, that of its first look.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import bucket_path, read_table, vectors_of
from training.data.arrays import Arrays, Zeros
from training.data.part import Part
from training.data.rows import EncoderFiles

WORD = "again"
BRANCHES = ("discriminative", "complementary")  # in the order of a batch


@dataclass(frozen=True)
class Again(Part):
    """A batch has under again/NAME (B, 2, d) float32: g_D of the discriminative picture and g_C of the complementary.

    They are made before the projection, and not of unit length.
    """

    provides: ClassVar[frozenset[str]] = frozenset({WORD})
    named: ClassVar[str] = WORD
    shows: ClassVar[tuple[str, ...]] = (WORD,)

    looks: dict[str, Tensor]  # by the word of READS (n V, 2, d) float16

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(again_words(words), "again/1")

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        return cls({word: torch.from_numpy(kept_vectors(source, word)) for word in again_words(source.reads)})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.looks)

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        return replace(self, looks=dict(values))

    def only(self, names: Collection[str]) -> Self:
        if WORD in names:  # as moments: the word alone stands for whatever a run's settings name
            return self
        return replace(self, looks={word: value for word, value in self.looks.items() if word in names})


def is_again(name: str) -> bool:
    """Whether a word of READS, or a name in `features`, is one of a second look."""
    return name.startswith(f"{WORD}/")


def again_words(words: Collection[str]) -> list[str]:
    """Those of READS that name a second look. Raises UserError for `again` alone, which names none."""
    if WORD in words:
        raise UserError(f"READS: `{WORD}` alone names none; say {WORD}/NAME, NAME a key of `train.first_looks`")
    return sorted(filter(is_again, words))


def kept_vectors(source: EncoderFiles, word: str) -> np.ndarray:
    """(n V, 2, d) float16."""
    folder = source.folder / word
    return source.keep("again", [folder], partial(read_vectors, source, folder))["vectors"]


def read_vectors(source: EncoderFiles, folder: Path, zeros: Zeros) -> Arrays:
    """`vectors` (n V, 2, d) float16: one bucket at a time beside it in memory."""
    rows = source.rows
    vectors: np.ndarray | None = None
    present = np.zeros((rows.count, len(BRANCHES)), dtype=bool)
    for bucket in range(source.buckets):
        path = bucket_path(folder, bucket)
        table, row = rows.place(read_table(path, "again/1", ["image_id", "view", "branch", "vector"]), path)
        branch = pc.index_in(table["branch"], value_set=pa.array(BRANCHES)).to_numpy()
        if vectors is None:
            vectors = zeros((rows.count, len(BRANCHES), table.schema.field("vector").type.list_size))
        vectors[row, branch] = vectors_of(table)
        present[row, branch] = True
    assert vectors is not None
    rows.require(np.asarray(present.all(axis=1)), folder, "look_again")
    return {"vectors": vectors}
