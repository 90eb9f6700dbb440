"""Pictures as everything downstream sees them: upright, 8-bit sRGB, one frame, opened within a set memory.

Colours are converted from the picture's own ICC profile to sRGB; a profile that cannot be read counts as none. What is
transparent is laid on BACKGROUND. Integers of 16 bits are divided by 257, and so are those of 32 bits unless all are
under 256. Floats are taken as values in [0,1], [0,255] or [0,65535], the smallest of these ranges that holds them all.
Of a picture with several frames the first is taken. Where a smaller picture is enough (`open_reduced`), a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size.
"""

import hashlib
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from fieldmark.pictures.boxes import Box, region_of, scale_region
from fieldmark.pictures.files import BadImage, open_plain
from fieldmark.pictures.held import find_held, unpack
from fieldmark.pictures.metadata import HEAD_BYTES, STEPS, format_of, hide_metadata

# A picture of more pixels is refused as a decompression bomb before it is decoded, which takes up to 24 bytes a pixel.
MAX_PIXELS = 120_000_000
# How much of a file is read at a time to hash it.
BLOCK_BYTES = 2**20
# How many pixels all scans of a progressive JPEG may have together, which takes about ten seconds. Cameras and programs
# write ten scans or so.
MAX_SCANNED = 60 * MAX_PIXELS
SCAN = b"\xff\xda"
# A part of a file is not taken for thinner than this share of it when it is asked how far the file may be reduced.
SMALLEST_PART = 2**-16
# What shows through where a picture is transparent: mid-grey, so that neither dark nor light subjects vanish.
BACKGROUND = (128, 128, 128)
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif",
}  # fmt: skip
# The formats that a file may have, whatever its suffix says. Others are not safe: of some that Pillow reads, decoding
# starts another program (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
pillow_heif.register_heif_opener(thumbnails=False)
# What makes a picture upright, by the value of EXIF's Orientation, and which of it exchanges width and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(TURNS[value] for value in (5, 6, 7, 8))
# Entries of a TIFF's directory.
TILE_WIDTH, TILE_HEIGHT = 322, 323
# Raised when the pixels that the rules of this module give for the same file change.
RULES = 3

# Pillow warns of large sizes, which MAX_PIXELS decides about, and of odd metadata, which does not change the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# A colour profile or a text of a PNG may be so long when it is unpacked; all texts together keep Pillow's own limit.
PngImagePlugin.MAX_TEXT_CHUNK = 2**22

Item = TypeVar("Item")
Result = TypeVar("Result")


def open_file(path: str | Path) -> IO[bytes]:
    """A picture's file, opened to be read, or a picture that lies in another file (held.py).

    Raises BadImage with the reason where it is no file, or too large to be one.
    """
    held = find_held(path)
    return open_plain(path if held is None else unpack(held))


