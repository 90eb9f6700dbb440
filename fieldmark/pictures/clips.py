"""Films: how long one is, and its frames as pictures, by PyAV (the extra `video`), which brings FFmpeg's libraries.

A frame of a film is a picture of its own, and its path goes on behind that of the film: `CLIP/RATEfps/NUMBER.jpg` is
what is shown NUMBER / RATE seconds after the first frame, `CLIP/at/SECONDS.jpg` what is shown at that time. A frame is
shown until the next one is. It is turned upright as the film says, and written as a JPEG of quality 95 with colours at
full resolution: what an H.264 film has lost before is more. The same film gives the same bytes on one machine.

No film reaches another file or server: the container is known by its first bytes, of those of CONTAINERS alone, so that
no playlist or script is read as one, and FFmpeg may open nothing by itself. Frames over MAX_PIXELS or MAX_SIDE, and
what is left of a film after MAX_DECODED pixels, MAX_WRITTEN bytes or MOST frames, are refused. A film that breaks off,
or cannot be decoded from some place on, has the frames before that.
"""

import importlib.util
import io
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from fieldmark.command import UserError
from fieldmark.pictures.files import BadImage, open_plain

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv",
    ".asf", ".ogv",
)  # fmt: skip
# The first bytes of a container, from which place on, and what FFmpeg calls it.
CONTAINERS = (
    *((4, kind, "mov") for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (0, b"\x1aE\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"\0\0\1\xba", "mpeg"), (0, b"FLV", "flv"),
    (0, b"0&\xb2u", "asf"), (0, b"OggS", "ogg"),
)  # fmt: skip
# Transport streams have a sync byte every so often, the first of them at this place.
TRANSPORT = ((188, 0), (192, 4))
HEAD_BYTES = 400
# A film of 8K has 33 million pixels a frame.
MAX_PIXELS = 40_000_000
# No JPEG of Pillow's is wider or higher.
MAX_SIDE = 65_500
# Five hours of 1920 x 1080 at 25 frames a second.
MAX_DECODED = 10**12
# Frames that are made of one film, ten hours of it at one a second.
MOST = 36_000
# Bytes of the frames of a film at one rate, a megabyte for each of MOST.
MAX_WRITTEN = MOST * 10**6
# Frames a second, and seconds from the first frame, that a path may name; the last is over eleven days.
MAX_RATE = 1000
MAX_SECONDS = 1e6
# A container may state a longer time than its pictures have: the last frame is shown for as long at most.
HELD_S = 1.0
QUALITY = 95
# What turns a frame by so many quarters, against the clock.
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
# Raised when the bytes that the rules of this module give for the same film change.
RULES = 2


def is_film(path: str | Path) -> bool:
    """Whether a file is one by its name."""
    return Path(path).suffix.lower() in SUFFIXES


def begins_as_film(path: str | Path) -> bool:
    """Whether a file is one by its first bytes."""
    try:
        with open_plain(path, math.inf) as file:
            return container_of(file.read(HEAD_BYTES)) is not None
    except (BadImage, OSError):
        return False


def can_read() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def frame_path(clip: str, rate: float, number: int) -> str:
    """The path of a frame at a rate of frames a second."""
    return f"{clip}/{rate:g}fps/{number:06d}.jpg"


def moment_path(clip: str, at: float) -> str:
    """The path of the frame that is shown so many seconds after the first one, to a thousandth."""
    return f"{clip}/at/{at:.3f}.jpg"


def count_frames(seconds: float, rate: float) -> int:
    """How many frames a film of that length has at a rate, one at least and MOST at most."""
    return max(1, min(MOST, math.ceil(seconds * rate - 1e-6)))


def length_of(path: str | Path) -> float:
    """Seconds that the pictures of a film last, as its container states; where it does not, all of it is read.

    Raises BadImage with the reason where it is no film.
    """
    with opened(path) as (container, stream):
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return float(container.duration / 1_000_000)
        first, last = math.inf, -math.inf
        for packet in container.demux(stream):
            if packet.pts is not None:
                at = float(packet.pts * stream.time_base)
                first, last = min(first, at), max(last, at)
        return max(0.0, last - first)


def write_frames(path: str | Path, rate: float, folder: Path) -> str | None:
    """Write the frames of a film at a rate into a folder, NUMBER.jpg each, in one pass over it.

    A frame that is shown at several of the times is one file of several names. Returns what ends them, None where the
    film does at its stated length: an error, or its true end. Raises BadImage where it is no film, and OSError where
    the folder cannot be written.
    """
    wanted, number, ends, size = count_frames(length_of(path), rate), 0, 0.0, 0
    shown: Any = None
    written: Path | None = None  # the file of the frame that is shown

    def show(until: float) -> None:
        nonlocal number, size, written
        while number < wanted and shown is not None and number / rate < until - 1e-6:
            file = folder / f"{number:06d}.jpg"
            if size > MAX_WRITTEN:
                raise BadImage(f"its frames have more than {MAX_WRITTEN} bytes; take fewer a second")
            size += file.write_bytes(as_jpeg(shown)) if written is None else link(written, file)
            number, written = number + 1, file

    try:
        for at, lasts, frame in decoded(path):
            show(at)
            shown, written, ends = frame, None, at + lasts
            if number >= wanted:
                return None
        show(ends + HELD_S)
        return None if number >= wanted else f"the film ends after {ends:.2f} s"
    except BadImage as error:
        if size <= MAX_WRITTEN:
            show(ends)
        return f"cannot be decoded from {ends:.2f} s on: {error}"


def link(file: Path, other: Path) -> int:
    """Give a file a second name; where the file system has none, or no more, copy it. Returns the bytes it takes."""
    try:
        os.link(file, other)
        return 0
    except OSError:
        shutil.copyfile(file, other)
        return file.stat().st_size


def write_moment(path: str | Path, at: float, file: Path) -> str | None:
    """Write the frame that is shown at that many seconds as a file; returns why there is none. Raises BadImage."""
    shown, ends, later = None, 0.0, False
    # Some containers have no list of places, and a search in them goes too far: then all frames before are decoded.
    for near in (at, None):
        for time, lasts, frame in decoded(path, near):
            later = time > at + 1e-6
            if later:
                break
            shown, ends = frame, time + lasts
        if shown is not None:
            break
    if shown is None and later:
        return "no frame up to there can be decoded"
    if shown is None or (not later and at > ends + HELD_S):
        return f"the film ends after {ends:.2f} s"
    file.write_bytes(as_jpeg(shown))
    return None


def as_jpeg(frame: Any) -> bytes:
    image = frame.to_image()
    # Films are turned by quarters. Another angle would have corners that no frame has.
    quarters = round(frame.rotation / 90) % 4
    if quarters:
        image = image.transpose(TURNS[quarters])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def decoded(path: str | Path, near: float | None = None) -> Iterator[tuple[float, float, Any]]:
    """The frames of a film with when each is shown, in seconds after the first, and for how long.

    `near`: from the last frame on that can be decoded by itself and is shown no later. Raises BadImage where decoding
    fails, after the frames before that.
    """
    with opened(path) as (container, stream):
        pixels, unit = 0, float(stream.time_base)
        start = float(stream.start_time * stream.time_base) if stream.start_time is not None else None
        usual = 1 / float(stream.average_rate) if stream.average_rate else 0.04
        if near is not None and start is not None:
            container.seek(int((start + near) / unit), stream=stream)
        for frame in container.decode(stream):
            pixels += frame.width * frame.height
            check_size(frame.width, frame.height)
            if pixels > MAX_DECODED:
                raise BadImage(f"more than {MAX_DECODED} pixels in all")
            if frame.pts is None or frame.is_corrupt:
                continue
            time = frame.pts * unit
            start = time if start is None else start
            yield max(0.0, time - start), frame.duration * unit if frame.duration else usual, frame


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A film as PyAV's container and its stream of pictures. What FFmpeg raises on broken bytes becomes BadImage."""
    try:
        import av
    except ImportError:
        remedy = "install the extra (pip install -c constraints.txt '.[video]'), or take films out of the data"
        raise UserError(f"films are read by PyAV, which is not installed; {remedy}") from None
    with open_plain(path, math.inf) as file:
        kind = container_of(file.read(HEAD_BYTES))
        file.seek(0)
        if kind is None:
            raise BadImage("is no film by its first bytes (MP4, MOV, Matroska, WebM, AVI, MPEG, TS, FLV, WMV, Ogg)")
        safe = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
        try:
            with av.open(file, format=kind, options=safe, metadata_errors="ignore", buffer_size=2**18) as container:
                stream: Any = container.streams.best("video")
                if stream is None:
                    raise BadImage("holds no stream of pictures")
                check_size(stream.codec_context.width, stream.codec_context.height)
                stream.codec_context.options = {"max_pixels": safe["max_pixels"]}
                # Several films are unpacked at once, one a thread of ours.
                stream.codec_context.thread_count = 1
                yield container, stream
        except av.FFmpegError as error:
            raise BadImage(f"cannot be decoded: {error.strerror}") from None
        # Broken bytes raise others, too: a text that is not UTF-8, a rate of nothing.
        except (ValueError, ArithmeticError, TypeError, IndexError) as error:
            raise BadImage(f"cannot be decoded: {type(error).__name__}") from None


def check_size(width: int, height: int) -> None:
    """Raises BadImage for frames that are not taken."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels a frame, more than {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels a frame, more than {MAX_SIDE} on a side")


def container_of(head: bytes) -> str | None:
    """What FFmpeg calls the container that begins so, of those that are safe; None for anything else."""
    for place, mark, kind in CONTAINERS:
        if head[place : place + len(mark)] == mark:
            return kind
    for step, first in TRANSPORT:
        if head[first : first + 1] == head[first + step : first + step + 1] == b"G":
            return "mpegts"
    return None
