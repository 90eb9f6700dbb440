"""Pictures that are shifted, turned, scaled, cropped, mirrored or darkened, and where in them everything comes to lie.

Which way a picture is shifted or turned is drawn by its image_id, the same way for every strength. What the frame does
not hold any more is lost, and what it holds beside the picture gets one colour, the mean of the picture's outermost
pixels. A transform that is `in_place` is a control: nothing moves, but whatever the motion would lose gets that colour,
so that what is lost can be told from what moving does.

Places count in shares of a picture, (x, y) in [0, 1], from left to right and from top to bottom.
"""

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from fieldmark.pictures.boxes import Box

WAYS = ((1, 0), (0, 1), (-1, 0), (0, -1))
STILL = np.eye(2)


class Transform(NamedTuple):
    """What is done to a picture. By default, nothing."""

    name: str
    shift: float = 0.0  # it is moved by this share of its side, left, right, up or down
    degrees: float = 0.0  # it is turned about the middle, either way; at a right angle the frame turns with it
    scale: float = 1.0  # what it shows is so many times as large, in a frame of the same size
    crop: float = 1.0  # this share of each side is left, in the middle
    flip: bool = False  # left and right are exchanged
    light: float = 1.0  # sRGB values are multiplied by it
    in_place: bool = False

    @property
    def zoom(self) -> float:
        """How many times as many pixels it needs for what is left of it to be as sharp as the whole was."""
        return max(1.0, self.scale) / self.crop

    @property
    def moves(self) -> bool:
        return bool(self.shift or self.degrees or self.flip) or self.scale != 1 or self.crop != 1

    @property
    def loses(self) -> bool:
        """Whether a part of the picture leaves the frame."""
        return bool(self.shift or self.degrees % 90) or self.scale > 1 or self.crop < 1


UNCHANGED = Transform("unchanged")


class Motion(NamedTuple):
    """A pixel at p of one picture, p = (x, y), comes to lie at linear p + offset in a frame of `size`."""

    linear: np.ndarray  # (2, 2)
    offset: np.ndarray  # (2,)
    source: tuple[int, int]  # width and height of the picture
    size: tuple[int, int]  # of the frame

    def places(self, places: np.ndarray) -> np.ndarray:
        """Where places (..., 2) of the picture come to lie in the frame."""
        return (places * self.source @ self.linear.T + self.offset) / self.size

    def origins(self, places: np.ndarray) -> np.ndarray:
        """Where places (..., 2) in the frame were in the picture: outside [0, 1] where it has none."""
        return (places * self.size - self.offset) @ np.linalg.inv(self.linear).T / self.source


def motion_of(transform: Transform, image_id: str, size: tuple[int, int]) -> Motion:
    """How a picture of `size` (width, height) moves, whether or not it is done in place."""
    chance = random.Random(image_id)
    way, side = np.array(chance.choice(WAYS)), chance.choice((-1, 1))
    angle = math.radians(side * transform.degrees)
    # Rounded, so that at a right angle pixels fall on pixels.
    cos, sin = round(math.cos(angle), 12), round(math.sin(angle), 12)
    linear = transform.scale * np.array([[cos, sin], [-sin, cos]]) @ np.diag([-1.0 if transform.flip else 1.0, 1.0])
    width, height = (max(1, round(transform.crop * each)) for each in size)
    frame = (height, width) if transform.degrees % 180 == 90 else (width, height)
    offset = np.divide(frame, 2) - linear @ np.divide(size, 2) + transform.shift * way * size
    # By whole pixels where nothing else happens: none is made of its neighbours.
    return Motion(linear, np.round(offset) if np.array_equal(linear, STILL) else offset, size, frame)


def transformed(picture: Image.Image, transform: Transform, image_id: str) -> Image.Image:
    """The picture (RGB) as the transform leaves it."""
    if transform.light != 1:
        picture = picture.point([round(transform.light * value) for value in range(256)] * 3)
    if not transform.moves:
        return picture
    motion, fill = motion_of(transform, image_id, picture.size), edge_colour(picture)
    if transform.in_place:
        pixels = np.array(picture)
        pixels[~stays(motion)] = fill
        return Image.fromarray(pixels)
    back = np.linalg.inv(motion.linear)
    x, y = -back @ motion.offset
    rows = (*back[0], x, *back[1], y)
    return picture.transform(motion.size, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC, fillcolor=fill)


def stays(motion: Motion) -> np.ndarray:
    """(height, width) bool: which pixels of the picture the frame still holds."""
    width, height = motion.source
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    places = motion.places(np.stack([x, y], axis=-1))
    return np.asarray(((places >= 0) & (places <= 1)).all(axis=-1))


def edge_colour(picture: Image.Image) -> tuple[int, ...]:
    """The mean colour of a picture's outermost pixels."""
    pixels = np.asarray(picture)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(np.round(edge.mean(axis=0)).astype(int).tolist())


def moved_box(box: Box, motion: Motion) -> Box:
    """The smallest upright box around what a box of the picture becomes, cut at the frame."""
    x0, y0, x1, y1 = box
    corners = motion.places(np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)])).clip(0, 1)
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return left, top, right, bottom
