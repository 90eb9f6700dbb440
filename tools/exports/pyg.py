"""Patch graphs as PyG's `Data`: from the cache (`patch_graphs`), or from a folder of `--to pyg` (`PatchGraphs`).

A graph has x (N, D), pos (N, 2), kind (N,), edge_index (2, E), edge_attr (E, 2), y (1,), image_id and split, as
tools/exports/graphs.py has them; numbers are float32. Each edge stands in both directions, without loops.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from torch_geometric.data import Data

from tools.exports.embeddings import find_source
from tools.exports.graphs import read_graphs


def patch_graphs(data: str | Path, encoder: str, view: int = 0) -> Iterator[Data]:
    """The graph of every usable image, bucket by bucket; `data` is where the stages wrote.

    Raises UserError where embeddings or graphs are missing or do not belong together.
    """
    folder = Path(data) / "embed" / encoder / "images"
    source = find_source(Path(data), encoder, view, max(1, len(list(folder.glob("b*.parquet")))))
    for arrays in read_graphs(source):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for row in range(len(tensors["y"])):
            yield cut(tensors, row, tensors["node_ptr"], tensors["edge_ptr"], source.about["splits"])


class PatchGraphs(Dataset):
    """The graphs of a folder of `--to pyg`, those of one split or all; each is read when it is asked for."""

    def __init__(self, folder: str | Path, split: str | None = None) -> None:
        """Raises ValueError for a split that there is none of."""
        folder = Path(folder)
        self.about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if split is not None and split not in self.about["splits"]:
            raise ValueError(f"split is {split!r}; use one of {self.about['splits']}")
        self.files = [str(folder / name) for name in self.about["files"]]
        self.ends: list[tuple[Tensor, Tensor]] = []  # by file: node_ptr and edge_ptr
        self.places: list[tuple[int, int]] = []  # file, row
        for number, name in enumerate(self.files):
            with safe_open(name, "pt") as file:
                self.ends.append((file.get_tensor("node_ptr"), file.get_tensor("edge_ptr")))
                codes = file.get_tensor("split").tolist()
            self.places += [
                (number, row) for row, code in enumerate(codes) if split in (None, self.about["splits"][code])
            ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Data:
        number, row = self.places[place]
        with safe_open(self.files[number], "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cut(slices, row, *self.ends[number], self.about["splits"])


def cut(tensors: dict[str, Any], row: int, node_ptr: Tensor, edge_ptr: Tensor, splits: list[str]) -> Data:
    """One graph of a file's tensors, or of slices that are read where they are cut."""
    nodes = slice(int(node_ptr[row]), int(node_ptr[row + 1]))
    edges = slice(int(edge_ptr[row]), int(edge_ptr[row + 1]))
    here = slice(row, row + 1)
    return Data(
        x=tensors["x"][nodes].float(),
        pos=tensors["pos"][nodes],
        kind=tensors["kind"][nodes],
        edge_index=tensors["edge_index"][:, edges].long(),
        edge_attr=tensors["edge_attr"][edges].float(),
        y=tensors["y"][here],
        image_id=bytes(tensors["image_id"][here][0].tolist()).hex(),
        split=splits[int(tensors["split"][here])],
    )
