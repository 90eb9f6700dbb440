"""What a study's runs reach, and what may be said of it: verdicts on methods, and answers to the study's questions.

Reads the predictions of runs through a plan (evaluation/plan.py); the rest are pure functions. compare.py writes the
tables.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.effort import still_rising
from evaluation.plan import REFERENCE, RIVAL, Cell, Plan, Question, again
from evaluation.predictions import read_predictions
from evaluation.runs import read_json
from evaluation.statistics import LEVEL, MARGIN, UNITS, Paired, holm, paired_differences
from evaluation.words import on_these_classes, points, points_range, written_p
from fieldmark.command import UserError
from fieldmark.store import vectors_of
from training.controls import Control
from training.folds import HELD_OUT
from training.links import TRANSDUCTIVE
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
from training.regimes import Folds, Partial, Regime, Shots, Unseen, harmonic_mean

STAND_IN = "no verdict: its tower stands in for that of the system"
WITHIN = f"{100 * MARGIN:g} point"


class Result(NamedTuple):
    """What one method under one control reaches in S runs, all on the same n images."""

    method: str
    control: Control
    plain: Control  # what the control stands against: none, with as many concepts where the method reads concepts
    correct: Bools  # (S, n)
    figures: list[dict[str, float]]  # of each run, by name
    rising: str = ""  # of a method with epochs: in how many runs the last one was best
    transductive: bool = False  # whether images that are judged send to each other (training/links.py)


class Table(NamedTuple):
    """The results of one encoder under one regime by one measure, all on the same n images.

    `part` (S, n) or (1, n) says how the measure counts images: see evaluation.statistics.paired_difference.
    """

    encoder: str
    regime: Regime
    paths: list[str]  # n
    y: Ints  # (n,) positions in the classes
    results: list[Result]
    groups: Ints | None = None  # (n,) which group each image is of
    measure: str = "accuracy"
    part: Ints | None = None
    stand_ins: frozenset[str] = frozenset()  # rows without a verdict: their tower stands in for the system's

    def compare(self, a: Bools, b: Bools) -> list[Paired]:
        """The difference of each row of a (R, S, n) to b (S, n), or to the same row of b (R, S, n).

        Few shots and unseen classes make a claim about other classes: there these are a unit.
        """
        by_class = isinstance(self.regime, Shots | Unseen)
        return paired_differences(a, b, self.y, self.groups, self.part, by_class)


class Verdict(NamedTuple):
    """What may be said of a result.

    `paired` is its difference to the probe, None for the probe itself. `gain` is what a control takes away: what the
    method without it is ahead by, None for methods and where the table lacks the method without it. `p` is that of
    `gain`, else that of `paired`, corrected for all such that the study publishes; None for the probe, and for a
    control without `gain`.
    """

    result: Result
    paired: Paired | None
    gain: Paired | None
    p: float | None
    words: str


# What the runs reach.


def read_results(plan: Plan, grid: Sequence[Cell], split: str) -> list[Table]:
    """The results of one encoder and regime on a split, in the order in which the study lists methods and controls.

    One table, of accuracy; for unseen classes one of the accuracy on these alone, and one of the harmonic mean. Raises
    UserError where runs are of different images, or where the split has none.
    """
    place = place_in_study(plan)
    read = [read_result(plan, list(runs), split) for _, runs in groupby(sorted(grid, key=place), place)]
    first = read[0]
    for other in read:
        if other.paths != first.paths or (other.part != first.part).any():
            raise UserError(f"{plan.folder}: its runs are of different images; {again(plan)}")
    if not first.paths:
        raise UserError(f"{plan.folder}: regime {grid[0].regime.label} leaves no {split} image to compare on")
    results, stand_ins = [one.result for one in read], frozenset(plan.study.stand_in)
    table = Table(grid[0].encoder, grid[0].regime, first.paths, first.y, results, stand_ins=stand_ins)
    if not isinstance(grid[0].regime, Unseen):
        return [table]
    part = max((one.part for one in read), key=len)
    among_unseen = [one.result._replace(correct=one.among_unseen) for one in read if one.among_unseen is not None]
    return [
        table._replace(measure="unseen", part=np.where(part == 1, 0, -1), results=among_unseen),
        table._replace(measure="harmonic", part=part),
    ]


def place_in_study(plan: Plan) -> Callable[[Cell], tuple[int, int]]:
    """A key that sorts runs by method (or variant), then by control, as the study lists them."""
    return lambda cell: ([*plan.entries, RIVAL].index(cell.method), plan.study.controls.index(cell.control))


class Read(NamedTuple):
    """What the runs of one method and control say of n images."""

    paths: list[str]
    y: Ints  # (n,)
    result: Result
    part: Ints  # (S, n): -1 where an image is not of the split in that run, 1 where its class is an unseen one, else 0
    among_unseen: Bools | None  # (S, n): right where the unseen classes alone compete; under the regime Unseen


def read_result(plan: Plan, runs: Sequence[Cell], split: str) -> Read:
    """What the runs of one method and control reach on the images that are of a split in any of them.

    Raises UserError where the runs are of different images.
    """
    paths: list[str] = []
    y: Ints = np.zeros(0, np.int64)
    correct, among_unseen, parts, figures = [], [], [], []
    # The folds of a method are one run of all their held-out images.
    split = HELD_OUT if isinstance(runs[0].regime, Folds) else split
    for cell, table in zip(runs, read_predictions(plan, runs), strict=False):
        classes = json.loads(table.schema.metadata[b"params"])["classes"]
        labels = pc.index_in(table["class_id"], value_set=pa.array(classes)).to_numpy().astype(np.int64)
        splits = np.array(table["split"].to_pylist(), dtype=str)
        logits, part = vectors_of(table, "logits"), np.where(splits == split, 0, -1)
        own: dict[str, float] = {}
        if isinstance(cell.regime, Unseen):
            logits, part, unseen, own = read_unseen(logits, labels, splits, split)
            among_unseen.append(unseen)
        if isinstance(cell.regime, Partial):
            metrics = read_json(plan.folder / cell.run / "metrics.json", again(plan))
            own["disambiguated"] = metrics["train"]["disambiguated"]
        figures.append(own | figures_of(logits, labels, splits, split))
        paths, y = table["path"].to_pylist(), labels
        parts.append(part)
        correct.append(logits.argmax(1) == y)
    method, control = runs[0].method, runs[0].control
    plain = Control(concepts=control.concepts)
    plain = plain if plan.reads(runs[0], plain.changes) else Control()
    part = np.stack(parts)
    shown: Bools = np.asarray((part >= 0).any(0))
    if not among_unseen and (part[:, shown] < 0).any():
        raise UserError(f"{plan.folder}: the runs of {method} are of different images; {again(plan)}")
    rising = still_rising(plan, runs)
    transductive = plan.is_transductive(method)
    result = Result(method, control, plain, np.stack(correct)[:, shown], figures, rising, transductive)
    return Read(
        [path for path, chosen in zip(paths, shown, strict=True) if chosen],
        y[shown],
        result,
        part[:, shown],
        np.stack(among_unseen)[:, shown] if among_unseen else None,
    )


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


class ReadUnseen(NamedTuple):
    """What a run says of seen and unseen classes.

    Classes compete that were trained on (seen) or that have images in the split (unseen if not trained on).
    """

    joint: Floats  # (n, C) the logits; those of classes that do not compete are -inf
    part: Ints  # (n,): 0 for the split's images of seen classes, 1 for those of unseen ones, -1 for all others
    among_unseen: Bools  # (n,): right where the unseen classes alone compete
    figures: dict[str, float]


def read_unseen(logits: Floats, y: Ints, splits: np.ndarray, split: str) -> ReadUnseen:
    """Seen and unseen classes in one run's logits (n, C), classes y (n,) and splits (n,).

    The figure `seen` is the accuracy on images of seen classes where seen classes alone compete, `unseen` likewise;
    `harmonic` is the harmonic mean of the accuracies on both kinds of images where all classes compete.
    """
    seen, present = (np.isin(np.arange(logits.shape[1]), y[splits == name]) for name in ("train", split))
    unseen = present & ~seen
    joint, of_seen, of_unseen = (
        np.where(space, logits, -np.inf).astype(np.float32) for space in (seen | unseen, seen, unseen)
    )
    part = np.where(splits != split, -1, np.where(seen[y], 0, 1))
    figures = {
        "seen": accuracy(of_seen[part == 0], y[part == 0]),
        "unseen": accuracy(of_unseen[part == 1], y[part == 1]),
        "harmonic": harmonic_mean(*(accuracy(joint[part == of], y[part == of]) for of in (0, 1))),
    }
    return ReadUnseen(joint, part, of_unseen.argmax(1) == y, figures)


# Verdicts.


class Compared(NamedTuple):
    """A table's results (by their number) against the probe, and against themselves under their controls."""

    reference: int  # the number of the probe
    to_probe: dict[int, Paired]  # of all results but the probe
    own: dict[int, int]  # by the number of a result under a control: that of its method's plain result
    gains: dict[int, Paired]  # the same: what the plain result is ahead by


