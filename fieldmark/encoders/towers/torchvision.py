"""Towers that torchvision loads: its ResNets, RegNets and EfficientNets.

The global embedding is what torchvision's classifier would read, the mean of the cells of the last map; a dense token
is a cell. What a tower sees (size, middle crop, interpolation, mean and deviation) is that of its default weights. With
`image_size` the same share of the picture is shown in another size.

Weights are torchvision's default ones, or those of a checkpoint FILE (`pretrained`) in torchvision's layout. One that
ends in .safetensors may lack the classifier, which is not read: what `finetune` writes does.

    towers:
      regnet: {library: torchvision, model: regnet_y_400mf}
      tuned: {library: torchvision, model: regnet_y_400mf, pretrained: data/adapted/tuned/model.safetensors}
"""

import math
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models, transforms

from fieldmark.command import UserError
from fieldmark.encoders.base import DTYPES, LOADING_ERRORS, check_size, encoder_fingerprint, split_transform
from fieldmark.encoders.towers import LoadedTower
from fieldmark.params import Tower

# Models whose parts before `avgpool` run one after the other, and whose classifier reads the mean as it is.
KNOWN = (models.ResNet, models.RegNet, models.EfficientNet)
CELL = 32  # pixels a side of a cell, in each of them


def load(name: str, settings: Tower, device: torch.device) -> LoadedTower:
    """Load `towers.NAME`. Raises UserError where torchvision cannot, with its reason."""
    key = f"params.yaml: towers.{name}"
    if settings.model not in models.list_models(module=models):
        raise UserError(f"{key}.model: torchvision knows no {settings.model!r}; see torchvision.models.list_models()")
    default = models.get_model_weights(settings.model).DEFAULT
    try:
        classifier = models.get_model(settings.model, weights=default if settings.pretrained is None else None)
        if settings.pretrained is not None:
            load_weights(classifier, settings.pretrained)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{key}: torchvision cannot load {settings.model!r} ({reason}); correct it") from None
    if not isinstance(classifier, KNOWN):
        known = ", ".join(each.__name__ for each in KNOWN)
        raise UserError(f"{key}.model: no rule for the cells of a {type(classifier).__name__}; use one of: {known}")
    model = nn.Sequential(*(part for _, part in parts_of(classifier))).to(device, DTYPES[settings.precision])
    model.eval().requires_grad_(False)

    def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
        cells = model(pixels).float()
        return cells.mean(dim=(2, 3)), cells.permute(0, 2, 3, 1)

    shown = default.transforms()
    check_size(settings.image_size, shown.crop_size[0], CELL, key)
    size = settings.image_size or shown.crop_size[0]
    resized = math.floor(size * shown.resize_size[0] / shown.crop_size[0])
    preprocessing = {
        "size": (size, size), "mode": "RGB", "mean": tuple(shown.mean), "std": tuple(shown.std),
        "interpolation": shown.interpolation.value, "resize_mode": "shortest", "crop_share": size / resized,
    }  # fmt: skip
    steps = [
        transforms.Resize(resized, shown.interpolation), transforms.CenterCrop(size), transforms.ToTensor(),
        transforms.Normalize(shown.mean, shown.std),
    ]  # fmt: skip
    preprocess, normalise = split_transform(transforms.Compose(steps), device)
    architecture = {"torchvision": settings.model}
    return LoadedTower(
        name=name, model=model, preprocess=preprocess, normalise=normalise, preprocessing=preprocessing,
        features=features, dtype=DTYPES[settings.precision], device=device, batch_size=settings.batch_size,
        fingerprint=encoder_fingerprint(model, architecture, preprocessing, settings.precision),
    )  # fmt: skip


def parts_of(classifier: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model of torchvision's before its pooling, by their names in it."""
    return takewhile(lambda part: part[0] != "avgpool", classifier.named_children())


def load_weights(classifier: nn.Module, path: str) -> None:
    """Load a checkpoint file. Raises RuntimeError where it lacks a weight; safetensors may lack the classifier's."""
    if Path(path).suffix != ".safetensors":
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return
    lacking, strange = classifier.load_state_dict(load_file(path), strict=False)
    needed = {name for name, _ in parts_of(classifier)}
    if missing := [name for name in lacking if name.partition(".")[0] in needed]:
        raise RuntimeError(f"it lacks {missing[0]}")
    if strange:
        raise RuntimeError(f"the model has no {strange[0]}")
