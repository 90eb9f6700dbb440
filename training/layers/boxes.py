"""Where things lie in a picture: boxes x0 y0 x1 y1 in [0,1] of it, cells of a grid, and boxes that keep apart."""

import torch
from torch import Tensor


def centre_and_sides(box: Tensor) -> tuple[Tensor, Tensor]:
    """x y and width height (..., 2) each of boxes (..., 4), x0 y0 x1 y1."""
    low, high = box[..., :2], box[..., 2:]
    return (low + high) / 2, high - low


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (B, n, m) of boxes a (B, n, 4) and b (B, m, 4)."""
    a, b = a[:, :, None], b[:, None]
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    areas = [centre_and_sides(box)[1].prod(-1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


def cell_places(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(T, 2): x, y of the centres of the cells of a grid (h, w), row by row, in [0,1] of the picture."""
    height, width = grid
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in grid)
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def keep_apart(scores: Tensor, box: Tensor, mask: Tensor, count: int, most: float) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression: the highest score, then the highest of what overlaps none taken by more than `most`.

    scores (B, n), box (B, n, 4), mask (B, n) -> positions (B, count), and which of them are real (B, count) bool: an
    image may have fewer. In the order of scores; of equals the first. One step a box that is taken, for all images at
    once: what is left depends on it.
    """
    if not scores.shape[1]:
        none = torch.zeros(len(scores), count, dtype=torch.long, device=scores.device)
        return none, none.bool()
    clash = overlap(box, box) > most
    clash |= torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)  # a box without area, too
    left, taken = scores.masked_fill(~mask, -torch.inf), []
    for _ in range(count):
        best = left.max(1)
        taken.append(best)
        beside = clash.gather(1, best.indices[:, None, None].expand(-1, 1, clash.shape[2])).squeeze(1)
        left = left.masked_fill(beside, -torch.inf)
    real = torch.stack([best.values for best in taken], dim=1) > -torch.inf
    return torch.stack([best.indices for best in taken], dim=1), real