def compare_table(table: Table) -> Compared:
    """Raises KeyError where the table lacks the probe without a control."""
    seeds = max(len(result.correct) for result in table.results)
    images = len(table.paths)
    correct = np.stack([np.broadcast_to(result.correct, (seeds, images)) for result in table.results])
    plain = {
        (result.method, result.plain): number
        for number, result in enumerate(table.results)
        if result.control == result.plain
    }
    own = {
        number: plain[result.method, result.plain]
        for number, result in enumerate(table.results)
        if result.control != result.plain and (result.method, result.plain) in plain
    }
    reference = plain[REFERENCE, Control()]
    to_probe = dict(enumerate(table.compare(correct, correct[reference])))
    del to_probe[reference]
    gains = table.compare(correct[list(own.values())], correct[list(own)]) if own else []
    return Compared(reference, to_probe, own, dict(zip(own, gains, strict=True)))


def corrected(families: Sequence[Mapping[int, Paired]]) -> list[dict[int, float]]:
    """p of each comparison that may have a verdict, corrected (Holm) for the number of these in all tables together."""
    places = [(table, number) for table, of in enumerate(families) for number, one in of.items() if one.judged]
    found: list[dict[int, float]] = [{} for _ in families]
    for (table, number), p in zip(places, holm([families[t][n].p for t, n in places]), strict=True):
        found[table][number] = p
    return found


