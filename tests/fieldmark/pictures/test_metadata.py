"""Odd metadata: whatever stands beside the pixels, a good picture stays good, and keeps its pixels and its turn."""

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from fieldmark.pictures.decode import BadImage, open_rgb
from fieldmark.pictures.metadata import TIFF_PIXELS

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION, MAKE, X_RESOLUTION, UNIT = 0x0112, 0x010F, 0x011A, 0x0128
BYTE, TEXT, SHORT, LONG, RATIONAL, UNDEFINED, DOUBLE = 1, 2, 3, 4, 5, 7, 12
Entry = tuple[int, int, int, bytes]


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(open_rgb(io.BytesIO(content)))


def directory(entries: list[Entry], order: str = "<", start: int = 0) -> bytes:
    """A directory of TIFF entries (tag, type, count, 4 bytes that are the value or its place), and none after it."""
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", start)


def exif_of(entries: list[Entry], order: str = "<") -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + directory(entries, order)


def jpeg_with(content: bytes, marker: int, segment: bytes) -> bytes:
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(segment) + 2) + segment + content[2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(content: bytes, *chunks: bytes) -> bytes:
    return content[:33] + b"".join(chunks) + content[33:]


def webp_with(content: bytes, block: bytes, length: int | None = None) -> bytes:
    size = [(side - 1).to_bytes(3, "little") for side in PICTURE.size]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes([8, 0, 0, 0]) + b"".join(size)
    exif = b"EXIF" + struct.pack("<I", len(block) if length is None else length) + block + bytes(len(block) % 2)
    body = b"WEBP" + extended + content[12:] + exif
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_with(content: bytes, entries: list[Entry]) -> bytes:
    """A TIFF whose directory stands at its end anew, with these entries too."""
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    own = [content[place + 2 + 12 * index : place + 14 + 12 * index] for index in range(count)]
    parsed = [(*struct.unpack("<HHI", entry[:8]), entry[8:]) for entry in own]
    content += bytes(len(content) % 2)
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + directory(sorted([*parsed, *entries]))


def with_exif(kind: str, entries: list[Entry]) -> bytes:
    """A picture of this kind whose EXIF holds these entries."""
    content, block = saved(kind), exif_of(entries)
    if kind == "JPEG":
        return jpeg_with(content, 0xE1, b"Exif\0\0" + block)
    if kind == "PNG":
        return png_with(content, chunk(b"eXIf", block))
    return webp_with(content, block) if kind == "WEBP" else tiff_with(content, entries)


KINDS = ("JPEG", "PNG", "WEBP", "TIFF")
PLAIN = {kind: pixels(saved(kind)) for kind in KINDS}
QUARTER = (ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entry",
    [
        (MAKE, RATIONAL, 1, struct.pack("<I", 8)),
        (MAKE, DOUBLE, 1, struct.pack("<I", 8)),
        (MAKE, TEXT, 2**31, struct.pack("<I", 2**31)),
        (X_RESOLUTION, TEXT, 4, b"many"),
        (X_RESOLUTION, RATIONAL, 0, bytes(4)),
        (UNIT, RATIONAL, 1, struct.pack("<I", 0)),
        (UNIT, SHORT, 1, struct.pack("<HH", 3, 0)),
        (0x8769, UNDEFINED, 4, b"none"),
        (0x8825, LONG, 2, struct.pack("<I", 2**31)),
        (0x02BC, DOUBLE, 1, struct.pack("<I", 8)),
    ],
)
def test_an_odd_entry_of_exif_leaves_pixels_and_orientation(kind: str, entry: Entry) -> None:
    content = with_exif(kind, sorted([entry, QUARTER]))
    assert np.array_equal(pixels(content), np.rot90(PLAIN[kind], 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entry",
    [
        (ORIENTATION, SHORT, 1, struct.pack("<HH", 9, 0)),
        (ORIENTATION, UNDEFINED, 4, b"\6\0\0\0"),
        (ORIENTATION, TEXT, 4, b"six\0"),
        (ORIENTATION, SHORT, 2**20, struct.pack("<I", 2**31)),
    ],
)
def test_an_orientation_that_is_none_turns_nothing(kind: str, entry: Entry) -> None:
    assert np.array_equal(pixels(with_exif(kind, [entry])), PLAIN[kind])


@pytest.mark.parametrize(
    ("marker", "segment"),
    [
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0" + exif_of([(0xB001, LONG, 1, struct.pack("<I", 2)), (0xB002, UNDEFINED, 4, b"none")])),
        (0xE2, b"MPF\0" + exif_of([(0xB001, LONG, 1, struct.pack("<I", 2**31))])),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x02ab"),
        (0xEE, b"Adobe"),
        (0xE1, b"Exif\0\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>0</tiff:Orientation>"),
    ],
)
def test_an_odd_segment_of_a_jpeg_is_passed_over(marker: int, segment: bytes) -> None:
    content = jpeg_with(saved("JPEG"), marker, segment)
    assert np.array_equal(pixels(content), PLAIN["JPEG"])
    turned = jpeg_with(content, 0xE1, b"Exif\0\0" + exif_of([QUARTER]))
    assert pixels(turned).shape == (20, 12, 3)


LONG_TEXT = b"Comment\0" + b"x" * 20_000_000


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"tEXt", LONG_TEXT)],
        [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG_TEXT))] * 8,
        [chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG_TEXT))],
        [chunk(b"iCCP", b"none\0\0" + zlib.compress(bytes(20_000_000)))],
        [chunk(b"iCCP", b"none\0\7")],
        [chunk(b"iCCP", b"")],
        [chunk(b"pHYs", b"1")],
        [chunk(b"cHRM", b"1")],
        [chunk(b"gAMA", b"")],
        [chunk(b"sRGB", b"")],
        [chunk(b"tRNS", b"1")],
        [chunk(b"acTL", bytes(8)), chunk(b"fcTL", b"")],
        [chunk(b"fdAT", b"")],
        [chunk(b"tIME", b"now")[:-4] + b"sum."],
    ],
)
def test_an_odd_chunk_of_a_png_is_passed_over(chunks: list[bytes]) -> None:
    content = png_with(saved("PNG"), *chunks)
    assert np.array_equal(pixels(content), PLAIN["PNG"])
    turned = png_with(content, chunk(b"eXIf", exif_of([QUARTER])))
    assert np.array_equal(pixels(turned), np.rot90(PLAIN["PNG"], 3))


