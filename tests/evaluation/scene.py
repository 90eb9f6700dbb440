"""Images that show a bill and a tail in two cells of a 3 x 3 grid, and what concepts that name them hit there."""

import numpy as np
import torch
from torch import Tensor

from evaluation.pointing import Hits, Marked, judge_part

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