def judge(tables: Sequence[Table]) -> list[list[Verdict]]:
    """For each table a verdict on each result: every method against the probe, and against itself under its controls.

    p is corrected over all tables, for they are published together: of the methods' differences to the probe for the
    number of these, of the controls' for theirs. Raises KeyError where a table lacks the probe without a control.
    """
    compared = [compare_table(table) for table in tables]
    plain = [{n for n, one in enumerate(table.results) if one.control == one.plain} for table in tables]
    of_methods = corrected(
        [
            {number: one for number, one in found.to_probe.items() if number in of_table}
            for found, of_table in zip(compared, plain, strict=True)
        ]
    )
    of_controls = corrected([found.gains for found in compared])
    return [
        [verdict(table, found, number, p, gain_p) for number in range(len(table.results))]
        for table, found, p, gain_p in zip(tables, compared, of_methods, of_controls, strict=True)
    ]


def verdict(table: Table, found: Compared, number: int, p: Mapping[int, float], gain_p: Mapping[int, float]) -> Verdict:
    """What may be said of a table's result of this number; p and gain_p are corrected."""
    result = table.results[number]
    if number == found.reference:
        words = ["the probe"]
    elif result.control == result.plain:
        words = [against_probe(found.to_probe[number], p.get(number))]
    elif number in found.gains:
        words = [of_control(found.gains[number], gain_p.get(number))]
    else:
        words = [f"control of {result.plain.label}, which the table does not have"]
    for other, plain in found.own.items():
        if plain == number and other in gain_p:
            words += against_control(table.results[other].control, found.gains[other], gain_p[other])
    if result.control == result.plain:
        words += unlike(result, table.results[found.reference])
    if result.method in table.stand_ins:
        words = [STAND_IN]
    gain = found.gains.get(number)
    own_p = p.get(number) if gain is None else gain_p.get(number)
    return Verdict(result, found.to_probe.get(number), gain, own_p, "; ".join(words))


