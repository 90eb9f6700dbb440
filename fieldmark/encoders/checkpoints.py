"""Folders of tuned encoders: weights and configuration as open_clip, timm or torchvision read them, and provenance.

`data/adapted/NAME` holds, beside the model's own files,

- `provenance.json`: what it was made from and how it came out,
- `seen_classes.txt`, `seen_images.txt`: the class_ids and the paths that it was shown with their labels, one a line, as
  `clean` of a study reads them,
- `seen.csv`: the same images by image_id, with their class_id and what they did: `learned`, or `chose` when to stop,
- `texts.json` where texts were read: the sentences of each class,
- `history.csv`: the epochs.

Weights are safetensors; nothing of a folder is code (foreign_code.py). A folder is written beside its place and moved
there, so that it is whole or not there. It is kept as it is (`is_kept`): every vector that it made hangs on it.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from torchvision import models

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders import longclip
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import LoadedEncoder
from fieldmark.encoders.towers import LoadedTower
from fieldmark.encoders.towers.timm import tower_features
from fieldmark.encoders.towers.torchvision import parts_of
from fieldmark.params import ADAPTED, Encoder, Tower

PROVENANCE = "provenance.json"
# open_clip's names of how a picture becomes a square, and timm's of the same.
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}


class Seen(NamedTuple):
    """An image that a tuned encoder was shown with its label."""

    image_id: str
    class_id: str
    path: str  # relative to the data set's folder
    role: str  # learned, or chose: when to stop


def folder_of(name: str) -> Path:
    return Path(ADAPTED) / name


def read_seen(folder: Path) -> list[tuple[str, str, str]]:
    """(image_id, class_id, role) of what a tuned encoder was shown."""
    rows = csv.reader(io.StringIO((folder / "seen.csv").read_text(encoding="utf-8")))
    return [(image_id, class_id, role) for image_id, class_id, role in rows]


def read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable ({error}); dvc pull it, or make it anew with --refit") from None


def is_kept(
    folder: Path,
    identity: Mapping[str, Any],
    index: Mapping[str, str],
    learnable: Mapping[str, str],
    choosable: Mapping[str, str],
) -> bool:
    """Whether a folder stands: made alike, and shown no image that it may not know now, or under another class.

    `index` are all usable images, `learnable` those that may be learned from, `choosable` those that may choose, each
    with its class_id. Images and texts that came or changed since do not matter: they are for --refit.
    """
    if not (folder / PROVENANCE).is_file() or read_provenance(folder)["identity"] != identity:
        return False
    allowed = {"learned": learnable, "chose": choosable}
    return all(
        allowed[role].get(image_id) == class_id for image_id, class_id, role in read_seen(folder) if image_id in index
    )


def write_folder(
    folder: Path, write_model: Callable[[Path], None], provenance: dict[str, Any], seen: list[Seen],
    history: list[dict[str, Any]], texts: Mapping[str, list[str]] | None = None,
) -> None:  # fmt: skip
    """Write a folder whole, in the place of the one that is there."""
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    write_model(partial_folder)
    rows = sorted(seen)
    classes = sorted({each.class_id for each in rows})
    lines_of = (f"{each.image_id},{each.class_id},{each.role}\n" for each in rows)
    store.write_text(partial_folder / "seen.csv", "".join(lines_of))
    store.write_text(partial_folder / "seen_classes.txt", "".join(f"{each}\n" for each in classes))
    store.write_text(partial_folder / "seen_images.txt", "".join(f"{each.path}\n" for each in rows))
    if texts is not None:
        store.write_text(partial_folder / "texts.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    store.write_text(partial_folder / "history.csv", lines.getvalue())
    store.write_text(partial_folder / PROVENANCE, json.dumps(provenance, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial_folder, folder)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, each tensor with memory of its own, on the CPU."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def check_writable(settings: Encoder, key: str) -> None:
    """Raises UserError, under `key`, for an encoder that no folder can hold."""
    if settings.pretrained and longclip.read_checkpoint(settings.pretrained) is not None:
        raise UserError(f"{key}: a LongCLIP checkpoint is no model of open_clip's own; tune another encoder")


def write_encoder(encoder: LoadedEncoder, settings: Encoder, folder: Path, home: Path) -> None:
    """An open_clip folder of an encoder that was loaded with these settings; `home` is where it will lie."""
    config: dict[str, Any] = json.loads(json.dumps(open_clip.get_model_config(settings.model)))
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision["image_size"] = settings.image_size or vision.get("image_size", CLIPVisionCfg.image_size)
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        inner: Any = encoder.model.text
        inner.config.save_pretrained(folder)
        text["hf_model_name"] = home.as_posix()
    if isinstance(encoder.tokenizer, HFTokenizer):
        encoder.tokenizer.tokenizer.save_pretrained(folder)
        text["hf_tokenizer_name"] = home.as_posix()
    shown = {name: value for name, value in encoder.preprocessing.items() if name not in ("size", "mode")}
    content = {"model_cfg": config, "preprocess_cfg": shown}
    store.write_text(folder / "open_clip_config.json", json.dumps(content, indent=1) + "\n")
    store.write_bytes(folder / "open_clip_model.safetensors", save(weights_of(encoder.model)))


def as_tower(encoder: ImageEncoder, key: str) -> LoadedTower:
    """A tower by itself, or what of an encoder's image tower lies before its projection.

    Raises UserError, under `key`, where that is no model of timm's, which no folder could hold as a tower.
    """
    if isinstance(encoder, LoadedTower):
        return encoder
    assert isinstance(encoder, LoadedEncoder)
    visual: Any = encoder.model.visual
    if not isinstance(visual, TimmModel):
        kind = type(visual).__name__
        raise UserError(f"{key}: its image tower is open_clip's own {kind}, not timm's; name a tower under `towers`")
    return LoadedTower(
        name=encoder.name, model=visual.trunk, preprocess=encoder.preprocess, normalise=encoder.normalise,
        preprocessing=encoder.preprocessing, features=partial(tower_features, visual.trunk, name=encoder.name),
        dtype=encoder.dtype, device=encoder.device, batch_size=encoder.batch_size, fingerprint=encoder.fingerprint,
    )  # fmt: skip


def write_tower(tower: LoadedTower, settings: Encoder | Tower, folder: Path) -> None:
    """A folder of a tower that was loaded with these settings: timm's, or torchvision's weights by themselves."""
    if isinstance(settings, Tower) and settings.library == "torchvision":
        names = [name for name, _ in parts_of(models.get_model(settings.model))]
        state = {f"{names[int(number)]}.{rest}": value for (number, rest), value in split_names(tower.model)}
        store.write_bytes(folder / "model.safetensors", save(state))
        return
    model: Any = tower.model
    if isinstance(settings, Tower):
        shown = resolve_model_data_config(model, {"img_size": settings.image_size})
        config = {name: shown[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    else:
        side = tower.preprocessing["size"]
        width, height = side if isinstance(side, tuple | list) else (side, side)
        config = {name: tower.preprocessing[name] for name in ("interpolation", "mean", "std")}
        config |= {"input_size": (3, height, width), "crop_pct": 1.0}
        config["crop_mode"] = CROP_MODES[tower.preprocessing["resize_mode"]]
    model.cpu()
    save_for_hf(model, str(folder), safe_serialization=True, data_config=config)


def split_names(model: nn.Module) -> list[tuple[tuple[str, str], torch.Tensor]]:
    """The state of nn.Sequential: the number of a part and a name in it, with the tensor."""
    found = []
    for name, value in weights_of(model).items():
        number, _, rest = name.partition(".")
        found.append(((number, rest), value))
    return found
