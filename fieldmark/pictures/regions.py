"""Where the object of a picture lies, and which parts of it deserve a look of their own.

The object's box is found as AOLM does (MMAL-Net, Zhang et al., MMM 2021; read in a fork's code [code]). A map A has a
number a cell: how much the encoder sees there. Of the cells with A > mean(A) the largest patch is taken, cells that
touch at a corner belonging together, and of that the box. AOLM also asks that a map of an earlier layer agrees; here
one map is at hand. Parts are found as APPM does [code]: windows of a few sizes slide over the object, each is scored by
its mean of A in a pass of the object alone, and of every size the best are kept, of which no two overlap by more than
MAX_OVERLAP (intersection over union).

What A is, of the dense tokens t of a picture and its global vector g [design]:
  norm        sum |t|, as AOLM has it
  similarity  max(0, t . g), each cell's share of g where the tower pools by a mean
  attention   rollout to the CLS token, the mean over heads (fieldmark/encoders/layers.py)

Boxes count in shares of a view, as it lies in the picture: whoever calls turns the map of a mirrored view back.
"""

import random

import numpy as np
import torch
from torch import Tensor

from fieldmark.params import Regions
from fieldmark.pictures.boxes import Box, cut_windows

# Raised when the boxes that the same maps give change.
RULES = 1
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Two windows of a size that are kept overlap by no more, as intersection over union, where enough such windows exist.
MAX_OVERLAP = 0.25


def activation(kind: str, outputs: tuple[Tensor, ...]) -> np.ndarray:
    """The map A (h, w), float64, of what a pass gave: the global vector (D), tokens (h, w, D), rollout (heads, h w)."""
    pooled, tokens, *rollout = (each.double() for each in outputs)
    if kind == "norm":
        found = tokens.abs().sum(-1)
    elif kind == "similarity":
        found = (tokens * pooled).sum(-1).clamp(min=0)
    else:
        found = rollout[0].mean(0).reshape(tokens.shape[:2])
    # What no number is stands nowhere; the rows of such a picture are an error anyway (fieldmark/encoders/nodes.py).
    return torch.nan_to_num(found, nan=0.0, posinf=0.0).cpu().numpy()


