"""A picture in a question: what stands for it in an item, and how it is sent."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from fieldmark.llm.answers import Item, Unaskable
from fieldmark.llm.prompts import Message
from fieldmark.pictures.boxes import Box, box_of, region_of
from fieldmark.pictures.cuts import Place
from fieldmark.pictures.decode import BadImage, open_place

JPEG_QUALITY = 90


def image_part(image_id: str, px: int, box: Box | None = None) -> dict[str, Any]:
    """What stands for a picture, or for a box of it, in an item: its content and how it is resized."""
    of_box = {} if box is None else {"box": list(map(float, box))}
    return {"type": "image", "image_id": image_id, "px": px, "jpeg_quality": JPEG_QUALITY, **of_box}


def with_part(messages: list[Message], part: dict[str, Any]) -> list[Message]:
    """The messages with a picture at the end of the last one."""
    return with_parts(messages, [part])


def with_parts(messages: list[Message], parts: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages with pictures at the end of the last one, in this order."""
    *before, last = messages
    return [*before, {"role": last["role"], "content": [{"type": "text", "text": last["content"]}, *parts]}]


def as_sent(item: Item, places: Mapping[str, Place]) -> list[Message]:
    """An item's messages as sent; `places` by image_id. Raises Unaskable where a picture of it cannot be opened."""
    *before, last = item.messages
    text, *images = last["content"]
    try:
        urls = [
            data_url(places[image["image_id"]], image["px"], image["jpeg_quality"], box_of(image.get("box")))
            for image in images
        ]
    except BadImage as error:
        raise Unaskable(f"the image cannot be opened: {error}") from None
    return [*before, {**last, "content": [text, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]}]


def data_url(place: Place, px: int, quality: int, box: Box | None = None) -> str:
    """A picture, or a box of it, as a JPEG data URL, at most `px` on its long side, without metadata.

    Raises BadImage.
    """
    image, _ = open_place(*place)
    if box is not None:
        image = image.crop(region_of(box, image.size))
    image.thumbnail((px, px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=b"")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