def hash_file(file: IO[bytes]) -> str:
    """sha256 of a file from its start, and of no more than the size that it states. Raises BadImage."""
    digest = hashlib.sha256()
    try:
        left = os.fstat(file.fileno()).st_size
        while block := file.read(min(left, BLOCK_BYTES)):
            digest.update(block)
            left -= len(block)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def open_rgb(path: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of a picture in RGB, turned as its EXIF says. Raises BadImage with the reason."""
    return open_reduced(path)[0]


def open_reduced(path: str | Path | IO[bytes], side: float = math.inf) -> tuple[Image.Image, tuple[int, int]]:
    """open_rgb of a picture whose shorter side may shrink to `side` pixels, but no further, and its true upright size.

    Only a JPEG is decoded at a smaller size: its transform allows to leave out coefficients, which saves their time.
    A picture that cannot be decoded as it is is decoded with its metadata hidden (metadata.py), if it has any.
    """
    if isinstance(path, str | Path):
        with open_file(path) as file:
            # Some files of /proc state no size, and a read from them waits.
            if os.fstat(file.fileno()).st_size == 0:
                raise bad_image(UnidentifiedImageError())
            return open_reduced(file, side)
    try:
        return decode(path, side)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise bad_image(error) from None
    # Pillow's decoders raise many types on broken bytes; each is a fact about the picture, not about the program.
    except Exception as error:
        reason = error
    try:
        path.seek(0)
        head = path.read(HEAD_BYTES)
        content = bytearray(head + path.read() if format_of(head) else b"")
    except OSError as error:
        raise bad_image(error) from None
    exif = b""
    for step in STEPS:
        found = hide_metadata(content, step)
        if found is not None:
            exif = exif or found
            try:
                return decode(io.BytesIO(content), side, exif)
            except BadImage:
                raise
            except Exception as error:
                reason = error
    raise bad_image(reason) from None


def open_part(file: IO[bytes], part: Box | None, side: float = math.inf) -> tuple[Image.Image, tuple[int, int]]:
    """open_reduced of a part of a file, at least a pixel a side, whose own size is the true one; None: of all of it."""
    if part is None:
        return open_reduced(file, side)
    image, size = open_reduced(file, side / max(min(part[2] - part[0], part[3] - part[1]), SMALLEST_PART))
    region = region_of(part, size)
    return image.crop(scale_region(region, size, image.size)), (region[2] - region[0], region[3] - region[1])


def open_place(path: str | Path, part: Box | None) -> tuple[Image.Image, tuple[int, int]]:
    """open_rgb of a part of a file, or of all of it, and the size of the file in pixels."""
    image, size = open_reduced(path)
    return (image if part is None else image.crop(region_of(part, size))), size


def bad_image(error: Exception) -> BadImage:
    """What kept Pillow from decoding a picture, as one line that does not name the path."""
    said = " ".join(str(error).split())[:160]
    if isinstance(error, UnidentifiedImageError):
        return BadImage(f"is none of {', '.join(FORMATS)}")
    if isinstance(error, OSError):
        return BadImage(f"cannot be read: {error.strerror or said}")
    return BadImage(f"{type(error).__name__}: {said}")


def decode(file: IO[bytes], side: float, exif: bytes = b"") -> tuple[Image.Image, tuple[int, int]]:
    """open_reduced of a file as it is; `exif` is its EXIF block where that is hidden. Raises what Pillow raises."""
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        check_size(image)
        if "progressive" in image.info:
            check_scans(image, file)
        if side < min(width, height):
            image.draft(None, (math.ceil(side), math.ceil(side)))
        image.load()
        if exif:
            image.info["exif"] = exif
        turn = turn_of(image)
        if turn in SIDEWAYS:
            width, height = height, width
        upright = to_rgb(image)
        return upright if turn is None else upright.transpose(turn), (width, height)


def check_size(image: Image.Image) -> None:
    """Raises BadImage for a picture that is too large to be decoded, or one of whose tiles is (a TIFF states both)."""
    tags = getattr(image, "tag_v2", {})
    for width, height in (image.size, (tags.get(TILE_WIDTH), tags.get(TILE_HEIGHT))):
        if isinstance(width, int) and isinstance(height, int) and width * height > MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def check_scans(image: Image.Image, file: IO[bytes]) -> None:
    """Raises BadImage for a progressive JPEG of so many scans, a few bytes each, that decoding it takes minutes."""
    place = file.tell()
    file.seek(0)
    scans = file.read().count(SCAN)
    file.seek(place)
    width, height = image.size
    if width * height * scans > MAX_SCANNED:
        raise BadImage(f"{scans} scans of {width} x {height} pixels, more than {MAX_SCANNED} in all")


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes a loaded picture upright, as its EXIF or XMP says; None where nothing does, or nothing readable."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return TURNS.get(orientation)
    # Pillow's parser of metadata raises as many types as its decoders.
    except Exception:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit sRGB, as the module's docstring says."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(to_bytes(np.asarray(image, dtype=np.float32), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = to_srgb(image.convert("RGBA"), "RGBA")
        ground = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return to_srgb(image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB"), "RGB")


def to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits as bytes. Modes `I` and `F` do not say their range: the largest value decides."""
    most = values.max(initial=0)
    if mode == "F" and most <= 1:
        values = values * 255
    elif mode.startswith("I;16") or most > 255:
        values = values / 257
    return np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)


def to_srgb(image: Image.Image, mode: str) -> Image.Image:
    """A picture in `mode` (RGB or RGBA), its colours converted from its ICC profile if it has one other than sRGB."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode=mode)
                assert converted is not None
                return converted
        # A profile is metadata: what is wrong with it does not make the picture broken.
        except Exception:
            pass
    return image if image.mode == mode else image.convert(mode)


def dhash(image: Image.Image) -> int:
    """The 64-bit difference hash of a 9 x 8 grey thumbnail: a bit is 1 where a pixel is brighter than its right one."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def processors() -> int:
    """How many threads of this process decode: all of the machine's processors, or a worker's share (cluster.py)."""
    return int(os.environ.get("FIELDMARK_PROCESSORS") or os.cpu_count() or 1)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[Result, None, None]:
    """`map` in threads, in order. At most `ahead` results wait, so that memory does not grow with the items.

    `initializer` is called once in each thread.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, initializer=initializer) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
