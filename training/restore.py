"""The model of a run, back from data/runs/RUN without a fit, an image or the cache: to predict and to explain by it.

A run keeps the model of one seed, the one that is best on the half of val that chooses. Its method's `build` makes the
module from the settings, from what val chose of them and from the shapes in model.safetensors; then the weights are
loaded, and every one has to find its place. A file of weights holds numbers alone, so that one of a stranger runs no
code.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.params import Block, Params
from fieldmark.store import canonical_json
from training.controls import Control
from training.data.cache import header_of
from training.folds import settle
from training.hashes import hash_file
from training.inputs import Reading
from training.methods import load_method
from training.train import plan_run


@dataclass(frozen=True)
class Restored:
    """A run's model, in evaluation mode on the CPU, and what one has to read to ask it."""

    name: str
    method: str
    settings: Block  # as params.yaml has them
    encoder: str
    also: tuple[str, ...]
    classes: list[str]  # class_ids in the order of the logits
    reads: frozenset[str]  # what it sees of an image, in the words of READS
    also_reads: frozenset[str]
    seed: int  # of the fit that was kept
    model: nn.Module
    config: dict[str, Any]  # config.json


def restore(params: Params, path: str, name: str, data: Path) -> Restored:
    """The model of run `name` of train.runs; `path` is the parameters' file, for messages.

    Raises UserError where the run is not there and whole, was not possible, is not of these parameters or of the data
    as they are now, or was under a control: that took something away which a new picture has.
    """
    planned, folder = plan_run(path, params, name), data / "runs" / name
    reading, again = planned.reading, f"train it again (dvc repro -s train@{name})"
    config = read_config(folder / "config.json", again)
    for key, wanted in planned.describe().items():
        if canonical_json(config.get(key)) != canonical_json(wanted):
            raise UserError(f"{path}: train: {key} of {name} is not what {folder} was trained with; {again}")
    if "not_possible" in config:
        raise UserError(f"{folder}: holds no model, {planned.method} could not work on its data; ask another run")
    if planned.control != Control():
        raise UserError(f"{path}: train.control: {name} was trained without something; write none, and {again}")
    if "banks" not in config:
        raise UserError(f"{folder}: was trained by a version before; {again}")
    for file in changed_since(config, reading, data, params.dataset.buckets):
        raise UserError(f"{data / file}: was made anew since {folder} was trained; {again}")
    model = load_model(folder, planned.method, planned.settings, config, again)
    return Restored(
        name=name,
        method=planned.method,
        settings=planned.settings,
        encoder=reading.encoder,
        also=reading.also,
        classes=config["classes"],
        reads=reading.reads,
        also_reads=reading.also_reads,
        seed=config["model_seed"],
        model=model,
        config=config,
    )


def changed_since(config: Mapping[str, Any], reading: Reading, data: Path, buckets: int) -> Iterator[str]:
    """Paths under data/ of what a run reads and is another now; what was not fetched cannot differ."""
    for file, mark in config["fingerprints"].items():
        if (data / file).exists() and header_of(data, file, reading.files[file], buckets).fingerprint != mark:
            yield file
    for file, sha256 in config["banks"].items():
        if (data / file).exists() and hash_file(data / file) != sha256:
            yield file


def load_model(folder: Path, method: str, settings: Block, config: Mapping[str, Any], again: str) -> nn.Module:
    """The model of a run in `folder`, in evaluation mode on the CPU; `config` is its config.json.

    Raises UserError, which says to do `again`, where the weights are missing, broken or of another module.
    """
    state = read_state(folder / "model.safetensors", again)
    try:
        chosen = settle(settings, config["chosen"][str(config["model_seed"])])
        return build(method, chosen, len(config["classes"]), state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{folder}: is not of {method} as it is now ({shorten(error)}); {again}") from None


def build(method: str, settings: Block, classes: int, state: dict[str, Tensor]) -> nn.Module:
    """The module of a method with this state, in evaluation mode; `settings` as val chose them.

    Raises KeyError, IndexError or RuntimeError where the state is of another module.
    """
    model = load_method(method).build(state, settings, classes)
    model.load_state_dict(state)
    return model.eval()


def read_config(path: Path, again: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(path, again) from None
    except ValueError as error:
        raise UserError(f"{path}: is not readable ({shorten(error)}); {again}") from None
    return found


def read_state(path: Path, again: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise missing(path, again) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable ({shorten(error)}); {again}") from None
    return state


def missing(path: Path, again: str) -> UserError:
    return UserError(f"{path}: is missing; {again}, or fetch it (dvc pull)")


def shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
