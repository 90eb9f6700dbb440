import contextlib
import hashlib
import io
import os
import random
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fieldmark.pictures.decode import (
    BACKGROUND,
    MAX_PIXELS,
    BadImage,
    dhash,
    hash_file,
    map_ahead,
    open_file,
    open_rgb,
)
from fieldmark.pictures.files import MAX_BYTES

UPRIGHT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
# How a camera that is held so stores the upright picture: the inverse of what EXIF asks for.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_upright_picture(orientation: int, tmp_path: Path) -> None:
    method = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (UPRIGHT if method is None else UPRIGHT.transpose(method)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(UPRIGHT))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_keep_their_shades(name: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / name)
    assert pixels(tmp_path / name).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


def test_sixteen_dark_bits_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == 0).all()


@pytest.mark.parametrize(("values", "shades"), [([0, 0.5, 1], [0, 127, 255]), ([0, 100, 255], [0, 100, 255])])
def test_floats_are_taken_by_their_range(values: list[float], shades: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == shades


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged: what it calls red is green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_colours_go_through_the_profile(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert pixels(tmp_path / "a.png")[0, 0] == pytest.approx([0, 255, 0], abs=3)
    red.convert("RGBA").save(tmp_path / "b.png", icc_profile=swapped_profile())
    assert pixels(tmp_path / "b.png")[0, 0] == pytest.approx([0, 255, 0], abs=3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in {"srgb": srgb, "bad": b"x"}.items():
        red.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert pixels(tmp_path / f"{name}.png")[0, 0].tolist() == [255, 0, 0]


def test_a_profile_of_another_kind_counts_as_none(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert (pixels(tmp_path / "a.png") == 100).all()


@pytest.mark.parametrize("name", ["a.heic", "a.avif"])
def test_pictures_of_phones(name: str, tmp_path: Path) -> None:
    picture = UPRIGHT.resize((70, 50), Image.Resampling.NEAREST)
    picture.save(tmp_path / name, quality=95)
    assert np.abs(pixels(tmp_path / name) - np.asarray(picture)).mean() < 12
    (tmp_path / "cut").write_bytes((tmp_path / name).read_bytes()[:300])
    with pytest.raises(BadImage):
        open_rgb(tmp_path / "cut")


def test_transparency_lies_on_grey(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    opaque, clear, half = pixels(tmp_path / "a.png")[0]
    assert opaque.tolist() == [255, 0, 0]
    assert clear.tolist() == list(BACKGROUND)
    assert half == pytest.approx([64] * 3, abs=1)
    Image.fromarray(rgba[:, :, [0, 3]]).save(tmp_path / "grey.png")
    assert pixels(tmp_path / "grey.png")[0, 1].tolist() == list(BACKGROUND)


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([2, 1, 0])
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[0, 0, 255], [0, 255, 0], [255, 0, 0]]]
    image.save(tmp_path / "b.png", transparency=1)
    assert pixels(tmp_path / "b.png")[0, 1].tolist() == list(BACKGROUND)


def test_cmyk_grey_and_bits(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert pixels(tmp_path / "a.jpg")[8, 8] == pytest.approx([255, 0, 0], abs=6)
    Image.new("L", (2, 2), 77).save(tmp_path / "b.png")
    assert (pixels(tmp_path / "b.png") == 77).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "c.png")
    assert (pixels(tmp_path / "c.png") == 255).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_several_frames_the_first(name: str, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    red.save(tmp_path / name, save_all=True, append_images=[blue])
    assert pixels(tmp_path / name)[4, 4] == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    image = open_rgb(tmp_path / "a.png")
    assert image.size == size
    assert dhash(image) == 0


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    UPRIGHT.save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(UPRIGHT))
    # Pillow would start Ghostscript for this one.
    UPRIGHT.save(tmp_path / "b.jpg", "EPS")
    with pytest.raises(BadImage, match="none of JPEG"):
        open_rgb(tmp_path / "b.jpg")


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one line of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(3 * width + 1)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("height", [MAX_PIXELS // 10_000 + 1, 10 * MAX_PIXELS // 10_000])
def test_a_bomb_is_refused_by_its_header(height: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of(10_000, height))
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"pixels"):
        open_rgb(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    # What is refused is the size: Pillow itself would open this file.
    (tmp_path / "b.png").write_bytes(png_of(10, 10))
    assert open_rgb(tmp_path / "b.png").size == (10, 10)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    """100 kB that take minutes: each scan refines all pixels by nothing."""
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000), (200, 30, 40)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    assert open_rgb(io.BytesIO(content)).size == (3000, 3000)
    with pytest.raises(BadImage, match=r"3009 scans of 3000 x 3000 pixels, more than"):
        open_rgb(io.BytesIO(content[:last] + 3000 * content[last:-2] + content[-2:]))


def test_broken_files_say_why_and_not_where(tmp_path: Path) -> None:
    UPRIGHT.resize((200, 200)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, data in {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in {
        "cut": "truncated",
        "empty": "none of",
        "text": "none of",
        "folder": "directory",
        "link": "No such file",
        "none": "No such file",
    }.items():
        with pytest.raises(BadImage, match=reason) as error:
            open_rgb(tmp_path / name)
        assert str(tmp_path) not in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_file_is_a_reason_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(20 * 2**30)
    for name, reason in {
        "pipe.jpg": "is a named pipe, not a file",
        "endless.jpg": "is a device, not a file",
        "sparse.jpg": f"{20 * 2**30} bytes, more than {MAX_BYTES}",
        "a\0b.jpg": "NUL in its name",
        "x" * 300: "File name too long",
    }.items():
        for look in (open_file, open_rgb):
            with pytest.raises(BadImage, match=reason) as error:
                look(tmp_path / name)
            assert str(tmp_path) not in str(error.value)


def test_a_file_that_states_no_size_is_not_read(tmp_path: Path) -> None:
    """As /proc/kmsg, a read from which waits for ever; this one is of this process, and text."""
    (tmp_path / "a.jpg").symlink_to("/proc/self/status")
    with open_file(tmp_path / "a.jpg") as file:
        assert hash_file(file) == hashlib.sha256(b"").hexdigest()
    with pytest.raises(BadImage, match="none of JPEG"):
        open_rgb(tmp_path / "a.jpg")


def test_a_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    for content in (b"", b"x", bytes(range(256)) * 10_000):
        (tmp_path / "a").write_bytes(content)
        with open_file(tmp_path / "a") as file:
            assert hash_file(file) == hashlib.sha256(content).hexdigest()


def test_hostile_bytes_are_a_picture_or_a_reason() -> None:
    chance = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"):
        buffer = io.BytesIO()
        image = UPRIGHT.convert("P") if kind == "GIF" else UPRIGHT
        image.save(buffer, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
        for _ in range(300):
            data = bytearray(buffer.getvalue())
            for _ in range(chance.choice([1, 2, 8])):
                data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
            with contextlib.suppress(BadImage):
                assert open_rgb(io.BytesIO(data)).mode == "RGB"


def test_dhash_reads_left_to_right() -> None:
    falling = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8)[::-1] * 20, (8, 1)))
    assert dhash(falling) == 2**64 - 1
    assert dhash(falling.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0


def test_map_ahead_keeps_the_order_and_does_not_run_away() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: number * number, items(), workers=3, ahead=4)
    for number, result in enumerate(results):
        assert result == number * number
        assert len(taken) <= number + 6
    assert len(taken) == 50


def test_map_ahead_raises_and_stops() -> None:
    started = []
    hold = threading.Event()

    def work(number: int) -> int:
        started.append(number)
        if number == 1:
            raise ValueError("one")
        if number > 1:
            hold.wait(5)
        return number

    results = map_ahead(work, range(1000), workers=1, ahead=10)
    assert next(results) == 0
    threading.Timer(0.05, hold.set).start()
    with pytest.raises(ValueError, match="one"):
        next(results)
    assert len(started) < 20
