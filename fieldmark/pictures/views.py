"""The views of an image, cut from one decode: what an encoder is shown of it, and where in the picture that lies.

View 0 is the picture as it is. Views 1, 2, ... are random crops, flipped at random; their seed is the image_id, so that
the same image always has the same views. A view may be cut further into windows, each with a forward pass of its own.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Embed
from fieldmark.pictures.boxes import Box, Region, cut_windows, in_image, middle, scale_region, visible_box
from fieldmark.pictures.decode import MAX_PIXELS, BadImage, hash_file, open_file, open_reduced

# The area of a view's random crop, as a share of the largest square that fits into the picture.
VIEW_AREA = (0.5, 1.0)
# A picture may be decoded at a reduced size, as long as the side of whatever is cut from it has this many times as many
# pixels as the encoder reads. On sharp mosaics of photographs, the global vector then has a mean cosine of 0.9994 with
# that of a full decode; with 1.4 times as many pixels it is 0.997.
OVERSAMPLING = 2

class Preprocessor(Protocol):
    """The part of an encoder that decides how a picture is prepared for it (fieldmark/encoders/base.py)."""

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]: ...
    @property
    def preprocessing(self) -> dict[str, Any]: ...


class Source(NamedTuple):
    """A usable image of the index, and its file."""

    image_id: str
    path: Path


class View(NamedTuple):
    """One view of an image, ready for the encoder."""

    image_id: str
    number: int
    pixels: Tensor  # bytes (1 + windows, 3, H, W): the whole view, then its windows
    boxes: list[Box]  # where in the image each of them lies
    flip: bool


def read_sources(folder: Path) -> list[Source]:
    """The usable images of the index."""
    table = store.read_table("data/index/images.parquet", "index.images/1", ["image_id", "path", "status"])
    return [Source(row["image_id"], folder / row["path"]) for row in table.to_pylist() if row["status"] == "ok"]


def view_region(image_id: str, number: int, width: int, height: int) -> tuple[Region, bool]:
    """The region of a view and whether it is flipped: the whole picture for view 0, else drawn by image_id."""
    if number == 0:
        return (0, 0, width, height), False
    chance = random.Random(f"{image_id}:{number}")
    side = max(1, round(min(width, height) * math.sqrt(chance.uniform(*VIEW_AREA))))
    left, top = chance.randint(0, width - side), chance.randint(0, height - side)
    return (left, top, left + side, top + side), chance.random() < 0.5


def needed_side(encoder: Preprocessor, settings: Embed, zoom: float = 1.0) -> float:
    """How many pixels the shorter side of a picture must keep, so that its smallest view and window have enough.

    `zoom` is how much larger than the encoder's own picture of a view anything of it is shown.
    """
    share = (math.sqrt(VIEW_AREA[0]) if settings.views else 1) / max([1, *settings.crops])
    shown = encoder.preprocessing.get("crop_share", 1)
    return float(OVERSAMPLING * zoom * np.max(encoder.preprocessing["size"]) / shown / share)


def open_indexed(source: Source, side: float) -> tuple[Image.Image, tuple[int, int]]:
    """An image that the index calls usable, decoded at full size or less (decode.open_reduced), and its true size.

    Raises UserError where its bytes are not those that were indexed, or can no longer be read.
    """
    remedy = "run index_images again (dvc repro)"
    try:
        with open_file(source.path) as file:
            if hash_file(file) != source.image_id:
                raise UserError(f"{source.path}: has changed since it was indexed; {remedy}")
            file.seek(0)
            return open_reduced(file, side)
    except BadImage as error:
        reason = str(error).removeprefix("cannot be read: ")
        raise UserError(f"{source.path}: could be read when it was indexed, not now ({reason}); {remedy}") from None


def prepare(source: Source, encoder: Preprocessor, settings: Embed) -> list[View]:
    """Decode one image and cut its views and their windows. Raises UserError as open_indexed does."""
    image, size = open_indexed(source, needed_side(encoder, settings))
    return cut_views(source.image_id, image, size, encoder, settings)


def cut_views(
    image_id: str, image: Image.Image, size: tuple[int, int], encoder: Preprocessor, settings: Embed
) -> list[View]:
    """The views and windows of an image that was decoded for them (needed_side), its true size beside it."""
    views = []
    for number in range(settings.views + 1):
        region, flip = view_region(image_id, number, *size)
        picture = image.crop(scale_region(region, size, image.size))
        seen = visible_box(region[2] - region[0], region[3] - region[1], encoder.preprocessing)
        inside = max(seen[0], 0.0), max(seen[1], 0.0), min(seen[2], 1.0), min(seen[3], 1.0)
        windows = [window for count in settings.crops for window in cut_windows(inside, count)]
        pictures = [picture, *(crop_fraction(picture, window) for window in windows)]
        if flip:
            pictures = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pictures]
        share = encoder.preprocessing.get("crop_share", 1.0)
        boxes = [in_image(box, region, size) for box in (seen, *(middle(window, share) for window in windows))]
        pixels = torch.stack([encoder.preprocess(trim(each, encoder.preprocessing)) for each in pictures])
        views.append(View(image_id, number, pixels, boxes, flip))
    return views


def trim(picture: Image.Image, preprocessing: dict[str, Any]) -> Image.Image:
    """A picture without what an encoder does not see of it, where it is so thin that resizing it whole takes gigabytes.

    Where the shorter side is resized to the encoder's, and the whole would have over MAX_PIXELS then, the ends go, in
    equal steps of the shorter side: what is left in the middle falls on the same pixels. Where the longer side is, the
    shorter one keeps a pixel: it would have none.
    """
    side = int(np.max(preprocessing["size"]))
    short, long = min(picture.size), max(picture.size)
    if preprocessing["resize_mode"] == "longest" and round(side * short / long) == 0:
        picture = picture.copy()
        picture.thumbnail((side, side))
    elif preprocessing["resize_mode"] == "shortest" and side * side * long / short > MAX_PIXELS:
        ends = short * int((long / short - max(1, MAX_PIXELS / side**2)) // 2)
        x, y = (ends, 0) if picture.width == long else (0, ends)
        picture = picture.crop((x, y, picture.width - x, picture.height - y))
    return picture


def crop_fraction(picture: Image.Image, box: Box) -> Image.Image:
    """The window `box` of a picture, at least one pixel a side."""
    left, top = math.floor(box[0] * picture.width), math.floor(box[1] * picture.height)
    right = max(left + 1, round(box[2] * picture.width))
    bottom = max(top + 1, round(box[3] * picture.height))
    return picture.crop((left, top, right, bottom))


def count_passes(settings: Embed) -> int:
    """How many forward passes an image needs."""
    return (settings.views + 1) * (1 + sum(count**2 for count in settings.crops))
