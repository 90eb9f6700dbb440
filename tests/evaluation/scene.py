"""Images that show a bill and a tail in two cells of a 3 x 3 grid, and what concepts that name them hit there."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from evaluation.pointing import Hits, Marked, judge_part
from fieldmark.store import make_table, read_header, read_table, write_table
from tests.training.cache import ENCODER

SIDE, N, D = 3, 9, 16


def cells(images: int) -> np.ndarray:
    """(images, N, 4): the boxes of a 3 x 3 grid."""
    row, col = np.divmod(np.arange(N), SIDE)
    corner = np.stack([col, row], axis=1) / SIDE
    return np.broadcast_to(np.concatenate([corner, corner + 1 / SIDE], axis=1), (images, N, 4))


def scene(images: int, planted: bool, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, dict[str, Marked]]:
    """Directions, vectors and marks: bill and tail in two cells drawn anew for each image; noise unless `planted`."""
    rng = np.random.default_rng(seed)
    place = np.stack([rng.permutation(N)[:2] for _ in range(images)])
    vectors = torch.from_numpy(rng.standard_normal((images, N, D))).float()
    asked = {name: torch.eye(D)[number].expand(images, D) for number, name in enumerate(("bill", "tail"))}
    if planted:
        for number in (0, 1):
            vectors[torch.arange(images), torch.from_numpy(place[:, number]), number] = 9.0
    marked = {
        name: Marked(np.ones(images, bool), place[:, [number]] == np.arange(N)) for number, name in enumerate(asked)
    }
    return asked, vectors, marked


def judged(planted: bool, cell: int = 4) -> dict[str, Hits]:
    asked, vectors, marked = scene(400, planted)
    patches = np.ones((400, N), bool)
    found = {name: judge_part(name, asked, vectors, patches, marked, cell, seed=0) for name in asked}
    return {name: hits for name, hits in found.items() if hits is not None}


def name_concepts(data: Path, *parts: str) -> None:
    """The bank of tests.training.cache, its concepts naming these parts by turns."""
    path = data / f"bank/{ENCODER}.parquet"
    header, bank = read_header(path, "bank/1"), read_table(path, "bank/1")
    texts = [f"a {parts[number % len(parts)]} {number}" for number in range(bank.num_rows)]
    bank = bank.set_column(bank.schema.get_field_index("text"), "text", pa.array(texts))
    write_table(bank, path, "bank/1", header.params, header.fingerprint)


def write_parts(data: Path, rows: list[dict[str, Any]]) -> None:
    write_table(make_table("index.parts/1", rows), data / "index/parts.parquet", "index.parts/1", {}, "mark")