def test_beside_a_long_text_the_orientation_of_another_counts() -> None:
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>')
    content = png_with(saved("PNG"), chunk(b"tEXt", LONG_TEXT), xmp)
    assert np.array_equal(pixels(content), np.rot90(PLAIN["PNG"], 3))


def test_a_long_profile_still_says_the_colours() -> None:
    """Red and green exchanged, in a profile of 3 MB, and then beside a text that is too long."""
    swapped = SRGB.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")) + bytes(3_000_000)
    swapped = struct.pack(">I", len(swapped)) + swapped[4:]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, "PNG")
    profile = chunk(b"iCCP", b"swap\0\0" + zlib.compress(swapped))
    for more in ([], [chunk(b"tEXt", LONG_TEXT)]):
        content = png_with(buffer.getvalue(), profile, *more)
        assert pixels(content)[0, 0] == pytest.approx([0, 255, 0], abs=3)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_exif_that_is_none_in_pictures_of_phones(kind: str) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[MAKE] = "some camera of a make"
    PICTURE.resize((80, 64)).save(buffer, kind, exif=exif.tobytes())
    content = buffer.getvalue()
    plain = pixels(content)
    start = content.index(b"II*\0") if b"II*\0" in content else content.index(b"MM\0*")
    for place in range(start, content.index(b"some camera")):
        odd = bytearray(content)
        odd[place : place + 8] = b"\xff" * 8
        assert np.array_equal(pixels(bytes(odd)), plain)


