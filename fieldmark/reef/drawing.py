"""Draws one underwater picture of a fish with given field marks, and the boxes of its parts.

A fish lives in its own coordinates: x from 0 (snout) to 1 (root of the tail), y upwards, in body lengths. Every part
is a signed distance over those coordinates (positive inside), so an edge is antialiased by clipping the distance in
pixels, whatever the pose; the box of a part is the extent of its mask. The scene around it (water, sand, coral, weed,
bubbles) is drawn with PIL. Everything comes from one random generator: same generator, same picture.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Plane = npt.NDArray[np.floating]

VISIBLE_SHARE = 0.4  # a part counts as visible when this share of its pixels is in the picture and not covered

BODY_HALF_HEIGHT = {"slender": 0.145, "oval": 0.235, "tall": 0.36}
PEDUNCLE = {"slender": 0.035, "oval": 0.05, "tall": 0.055}
TAIL_LENGTH = {"forked": 0.36, "rounded": 0.27, "pointed": 0.46, "square": 0.26}
DORSAL_HEIGHT = {"sail": 0.33, "low": 0.065, "spiny": 0.19}
BODY_COLOUR = {
    "yellow": (238, 204, 52),
    "blue": (58, 116, 214),
    "orange": (240, 128, 44),
    "silver": (198, 206, 212),
    "green": (84, 164, 84),
    "purple": (156, 82, 178),
}
FIN_COLOUR = {"yellow": (246, 216, 60), "dark": (38, 38, 50), "red": (206, 44, 48), "white": (240, 240, 236)}
MARK_COLOURS = ((22, 22, 34), (52, 30, 22), (16, 30, 62))
CHEEK = (250, 246, 226)
WATERS = ((28, 104, 148), (24, 124, 138), (46, 132, 168), (34, 110, 110), (60, 120, 130))
CORALS = ((176, 92, 96), (160, 120, 84), (132, 96, 140), (182, 138, 76), (104, 118, 96), (186, 110, 70))
WEEDS = ((44, 96, 62), (70, 104, 50), (92, 84, 44))


class PartBox(NamedTuple):
    """A part's box as shares of the picture's width and height, in [0, 1]."""

    part: str
    x0: float
    y0: float
    x1: float
    y1: float
    visible: bool


@dataclass(frozen=True)
class Drawing:
    """A picture (RGB) and the boxes of the parts of its fish."""

    image: Image.Image
    parts: list[PartBox]


@dataclass(frozen=True)
class Pose:
    """Where the fish is: `length` in pixels from snout to tail root, `centre` in pixels, `angle` in radians."""

    length: float
    foreshortening: float
    angle: float
    flip: bool
    centre: tuple[float, float]
    bend: float


def draw_fish(attributes: Mapping[str, str], rng: np.random.Generator, size: int) -> Drawing:
    """A square picture of `size` pixels; `attributes` is a complete combination of `species.VOCABULARY`."""
    water = np.array(WATERS[rng.integers(len(WATERS))], np.float32) * rng.uniform(0.75, 1.3)
    scene = _background(rng, size, water)
    pose = _pose(rng, size, attributes)
    colour, alpha, masks = _fish(attributes, rng, size, pose)
    fog = rng.uniform(0.04, 0.34)
    colour = _light(colour, rng, size) * (1 - fog) + _gradient(water, size) * fog
    scene = scene * (1 - alpha[..., None]) + colour * alpha[..., None]
    cover = _foreground(rng, size)
    scene = scene * (1 - cover[..., 3:]) + cover[..., :3] * cover[..., 3:]
    image = _camera(scene, rng, size)
    return Drawing(image, [_box(part, mask, cover[..., 3], size) for part, mask in masks.items()])


# ---------------------------------------------------------------------------------------------------- the fish


def _pose(rng: np.random.Generator, size: int, attributes: Mapping[str, str]) -> Pose:
    """A pose that keeps most of the fish in the picture."""
    foreshortening = rng.uniform(0.7, 1.0)
    tall = attributes["body_shape"] == "tall"
    length = size * rng.uniform(0.44, 0.6 if tall else 0.68)
    reach = length * 0.64
    low, high = min(reach, size * 0.46), max(size - reach, size * 0.54)
    return Pose(
        length=length,
        foreshortening=foreshortening,
        angle=float(np.clip(rng.normal(0, 0.24), -0.6, 0.6)),
        flip=bool(rng.random() < 0.5),
        centre=(rng.uniform(low, high), rng.uniform(low, high)),
        bend=rng.uniform(-0.09, 0.09),
    )


@dataclass(frozen=True)
class Frame:
    """The fish's own coordinates at every pixel, each plane (size, size), and its individual build."""

    x: Plane
    y: Plane
    half: Plane  # half height of the body at x
    level: Plane  # -1 on the belly's edge, 0 on the midline, 1 on the back's edge
    height: float  # largest half height
    peduncle: float
    pixels: float  # in a body length

    def cover(self, distance: Plane) -> Plane:
        """Coverage in 0..1 of a signed distance in body lengths: its edge is one pixel wide."""
        return np.clip(distance * np.float32(self.pixels) + np.float32(0.5), 0, 1)


