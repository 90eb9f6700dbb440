"""Which attributes each class has, where the data set says so: a table of classes, not of images."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldmark.store import read_table
from training.data.part import Part, Parts
from training.data.rows import EncoderFiles

ATTRIBUTES = "index/attributes.parquet"
MOST = 50.0  # per cent of the people who looked at a class


@dataclass(frozen=True)
class Attributes(Part):
    """Ka attributes, in the order of their names. A batch has nothing of it.

    An attribute with words for values is one a value: (tail, forked). One with numbers alone is as CUB writes it, how
    many in a hundred people saw it, and a class has it from 50 on. Of a class that the file leaves out, none is known.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"attributes"})

    names: tuple[str, ...]  # Ka, NAME or NAME: VALUE
    table: Tensor  # (C, Ka) bool: what a class has

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {ATTRIBUTES: "index.attributes/1"}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        rows = read_table(source.folder / ATTRIBUTES, "index.attributes/1")
        class_of, attribute, value = (rows[name].to_pylist() for name in ("class_id", "attribute", "value"))
        words = {name for name, said in zip(attribute, value, strict=True) if number_of(said) is None}
        known = {class_id: place for place, class_id in enumerate(source.classes)}
        had: dict[str, set[int]] = {}
        for class_id, name, said in zip(class_of, attribute, value, strict=True):
            owners = had.setdefault(f"{name}: {said}" if name in words else name, set())
            if class_id in known and (name in words or float(said) >= MOST):
                owners.add(known[class_id])
        names = tuple(sorted(had))
        table = np.zeros((len(source.classes), len(names)), dtype=bool)
        for column, name in enumerate(names):
            table[sorted(had[name]), column] = True
        return cls(names, torch.from_numpy(table))

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return self

    def of_classes(self, classes: Tensor, parts: Parts) -> Self:
        return replace(self, table=self.table[classes])


def number_of(value: str) -> float | None:
    """What a value says as a number, None where it is a word."""
    try:
        return float(value)
    except ValueError:
        return None
