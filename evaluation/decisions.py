"""Why a run says one class and not another of the report's pictures: by patch, and by the texts that it reads.

training/explain.py says what the figures are. Each run that reads patches is asked about its own answer a against b:
the true class where a is wrong, else its second. A pass for each patch of a picture bounds how many can be asked:
EXPLAINED of them, mistakes of the run that is shown first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation.runs import Row, Run
from fieldmark import store
from fieldmark.params import Params
from training.controls import Control
from training.data import read_cache
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.explain import node_scores, occlude, texts, top_two
from training.metrics import Ints
from training.restore import Restored, restore
from training.train import plan_run

EXPLAINED = 200  # pictures
TEXTS = 8  # shown of a decision
LEAST = 0.005  # of a logit: a text that adds no more is not shown


def to_explain(pictures: Sequence[tuple[str, Row]]) -> list[int]:
    """Which EXPLAINED of the pictures are asked about: those answered wrongly, the surest first, then by image_id."""

    def rank(number: int) -> tuple[bool, int, str]:
        image_id, picture = pictures[number]
        (guess, sure), *_ = picture["top"]
        right = guess == picture["y"]
        return right, 0 if right else -sure, image_id

    return sorted(sorted(range(len(pictures)), key=rank)[:EXPLAINED])


def explain_runs(
    params: Params, path: str, data: Path, runs: Sequence[Run], positions: Ints, pictures: Sequence[Row]
) -> list[Row]:
    """What each run that reads patches says of `pictures`, at `positions` in the order of the run's paths.

    `path` is the parameters' file. To each picture it adds `decisions`, by the place of the run in `runs`: the pair of
    classes, what each patch adds (`fall`), the method's own scores, texts; and `boxes` of the patches, by encoder.
    Returns those runs, with the texts that `texts` refers to by place and the classes that own each. Of runs under a
    control there is nothing: it took away what a picture has. Raises UserError where a run is not of these parameters
    any more.
    """
    asked: list[Row] = []
    for picture in pictures:
        picture |= {"decisions": {}, "boxes": {}}
    for number, run in enumerate(runs):
        planned = plan_run(path, params, run.name)
        if "nodes" in planned.reading.reads and planned.control == Control():
            restored = restore(params, path, run.name, data)
            told = decide(restored, params.dataset.buckets, data, run.y[positions], positions)
            if told is not None:
                asked.append({"run": number, "texts": told.texts})
                for picture, decision, boxes in zip(pictures, told.decisions, told.boxes, strict=True):
                    picture["decisions"][number] = decision
                    picture["boxes"][restored.encoder] = boxes
    return asked


class Told(NamedTuple):
    """What one run says of n pictures."""

    decisions: list[Row]
    boxes: list[list[list[int]]]  # of each picture's patches, in thousandths
    texts: list[Row]


def decide(restored: Restored, buckets: int, data: Path, y: Ints, positions: Ints) -> Told | None:
    """Ask a run; None where it has no patch to take out. `y` (n,) are the true classes."""
    reads = restored.reads | {"nodes", "boxes"}
    whole = read_cache(data, restored.encoder, buckets, reads, restored.also, restored.also_reads)
    model, cache, images = restored.model, whole.only(restored.reads), torch.from_numpy(positions)
    first, second = top_two(model, cache, images).T
    true = torch.from_numpy(y)
    pairs = torch.stack([first, torch.where(first == true, second, true)], dim=1)
    falls = occlude(model, cache, images, pairs)
    if falls is None:
        return None
    scores, added = node_scores(model, cache, images), texts(restored, cache, images, pairs, TEXTS)
    rows = images * whole.views
    boxes, mask = whole.part(Boxes).box[rows, 1:], whole.part(Nodes).mask[rows, 1:]
    words = {} if added is None else bank_texts(data, restored.encoder, whole.classes)
    place: dict[int, int] = {}
    decisions, where = [], []
    for image, own in enumerate(mask):
        telling = [] if added is None else zip(added.text[image].tolist(), added.adds[image].tolist(), strict=True)
        decisions.append({
            "pair": pairs[image].tolist(),
            "fall": [round(value, 3) for value in falls[image, own].tolist()],
            "scores": None if scores is None else [round(value, 3) for value in scores[image, own].tolist()],
            "texts": [
                [place.setdefault(text, len(place)), round(adds, 3)]
                for text, adds in telling
                if abs(adds) > LEAST
            ],
        })
        where.append((1000 * boxes[image, own]).round().int().tolist())
    return Told(decisions, where, [words[text] for text in place])


def bank_texts(data: Path, encoder: str, classes: Sequence[str]) -> dict[int, Row]:
    """By concept_idx, the texts of a bank and the places in `classes` of those that own each.

    A prototype has no text, and is named by its classes.
    """
    table = store.read_table(data / f"bank/{encoder}.parquet", "bank/1", ["concept_idx", "text", "class_ids"])
    label = {class_id: number for number, class_id in enumerate(classes)}
    return {
        row["concept_idx"]: {
            "text": row["text"] or "prototype of " + ", ".join(row["class_ids"]),
            "owners": [label[class_id] for class_id in row["class_ids"] if class_id in label],
        }
        for row in table.to_pylist()
    }