def _frame(pose: Pose, size: int, height: float, peduncle: float) -> Frame:
    row, column = np.mgrid[0:size, 0:size].astype(np.float32) + np.float32(0.5)
    right, down = (column - pose.centre[0]) / pose.length, (row - pose.centre[1]) / pose.length
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    along, up = right * cos + down * sin, right * sin - down * cos
    x = (0.6 + along / pose.foreshortening * (1 if pose.flip else -1)).astype(np.float32)
    y = (up + pose.bend * np.square(np.maximum(x - 0.3, 0)) * 2).astype(np.float32)
    half = _profile(x, height, peduncle)
    return Frame(x, y, half, y / np.maximum(half, 0.01), height, peduncle, pose.length)


def _profile(x: Plane, half_height: float, peduncle: float) -> Plane:
    """Half height of the body at `x`: zero at the snout, largest near a third, `peduncle` at the root of the tail."""
    inside = np.clip(x, 0.0, 1.0)
    hump = inside**0.62 * (1 - inside) ** 0.95
    return np.asarray(half_height * hump / 0.3703 + peduncle * inside, np.float32)


def _ellipse(x: Plane, y: Plane, centre: tuple[float, float], radii: tuple[float, float]) -> Plane:
    """Signed distance (approximate) to an axis-parallel ellipse, positive inside."""
    radius = np.sqrt(np.square((x - centre[0]) / radii[0]) + np.square((y - centre[1]) / radii[1]))
    return np.asarray((1 - radius) * min(radii), np.float32)


def _disc(frame: Frame, centre: tuple[float, float], radius: float) -> Plane:
    """Signed distance to a round spot on the fish."""
    return _ellipse(frame.x, frame.y, centre, (radius, radius))


def _tail(frame: Frame, shape: str, spread: float, length: float) -> Plane:
    """Signed distance to the tail fin, which starts inside the body at x = 0.97."""
    y, peduncle = frame.y, frame.peduncle
    t = (frame.x - 0.97) / length
    rise = np.clip(t, 0, 1)
    if shape == "forked":
        half = peduncle + spread * rise**0.9
        end = 1 - 0.72 * np.clip(1 - np.abs(y) / (peduncle + spread), 0, 1)
    elif shape == "square":
        half = peduncle + 0.62 * spread * np.minimum(rise * 1.25, 1)
        end = np.ones_like(t)
    elif shape == "rounded":
        half = peduncle + 0.72 * spread * np.minimum(rise * 1.7, 1)
        end = 0.5 + 0.5 * np.sqrt(np.clip(1 - np.square(y / (peduncle + 0.72 * spread)), 0, 1))
    else:  # pointed
        half = (peduncle + 0.55 * spread * np.minimum(rise * 3.2, 1)) * np.clip((1 - t) / 0.68, 0, 1)
        end = np.ones_like(t)
    return np.asarray(np.minimum(np.minimum(half - np.abs(y), t * length), (end - t) * length), np.float32)


