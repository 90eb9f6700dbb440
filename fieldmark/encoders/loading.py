"""Which family loads an encoder of images: open_clip one with texts, the library that it names one without."""

from collections.abc import Mapping

import torch

from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.towers import load_tower
from fieldmark.params import Encoder, Tower


def load_image_encoder(
    name: str, settings: Encoder | Tower, device: torch.device, towers: Mapping[str, Tower] | None = None
) -> ImageEncoder:
    """Load `encoders.NAME` or `towers.NAME`; of `towers` an encoder's `dense` may name one.

    Raises UserError as load_encoder and load_tower do.
    """
    if isinstance(settings, Tower):
        return load_tower(name, settings, device)
    return load_encoder(name, settings, device, towers)
