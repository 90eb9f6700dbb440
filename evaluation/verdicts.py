"""What a study's runs reach, and what may be said of it: verdicts on methods, and answers to the study's questions.

Reads the predictions of runs through a plan (evaluation/plan.py); the rest are pure functions. compare.py writes the
tables.
"""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.plan import RIVAL, Cell, Plan, Question
from evaluation.predictions import read_predictions
from evaluation.statistics import LEVEL, Paired, holm, paired_differences
from evaluation.words import on_these_classes, points, points_range, written_p
from fieldmark.command import UserError
from fieldmark.store import vectors_of
from training.controls import Control
from training.folds import HELD_OUT
from training.metrics import (
    Bools,
    Floats,
    Ints,
    accuracy,
    calibration_error,
    fit_temperature,
    macro_accuracy,
    tier_accuracy,
    tiers,
    top_k_accuracy,
)
from training.regimes import Folds, Regime, Unseen, harmonic_mean

REFERENCE = "linear_probe"


class Result(NamedTuple):
    """What one method under one control reaches in S runs, all on the same n images."""

    method: str
    control: Control
    plain: Control  # what the control stands against: none, with as many concepts where the method reads concepts
    correct: Bools  # (S, n)
    figures: list[dict[str, float]]  # of each run, by name


class Table(NamedTuple):
    """The results of one encoder under one regime, all on the same n images."""

    encoder: str
    regime: Regime
    paths: list[str]  # n
    y: Ints  # (n,) positions in the classes
    results: list[Result]


class Verdict(NamedTuple):
    """What may be said of a result.

    `paired` is its difference to the probe, None for the probe itself. `p` is that difference's p, corrected for the
    methods of the table; None for the probe and for results under a control.
    """

    result: Result
    paired: Paired | None
    p: float | None
    words: str


# What the runs reach.


def read_results(plan: Plan, grid: Sequence[Cell], split: str) -> Table:
    """The results of one encoder and regime on a split, in the order in which the study lists methods and controls.

    Raises UserError where runs are of different images, or where the split has none.
    """
    y: Ints = np.zeros(0, np.int64)
    results: list[Result] = []
    paths: list[str] | None = None
    place = place_in_study(plan)
    for _, runs in groupby(sorted(grid, key=place), place):
        own_paths, y, result = read_result(plan, list(runs), split)
        paths = own_paths if paths is None else paths
        if own_paths != paths:
            raise UserError(f"{plan.folder}: its runs are of different images; {again(plan)}")
        results.append(result)
    assert paths is not None
    if not paths:
        raise UserError(f"{plan.folder}: regime {grid[0].regime.label} leaves no {split} image to compare on")
    return Table(grid[0].encoder, grid[0].regime, paths, y, results)


def place_in_study(plan: Plan) -> Callable[[Cell], tuple[int, int]]:
    """A key that sorts runs by method (or variant), then by control, as the study lists them."""
    return lambda cell: ([*plan.entries, RIVAL].index(cell.method), plan.study.controls.index(cell.control))


def read_result(plan: Plan, runs: Sequence[Cell], split: str) -> tuple[list[str], Ints, Result]:
    """The paths and classes of a split's images, and what the runs of one method and control reach on them.

    Raises UserError where the runs are of different images.
    """
    paths: list[str] = []
    y: Ints = np.zeros(0, np.int64)
    correct, figures = [], []
    # The folds of a method are one run of all their held-out images.
    split = HELD_OUT if isinstance(runs[0].regime, Folds) else split
    for cell, table in zip(runs, read_predictions(plan, runs), strict=False):
        classes = json.loads(table.schema.metadata[b"params"])["classes"]
        labels = pc.index_in(table["class_id"], value_set=pa.array(classes)).to_numpy().astype(np.int64)
        splits = np.array(table["split"].to_pylist(), dtype=str)
        logits, of_split = vectors_of(table, "logits"), splits == split
        if isinstance(cell.regime, Unseen):
            logits, found = figures_of_unseen(logits, labels, splits, split)
        else:
            found = {}
        figures.append(found | figures_of(logits, labels, splits, split))
        own_paths = [path for path, chosen in zip(table["path"].to_pylist(), of_split, strict=True) if chosen]
        if cell is not runs[0] and own_paths != paths:
            raise UserError(f"{plan.folder / cell.run}: is of other images than {runs[0].run}; {again(plan)}")
        paths, y = own_paths, labels[of_split]
        correct.append(logits[of_split].argmax(1) == y)
    method, control = runs[0].method, runs[0].control
    plain = Control(concepts=control.concepts)
    plain = plain if plan.reads(runs[0], plain.changes) else Control()
    return paths, y, Result(method, control, plain, np.stack(correct), figures)


def figures_of(logits: Floats, y: Ints, splits: np.ndarray, split: str) -> dict[str, float]:
    """The figures of one run on a split, by name, from logits (n, C), classes y (n,) and splits (n,) of all images.

    The temperature that scales logits is fitted on val; where val has no image, that figure is left out.
    """
    z, truth, val = logits[splits == split], y[splits == split], splits == "val"
    figures = {
        "accuracy": accuracy(z, truth),
        "macro": macro_accuracy(z, truth),
        "top-5": top_k_accuracy(z, truth, 5),
        "ECE": calibration_error(z, truth),
    }
    if val.any() and np.isfinite(logits).all():
        figures["ECE, scaled"] = calibration_error(z / fit_temperature(logits[val], y[val]), truth)
    counts = np.bincount(y[splits == "train"], minlength=logits.shape[1])
    if not counts.any():
        return figures  # of folds: each has training images of its own
    return figures | tier_accuracy(z, truth, tiers(counts, limits=None))


