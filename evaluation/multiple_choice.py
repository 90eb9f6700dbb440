"""FOCI: multiple choice among the true class and the wrong ones that a miner likes best, for any run and any model.

After Geigle et al., EMNLP 2024 [code options_generation.py]: whoever cannot be asked about a thousand classes at once,
a language model above all, is asked about four. The wrong three are those with the highest logits of a miner, in the
paper CLIP by class names. There the true class stood first in every list; here the order is drawn for each image.

The miner's own accuracy among its options is its top-1, and no other three wrong options make it lower: where it is
wrong, the class that it prefers is among them. So options are harder for their miner, and for what is near to it, than
for others: hard negatives chosen by CLIP are biased against CLIP. A judge is comparable with another one where both are
equally far from the miner (`kin`).

Nothing here reads a file; tools/foci.py does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.statistics import Paired, paired_difference
from evaluation.words import lay_out, percent, points, points_range
from fieldmark.command import UserError
from fieldmark.store import sha256
from training.metrics import Bools, Floats, Ints

OPTIONS = 4
CHUNK = 1024  # images whose classes are sorted at once


def mine(logits: Floats, y: Ints) -> Ints:
    """(n, OPTIONS): the true class y (n,) first, then the wrong ones by logits (n, C), from the highest down.

    Of equal logits the class that comes first in the order of classes goes first, as argmax has it. Raises UserError
    where there are fewer classes than options.
    """
    classes = logits.shape[1]
    if classes < OPTIONS:
        raise UserError(f"a question has {OPTIONS} options, and these data have {classes} classes: give them more")
    wrong = []
    for start in range(0, len(y), CHUNK):
        own = y[start : start + CHUNK, None]
        falling = np.argsort(-logits[start : start + CHUNK].astype(np.float64), axis=1, kind="stable")
        wrong.append(falling[falling != own].reshape(len(own), classes - 1)[:, : OPTIONS - 1])
    return np.concatenate([y[:, None], np.concatenate([np.zeros((0, OPTIONS - 1), np.int64), *wrong])], axis=1)


def most_named(options: Ints, y: Ints) -> dict[int, Ints]:
    """By class, the wrong classes among the options (n, OPTIONS) of its pictures: those named most often first.

    Of classes that are named as often the first in their order goes first.
    """
    found = {}
    for own in np.unique(y).tolist():
        named, count = np.unique(options[y == own], return_counts=True)
        wrong = named != own
        found[own] = named[wrong][np.argsort(-count[wrong], kind="stable")]
    return found


def mix(options: Ints, image_ids: Sequence[str], classes: Sequence[str], seed: int) -> Ints:
    """The same options, each image's in an order that seed, image and classes draw, whatever other images there are."""
    drawn = [
        sorted(row, key=lambda option: sha256(f"foci {seed} {image_id} {classes[option]}"))
        for image_id, row in zip(image_ids, options.tolist(), strict=True)
    ]
    return np.array(drawn, dtype=np.int64).reshape(options.shape)


def answer(logits: Floats, options: Ints) -> Ints:
    """(n,): the option with the highest logit, a class; of equals the one that comes first in the order of classes.

    Logits (n, C), options (n, OPTIONS) in any order.
    """
    ordered = np.sort(options, axis=1)
    best = np.take_along_axis(logits, ordered, axis=1).argmax(axis=1)
    return np.take_along_axis(ordered, best[:, None], axis=1)[:, 0]


class Judge(NamedTuple):
    """One who answered: S seeds, n images."""

    name: str
    encoder: str
    kin: bool  # whether it stands on what the miner stands on: the options are against it too
    right: Bools  # (S, n), among the options
    top1: Bools  # (S, n), among all classes
    by_class: bool = False  # whether its regime makes its accuracy a claim about other classes


class Score(NamedTuple):
    """The accuracy of a judge among the options, and its difference to the reference on the same images."""

    judge: Judge
    alone: Paired  # to one who is never right: its intervals are those of the accuracy
    reference: Paired | None  # None for the reference itself, or where there is none

    @property
    def accuracy(self) -> float:
        return float(self.judge.right.mean())

    @property
    def over(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        low, high = self.alone.over
        return max(low, 0.0), high


def score(judges: Sequence[Judge], y: Ints, groups: Ints | None, reference: str | None) -> list[Score]:
    """The judges in their order, of images with y (n,) and groups (n,).

    `reference` is the name of one of them or, where they are called ENCODER.NAME, of one an encoder: each judge is held
    against that of its own. None where there is none.
    """
    rivals = {judge.name: judge for judge in judges}
    found = []
    for judge in judges:
        rival = rivals.get(f"{judge.encoder}.{reference}") or rivals.get(reference or "")
        alone = paired_difference(judge.right, np.zeros(len(y), bool), y, groups, by_class=judge.by_class)
        paired = None
        if rival is not None and judge is not rival:
            paired = paired_difference(judge.right, rival.right, y, groups, by_class=judge.by_class)
        found.append(Score(judge, alone, paired))
    return found


def as_text(title: str, miner: str, own: Score, scores: Sequence[Score], reference: str | None, seed: int) -> str:
    """tables.txt: a row a judge, `own` is that of the miner, and what the table must not be read without."""
    head = ["", "encoder", f"1 of {OPTIONS}", "95 %", "over", "1 of all"]
    lines = [head if reference is None else [*head, f"- {reference}", "95 %"]]
    for row in (own, *scores):
        judge = row.judge
        line = [judge.name + (" *" if judge.kin else ""), judge.encoder, percent(row.accuracy)]
        line += ["[{}, {}]".format(*map(percent, row.over)), f"{row.alone.units} {row.alone.unit}"]
        line += [percent(float(judge.top1.mean()))]
        if row.reference is not None and row is not own:
            line += [points(row.reference.difference), points_range(row.reference.over)]
        lines.append([*line, *[""] * (len(lines[0]) - len(line))])
    foot = [
        f"accuracy in % among {OPTIONS} options, the true class and the {OPTIONS - 1} wrong ones that {miner} likes"
        f" best, in an order drawn by seed {seed}; guessing gets {percent(1 / OPTIONS)}; 1 of all: among all classes",
        "95 % bootstrap intervals over the units that a row names; nothing is corrected for the number of rows, and no"
        " verdict rests on them",
        "the miner's own accuracy is its 1 of all: no other wrong options are harder for it; so they are harder for it"
        " than for others, and by how much cannot be told from this table",
    ]
    if reference is not None and all(row.judge.name != reference for row in scores):
        foot.append(f"- {reference}: that of the same encoder")
    if any(row.judge.kin for row in scores):
        foot.append(
            "* the encoder that mined the options, or a run that stands on it: they are against it (hard negatives"
            " chosen by CLIP are against CLIP); compare only rows with a star, or only rows without, or mine by another"
        )
    return "\n\n".join([title, lay_out(lines), "\n".join(foot)]) + "\n"


def as_json(own: Score, scores: Sequence[Score]) -> dict[str, Any]:
    """tables.json: the same figures for programs."""

    def row(one: Score) -> dict[str, Any]:
        judge = one.judge
        return {
            "name": judge.name,
            "encoder": judge.encoder,
            "kin": judge.kin,
            "accuracy": one.accuracy,
            "interval": one.over,
            "unit": one.alone.unit,
            "units": one.alone.units,
            "top1": float(judge.top1.mean()),
            "paired": None if one.reference is None else one.reference._asdict(),
        }

    return {"options": OPTIONS, "miner": row(own), "judges": [row(one) for one in scores]}