def unlike(one: Result, other: Result) -> list[str]:
    """What limits a comparison of two results of which only one heard images that are judged."""
    if one.transductive == other.transductive:
        return []
    transductive, inductive = (one, other) if one.transductive else (other, one)
    return [f"{transductive.method} is {TRANSDUCTIVE}, {inductive.method} is not"]


def too_few(paired: Paired) -> str:
    """Why there is no verdict."""
    return f"no verdict: {paired.units} {paired.unit}, and it takes {UNITS}"


def aside(paired: Paired) -> str:
    """What limits a difference that is shown: to these classes, to less than the margin."""
    these = on_these_classes(paired.classes) if paired.unit != "classes" else ""
    return these + (f", by less than {WITHIN}" if paired.equivalent else "")


def against_probe(paired: Paired, p: float | None) -> str:
    """The verdict on a method, `paired` being its difference to the probe and p corrected."""
    if p is None:
        return too_few(paired)
    if p < LEVEL:
        return ("beats the probe" if paired.difference > 0 else "worse than the probe") + aside(paired)
    return f"equivalent to the probe within {WITHIN}" if paired.equivalent else "no difference shown"


def of_control(gain: Paired, p: float | None) -> str:
    """The verdict on a control: `gain` is what the method without it is ahead by, p corrected."""
    words = f"control: the method is {points(gain.difference)} {points_range(gain.over)} ahead"
    if p is None:
        return f"{words}; {too_few(gain)}"
    words += f", p {written_p(p)}"
    if p < LEVEL:
        return words if gain.difference > 0 else f"{words}: it is behind"
    return f"{words}: equivalent within {WITHIN}" if gain.equivalent else f"{words}: not shown to be"


def against_control(control: Control, gain: Paired, p: float) -> list[str]:
    """What a control adds to the verdict on its method: nothing where the method beats it."""
    if p < LEVEL:
        return [] if gain.difference > 0 else [f"worse than its control {control.label}"]
    if gain.equivalent:
        return [f"equivalent to its control {control.label} within {WITHIN}: {control.subject} nothing here"]
    return [f"not shown to beat its control {control.label}: not shown that {control.subject} anything here"]


# Answers.


class Answer(NamedTuple):
    """What a table says of a question.

    `paired` is the difference of the question's `of` to its `against`, p is corrected for all answers of the study;
    None where there are too few units.
    """

    question: Question
    paired: Paired
    p: float | None
    stand_in: bool = False  # whether the tower of either stands in for that of its system
    unlike: str = ""  # what limits the comparison, in words

    @property
    def words(self) -> str:
        return STAND_IN if self.stand_in else "; ".join([self.found, *([self.unlike] if self.unlike else [])])

    @property
    def found(self) -> str:
        """What the figures say."""
        if self.p is None:
            return too_few(self.paired)
        if self.p < LEVEL:
            return ("yes" if self.paired.difference > 0 else "no: the other way round") + aside(self.paired)
        if self.paired.equivalent:
            return f"no: equivalent within {WITHIN}"
        return f"not shown: the interval holds {points_range(self.paired.over)}"


def answer(tables: Sequence[Table], questions: Sequence[Question]) -> list[list[Answer]]:
    """For each table an answer to each question that compares two methods which it has, both without a control."""
    asked, found, limits = [], [], []
    for table in tables:
        plain = {result.method: result for result in table.results if result.control == Control()}
        correct = {name: result.correct for name, result in plain.items()}
        own = [question for question in questions if {question.of, question.against} <= correct.keys()]
        paired: list[Paired] = []
        if own:
            shape = max(len(runs) for runs in correct.values()), len(table.paths)
            of, against = (
                np.stack([np.broadcast_to(correct[name], shape) for name in names])
                for names in ([question.of for question in own], [question.against for question in own])
            )
            paired = table.compare(of, against)
        asked.append(own)
        found.append(dict(enumerate(paired)))
        limits.append(["".join(unlike(plain[question.of], plain[question.against])) for question in own])
    return [
        [
            Answer(question, one[number], p.get(number), bool(table.stand_ins & {question.of, question.against}), limit)
            for number, (question, limit) in enumerate(zip(own, of_table, strict=True))
        ]
        for table, own, of_table, one, p in zip(tables, asked, limits, found, corrected(found), strict=True)
    ]