def _dorsal(frame: Frame, shape: str, height: float) -> Plane:
    """Signed distance to the dorsal fin on the upper edge of the body."""
    x, y, top = frame.x, frame.y, frame.half
    start, stop = (0.2, 0.72) if shape == "sail" else (0.24, 0.86)
    lean = 0.55 * np.clip(y - top, 0, height) if shape == "sail" else 0.3 * np.clip(y - top, 0, height)
    t = np.clip((x - lean - start) / (stop - start), 0, 1)
    if shape == "sail":
        crest = height * np.minimum(t / 0.28, 1) ** 0.8 * (1 - 0.45 * t) * np.minimum((1 - t) / 0.25, 1) ** 0.6
    elif shape == "spiny":
        saw = (t * 6.0) % 1.0
        crest = height * (1 - 0.5 * t) * (0.28 + 0.72 * (1 - saw)) * np.minimum((1 - t) / 0.15, 1)
    else:
        crest = height * np.minimum(t / 0.15, 1) * np.minimum((1 - t) / 0.15, 1) ** 0.7
    inside = np.minimum(top + crest - y, y - top + 0.05)
    return np.asarray(np.minimum(inside, np.minimum(x - lean - start, stop - x + lean)), np.float32)


def _belly_fins(frame: Frame) -> tuple[Plane, Plane]:
    """Signed distances to the anal and the pelvic fin, which are alike in all fishes."""
    x, y = frame.x, frame.y
    depth = 0.11 * np.clip((x - 0.56) / 0.1, 0, 1) * np.clip((0.92 - x) / 0.25, 0, 1)
    anal = np.minimum(np.minimum(y + frame.half + depth, -y), np.minimum(x - 0.56, 0.92 - x))
    drop = -y - frame.half + 0.03  # how far below the belly
    pelvic = np.minimum(np.minimum(drop, 0.15 - drop), 0.045 - np.abs(x - 0.37 - 0.6 * drop))
    return anal, pelvic


def _fish(
    attributes: Mapping[str, str], rng: np.random.Generator, size: int, pose: Pose
) -> tuple[Plane, Plane, dict[str, Plane]]:
    """Colour (size, size, 3) in 0..255, coverage (size, size) in 0..1 and the mask of every part the fish has."""
    height = BODY_HALF_HEIGHT[attributes["body_shape"]] * rng.uniform(0.93, 1.07)
    frame = _frame(pose, size, height, PEDUNCLE[attributes["body_shape"]])
    base = _vary(BODY_COLOUR[attributes["body_colour"]], rng, 16)
    fin = _vary(FIN_COLOUR[attributes["fin_colour"]], rng, 12)
    dark = _vary(MARK_COLOURS[rng.integers(len(MARK_COLOURS))], rng, 8)

    spread = 0.2 * rng.uniform(0.9, 1.12)
    length = TAIL_LENGTH[attributes["tail_shape"]] * rng.uniform(0.92, 1.08)
    tail = frame.cover(_tail(frame, attributes["tail_shape"], spread, length))
    crest = DORSAL_HEIGHT[attributes["dorsal_fin"]] * rng.uniform(0.88, 1.12)
    dorsal = frame.cover(_dorsal(frame, attributes["dorsal_fin"], crest))
    fins = np.maximum.reduce([tail, dorsal, *map(frame.cover, _belly_fins(frame))])
    body = frame.cover(np.minimum(frame.half - np.abs(frame.y), np.minimum(frame.x, 1 - frame.x)))

    flesh = _flesh(frame, base)
    masks: dict[str, Plane] = {"body": body, "tail": tail, "dorsal_fin": dorsal, "head": body * (frame.x < 0.27)}
    for name, distance in _marks(attributes, rng, frame).items():
        masks[name] = frame.cover(distance) * (np.maximum(body, tail) if name == "tail_spot" else body)
        if attributes[name] == "back":
            flesh = _over(flesh, (240, 240, 240), 0.8 * frame.cover(distance + np.float32(0.022)) * body)
        flesh = _over(flesh, CHEEK if name == "cheek" else dark, rng.uniform(0.78, 0.95) * masks[name])
    flesh, masks["eye"] = _face(frame, flesh, fin)

    on_body = np.maximum(body, masks["tail_spot"]) if "tail_spot" in masks else body
    return _over(_rays(frame, tail, fin), flesh, on_body), np.maximum(body, fins * 0.94), masks


