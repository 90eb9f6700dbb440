"""Boxes: where in a picture lies what an encoder is shown of it.

A Box counts in shares of a picture, (x0, y0, x1, y1), where [0, 1] is the whole of it from left to right and from top
to bottom. A Region counts in whole pixels, (left, top, right, bottom), as Pillow crops.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
Region = tuple[int, int, int, int]


def box_of(numbers: Sequence[float] | None) -> Box | None:
    """The box that four numbers of a table are."""
    if numbers is None:
        return None
    x0, y0, x1, y1 = numbers
    return x0, y0, x1, y1


def visible_box(width: int, height: int, preprocessing: dict[str, Any]) -> Box:
    """The part of a picture of this size that an encoder sees after its `preprocessing`.

    With `resize_mode: longest` it may be larger than the picture: the encoder then sees padding beside it.
    """
    # timm may crop less than the whole side of the resized picture (fieldmark/encoders/towers/timm.py).
    share = preprocessing.get("crop_share", 1.0)
    if preprocessing["resize_mode"] == "squash":
        return (1 - share) / 2, (1 - share) / 2, (1 + share) / 2, (1 + share) / 2
    # `shortest` crops to the middle square; `longest` pads to a square, which is larger than the picture.
    side = share * (min(width, height) if preprocessing["resize_mode"] == "shortest" else max(width, height))
    x, y = (width - side) / 2 / width, (height - side) / 2 / height
    return x, y, 1 - x, 1 - y


def cut_windows(box: Box, count: int) -> list[Box]:
    """count x count equal windows of a box, row by row."""
    x0, y0, x1, y1 = box
    xs, ys = np.linspace(x0, x1, count + 1), np.linspace(y0, y1, count + 1)
    return [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(count) for i in range(count)]


def middle(box: Box, share: float) -> Box:
    """The middle of a box, `share` of its sides long: what timm's crop leaves of a window (see visible_box)."""
    x, y = (1 - share) / 2 * (box[2] - box[0]), (1 - share) / 2 * (box[3] - box[1])
    return box[0] + x, box[1] + y, box[2] - x, box[3] - y


def in_image(box: Box, region: Region, size: tuple[int, int]) -> Box:
    """A box of a region as a box of the whole image, whose `size` (width, height) is in pixels."""
    left, top, right, bottom = region
    x = [(left + share * (right - left)) / size[0] for share in (box[0], box[2])]
    y = [(top + share * (bottom - top)) / size[1] for share in (box[1], box[3])]
    return x[0], y[0], x[1], y[1]


def scale_region(region: Region, size: tuple[int, int], reduced: tuple[int, int]) -> Region:
    """A region of a picture of `size` in the same picture of a reduced size, at least one pixel a side."""
    (left, top, right, bottom), (width, height) = region, size
    left, top = left * reduced[0] // width, top * reduced[1] // height
    right = max(left + 1, round(right * reduced[0] / width))
    return left, top, right, max(top + 1, round(bottom * reduced[1] / height))


def region_of(box: Box, size: tuple[int, int]) -> Region:
    """The pixels of a box, at least one a side."""
    (x0, y0, x1, y1), (width, height) = box, size
    left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
    return left, top, max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))


def grid_cells(box: Box, height: int, width: int, rows: int, columns: int, *, flip: bool) -> list[Box]:
    """The boxes of rows x columns cells pooled from height x width tokens that cover `box`, row by row.

    A cell covers the tokens that adaptive average pooling gives it; neighbours overlap where the counts do not divide.
    """
    x0, y0, x1, y1 = box
    cells = []
    for row in range(rows):
        top, bottom = row * height // rows, -(-(row + 1) * height // rows)
        for column in range(columns):
            left, right = column * width // columns, -(-(column + 1) * width // columns)
            if flip:
                left, right = width - right, width - left
            cells.append((
                x0 + (x1 - x0) * left / width, y0 + (y1 - y0) * top / height,
                x0 + (x1 - x0) * right / width, y0 + (y1 - y0) * bottom / height,
            ))
    return cells
