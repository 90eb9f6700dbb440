"""Image-only encoders ("towers"), one file a library: `library: NAME` of a tower is `NAME.py` of this folder.

A tower embeds images as the encoders of clip.py do. It has no text side, so that no text is ever compared with its
embeddings: a run may name it as its `encoder` where its method reads no text, and under `also`.

A library's module holds `load(name, settings, device)`, which gives a `LoadedTower`: a model, how a picture becomes its
pixels, and `features`, which makes global embeddings and dense tokens of a batch. A dense token of a cell is what the
global embedding would be of a map that held this cell alone (maps.py). There is no list of libraries to extend.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.devices import keep_float32
from fieldmark.encoders.base import make_batch
from fieldmark.params import Tower


@dataclass
class LoadedTower:
    """One loaded encoder of images alone (base.ImageEncoder), on one device."""

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # to bytes (3, H, W)
    normalise: Callable[[Tensor], Tensor]  # of bytes (n, 3, H, W), to float32
    preprocessing: dict[str, Any]
    features: Callable[[Tensor], tuple[Tensor, Tensor]]  # of a batch (n, 3, H, W): (n, D) and (n, h, w, D)
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    fingerprint: str
    dense: None = None  # a tower's cells are its own

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""
        return self.embed_images(self.preprocess(Image.new("RGB", (8, 8)))[None])[0].shape[1]

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """ImageEncoder.embed_images: pixels (n, 3, H, W) to global embeddings (n, D) and dense tokens (n, h, w, D)."""
        pooled, tokens = self.features(make_batch(self, pixels))
        return pooled[: len(pixels)].float(), tokens[: len(pixels)].float()


def load_tower(name: str, settings: Tower, device: torch.device) -> LoadedTower:
    """Load `towers.NAME`. Raises UserError where its library cannot, with its reason."""
    key = f"params.yaml: towers.{name}"
    keep_float32()
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32 on this machine")
    if settings.pretrained is not None and not Path(settings.pretrained).is_file():
        raise UserError(f"{key}.pretrained: there is no file {settings.pretrained}; correct the path")
    tower: LoadedTower = importlib.import_module(f"{__name__}.{settings.library}").load(name, settings, device)
    try:
        tower.embed_images(tower.preprocess(Image.new("RGB", (8, 8)))[None])
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"{settings.library} cannot run {settings.model} with these settings ({reason})"
        raise UserError(f"{key}: {problem}; use precision fp32, and image_size null or a size it is made for") from None
    return tower