def _over(under: Plane, colour: npt.ArrayLike, cover: Plane) -> Plane:
    """`colour` laid over `under` (size, size, 3) with coverage (size, size)."""
    return np.asarray(under + (np.asarray(colour, np.float32) - under) * cover[..., None], np.float32)


def _rays(frame: Frame, tail: Plane, fin: Plane) -> Plane:
    """The colour of the fins, with rays that run outwards."""
    tail_rays = 1 - 0.16 * (0.5 + 0.5 * np.sin(np.arctan2(frame.y, frame.x - 0.9) * 34))
    other_rays = 1 - 0.18 * (0.5 + 0.5 * np.sin((frame.x - 0.35 * (frame.y - frame.half)) * 95))
    return np.asarray(fin * np.where(tail > 0, tail_rays, other_rays)[..., None], np.float32)


def _flesh(frame: Frame, base: Plane) -> Plane:
    """The colour of an unmarked body: pale belly, lit from above, faint scales, the edge of the gill cover."""
    x, y, level = frame.x, frame.y, frame.level
    flesh = _over(np.broadcast_to(base, (*x.shape, 3)), (245, 245, 245), 0.42 * np.clip(0.05 - 0.5 * level, 0, 1))
    scales = 1 + 0.05 * np.sin(x * 70 + np.sin(y * 60)) * np.sin(y * 62)
    gloss = 0.16 * np.exp(-np.square((level - 0.42) / 0.3))
    gill = frame.cover(0.012 - np.abs(np.sqrt(np.square(x - 0.08) + np.square(y * 0.8)) - 0.2)) * (x > 0.1)
    shade = (
        scales * (1.03 - 0.4 * np.square(np.clip(level, -1, 1)) + gloss) * (1 - 0.28 * gill * (np.abs(level) < 0.72))
    )
    return np.asarray(flesh * shade[..., None], np.float32)


def _face(frame: Frame, flesh: Plane, fin: Plane) -> tuple[Plane, Plane]:
    """Eye, mouth and pectoral fin, which lie on top of every mark: the colour with them, and the mask of the eye."""
    x, y = frame.x, frame.y
    eye_x, eye_y, radius = _eye(frame.height)
    iris = frame.cover(_disc(frame, (eye_x, eye_y), radius))
    flesh = _over(flesh, (238, 226, 180), iris)
    flesh = _over(flesh, (14, 14, 14), frame.cover(_disc(frame, (eye_x, eye_y), 0.6 * radius)))
    glint = _disc(frame, (eye_x - 0.25 * radius, eye_y + 0.3 * radius), 0.26 * radius)
    flesh = _over(flesh, (255, 255, 255), frame.cover(glint))
    flesh = _over(flesh, (0, 0, 0), 0.6 * frame.cover(np.minimum(0.009 - np.abs(y + 0.02 + 0.2 * x), 0.06 - x)))
    low = -0.25 * frame.height
    pectoral = _ellipse(x + 0.5 * (y - low), y, (0.385, low), (0.075, 0.042))
    return _over(flesh, 0.92 * fin, 0.75 * frame.cover(pectoral)), iris


def _eye(height: float) -> tuple[float, float, float]:
    """Centre and radius of the eye on a body of this half height."""
    return 0.135, 0.24 * height, 0.036 + 0.025 * height


