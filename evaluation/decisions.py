"""Why a run says one class and not another of the report's pictures: by patch, and by the texts that it reads.

training/explain.py says what the figures are. Each run that reads patches or concepts is asked about its own answer a
against b: the true class where a is wrong, else its second. A pass for each patch of a picture bounds how many can be
asked: EXPLAINED of them, mistakes of the run that is shown first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.runs import Row, Run
from fieldmark import store
from fieldmark.params import Params
from training.controls import Control
from training.data import Cache, read_cache
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.explain import can_say_why, name_pair, name_text, node_scores, occlude, pairs, reads_of, texts, top_two
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
    """What each run that reads patches or concepts says of `pictures`, at `positions` in the order of the run's paths.

    `path` is the parameters' file. To each picture it adds `decisions`, by the place of the run in `runs`: the pair of
    classes, what each patch adds (`fall`, null where it reads none), the method's own scores, texts or pairs of texts;
    and `boxes` of the patches, by encoder. Returns those runs, with the texts that `texts` refers to by place, the
    classes that own each, and whether they are `pairs`. Of runs under a control there is nothing: it took away what a
    picture has. Raises UserError where a run is not of these parameters any more.
    """
    asked: list[Row] = []
    for picture in pictures:
        picture |= {"decisions": {}, "boxes": {}}
    for number, run in enumerate(runs):
        planned = plan_run(path, params, run.name)
        reads = planned.reading.reads
        # A run of class names alone has no field mark to name.
        tells = can_say_why(planned.method, reads) and bool(reads & {"nodes", "concepts"})
        if tells and planned.control == Control():
            restored = restore(params, path, run.name, data)
            told = decide(restored, params.dataset.buckets, data, run.y[positions], positions)
            if told is not None:
                asked.append({"run": number, "texts": told.texts, "pairs": told.pairs})
                for picture, decision in zip(pictures, told.decisions, strict=True):
                    picture["decisions"][number] = decision
                if told.boxes is not None:
                    for picture, boxes in zip(pictures, told.boxes, strict=True):
                        picture["boxes"][restored.encoder] = boxes
    return asked


class Told(NamedTuple):
    """What one run says of n pictures."""

    decisions: list[Row]
    boxes: list[list[list[int]]] | None  # of each picture's patches, in thousandths; None where the run reads none
    texts: list[Row]
    pairs: bool  # whether these are pairs of texts


Key = tuple[int, int, bool]  # two rows of the bank, of one text the same twice; whether the picture has more of them


def decide(restored: Restored, buckets: int, data: Path, y: Ints, positions: Ints) -> Told | None:
    """Ask a run; None where it has no patch to take out and no text that adds. `y` (n,) are the true classes."""
    whole = read_cache(data, restored.encoder, buckets, reads_of(restored), restored.also, restored.also_reads)
    model, cache, images = restored.model, whole.only(restored.reads), torch.from_numpy(positions)
    first, second = top_two(model, cache, images).T
    true = torch.from_numpy(y)
    classes = torch.stack([first, torch.where(first == true, second, true)], dim=1)
    falls = occlude(model, cache, images, classes)
    telling, paired = telling_texts(restored, cache, images, classes)
    if falls is None and telling is None:
        return None
    words = {} if telling is None else bank_texts(data, restored.encoder, whole.classes)
    place: dict[Key, int] = {}
    decisions: list[Row] = [
        {
            "pair": pair,
            "fall": None,
            "scores": None,
            "texts": [
                [place.setdefault(key, len(place)), round(adds, 3)]
                for key, adds in ([] if telling is None else telling[image])
                if abs(adds) > LEAST
            ],
        }
        for image, pair in enumerate(classes.tolist())
    ]
    where: list[list[list[int]]] | None = None
    if falls is not None:
        where, scores = [], node_scores(model, cache, images)
        rows = images * whole.views
        boxes, mask = whole.part(Boxes).box[rows, 1:], whole.part(Nodes).mask[rows, 1:]
        for image, own in enumerate(mask):
            decisions[image]["fall"] = [round(value, 3) for value in falls[image, own].tolist()]
            if scores is not None:
                decisions[image]["scores"] = [round(value, 3) for value in scores[image, own].tolist()]
            where.append((1000 * boxes[image, own]).round().int().tolist())
    return Told(decisions, where, [word_of(key, words, paired) for key in place], paired)


def telling_texts(
    restored: Restored, cache: Cache, images: Tensor, classes: Tensor
) -> tuple[list[list[tuple[Key, float]]] | None, bool]:
    """By image the texts that tell its classes apart the most, or pairs of texts, and what each adds; and which it is.

    None where the run reads none.
    """
    found = texts(restored, cache, images, classes, TEXTS)
    if found is not None:
        each = zip(found.text.tolist(), found.adds.tolist(), strict=True)
        return [[((text, text, True), adds) for text, adds in zip(*row, strict=True)] for row in each], False
    together = pairs(restored, cache, images, classes, TEXTS)
    if together is None:
        return None, False
    of_pairs = zip(together.text.tolist(), together.adds.tolist(), together.more.tolist(), strict=True)
    return [[((a, b, more), adds) for (a, b), adds, more in zip(*row, strict=True)] for row in of_pairs], True


def word_of(key: Key, words: dict[int, Row], paired: bool) -> Row:
    """A text, or how a pair of them is named; the classes that own either."""
    first, second, more = key
    if not paired:
        return words[first]
    owners = sorted({*words[first]["owners"], *words[second]["owners"]})
    return {"text": name_pair(words[first]["text"], words[second]["text"], more), "owners": owners}


def bank_texts(data: Path, encoder: str, classes: Sequence[str]) -> dict[int, Row]:
    """By concept_idx, the texts of a bank and the places in `classes` of those that own each."""
    known = store.read_table(data / "index/classes.parquet", "index.classes/2", ["class_id", "name"]).to_pylist()
    names = {row["class_id"]: row["name"] for row in known}
    table = store.read_table(data / f"bank/{encoder}.parquet", "bank/1", ["concept_idx", "text", "class_ids"])
    label = {class_id: number for number, class_id in enumerate(classes)}
    return {
        row["concept_idx"]: {
            "text": name_text(row["text"], row["class_ids"], names),
            "owners": [label[class_id] for class_id in row["class_ids"] if class_id in label],
        }
        for row in table.to_pylist()
    }
