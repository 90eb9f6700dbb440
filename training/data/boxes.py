"""Where the nodes of an image lie in it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from training.data.nodes import Nodes, read_boxes
from training.data.part import Part
from training.data.rows import EncoderFiles


@dataclass(frozen=True)
class Boxes(Part):
    """x0 y0 x1 y1 of every node in [0,1] of the full image; a batch has those of the local nodes, `box` (B, N, 4)."""

    provides: ClassVar[frozenset[str]] = frozenset({"boxes"})
    shows: ClassVar[tuple[str, ...]] = ("box",)

    box: Tensor  # (n V, N+1, 4) float32, zero where an image has fewer nodes

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return Nodes.files(encoder, words)

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        return cls(torch.from_numpy(read_boxes(source)))

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"box": self.box[rows, 1:]}