def _marks(attributes: Mapping[str, str], rng: np.random.Generator, frame: Frame) -> dict[str, Plane]:
    """Signed distance of every field mark the fish has, by attribute."""
    x, y, level, height = frame.x, frame.y, frame.level, frame.height
    marks: dict[str, Plane] = {}
    bow = x + 0.05 * np.square(level)  # bars bow with the roundness of the body
    if attributes["stripes"] == "single":
        marks["stripes"] = np.minimum(0.021 * rng.uniform(0.85, 1.25) - np.abs(y - 0.1 * height), x - 0.27)
    elif attributes["stripes"] == "many":
        line = _repeat(level + 0.2, 0.4) * frame.half
        width = 0.011 * rng.uniform(0.85, 1.2) * (0.6 + height / 0.36)
        marks["stripes"] = np.minimum(width - line, np.minimum(x - 0.25, 0.95 - x))
    if attributes["bars"] == "single":
        marks["bars"] = 0.034 * rng.uniform(0.85, 1.2) - np.abs(bow - 0.35 - rng.uniform(-0.012, 0.012))
    elif attributes["bars"] == "many":
        bars = 0.026 * rng.uniform(0.8, 1.2) - _repeat(bow - 0.36, 0.135)
        marks["bars"] = np.minimum(bars, np.minimum(x - 0.29, 0.94 - x))
    if attributes["spots"] == "scattered":
        marks["spots"] = np.maximum.reduce([_disc(frame, *spot) for spot in _scatter(rng, height)])
    elif attributes["spots"] == "back":
        radius = 0.052 * rng.uniform(0.85, 1.15)
        marks["spots"] = _disc(frame, (0.62 + rng.uniform(-0.02, 0.02), 0.4 * height), radius)
    if attributes["eye_mask"] == "mask":
        eye_x, eye_y, radius = _eye(height)
        marks["eye_mask"] = radius * rng.uniform(0.8, 1.05) - np.abs(x - eye_x - 0.25 * (y - eye_y))
    if attributes["tail_spot"] == "spot":
        marks["tail_spot"] = _disc(frame, (0.95, 0.0), 0.05 * rng.uniform(0.9, 1.15))
    if attributes["cheek"] == "patch":
        radii = (0.05 * rng.uniform(0.9, 1.1), 0.036 + 0.03 * height)
        marks["cheek"] = _ellipse(x, y, (0.2, -0.32 * height), radii)
    return marks


def _repeat(position: Plane, gap: float) -> Plane:
    """Distance to the nearest multiple of `gap`."""
    return np.abs((position + gap / 2) % gap - gap / 2)


def _scatter(rng: np.random.Generator, height: float) -> Iterator[tuple[tuple[float, float], float]]:
    """Centres and radii of small spots all over the flank."""
    for along in np.linspace(0.33, 0.88, 7):
        for across in (-0.35, 0.15, 0.6):
            x = along + rng.uniform(-0.03, 0.03) + 0.04 * (across == 0.15)
            half = float(_profile(np.array(x, np.float32), height, 0.04))
            yield (x, (across + rng.uniform(-0.12, 0.12)) * half), rng.uniform(0.014, 0.024)


def _vary(colour: tuple[int, int, int], rng: np.random.Generator, amount: float) -> Plane:
    """An individual's shade of a colour: brightness and each channel move a little."""
    shade = np.array(colour) * rng.uniform(0.88, 1.08) + rng.normal(0, amount / 2, 3)
    return np.clip(shade, 0, 255).astype(np.float32)


# --------------------------------------------------------------------------------------------------- the scene


