"""Vectors of a whole image before the projection into the text space: pooled by the tower's head, or moments of tokens.

Each has a NAME, its key under `moments.ENCODER` in params.yaml, and a folder. READS names one as `moments/NAME`;
`pooled` is short for `moments/pooled`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import bucket_path, read_table, vectors_of
from training.data.arrays import Arrays, Zeros
from training.data.part import Part
from training.data.rows import EncoderFiles

WORD = "moments"


class NamedVectors(dict[str, Tensor]):
    """Vectors by NAME. A NAME that the method does not declare is a UserError that says so."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Self:
        """Those among tensors that stand under moments/NAME."""
        return cls({name.partition("/")[2]: value for name, value in values.items() if name.startswith(f"{WORD}/")})

    def __missing__(self, name: str) -> Tensor:
        raise UserError(f"{name}: is of the part `{read_as(name)}`, which the method's READS does not name; add it")


@dataclass(frozen=True)
class Moments(Part):
    """A batch has each as float32 (B, d) in `batch.moments[NAME]`, and `batch.pooled`. They are not of unit length."""

    provides: ClassVar[frozenset[str]] = frozenset({WORD, "pooled"})
    named: ClassVar[str] = WORD
    shows: ClassVar[tuple[str, ...]] = ("moments", "pooled")

    vectors: NamedVectors  # by NAME (n V, d) float16, each with its own d

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {folder_of(encoder, name): "embed.moments/1" for name in names_in(words)}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        names = names_in(source.reads)
        return cls(NamedVectors({name: torch.from_numpy(kept_moments(source, name)) for name in names}))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{WORD}/{name}": value for name, value in self.vectors.items()}

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        return replace(self, vectors=NamedVectors.of(values))

    def only(self, names: Collection[str]) -> Self:
        if WORD in names:
            return self
        kept = names_in(names)
        return replace(self, vectors=NamedVectors({name: self.vectors[name] for name in self.vectors if name in kept}))


def read_as(name: str) -> str:
    """What READS calls the moments of a NAME."""
    return name if name == "pooled" else f"{WORD}/{name}"


def names_in(words: Collection[str]) -> list[str]:
    """The NAMEs of moments that words of READS name. Raises UserError for `moments` alone, which names none."""
    if WORD in words:
        raise UserError(f"READS: `{WORD}` alone names no vector to read; say {WORD}/NAME, NAME a key of `moments`")
    return sorted({"pooled" if word == "pooled" else word.partition("/")[2] for word in words if is_ours(word)})


def is_ours(word: str) -> bool:
    return word == "pooled" or word.startswith(f"{WORD}/")


def folder_of(encoder: str, name: str) -> str:
    return f"embed/{encoder}/moments/{name}"


def kept_moments(source: EncoderFiles, name: str) -> np.ndarray:
    """(n V, d) float16."""
    folder = source.folder / folder_of(source.encoder, name)
    return source.keep("moments", [folder], partial(read_moments, source, folder))["vectors"]


def read_moments(source: EncoderFiles, folder: Path, zeros: Zeros) -> Arrays:
    """`vectors` (n V, d) float16: one bucket at a time beside it in memory."""
    rows = source.rows
    vectors: np.ndarray | None = None
    present = np.zeros(rows.count, dtype=bool)
    for bucket in range(source.buckets):
        path = bucket_path(folder, bucket)
        table, row = rows.place(read_table(path, "embed.moments/1", ["image_id", "view", "vector"]), path)
        if vectors is None:
            vectors = zeros((rows.count, table.schema.field("vector").type.list_size))
        vectors[row] = vectors_of(table)
        present[row] = True
    assert vectors is not None
    rows.require(present, folder, "pool_tokens")
    return {"vectors": vectors}
