"""What a picture's file holds beside its pixels, hidden from Pillow where it keeps Pillow from reading them.

Pillow parses much of a file's metadata while it opens it, and gives the picture up where a part of it is odd: a text of
many megabytes in a PNG, a resolution that is no number in a TIFF. `hide_metadata` changes a copy of such a file in
place, block by block, so that Pillow passes over it: a JPEG's segments become APP15, a PNG's chunks and a HEIF's items
get a name that nobody knows, a TIFF's directory keeps the entries that pixels need, and a WebP ends before a block that
is longer than the file. Pixels are never touched.
"""

import hashlib
import re
import struct
import zlib
from typing import Literal

# How much of a file shows its format.
HEAD_BYTES = 12
# The steps of hiding: what no pixel depends on; then also what says how colours and transparency are meant.
Step = Literal["metadata", "colours"]
STEPS: tuple[Step, ...] = ("metadata", "colours")

# Texts of a PNG that may say its orientation, and how long one of them may be.
ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
ORIENTED_BYTES = 2**20
# Entries of a TIFF's directory without which its pixels cannot be decoded: size, samples, compression, strips and
# tiles, palette, and the parameters of JPEG and fax compression.
TIFF_PIXELS = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334,
    338, 339, 347, *range(512, 522), 529, 530, 531, 532,
}  # fmt: skip
TIFF_ORIENTATION, TIFF_PROFILE = 274, 34675
SHORT = 3
# The blocks of a WebP that hold pixels, or say what they are.
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP")


def hide_metadata(content: bytearray, step: Step) -> bytes | None:
    """Hide the metadata of a whole file in place. Returns its EXIF block, b"" where it has none; None: nothing hidden.

    The content may be anything: what is no file of a known format, or ends early, is left as it is from there on.
    """
    before = hashlib.sha256(content).digest()
    exif = b""
    try:
        match format_of(bytes(content[:HEAD_BYTES])):
            case "JPEG":
                exif = hide_in_jpeg(content, step)
            case "PNG":
                exif = hide_in_png(content, step)
            case "TIFF":
                hide_in_tiff(content, step)
            case "WEBP":
                hide_in_webp(content)
            case "HEIF":
                hide_in_heif(content)
    except (struct.error, IndexError):
        pass
    return None if hashlib.sha256(content).digest() == before else exif


def format_of(head: bytes) -> str | None:
    """The format of a file that starts so, if its metadata can be hidden; AVIF counts as HEIF."""
    if head.startswith(b"\xff\xd8"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[8:12] == b"WEBP":
        return "WEBP"
    return "HEIF" if head[4:8] == b"ftyp" else None


def hide_in_jpeg(content: bytearray, step: Step) -> bytes:
    """Hide comments and APP segments but those that say what the colours are: JFIF, Adobe, the profile; and XMP."""
    exif, place = b"", 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        marker = content[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        segment = bytes(content[place + 4 : place + 2 + length])
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif += segment if not exif else segment[6:]
        # libjpeg, too, passes over a JFIF and an Adobe segment that are shorter.
        kept = (
            (marker == 0xE0 and len(segment) >= 14)
            or (marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"))
            or (marker == 0xE2 and segment.startswith(b"ICC_PROFILE\0") and len(segment) > 14 and step == "metadata")
            or (marker == 0xEE and len(segment) >= 12)
        )
        if (0xE0 <= marker <= 0xEF or marker == 0xFE) and not kept:
            content[place + 1] = 0xEF
        place += 2 + length
    return exif


def hide_in_png(content: bytearray, step: Step) -> bytes:
    """Hide every chunk that is not critical, but for the profile, the transparency and what may say the orientation."""
    exif, place = b"", 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            break
        data = bytes(content[place + 8 : end])
        if kind == b"eXIf":
            exif = b"Exif\0\0" + data
        kept = step == "metadata" and (
            kind in (b"iCCP", b"tRNS") or (data.startswith(ORIENTED) and length <= ORIENTED_BYTES)
        )
        # The first letter of a critical chunk is a capital.
        if kind[:1].islower() and not kept:
            content[place + 4 : place + 8] = b"odDd"
            struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return exif


def hide_in_tiff(content: bytearray, step: Step) -> None:
    """Take the other entries out of the first directory, and say that no directory follows."""
    order = "<" if content[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", content, 2)[0] == 43
    (place,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    number, size, pointer = ("Q", 20, "Q") if big else ("H", 12, "I")
    (count,) = struct.unpack_from(order + number, content, place)
    start = place + struct.calcsize(order + number)
    entries = [bytes(content[start + size * index : start + size * (index + 1)]) for index in range(min(count, 65535))]
    kept = []
    for entry in entries:
        if len(entry) == size:
            tag, kind, values = struct.unpack_from(order + "HH" + pointer, entry)
            upright = tag == TIFF_ORIENTATION and kind == SHORT and values == 1
            if tag in TIFF_PIXELS or upright or (tag == TIFF_PROFILE and step == "metadata"):
                kept.append(entry)
    struct.pack_into(order + number, content, place, len(kept))
    rest = b"".join(kept) + bytes(struct.calcsize(order + pointer))
    content[start : start + len(rest)] = rest


def hide_in_webp(content: bytearray) -> None:
    """End the file before the first block that holds no pixels and is longer than the file; Pillow reads all others."""
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, place)
        if kind not in WEBP_PIXELS and place + 8 + length > len(content):
            break
        place += 8 + length + length % 2
    del content[place:]
    struct.pack_into("<I", content, 4, len(content) - 8)


def hide_in_heif(content: bytearray) -> None:
    """Rename the items of a HEIF or an AVIF that hold EXIF; its orientation is a property of the picture's own."""
    # An item's entry: version 2 or 3, flags, the item's id (2 or 4 bytes), protection, type.
    items = re.finditer(rb"infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2}Exif", content, re.DOTALL)
    for end in [found.end() for found in items]:
        content[end - 4 : end] = b"odDd"