def _gradient(water: Plane, size: int) -> Plane:
    """Open water (size, 1, 3): bright above, dark below."""
    depth = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    return water * (1.35 - 0.75 * depth)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Noise of unit range (size, size) that varies over size / cells pixels."""
    coarse = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _background(rng: np.random.Generator, size: int, water: Plane) -> Plane:
    """Water, rays of light, sand, coral and weed behind the fish: (size, size, 3) in 0..255."""
    scene = np.broadcast_to(_gradient(water, size), (size, size, 3)).copy()
    row, column = np.mgrid[0:size, 0:size].astype(np.float32) / size
    rays = np.sin((column + row * rng.uniform(-0.6, 0.6)) * rng.uniform(9, 20) + rng.uniform(0, 6))
    scene *= (1 + 0.1 * np.clip(rays, 0, 1) * (1 - row) + 0.22 * (_smooth_noise(rng, size, 5) - 0.5))[..., None]
    floor = rng.uniform(0.66, 1.05)
    if floor < 1:
        sand = np.array((196, 180, 140), np.float32) * rng.uniform(0.6, 0.95)
        ripple = (
            1 + 0.08 * np.sin(row * 90 + 5 * _smooth_noise(rng, size, 6)) + 0.2 * (_smooth_noise(rng, size, 24) - 0.5)
        )
        ground = np.clip((row - floor - 0.05 * _smooth_noise(rng, size, 4)) * size / 4, 0, 1)[..., None]
        haze = np.clip(1.2 - (row - floor) * 3, 0.35, 0.85)[..., None]
        ground_colour = (sand * (1 - haze) + water * haze) * ripple[..., None]
        scene = scene * (1 - ground) + ground_colour * ground
    layer = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(layer)
    base = min(floor + 0.12, 1.02) * size
    for _ in range(rng.integers(1, 5)):
        _coral(pen, rng, size, (rng.uniform(0, size), base + rng.uniform(0, 0.1) * size), water)
    for _ in range(rng.integers(0, 6)):
        colour = _hazed(WEEDS[rng.integers(len(WEEDS))], water, rng.uniform(0.2, 0.6))
        foot = (rng.uniform(0, size), base + 0.05 * size)
        _weed(pen, rng, foot, height=rng.uniform(0.2, 0.6) * size, width=size / 40, colour=colour)
    for _ in range(rng.integers(0, 3)):  # other fish, too far to tell
        _far_fish(pen, rng, size, _hazed((40, 50, 60), water, rng.uniform(0.6, 0.85)))
    layer = layer.filter(ImageFilter.GaussianBlur(rng.uniform(0.008, 0.016) * size))
    return np.asarray(layer, np.float32)


def _hazed(colour: tuple[int, int, int], water: Plane, haze: float) -> tuple[int, int, int]:
    mixed = np.clip(np.array(colour) * (1 - haze) + water * haze, 0, 255).astype(int)
    return int(mixed[0]), int(mixed[1]), int(mixed[2])


def _coral(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, foot: tuple[float, float], water: Plane
) -> None:
    """A branching or a domed coral that stands on `foot`."""
    colour = _hazed(CORALS[rng.integers(len(CORALS))], water, rng.uniform(0.15, 0.55))
    if rng.random() < 0.5:
        for _ in range(rng.integers(5, 10)):
            lean, reach = rng.uniform(-0.9, 0.9), rng.uniform(0.12, 0.34) * size
            middle = (foot[0] + lean * reach * 0.4, foot[1] - reach * 0.5)
            tip = (foot[0] + lean * reach * 0.8 + rng.uniform(-0.05, 0.05) * size, foot[1] - reach)
            width = max(2, int(size * rng.uniform(0.018, 0.035)))
            pen.line([foot, middle, tip], fill=colour, width=width, joint="curve")
            pen.ellipse([tip[0] - width / 2, tip[1] - width / 2, tip[0] + width / 2, tip[1] + width / 2], fill=colour)
    else:
        rx, ry = rng.uniform(0.08, 0.24) * size, rng.uniform(0.08, 0.2) * size
        pen.ellipse([foot[0] - rx, foot[1] - ry, foot[0] + rx, foot[1] + ry], fill=colour)
        for _ in range(rng.integers(6, 20)):
            px, py = foot[0] + rng.uniform(-0.75, 0.75) * rx, foot[1] - rng.uniform(0, 0.75) * ry
            dot = size * rng.uniform(0.006, 0.016)
            shade = _hazed(colour, water * 0.4, 0.3)
            pen.ellipse([px - dot, py - dot, px + dot, py + dot], fill=shade)


def _weed(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    foot: tuple[float, float],
    *,
    height: float,
    width: float,
    colour: tuple[int, ...],
) -> None:
    """A blade of weed that sways upwards from `foot` and thins out."""
    t = np.linspace(0, 1, 12)
    sway = foot[0] + height * 0.16 * np.sin(t * rng.uniform(3, 7) + rng.uniform(0, 6)) * t
    thickness = width * rng.uniform(0.5, 1.3) * (1 - t**2)
    up = foot[1] - t * height
    outline = [*zip(sway - thickness, up, strict=True), *zip((sway + thickness)[::-1], up[::-1], strict=True)]
    pen.polygon([(float(px), float(py)) for px, py in outline], fill=colour)


def _far_fish(pen: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, colour: tuple[int, int, int]) -> None:
    x, y, length = rng.uniform(0, size), rng.uniform(0, 0.7 * size), rng.uniform(0.04, 0.1) * size
    way = 1 if rng.random() < 0.5 else -1
    pen.ellipse([x - length, y - 0.4 * length, x + length, y + 0.4 * length], fill=colour)
    root, end = x - way * 0.8 * length, x - way * 1.6 * length
    pen.polygon([(root, y), (end, y - 0.5 * length), (end, y + 0.5 * length)], fill=colour)


def _foreground(rng: np.random.Generator, size: int) -> Plane:
    """Bubbles, drifting specks and now and then weed before the fish: (size, size, 4), colour 0..255, coverage 0..1."""
    scale = 2
    layer = Image.new("RGBA", (size * scale, size * scale), (120, 140, 140, 0))
    pen = ImageDraw.Draw(layer)
    wide = size * scale
    if rng.random() < 0.35:
        for _ in range(rng.integers(1, 4)):
            red, green, blue = WEEDS[rng.integers(len(WEEDS))]
            height = rng.uniform(0.3, 0.8) * wide
            foot = (rng.uniform(0, wide), wide * 1.02)
            _weed(pen, rng, foot, height=height, width=wide / 45, colour=(red, green, blue, 255))
    for _ in range(rng.integers(0, 9)):
        x, y, r = rng.uniform(0, wide), rng.uniform(0, wide), rng.uniform(0.006, 0.02) * wide
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(205, 228, 235, 60), outline=(225, 240, 245, 190), width=scale)
        pen.ellipse([x - 0.5 * r, y - 0.6 * r, x - 0.1 * r, y - 0.2 * r], fill=(255, 255, 255, 220))
    for _ in range(rng.integers(0, 40)):
        x, y, r = rng.uniform(0, wide), rng.uniform(0, wide), rng.uniform(0.001, 0.004) * wide
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(210, 220, 215, 110))
    cover = np.asarray(layer.reduce(scale), np.float32)
    return np.concatenate([cover[..., :3], cover[..., 3:] / 255], axis=-1)


def _light(colour: Plane, rng: np.random.Generator, size: int) -> Plane:
    """Dappled light of a random strength and tint on the fish."""
    dapple = 1 + rng.uniform(0.1, 0.45) * (_smooth_noise(rng, size, 6) - 0.5)
    tint = np.array((rng.uniform(0.78, 1.04), rng.uniform(0.92, 1.05), rng.uniform(0.94, 1.1)), np.float32)
    return colour * tint * (dapple * rng.uniform(0.8, 1.08))[..., None]


def _camera(scene: Plane, rng: np.random.Generator, size: int) -> Image.Image:
    """Exposure, turbid blur and sensor noise."""
    image = Image.fromarray(np.clip(scene * rng.uniform(0.82, 1.12), 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.0075) * size))
    noise = rng.normal(0, rng.uniform(1.5, 7), (size, size, 1)) + rng.normal(0, 1.5, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))


def _box(part: str, mask: Plane, cover: Plane, size: int) -> PartBox:
    """The extent of `mask` in the picture. A part that is out of the picture has an empty box at the edge."""
    solid = mask > 0.5
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    if not len(rows):
        return PartBox(part, 0.0, 0.0, 0.0, 0.0, False)
    seen = float((1 - cover[solid]).mean())
    return PartBox(
        part,
        float(columns[0] / size),
        float(rows[0] / size),
        float((columns[-1] + 1) / size),
        float((rows[-1] + 1) / size),
        seen >= VISIBLE_SHARE,
    )
