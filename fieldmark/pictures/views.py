"""The views of an image, cut from one decode: what an encoder is shown of it, and where in the picture that lies.

View 0 is the picture as it is. Views 1, 2, ... are random crops, flipped at random; their seed is the image_id, so that
the same image always has the same views. A view may be cut further into windows, each with a forward pass of its own.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Embed, Regions
from fieldmark.pictures import regions
from fieldmark.pictures.boxes import Box, Region, cut_windows, in_image, middle, scale_region, visible_box
from fieldmark.pictures.cuts import image_id_of, object_of, place_of
from fieldmark.pictures.decode import MAX_PIXELS, BadImage, hash_file, open_file, open_part

# The area of a view's random crop, as a share of the largest square that fits into the picture.
VIEW_AREA = (0.5, 1.0)
# A picture may be decoded at a reduced size, as long as the side of whatever is cut from it has this many times as many
# pixels as the encoder reads. On sharp mosaics of photographs, the global vector then has a mean cosine of 0.9994 with
# that of a full decode; with 1.4 times as many pixels it is 0.997.
OVERSAMPLING = 2
# A decoded picture of more pixels is not held until the encoder has said where its object lies.
HELD_PIXELS = 2**21
# What the forward pass of a picture gave: one tensor an output.
Outputs = tuple[Tensor, ...]


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
    box: Box | None = None  # of its object, where the data have one
    size: tuple[int, int] | None = None  # width and height, where the index has them
    part: Box | None = None  # of the file, where the picture is not all of it (cuts.py)


class View(NamedTuple):
    """One view of an image, ready for the encoder."""

    image_id: str
    number: int
    pixels: Tensor  # bytes (n, 3, H, W), to be shown next: at first the whole view, then its windows
    boxes: list[Box]  # where in the image lies what is and what was shown: the whole view, windows, object, crops
    flip: bool
    # Where more is to be shown then: the view with that, from the outputs of all passes so far.
    further: "Callable[[list[Outputs]], View] | None" = None


class Sources(Sequence[Source]):
    """Images of the index as rows of its table, each made a Source when it is asked for.

    A row takes a fraction of the bytes of a Source with its path (on CPython 3.11 123, not 770), and to make one takes
    longer than to see that its image is embedded.
    """

    def __init__(self, folder: Path, table: pa.Table) -> None:
        """`table` has image_id, path, box, width and height."""
        self.folder, self.table = folder, table.combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> Source: ...
    @overload
    def __getitem__(self, place: slice) -> list[Source]: ...
    def __getitem__(self, place: int | slice) -> Source | list[Source]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        [row] = self.table.slice(place % len(self), 1).to_pylist()
        return source_of(self.folder, row["image_id"], row["path"], row["box"], (row["width"], row["height"]))


class Chosen(Sequence[Source]):
    """Some of a sequence of sources, by their places there."""

    def __init__(self, sources: Sequence[Source], places: np.ndarray) -> None:
        self.sources, self.places = sources, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Source: ...
    @overload
    def __getitem__(self, place: slice) -> list[Source]: ...
    def __getitem__(self, place: int | slice) -> Source | list[Source]:
        if isinstance(place, slice):
            return [self.sources[each] for each in self.places[place].tolist()]
        return self.sources[int(self.places[place])]


def image_ids_of(sources: Sequence[Source]) -> pa.Array:
    """The image_id of each source."""
    if isinstance(sources, Sources):
        # One array of `string` has 2 GiB at most, which is 33 million ids.
        return sources.table["image_id"].cast(pa.large_string()).combine_chunks()
    return pa.array([source.image_id for source in sources], pa.large_string())


def read_sources(folder: Path) -> Sources:
    """The usable images of the index; none of an index of documents, which have no picture."""
    return Sources(folder, read_usable())


def read_usable() -> pa.Table:
    """The rows of the usable images of the index; none of an index of documents."""
    index, columns = "data/index/images.parquet", ["image_id", "path", "box", "width", "height"]
    table = store.read_table(index, "index.images/1", [*columns, "status"])
    usable = table.slice(0, 0) if store.are_documents(index) else table.filter(pc.field("status") == "ok")
    return usable.select(columns)


class BucketSources:
    """The usable images of the index, to be taken bucket by bucket: as a table, since sources take more room."""

    def __init__(self, folder: Path, buckets: int) -> None:
        self.folder, self.table = folder, read_usable()
        self.buckets = store.buckets_of(self.table["image_id"], buckets)

    def __getitem__(self, bucket: int) -> Sources:
        return Sources(self.folder, self.table.take(pa.array(np.flatnonzero(self.buckets == bucket))))


def source_of(
    folder: Path, image_id: str, path: str, box: Sequence[float] | None, size: tuple[int, int] | None = None
) -> Source:
    """A row of the index as a source: its box is that of its object, or of the picture within the file."""
    place = place_of(folder, path, box)
    return Source(image_id, place.file, object_of(path, box), size, place.part)


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
    """An image that the index calls usable, decoded at full size or less (decode.open_part), and its true size.

    Raises UserError where its bytes are not those that were indexed, or can no longer be read.
    """
    remedy = "run index_images again (dvc repro)"
    try:
        with open_file(source.path) as file:
            if image_id_of(hash_file(file), source.part) != source.image_id:
                raise UserError(f"{source.path}: has changed since it was indexed; {remedy}")
            file.seek(0)
            return open_part(file, source.part, side)
    except BadImage as error:
        reason = str(error).removeprefix("cannot be read: ")
        raise UserError(f"{source.path}: could be read when it was indexed, not now ({reason}); {remedy}") from None


def prepare(source: Source, encoder: Preprocessor, settings: Embed) -> list[View]:
    """Decode one image and cut its views and their windows. Raises UserError as open_indexed does."""

    return cut_views(source.image_id, partial(open_indexed, source), encoder, settings, source.box)


def cut_views(
    image_id: str,
    open_at: Callable[[float], tuple[Image.Image, tuple[int, int]]],
    encoder: Preprocessor,
    settings: Embed,
    box: Box | None = None,
) -> list[View]:
    """The views of an image, their windows, and what of the regions is known beforehand.

    `open_at` decodes the image so that its shorter side keeps so many pixels, and gives its true size beside it; `box`
    is that of its object, where the data have one.
    """
    image, size = open_at(needed_side(encoder, settings))
    views = []
    for number in range(settings.views + 1):
        region, flip = view_region(image_id, number, *size)
        picture = image.crop(scale_region(region, size, image.size))
        seen = visible_box(region[2] - region[0], region[3] - region[1], encoder.preprocessing)
        windows = [window for count in settings.crops for window in cut_windows(within(seen), count)]
        share = encoder.preprocessing.get("crop_share", 1.0)
        boxes = [in_image(each, region, size) for each in (seen, *(middle(window, share) for window in windows))]
        pixels = cut(picture, [regions.WHOLE, *windows], encoder, flip=flip)
        view = View(image_id, number, pixels, boxes, flip)
        if settings.regions is not None:
            held = image if image.width * image.height <= HELD_PIXELS else None
            scene = Scene(held, open_at, size, region, encoder)
            view = show_object(view, scene, settings.regions, box)
        views.append(view)
    return views


def cut(picture: Image.Image, windows: list[Box], encoder: Preprocessor, *, flip: bool) -> Tensor:
    """Windows of a view's picture as bytes (n, 3, H, W) for the encoder, each mirrored where the view is."""
    pictures = [picture if window == regions.WHOLE else crop_fraction(picture, window) for window in windows]
    if flip:
        pictures = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pictures]
    return torch.stack([encoder.preprocess(trim(each, encoder.preprocessing)) for each in pictures])


