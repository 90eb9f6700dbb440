"""Image-only encoders ("towers") that timm loads: DINOv2, ResNet, Swin, ConvNeXt and all others with a map of cells.

A tower embeds images as the encoders of clip.py do, with the same rule for its dense tokens (maps.py). It has no text
side, so that no text is ever compared with its embeddings: a run may name it as its `encoder` where its method reads no
text, and under `also`.

Its global embedding is what timm's classifier would read, `model(pixels)` of a model without classes: the CLS token
after the last norm (DINOv2), the mean of the cells (ResNet, Swin), their mean after a norm (ConvNeXt), or what its
attention pools (`map`). A dense token is the same of one cell.

timm decides what a tower sees: size, middle crop, interpolation, mean and deviation come from the model's own
pretrained_cfg and become timm's own transform. Where crop_pct is under 1 the margin of the picture is not seen, and the
boxes of the nodes say so. `image_size` builds the model for another size, and timm interpolates its positions. DINOv2's
own size is 518, which takes five times the work of 224 or more.

    towers:
      dinov2: {model: vit_small_patch14_dinov2.lvd142m, image_size: 224}
      resnet50: {model: resnet50.a1_in1k}
      swin: {model: swin_tiny_patch4_window7_224.ms_in1k}

Weights are those of the tag in the model's name, from the model hub, or those of a checkpoint FILE (`pretrained`) in
timm's layout or in one that timm translates itself. A file must hold every weight of the model; only its classifier is
left out. Earlier stages of Swin and ResNet can be read as well: `tower.model.forward_intermediates` (layers.py).
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.encoders.base import DTYPES, LOADING_ERRORS, encoder_fingerprint, make_batch, split_transform
from fieldmark.encoders.maps import timm_features
from fieldmark.params import Tower

# timm's names of how a picture becomes a square, and open_clip's names of the same, which visible_box reads.
RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


@dataclass
class LoadedTower:
    """One loaded encoder of images alone (base.ImageEncoder), on one device."""

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # to bytes (3, H, W)
    normalise: Callable[[Tensor], Tensor]  # of bytes (n, 3, H, W), to float32
    preprocessing: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    fingerprint: str

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""
        return self.embed_images(self.preprocess(Image.new("RGB", (8, 8)))[None])[0].shape[1]

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """ImageEncoder.embed_images: pixels (n, 3, H, W) to global embeddings (n, D) and dense tokens (n, h, w, D)."""
        pooled, tokens = tower_features(self.model, make_batch(self, pixels), self.name)
        return pooled[: len(pixels)].float(), tokens[: len(pixels)].float()


def tower_features(model: nn.Module, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """maps.image_features of a timm model whose embedding is not projected."""
    visual = nn.ModuleDict({"trunk": model, "head": nn.Identity()})
    return timm_features(visual, pixels, f"params.yaml: towers.{name}: {type(model).__name__}")


def load_tower(name: str, settings: Tower, device: torch.device) -> LoadedTower:
    """Load `towers.NAME`. Raises UserError where timm cannot, with its reason."""
    key = f"params.yaml: towers.{name}"
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32 on this machine")
    cfg = find_config(settings.model, key)
    # None leaves the size to timm. Models without positions take any size as they are.
    size = settings.image_size if cfg.fixed_input_size else None
    if settings.pretrained is None and not cfg.has_weights:
        problem = f"timm has no weights for {settings.model}, and random ones embed nothing"
        raise UserError(f"{key}.pretrained: {problem}; name a checkpoint file, or a model of timm.list_pretrained()")
    if settings.pretrained is not None and not Path(settings.pretrained).is_file():
        raise UserError(f"{key}.pretrained: there is no file {settings.pretrained}; correct the path")
    try:
        overlay = read_checkpoint(settings.pretrained, cfg.classifier) if settings.pretrained is not None else {}
        model: Any = timm.create_model(
            settings.model, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, img_size=size
        )
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        source = "the model hub" if settings.pretrained is None else settings.pretrained
        remedy = "correct it, or name a checkpoint file" if settings.pretrained is None else "correct it"
        raise UserError(f"{key}: timm cannot load {settings.model!r} from {source} ({reason}); {remedy}") from None
    # timm keeps the weights of a file there as well.
    model.pretrained_cfg.pop("state_dict", None)
    model.to(device, DTYPES[settings.precision]).eval().requires_grad_(False)
    config = resolve_model_data_config(model, {"img_size": settings.image_size})
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        problem = f"it reads {channels} x {height} x {width}, and pictures are shown as squares of 3 channels"
        raise UserError(f"{key}.model: {problem}; use another tower")
    preprocessing = translate_config(config)
    # timm's name without its tag: the tag stands for weights and preprocessing, which count by themselves.
    architecture = {"timm": settings.model.partition(".")[0], "image_size": height}
    preprocess, normalise = split_transform(create_transform(**config), device)
    tower = LoadedTower(
        name=name, model=model, preprocess=preprocess, normalise=normalise, preprocessing=preprocessing,
        dtype=DTYPES[settings.precision], device=device, batch_size=settings.batch_size,
        fingerprint=encoder_fingerprint(model, architecture, preprocessing, settings.precision),
    )  # fmt: skip
    check_forward(tower, settings)
    return tower


def find_config(model: str, key: str) -> Any:
    """timm's PretrainedCfg of a model's name and tag. Raises UserError for a name or a tag that timm does not know."""
    try:
        return timm.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError:
        close = difflib.get_close_matches(model, [*timm.list_models(), *timm.list_pretrained()], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models() and timm.list_pretrained()"
        raise UserError(f"{key}.model: timm knows no {model!r}; {hint}") from None


def read_checkpoint(path: str, classifier: str | tuple[str, ...] | None) -> dict[str, Any]:
    """What timm.create_model needs to load every weight of a model without classes from a file, or to fail."""
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    dropped = tuple(f"{name}." for name in names)
    held = load_state_dict(path, weights_only=True)
    state = {name: weight for name, weight in held.items() if not name.startswith(dropped)}
    # As many classes as the model has, which is none: otherwise timm does not mind that weights are missing.
    return {"state_dict": state, "num_classes": 0, "label_offset": 0}


def translate_config(config: dict[str, Any]) -> dict[str, Any]:
    """timm's data config by open_clip's names of preprocessing, and `crop_share`, which open_clip does not know.

    `crop_share` is the side of the middle crop over that of the resized picture, in whole pixels as timm counts them.
    """
    side = config["input_size"][-1]
    return {
        "size": (side, side),
        "mode": "RGB",
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "resize_mode": RESIZE_MODES[config["crop_mode"]],
        "crop_share": side / math.floor(side / config["crop_pct"]),
    }


def check_forward(tower: LoadedTower, settings: Tower) -> None:
    """Raises UserError where the tower cannot run in its precision or size, or whole cells do not fill its picture."""
    key, size = f"params.yaml: towers.{tower.name}", settings.image_size
    try:
        tower.embed_images(tower.preprocess(Image.new("RGB", (8, 8)))[None])
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = "use precision fp32, and image_size null or a size it is made for"
        raise UserError(f"{key}: timm cannot run {settings.model} with these settings ({reason}); {remedy}") from None
    # timm itself leaves out pixels that do not fill a cell, or pads them, and does not say so.
    layers = getattr(tower.model, "feature_info", None)
    cell = layers[-1]["reduction"] if layers else 1
    if size is not None and size % cell:
        problem = f"{size} pixels are no whole number of cells, {cell} pixels each"
        raise UserError(f"{key}.image_size: {problem}; use {-(-size // cell) * cell}")
