"""Pictures as everything downstream sees them: upright, 8-bit sRGB, one frame, opened within a set memory.

Colours are converted from the picture's own ICC profile to sRGB; a profile that cannot be read counts as none. What is
transparent is laid on BACKGROUND. Integers of 16 bits are divided by 257, and so are those of 32 bits unless all are
under 256. Floats are taken as values in [0,1], [0,255] or [0,65535], the smallest of these ranges that holds them all.
Of a picture with several frames the first is taken. Where a smaller picture is enough (`open_reduced`), a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size.
"""

import io
import math
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

# A picture of more pixels is refused as a decompression bomb before it is decoded, which takes up to 24 bytes a pixel.
MAX_PIXELS = 120_000_000
# What shows through where a picture is transparent: mid-grey, so that neither dark nor light subjects vanish.
BACKGROUND = (128, 128, 128)
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
}  # fmt: skip
# The formats that a file may have, whatever its suffix says. Others are not safe: of some that Pillow reads, decoding
# starts another program (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
pillow_heif.register_heif_opener(thumbnails=False)
# Values of EXIF's Orientation that turn a picture by a quarter.
SIDEWAYS = (5, 6, 7, 8)
# Raised when the pixels that the rules of this module give for the same file change.
RULES = 3

# Pillow warns of large sizes, which MAX_PIXELS decides about, and of odd metadata, which does not change the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Item = TypeVar("Item")
Result = TypeVar("Result")


class BadImage(Exception):
    """A picture that cannot be used; the message says why."""


def open_rgb(path: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of a picture in RGB, turned as its EXIF says. Raises BadImage with the reason."""
    return open_reduced(path)[0]


def open_reduced(path: str | Path | IO[bytes], side: float = math.inf) -> tuple[Image.Image, tuple[int, int]]:
    """open_rgb of a picture whose shorter side may shrink to `side` pixels, but no further, and its true upright size.

    Only a JPEG is decoded at a smaller size: its transform allows to leave out coefficients, which saves their time.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            if side < min(width, height):
                image.draft(None, (math.ceil(side), math.ceil(side)))
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS:
                width, height = height, width
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image), (width, height)
    # No message names the path: the table that they are written to is the same on every machine.
    except UnidentifiedImageError:
        raise BadImage(f"is none of {', '.join(FORMATS)}") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or ' '.join(str(error).split())[:160]}") from None
    # Pillow's decoders raise many types on broken bytes; each is a fact about the picture, not about the program.
    except (ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError,
            MemoryError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None


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
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image if image.mode == mode else image.convert(mode)


def dhash(image: Image.Image) -> int:
    """The 64-bit difference hash of a 9 x 8 grey thumbnail: a bit is 1 where a pixel is brighter than its right one."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """`map` in threads, in order. At most `ahead` results wait, so that memory does not grow with the items."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
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