def edges_of(extent: Box, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The borders of the columns (width + 1) and rows (height + 1) of a map that covers a box."""
    return np.linspace(extent[0], extent[2], width + 1), np.linspace(extent[1], extent[3], height + 1)


def largest_patch(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected patch (h, w) of a mask (h, w), the first of equals row by row; none of an empty mask."""
    height, width = mask.shape
    # Every cell takes the largest number about it, until a patch has one number.
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        around = np.pad(numbers, 1)
        spread = np.max([around[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, numbers):
            break
        numbers = spread
    found, first, sizes = np.unique(numbers[mask], return_index=True, return_counts=True)
    if not len(found):
        return mask
    return numbers == found[np.lexsort((first, -sizes))[0]]


def find_object(values: np.ndarray, extent: Box = WHOLE) -> Box:
    """The box of the object by a map (h, w) that covers `extent`; all of what it shows where no cell is above the mean.

    What of the map lies beside the picture (padding) does not count.
    """
    columns, rows = edges_of(extent, *values.shape)
    inside = np.outer(*(((edges[:-1] + edges[1:]) / 2 > 0) & ((edges[:-1] + edges[1:]) / 2 < 1)
                        for edges in (rows, columns)))  # fmt: skip
    patch = largest_patch(inside & (values > values.mean(where=inside))) if inside.any() else inside
    if not patch.any():
        patch = np.ones_like(patch)
    (x, y) = (np.flatnonzero(patch.any(axis)) for axis in (0, 1))
    x0, y0, x1, y1 = columns[x[0]], rows[y[0]], columns[x[-1] + 1], rows[y[-1] + 1]
    return max(0.0, float(x0)), max(0.0, float(y0)), min(1.0, float(x1)), min(1.0, float(y1))


def grow_square(box: Box, width: int, height: int) -> Box:
    """The square about a box, in pixels of a picture of this size, moved to lie in it, and no larger than fits."""
    side = min(max((box[2] - box[0]) * width, (box[3] - box[1]) * height), width, height)
    shares = side / width, side / height
    x, y = (min(max(0.0, (box[i] + box[i + 2] - shares[i]) / 2), 1 - shares[i]) for i in (0, 1))
    return x, y, x + shares[0], y + shares[1]


def slide(base: Box, side: float, height: int, width: int) -> np.ndarray:
    """Windows (n, 4) in a box, `side` of its sides long, row by row, in steps of about a cell of height x width."""
    x0, y0, x1, y1 = base
    extent_x, extent_y = side * (x1 - x0), side * (y1 - y0)
    left = np.linspace(x0, x1 - extent_x, round((1 - side) * width) + 1)
    top = np.linspace(y0, y1 - extent_y, round((1 - side) * height) + 1)
    y, x = (each.ravel() for each in np.meshgrid(top, left, indexing="ij"))
    return np.stack([x, y, x + extent_x, y + extent_y], axis=1)


def score(windows: np.ndarray, values: np.ndarray, extent: Box) -> np.ndarray:
    """The mean (n,) of a map (h, w), which covers `extent`, over windows (n, 4): by the area of each cell in them."""
    columns, rows = edges_of(extent, *values.shape)

    def lengths(edges: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.clip(np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1]), 0, None)

    x, y = lengths(columns, windows[:, 0], windows[:, 2]), lengths(rows, windows[:, 1], windows[:, 3])
    return np.einsum("ny,yx,nx->n", y, values, x) / (x.sum(1) * y.sum(1))


def overlap(windows: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Intersection over union (n,) of windows (n, 4) with one (4,)."""
    low, high = np.maximum(windows[:, :2], window[:2]), np.minimum(windows[:, 2:], window[2:])
    shared = np.clip(high - low, 0, None).prod(1)
    return shared / ((windows[:, 2:] - windows[:, :2]).prod(1) + (window[2:] - window[:2]).prod() - shared)


def keep_best(windows: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Which `count` of windows (n, 4) are kept, best first: each time the best that overlaps none too much.

    Where none is left, the one that overlaps those kept least is next, so that every picture has `count`; where there
    are no more windows at all, one of them stands twice.
    """
    kept: list[int] = []
    most = np.zeros(len(windows))
    for _ in range(count):
        # Overlaps up to the limit are as good as none; a hair more of it is rounding.
        excess = np.where(most <= MAX_OVERLAP + 1e-9, 0.0, most)
        kept.append(int(np.lexsort((-scores, excess))[0]))
        most = np.maximum(most, overlap(windows, windows[kept[-1]]))
    return np.array(kept, dtype=int)


def best_windows(values: np.ndarray, extent: Box, base: Box, asked: Regions) -> list[Box]:
    """The windows of a box that `crops: map` takes, size by size, by a map (h, w) that covers `extent`."""
    found: list[Box] = []
    for side, count in asked.windows:
        windows = slide(base, side, *values.shape)
        kept = windows[keep_best(windows, score(windows, values, extent), count)]
        found += [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in kept]
    return found


def blind_windows(base: Box, asked: Regions, seed: str) -> list[Box]:
    """The windows of a box that `crops: grid` and `crops: random` take, which look at no map."""
    if asked.crops == "grid":
        return [window for side, _ in asked.windows for window in cut_windows(base, round(1 / side))]
    chance, (x0, y0, x1, y1) = random.Random(seed), base
    found = []
    for side, count in asked.windows:
        for _ in range(count):
            left, top = x0 + chance.random() * (1 - side) * (x1 - x0), y0 + chance.random() * (1 - side) * (y1 - y0)
            found.append((left, top, left + side * (x1 - x0), top + side * (y1 - y0)))
    return found
