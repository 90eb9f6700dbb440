"""What a run says of images: the class it takes each for, and how probable it holds that, as exports pass it on.

The images are those of the index, whose classes are known; tools/exports/new_pictures.py has others. A probability is
that of the seed whose model is kept, calibrated as tools.predict does: the softmax of its logits over the temperature
that fits val, the half that chose nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.calibration import fit_calibrating_temperature
from evaluation.runs import NotMade, Run, check_same_images, read_json, read_run
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tools.exports.index import Index, Row
from training.metrics import softmax

# What is exported: `val` is the half that chose nothing. Whoever looks at test tunes on it, so it is asked for by name.
SPLITS = ("val", "choose", "train", "test", "all")


class Said(NamedTuple):
    """What a run says of one image."""

    number: int  # of the image, from 1: the same in every split and of every run
    image: Row  # its row of the index; of a new picture the same columns, and None for class_id
    split: str | None  # as in run.predictions; None of a new picture
    class_id: str  # of the class that it holds most probable
    probability: float
    of_label: float | None  # the probability that it gives the image's own class, where that is known


class Source(NamedTuple):
    """A run as its exports name it."""

    name: str
    method: str
    encoder: str
    mark: str  # its fingerprint
    temperature: float  # that its probabilities are calibrated with

    def __str__(self) -> str:
        return f"fieldmark run {self.name} ({self.method} on {self.encoder})"


def find_run(data: Path, params: Params, name: str) -> tuple[Run, dict[str, Any]]:
    """A run and its config.json, held against the index. Raises UserError where it is not there or cannot predict."""
    if name not in params.train.runs:
        raise UserError(f"params.yaml: train.runs: has no {name}; choose one of: {', '.join(params.train.runs)}")
    found = read_run(data, name, params.train.runs[name].encoder)
    if isinstance(found, NotMade):
        raise UserError(f"{data}/runs/{name}: predicts nothing: {found.reason}; choose another run")
    index = store.read_table(
        data / "index/images.parquet", "index.images/1", ["path", "split", "class_id", "status", "group"]
    )
    check_same_images(data, [found], index)
    return found, read_json(data / "runs" / name / "config.json", f"run train@{name} again (dvc repro)")


def temperature_of(run: Run, logits: np.ndarray) -> float:
    """The temperature that val asks for, of the kept logits (n, C)."""
    val = run.split == "val"
    return fit_calibrating_temperature(logits[val], run.y[val])


def read_said(index: Index, run: Run, logits: np.ndarray, split: str) -> Iterator[Said]:
    """What the run says of the images of a split, or of `all`, in the order of their paths; logits (n, C) are kept."""
    chosen = np.flatnonzero(run.split == split) if split != "all" else np.arange(len(run.paths))
    probabilities = softmax(logits[chosen] / temperature_of(run, logits))
    for place, row in zip(chosen.tolist(), probabilities, strict=True):
        image, best = index.images[place], int(row.argmax())  # check_same_images: a run has the images of the index
        own = float(row[image["y"]])
        yield Said(place + 1, image, str(run.split[place]), run.classes[best], float(row[best]), own)