def within(box: Box) -> Box:
    """The part of a box that lies in the picture."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], 1.0), min(box[3], 1.0)


class Scene(NamedTuple):
    """What the regions of a view are cut from. Their boxes count in shares of the view, which is not mirrored here."""

    image: Image.Image | None  # as the view was cut from it; None: it is too large to be held
    open_at: Callable[[float], tuple[Image.Image, tuple[int, int]]]
    size: tuple[int, int]  # the true one of the image
    region: Region  # of the view
    encoder: Preprocessor

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the view, in pixels of the image."""
        return self.region[2] - self.region[0], self.region[3] - self.region[1]

    def shown(self, window: Box) -> Box:
        """What the encoder sees of a window; more than the window where it pads."""
        width, height = (share * side for share, side in zip(sides(window), self.extent, strict=True))
        seen = visible_box(max(1, round(width)), max(1, round(height)), self.encoder.preprocessing)
        (x, y), (across, down) = window[:2], sides(window)
        return x + seen[0] * across, y + seen[1] * down, x + seen[2] * across, y + seen[3] * down

    def cut(self, windows: list[Box], *, flip: bool) -> Tensor:
        """Windows as bytes for the encoder, with pixels to spare where the file has them (OVERSAMPLING)."""
        smallest = min(min(across * self.extent[0], down * self.extent[1]) for across, down in map(sides, windows))
        needed = needed_side(self.encoder, Embed()) * min(self.size) / max(1.0, smallest)
        image = self.image
        if image is None or (image.size != self.size and min(image.size) < needed):
            image, _ = self.open_at(needed)
        picture = image.crop(scale_region(self.region, self.size, image.size))
        return cut(picture, windows, self.encoder, flip=flip)

    def place(self, window: Box) -> Box:
        """Where in the image lies what the encoder sees of a window."""
        return in_image(within(self.shown(window)), self.region, self.size)

    def add(self, view: View, windows: list[Box]) -> View:
        """A view that shows these windows next, behind what it was to show."""
        boxes = [self.place(window) for window in windows]
        pixels = torch.cat([view.pixels, self.cut(windows, flip=view.flip)]) if windows else view.pixels
        return view._replace(pixels=pixels, boxes=[*view.boxes, *boxes], further=None)


def sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def show_object(view: View, scene: Scene, asked: Regions, box: Box | None) -> View:
    """A view that shows its object and crops of it as well, at once as far as no map has to say where they are."""
    if asked.object != "map":
        return show_crops(view, scene, asked, in_view(box, scene) if asked.object == "box" else regions.WHOLE)

    def further(found: list[Outputs]) -> View:
        values = upright(regions.activation(asked.map, found[0]), view)
        return show_crops(done(view), scene, asked, regions.find_object(values, scene.shown(regions.WHOLE)))

    return view._replace(further=further)


def show_crops(view: View, scene: Scene, asked: Regions, place: Box) -> View:
    """A view that shows its object, whose box is `place`, and crops of that."""
    place = seen_whole(place, scene)
    seen = scene.shown(place)
    base = max(seen[0], place[0]), max(seen[1], place[1]), min(seen[2], place[2]), min(seen[3], place[3])
    if asked.crops != "map":
        return scene.add(view, [place, *regions.blind_windows(base, asked, f"{view.image_id}:{view.number}:crops")])
    shown = scene.add(view, [place])

    def further(found: list[Outputs]) -> View:
        values = upright(regions.activation(asked.map, found[-1]), view)
        return scene.add(done(shown), regions.best_windows(values, seen, base, asked))

    return shown._replace(further=further)


def seen_whole(place: Box, scene: Scene) -> Box:
    """A box as the encoder can see it: of anything but a square, one that resizes the shorter side sees the middle."""
    squares = scene.encoder.preprocessing["resize_mode"] == "shortest"
    return regions.grow_square(place, *scene.extent) if squares else place


def marked_object(source: Source, encoder: Preprocessor) -> Box | None:
    """Where in view 0 the object's node of a source lies with `object: box`; None where its size is not known."""
    if source.size is None:
        return None
    scene = Scene(None, partial(open_indexed, source), source.size, (0, 0, *source.size), encoder)
    return scene.place(seen_whole(in_view(source.box, scene), scene))


def in_view(box: Box | None, scene: Scene) -> Box:
    """The part of an image's box that a view shows; the whole view where the image has none, or it shows none of it."""
    if box is None:
        return regions.WHOLE
    (left, top, _, _), (across, down), (width, height) = scene.region, scene.extent, scene.size
    x0, x1 = ((share * width - left) / across for share in (box[0], box[2]))
    y0, y1 = ((share * height - top) / down for share in (box[1], box[3]))
    part = within((x0, y0, x1, y1))
    return part if part[0] < part[2] and part[1] < part[3] else regions.WHOLE


def upright(values: np.ndarray, view: View) -> np.ndarray:
    """A map of a view as the view lies in the picture."""
    return values[:, ::-1] if view.flip else values


def done(view: View) -> View:
    """A view all of whose pictures were shown."""
    return view._replace(pixels=view.pixels[:0])


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
    asked = settings.regions
    of_regions = 0 if asked is None else 1 + sum(count for _, count in asked.windows)
    return (settings.views + 1) * (1 + sum(count**2 for count in settings.crops) + of_regions)
