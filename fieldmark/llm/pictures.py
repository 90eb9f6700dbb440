"""A picture in a question: what stands for it in an item, and how it is sent."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from fieldmark.llm.answers import Item, Unaskable
from fieldmark.llm.prompts import Message
from fieldmark.pictures.boxes import Box, Region, box_of
from fieldmark.pictures.decode import BadImage, open_rgb

JPEG_QUALITY = 90


def image_part(image_id: str, px: int, box: Box | None = None) -> dict[str, Any]:
    """What stands for a picture, or for a box of it, in an item: its content and how it is resized."""
    of_box = {} if box is None else {"box": list(map(float, box))}
    return {"type": "image", "image_id": image_id, "px": px, "jpeg_quality": JPEG_QUALITY, **of_box}


def with_part(messages: list[Message], part: dict[str, Any]) -> list[Message]:
    """The messages with a picture at the end of the last one."""
    *before, last = messages
    return [*before, {"role": last["role"], "content": [{"type": "text", "text": last["content"]}, part]}]


def as_sent(item: Item, paths: dict[str, Path]) -> list[Message]:
    """An item's messages as they are sent; `paths` by image_id. Raises Unaskable where its picture cannot be opened."""
    *before, last = item.messages
    text, image = last["content"]
    try:
        url = data_url(paths[image["image_id"]], image["px"], image["jpeg_quality"], box_of(image.get("box")))
    except BadImage as error:
        raise Unaskable(f"the image cannot be opened: {error}") from None
    return [*before, {**last, "content": [text, {"type": "image_url", "image_url": {"url": url}}]}]


def data_url(path: Path, px: int, quality: int, box: Box | None = None) -> str:
    """A picture, or a box of it, as a JPEG data URL, at most `px` on its long side, without metadata.

    Raises BadImage.
    """
    image = open_rgb(path)
    if box is not None:
        image = image.crop(region_of(box, image.size))
    image.thumbnail((px, px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=b"")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def region_of(box: Box, size: tuple[int, int]) -> Region:
    """The pixels of a box, at least one a side."""
    (x0, y0, x1, y1), (width, height) = box, size
    left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
    return left, top, max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))