def figures_of_unseen(logits: Floats, y: Ints, splits: np.ndarray, split: str) -> tuple[Floats, dict[str, float]]:
    """Logits (n, C) of the classes that compete, and the figures of one run on seen and on unseen classes.

    Classes compete that were trained on (seen) or that have images in the split (unseen if not trained on); the logits
    of the others become -inf. The figure `seen` is the accuracy on images of seen classes where seen classes alone
    compete, `unseen` likewise; `harmonic` is the harmonic mean of the accuracies on both kinds of images where all
    classes compete.
    """
    seen, present = (np.isin(np.arange(logits.shape[1]), y[splits == name]) for name in ("train", split))
    unseen = present & ~seen
    joint = np.where(seen | unseen, logits, -np.inf).astype(np.float32)
    figures, competing = {}, []
    for name, space in (("seen", seen), ("unseen", unseen)):
        images = (splits == split) & space[y]
        figures[name] = accuracy(np.where(space, logits, -np.inf)[images], y[images])
        competing.append(accuracy(joint[images], y[images]))
    return joint, figures | {"harmonic": harmonic_mean(*competing)}


def again(plan: Plan) -> str:
    """The remedy, where runs do not fit."""
    return f"run `make study NAME={plan.name}`"


# Verdicts.


def judge(table: Table, groups: Ints | None) -> list[Verdict]:
    """A verdict on each result: every method against the probe, and against itself under its controls.

    `groups` (n,) says which group each image is of. Raises KeyError where the table lacks the probe without a control.
    """
    seeds = max(len(result.correct) for result in table.results)
    images = len(table.paths)
    correct = np.stack([np.broadcast_to(result.correct, (seeds, images)) for result in table.results])
    plain = {
        (result.method, result.plain): number
        for number, result in enumerate(table.results)
        if result.control == result.plain
    }
    reference = plain[REFERENCE, Control()]
    paired = paired_differences(correct, correct[reference], table.y, groups)
    rivals = [number for number in plain.values() if number != reference]
    p = dict(zip(rivals, holm([paired[number].p for number in rivals]), strict=True))

    # By the number of a result under a control: the number of its method's plain result, and what that is ahead by.
    own = {
        number: plain[result.method, result.plain]
        for number, result in enumerate(table.results)
        if result.control != result.plain and (result.method, result.plain) in plain
    }
    gains: dict[int, tuple[Paired, float]] = {}
    if own:
        found = paired_differences(correct[list(own.values())], correct[list(own)], table.y, groups)
        gains = dict(zip(own, zip(found, holm([gain.p for gain in found]), strict=True), strict=True))

    verdicts = []
    for number, result in enumerate(table.results):
        if number == reference:
            words = ["the probe"]
        elif result.control == result.plain:
            words = [against_probe(paired[number], p[number])]
        elif number in gains:
            words = [against_control(*gains[number])]
        else:
            words = [f"control of {result.plain.label}, which the table does not have"]
        for other, (gain, corrected) in gains.items():
            control = table.results[other].control
            if own[other] == number and not is_ahead(gain, corrected):
                words.append(f"does not beat its control {control.label}: {control.subject} nothing here")
        difference = None if number == reference else paired[number]
        verdicts.append(Verdict(result, difference, p.get(number), "; ".join(words)))
    return verdicts


def is_ahead(paired: Paired, p: float) -> bool:
    """Whether a difference is above 0 by its corrected p."""
    return p < LEVEL and paired.difference > 0


def against_probe(paired: Paired, p: float) -> str:
    """The verdict on a method, `paired` being its difference to the probe and p corrected."""
    if p >= LEVEL:
        return "no difference shown"
    found = "beats the probe" if paired.difference > 0 else "worse than the probe"
    return found + on_these_classes(paired.classes)


def against_control(gain: Paired, p: float) -> str:
    """The verdict on a control: `gain` is what the method without it is ahead by, p corrected."""
    words = f"control: the method is {points(gain.difference)} {points_range(gain.images)} ahead, p {written_p(p)}"
    return words if is_ahead(gain, p) else f"{words}: not shown to be"


# Answers.


class Answer(NamedTuple):
    """What a table says of a question.

    `paired` is the difference of the question's `of` to its `against`, p is corrected for the questions of the table.
    """

    question: Question
    paired: Paired
    p: float

    @property
    def words(self) -> str:
        if self.p >= LEVEL:
            return f"no difference shown: the interval holds {points_range(self.paired.images)}"
        found = "yes" if self.paired.difference > 0 else "no: the other way round"
        return found + on_these_classes(self.paired.classes)


def answer(table: Table, questions: Sequence[Question], groups: Ints | None) -> list[Answer]:
    """An answer to each question, which compares two methods without a control; `groups` as in `judge`."""
    if not questions:
        return []
    correct = {result.method: result.correct for result in table.results if result.control == Control()}
    shape = max(len(runs) for runs in correct.values()), len(table.paths)
    of, against = (
        np.stack([np.broadcast_to(correct[name], shape) for name in names])
        for names in ([question.of for question in questions], [question.against for question in questions])
    )
    paired = paired_differences(of, against, table.y, groups)
    return [Answer(*found) for found in zip(questions, paired, holm([one.p for one in paired]), strict=True)]
