"""The graph of each image's nodes: flat lists of edges, laid out as dense matrices for a batch."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldmark.command import UserError
from training.data.part import Origin, Part
from training.data.rows import EncoderFiles, flat


@dataclass(frozen=True)
class Edges(Part):
    """A batch has `adjacency` (B, N+1, N+1, 2) float32: spatial and semantic weight in [0,1], symmetric, diagonal 0."""

    provides: ClassVar[frozenset[str]] = frozenset({"edges"})
    shows: ClassVar[tuple[str, ...]] = ("adjacency",)

    nodes: int  # N+1, of the views that have most
    start: Tensor  # (n V,) int64: the edges of a row are start .. start + count
    count: Tensor  # (n V,) int64
    ends: Tensor  # (edges, 2) int16: the two nodes
    weight: Tensor  # (edges, 2) float16: spatial and semantic

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"graphs/{encoder}": "graphs/1"}

    @classmethod
    def origins(cls, encoder: str) -> list[Origin]:
        return [Origin(f"graphs/{encoder}", "embed", f"embed/{encoder}/images", "build_graphs")]

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        folder = source.folder / f"graphs/{source.encoder}"
        kept = source.keep("edges", [folder, source.nodes_folder], lambda zeros: read_edges(folder, source))
        return cls(source.nodes, **{name: torch.from_numpy(value) for name, value in kept.items()})

    def of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each edge of these rows (m,): which of the m it belongs to, and its place in the flat lists."""
        device = self.count.device
        rows = rows.to(device)
        count = self.count[rows]
        row = torch.repeat_interleave(torch.arange(len(rows), device=device), count)
        # Its row's start, plus how far it stands behind its row's first edge.
        first = count.cumsum(0) - count
        return row, torch.arange(len(row), device=device) + (self.start[rows] - first)[row]

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        row, edge = self.of_rows(rows)
        source, target = self.ends[edge].long().unbind(1)
        dense = torch.zeros(len(rows) * self.nodes * self.nodes, 2, device=self.weight.device)
        dense[(row * self.nodes + source) * self.nodes + target] = self.weight[edge].float()
        return {"adjacency": dense.view(len(rows), self.nodes, self.nodes, 2)}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return replace(self, start=self.start[rows], count=self.count[rows])


def read_edges(folder: Path, source: EncoderFiles) -> dict[str, np.ndarray]:
    """The tensors of `Edges` by name."""
    rows, nodes = source.rows, source.nodes
    start, count = np.zeros(rows.count, dtype=np.int64), np.full(rows.count, -1, dtype=np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []  # of each bucket
    total = 0
    for table, row in source.tables(folder, "graphs/1", ["image_id", "view", "src", "dst", "spatial", "semantic"]):
        first, lengths = flat(table["src"])
        ends = np.stack([first, flat(table["dst"])[0]], axis=1)
        if ends.size and (ends.min() < 0 or ends.max() >= nodes):
            raise UserError(f"{folder}: links nodes that the embeddings do not have; run build_graphs again")
        start[row], count[row] = total + np.cumsum(lengths) - lengths, lengths
        total += len(ends)
        found.append((ends, np.stack([flat(table["spatial"])[0], flat(table["semantic"])[0]], axis=1)))
    rows.require(count >= 0, folder, "build_graphs")
    ends, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return {"start": start, "count": count, "ends": ends, "weight": weight}
