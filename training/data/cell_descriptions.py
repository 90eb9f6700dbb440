"""What a vision model said of the cells of each image (`describe.nodes`), sentence by sentence."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from training.data.descriptions import read_sentences
from training.data.part import Part
from training.data.rows import EncoderFiles

CELLS, SCHEMA = "descriptions/cells.parquet", "descriptions.cells/1"


@dataclass(frozen=True)
class CellDescriptions(Part):
    provides: ClassVar[frozenset[str]] = frozenset({"cell_descriptions"})
    shows: ClassVar[tuple[str, ...]] = ("cd", "cdm")
    of_text: ClassVar[bool] = True
    by_image: ClassVar[bool] = True

    cd: Tensor  # (n, S, D) float16, cell by cell, in the order of their rank; S is 0 where no cell has one
    cdm: Tensor  # (n, S) bool: the sentences that the cells of an image have

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {CELLS: SCHEMA, f"embed/{encoder}/text.parquet": "embed.text/1"}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        path, text = (source.folder / file for file in cls.files(source.encoder, ()))
        order = ["image_id", "cell", "rank"]
        kept = source.keep(
            "cell_descriptions",
            [path, text],
            lambda zeros: dict(
                zip(cls.shows, read_sentences(path, SCHEMA, order, text, source.image_ids), strict=True)
            ),
        )
        return cls(**{name: torch.from_numpy(value) for name, value in kept.items()})
