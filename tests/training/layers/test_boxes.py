"""Boxes, cells and what keeps apart, against explicit loops."""

import pytest
import torch
from torch import Tensor

from training.layers.boxes import cell_places, keep_apart, overlap

CPU = torch.device("cpu")
IMAGES, NODES = 4, 12


def boxes(seed: int, count: int = NODES) -> Tensor:
    """(B, n, 4)."""
    generator = torch.Generator().manual_seed(seed)
    corner = 0.7 * torch.rand(IMAGES, count, 2, generator=generator)
    return torch.cat([corner, corner + 0.1 + 0.2 * torch.rand(IMAGES, count, 2, generator=generator)], dim=2)


def iou(a: list[float], b: list[float]) -> float:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    shared = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    return shared / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared)


def test_overlaps_are_intersection_over_union() -> None:
    a, b = boxes(0), boxes(1, 3)
    found = overlap(a, b)
    for image in range(IMAGES):
        expected = [[iou(one, other) for other in b[image].tolist()] for one in a[image].tolist()]
        torch.testing.assert_close(found[image], torch.tensor(expected))


def test_cells_lie_row_by_row_at_their_centres() -> None:
    height, width = 3, 4
    places = cell_places((height, width), CPU)
    for cell in range(height * width):
        row, column = divmod(cell, width)
        torch.testing.assert_close(places[cell], torch.tensor([(column + 0.5) / width, (row + 0.5) / height]))


@pytest.mark.parametrize("count", [1, 4, NODES])
def test_what_is_kept_is_what_greedy_suppression_keeps(count: int) -> None:
    box, scores = boxes(0), torch.rand(IMAGES, NODES, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(IMAGES, NODES, dtype=torch.bool)
    mask[1, 7:] = mask[2, 1:] = mask[3] = False
    place, real = keep_apart(scores, box, mask, count, 0.25)
    lengths = set()
    for image in range(IMAGES):
        kept: list[int] = []
        for node in sorted(range(NODES), key=lambda node: -float(scores[image, node])):
            apart = all(iou(box[image, node].tolist(), box[image, other].tolist()) <= 0.25 for other in kept)
            if mask[image, node] and apart and len(kept) < count:
                kept.append(node)
        assert place[image][real[image]].tolist() == kept
        assert real[image].tolist() == [rank < len(kept) for rank in range(count)]
        lengths.add(len(kept))
    assert count == 1 or len(lengths) > 2  # some overlap, and some are not there


def test_a_box_without_area_is_taken_once_and_of_nothing_nothing_is_taken() -> None:
    place, real = keep_apart(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, 4), torch.ones(1, 2).bool(), 3, 0.25)
    assert place[real].tolist() == [1, 0]
    none = keep_apart(torch.zeros(2, 0), torch.zeros(2, 0, 4), torch.zeros(2, 0).bool(), 3, 0.25)[1]
    assert none.shape == (2, 3)
    assert not none.any()