def test_a_webp_ends_before_metadata_that_are_cut() -> None:
    for length in (None, 9, 10**6, 2**32 - 1):
        assert np.array_equal(pixels(webp_with(saved("WEBP"), b"Exif\0\0II*", length)), PLAIN["WEBP"])


def test_what_is_broken_stays_broken() -> None:
    for kind in KINDS:
        content = with_exif(kind, [(MAKE, RATIONAL, 1, struct.pack("<I", 8))])
        for damaged in (content[: len(content) // 3], content[:30], content[:4]):
            with pytest.raises(BadImage) as error:
                open_rgb(io.BytesIO(damaged))
            assert "\n" not in str(error.value)


def test_a_tiff_whose_tile_is_a_bomb_is_refused() -> None:
    tile = [(tag, LONG, 1, struct.pack("<I", 40_000)) for tag in (322, 323)]
    with pytest.raises(BadImage, match="40000 x 40000 pixels, more than"):
        pixels(tiff_with(saved("TIFF"), [*tile, (324, LONG, 1, struct.pack("<I", 8))]))


TAGS = (
    0x010E, MAKE, 0x0110, X_RESOLUTION, 0x011B, UNIT, 0x0131, 0x0132, 0x0213, 0x02BC, 0x83BB, 0x8649, 0x8769, 0x8825,
    0x927C, 0x9286, 0xA005, 0xA401,
)  # fmt: skip


def random_exif(chance: random.Random) -> tuple[list[Entry], bytes]:
    """Entries of random types, counts and values, and an EXIF block of them, in one of three damaged."""
    order = chance.choice("<>")
    entries: list[Entry] = []
    for _ in range(chance.randint(0, 10)):
        tag = chance.choice(TAGS) if chance.random() < 0.85 else chance.randrange(65536)
        count = chance.choice([0, 1, 1, 1, 2, 3, 8, 100, 2**16, 2**31, 2**32 - 1])
        value = chance.choice([bytes(4), struct.pack(order + "I", chance.randrange(400)), chance.randbytes(4)])
        entries.append((tag, chance.choice([*range(17), 99, 65535]), count, value))
    turn = struct.pack(order + "HH", chance.randrange(10), 0)
    entries.append((ORIENTATION, chance.choice([SHORT, SHORT, SHORT, LONG, RATIONAL, TEXT]), 1, turn))
    block = bytearray(exif_of(sorted(entries), order) + chance.randbytes(chance.choice([0, 10, 300])))
    damage = chance.randrange(9)
    if damage == 0:
        block = bytearray(chance.randbytes(chance.randint(0, 60)))
    elif damage == 1:
        del block[chance.randint(0, len(block)) :]
    elif damage == 2:
        for _ in range(5):
            block[chance.randrange(len(block))] = chance.randrange(256)
    return [entry for entry in entries if entry[0] not in TIFF_PIXELS and entry[0] != 0xBC01], bytes(block)


@pytest.mark.slow
def test_6000_exif_blocks_lose_no_picture() -> None:
    """Each of the 6,000 in a JPEG, a PNG, a WebP and a TIFF: no traceback, and the pixels of before, turned or not."""
    chance = random.Random(0)
    content = {kind: saved(kind) for kind in KINDS}
    turned = {
        kind: [PLAIN[kind], *(np.asarray(Image.fromarray(PLAIN[kind]).transpose(turn)) for turn in Image.Transpose)]
        for kind in KINDS
    }
    put: dict[str, Callable[[bytes], bytes]] = {
        "JPEG": lambda block: jpeg_with(content["JPEG"], 0xE1, b"Exif\0\0" + block),
        "PNG": lambda block: png_with(content["PNG"], chunk(b"eXIf", block)),
        "WEBP": lambda block: webp_with(content["WEBP"], block),
    }
    lost = []
    for number in range(6000):
        entries, block = random_exif(chance)
        for kind in KINDS:
            file = put[kind](block) if kind in put else tiff_with(content["TIFF"], entries)
            try:
                found = pixels(file)
            except BadImage as error:
                lost.append((number, kind, str(error)))
                continue
            if not any(np.array_equal(found, each) for each in turned[kind]):
                lost.append((number, kind, "other pixels"))
    assert lost == []


def metadata_of(kind: str) -> tuple[bytes, list[range]]:
    """A picture with metadata of every sort, and where in it they stand."""
    exif = exif_of([(MAKE, TEXT, 4, b"make"), QUARTER, (X_RESOLUTION, RATIONAL, 1, struct.pack("<I", 8))])
    content = saved(kind)
    if kind == "PNG":
        blocks = [
            (b"eXIf", exif), (b"iCCP", b"x\0\0" + zlib.compress(SRGB)), (b"pHYs", bytes(9)), (b"gAMA", bytes(4)),
            (b"tEXt", b"Title\0A fish"), (b"iTXt", b"Title\0\0\0\0\0A fish"), (b"acTL", bytes(8)),
        ]  # fmt: skip
        file = png_with(content, *(chunk(*block) for block in blocks))
        return file, spans(33, [len(data) for _, data in blocks], 8, 4)
    if kind == "WEBP":
        file = webp_with(content, exif)
        return file, [range(len(file) - len(exif) - 4, len(file))]
    if kind == "TIFF":
        entries = [(tag, SHORT, 1, bytes(4)) for tag in (MAKE, X_RESOLUTION, 0x02BC, 0x8769)]
        file = tiff_with(content, entries)
        (place,) = struct.unpack_from("<I", file, 4)
        count = (len(file) - place - 6) // 12
        tags = [struct.unpack_from("<H", file, place + 2 + 12 * index)[0] for index in range(count)]
        starts = [place + 2 + 12 * index for index, tag in enumerate(tags) if tag not in TIFF_PIXELS]
        return file, [range(start + 2, start + 12) for start in starts]
    segments = [
        (0xED, b"Photoshop 3.0\08BIM\x03\xed\0\0\0\0\0\x10" + bytes(16)), (0xFE, b"A fish"), (0xE1, b"Exif\0\0" + exif),
        (0xE2, b"MPF\0" + exif_of([(0xB001, LONG, 1, struct.pack("<I", 1)), (0xB002, UNDEFINED, 16, bytes(4))])),
        (0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="1"/>'), (0xE2, b"FPXR\0"),
    ]  # fmt: skip
    for marker, segment in reversed(segments):
        content = jpeg_with(content, marker, segment)
    return content, spans(2, [len(segment) for _, segment in segments], 4, 0)


def spans(start: int, lengths: list[int], before: int, after: int) -> list[range]:
    """Where the contents of blocks stand that follow each other, each with a head and a tail of so many bytes."""
    ends = list(itertools.accumulate((before + length + after for length in lengths), initial=start))
    return [range(place + before, place + before + length) for place, length in zip(ends, lengths, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_2000_mutated_headers_lose_no_picture(kind: str) -> None:
    """1,000 times bytes of metadata are others, and the picture is good; 1,000 times any bytes of the head are."""
    chance = random.Random(0)
    content, places = metadata_of(kind)
    good = [PLAIN[kind].shape, PLAIN[kind].swapaxes(0, 1).shape]
    inside = [place for span in places for place in span]
    broken = {}
    for number in range(2000):
        file = bytearray(content)
        within = inside if number < 1000 else range(min(len(file), 600))
        for _ in range(chance.choice([1, 2, 8, 30])):
            file[chance.choice(within)] = chance.randrange(256)
        try:
            shape = pixels(bytes(file)).shape
        except BadImage as error:
            broken[number] = str(error)
        else:
            if number < 1000 and shape not in good:
                broken[number] = f"has the shape {shape}"
    assert {number: reason for number, reason in broken.items() if number < 1000 or "\n" in reason} == {}
    assert len(broken) > 100
