"""Towers that timm loads: DINOv2, ResNet, Swin, ConvNeXt and all others with a map of cells.

The global embedding is what timm's classifier would read, `model(pixels)` of a model without classes: the CLS token
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
      mine: {model: "local-dir:checkpoints/mine"}

Weights are those of the tag in the model's name, from the model hub, or those of a checkpoint FILE (`pretrained`) in
timm's layout or in one that timm translates itself. `local-dir:FOLDER` is a model as timm saves it (config.json beside
model.safetensors or pytorch_model.bin: `timm.models.save_for_hf`, or a repository of the hub): also one of another
depth or width than any that timm has a name for. A file must hold every weight of the model; only its classifier is
left out. Earlier stages of Swin and ResNet can be read as well: `tower.model.forward_intermediates` (layers.py).
"""

import dataclasses
import difflib
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import PretrainedCfg, load_state_dict, resolve_model_input_args
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.encoders.base import (
    DTYPES,
    LOADING_ERRORS,
    check_size,
    encoder_fingerprint,
    is_unreachable,
    split_transform,
)
from fieldmark.encoders.maps import timm_features
from fieldmark.encoders.towers import LoadedTower
from fieldmark.params import Tower

# timm's names of how a picture becomes a square, and open_clip's names of the same, which visible_box reads.
RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}
FOLDER = "local-dir:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as timm names them in a folder


def tower_features(model: nn.Module, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """maps.image_features of a timm model whose embedding is not projected."""
    visual = nn.ModuleDict({"trunk": model, "head": nn.Identity()})
    return timm_features(visual, pixels, f"params.yaml: towers.{name}: {type(model).__name__}")


def load(name: str, settings: Tower, device: torch.device) -> LoadedTower:
    """Load `towers.NAME`. Raises UserError where timm cannot, with its reason."""
    key = f"params.yaml: towers.{name}"
    found = find_model(settings, key)
    # Models without positions take any size as they are, and without a size of ours timm has its own.
    sized = settings.image_size is not None and found.cfg.fixed_input_size
    arguments = found.arguments | ({"img_size": settings.image_size} if sized else {})
    if found.file is None and not found.cfg.has_weights:
        problem = f"timm has no weights for {settings.model}, and random ones embed nothing"
        raise UserError(f"{key}.pretrained: {problem}; name a checkpoint file, or a model of timm.list_pretrained()")
    try:
        overlay = read_checkpoint(found.file, found.cfg.classifier) if found.file is not None else {}
        model: Any = timm.create_model(
            found.architecture, pretrained=True, pretrained_cfg=dataclasses.asdict(found.cfg),
            pretrained_cfg_overlay=overlay, num_classes=0, **arguments,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        if is_unreachable(error):
            remedy = "give `pretrained:` a checkpoint file (docs/own-data.md#encoders)"
            raise UserError(f"{key}: {settings.model!r} cannot be downloaded: no network? {remedy}") from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        source = "the model hub" if found.file is None else found.file
        remedy = "correct it, or name a checkpoint file" if found.file is None else "correct it"
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
    identity = {"timm": found.architecture, "image_size": height}
    identity |= {"arguments": found.arguments} if found.arguments else {}
    preprocess, normalise = split_transform(create_transform(**config), device)
    layers = getattr(model, "feature_info", None)
    check_size(settings.image_size, found.cfg.input_size[-1], layers[-1]["reduction"] if layers else 1, key)
    return LoadedTower(
        name=name, model=model, preprocess=preprocess, normalise=normalise, preprocessing=preprocessing,
        features=partial(tower_features, model, name=name),
        dtype=DTYPES[settings.precision], device=device, batch_size=settings.batch_size,
        fingerprint=encoder_fingerprint(model, identity, preprocessing, settings.precision),
    )  # fmt: skip


class Found(NamedTuple):
    """A model that timm can make."""

    architecture: str  # timm's name of it, without a tag
    arguments: dict[str, Any]  # how it differs from the model of that name
    cfg: PretrainedCfg
    file: str | None  # with its weights; None: they are on the hub


def find_model(settings: Tower, key: str) -> Found:
    """The model that `settings` name. Raises UserError for a name, a tag or a folder that timm does not know."""
    if settings.model.startswith(FOLDER):
        return read_folder(settings, key)
    cfg = find_config(settings.model, key)
    return Found(settings.model.partition(".")[0], {}, cfg, settings.pretrained)


def find_config(model: str, key: str) -> Any:
    """timm's PretrainedCfg of a model's name and tag. Raises UserError for a name or a tag that timm does not know."""
    try:
        return timm.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError:
        close = difflib.get_close_matches(model, [*timm.list_models(), *timm.list_pretrained()], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models() and timm.list_pretrained()"
        raise UserError(f"{key}.model: timm knows no {model!r}; {hint}") from None


def read_folder(settings: Tower, key: str) -> Found:
    """The model that timm saved to a folder. Raises UserError for a folder that holds none."""
    folder = Path(settings.model.removeprefix(FOLDER))
    try:
        # The name, what timm knows of it, and the arguments that it was made with.
        found = resolve_model_input_args(settings.model)
        architecture, cfg = found.pop("model_name"), PretrainedCfg(**found.pop("pretrained_cfg"))
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = f"name one with config.json and {WEIGHTS[0]}"
        raise UserError(f"{key}.model: {folder} holds no model as timm saves it ({reason}); {remedy}") from None
    held = [str(folder / name) for name in WEIGHTS if (folder / name).is_file()]
    if settings.pretrained is None and not held:
        raise UserError(f"{key}.model: {folder} holds no weights ({' or '.join(WEIGHTS)}); put them there")
    arguments = {name: value for name, value in found.items() if name not in ("num_classes", "pretrained_model_args")}
    # No source: the file is read here, so that no weight may be missing.
    return Found(architecture, arguments, dataclasses.replace(cfg, source=None), settings.pretrained or held[0])


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
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "resize_mode": RESIZE_MODES[config["crop_mode"]],
        "crop_share": side / math.floor(side / config["crop_pct"]),
    }
