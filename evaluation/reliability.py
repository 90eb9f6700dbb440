"""What a calibration is worth: coverage and size of sets, risk-coverage, back-off, errors by rank. Pure functions.

`judge` says it on images that had no part in the calibration, `cross_judge` on the calibrating ones by cross-fitting,
so that test need not be read.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from evaluation.calibration import ALPHA, ERROR, SETS, Calibration, calibrate, units_of
from evaluation.conformal import SCORES
from evaluation.runs import Row
from evaluation.taxonomy import Lineages, RankErrors, Taxonomy
from evaluation.words import percent
from fieldmark.command import UserError
from training.metrics import Bools, Floats, Ints, calibration_error, softmax

FOLDS = 10
CURVE_POINTS = 100  # of a risk-coverage curve that is shown


class Outcomes(NamedTuple):
    """What a calibration says of n images, and what is true."""

    logits: Floats  # (n, C) as the run gave them
    scaled: Floats  # (n, C) by the temperature
    y: Ints
    held: Bools  # (n, scores): whether the set by each of conformal.SCORES holds the class
    size: Ints  # (n, scores): how many classes it holds
    rank: Ints  # of the back-off's answer, -1 for none
    right: Bools  # whether it is right


@dataclass(frozen=True)
class Sets:
    coverage: float
    size: float  # mean number of classes
    empty: float  # share of sets without any


@dataclass(frozen=True)
class BackOff:
    answered: float  # share of pictures that get an answer
    ranks: tuple[float, ...]  # share of pictures answered at each rank
    wrong: float | None  # share of the answers; None without any


@dataclass(frozen=True)
class Reliability:
    """How a calibration did on n images that had no part in it; `dataclasses.asdict` of it is JSON.

    Sets and back-off count each group alike, as their promises do; the other figures count each image.
    """

    images: int
    units: int
    accuracy: float
    calibration_error: tuple[float, float]  # before the temperature and after it
    sets: dict[str, Sets]  # by conformal.SCORES
    backoff: BackOff
    curve: tuple[tuple[float, float], ...]  # risk-coverage: share answered, the surest first, and errors among them
    aurc: float
    ranks: tuple[RankErrors, ...]
    taxonomic_distance: float | None  # mean over mistakes; None without any, or without taxa


def judge(found: Calibration, logits: Floats, y: Ints, groups: Sequence[Any] | None = None) -> Reliability:
    """What a calibration is worth on images that had no part in it."""
    return summarise(outcomes(found, logits, y), units_of(groups, len(y)), found.taxonomy)


def cross_judge(
    logits: Floats,
    y: Ints,
    groups: Sequence[Any] | None,
    classes: Sequence[str],
    lineages: Lineages | None = None,
    alpha: float = ALPHA,
    error: float = ERROR,
) -> Reliability:
    """What `calibrate` is worth, on the same images: each is judged by a calibration on the other folds.

    10 folds, groups whole, so each calibration has about nine tenths of the images. Raises UserError where there are
    not two groups (or images).
    """
    units = units_of(groups, len(y))
    count = len(np.unique(units))
    if count < 2:
        raise UserError("val: the half that calibrates has fewer than two images or groups; add some to val")
    fold = (np.random.default_rng(0).permutation(count) % FOLDS)[units]
    parts, order = [], []
    for held_out in range(min(FOLDS, count)):
        out = fold == held_out
        found = calibrate(logits[~out], y[~out], units[~out].tolist(), classes, lineages, alpha, error)
        parts.append(outcomes(found, logits[out], y[out]))
        order.append(np.flatnonzero(out))
    seen = Outcomes(*(np.concatenate(field) for field in zip(*parts, strict=True)))
    return summarise(seen, units[np.concatenate(order)], found.taxonomy)


def outcomes(found: Calibration, logits: Floats, y: Ints) -> Outcomes:
    p = found.probabilities(logits)
    sets = np.stack([found.sets(p, score) for score in SCORES], axis=1)  # (n, scores, C)
    answers = found.back_off(p)
    return Outcomes(
        logits=logits,
        scaled=logits / found.temperature,
        y=y,
        held=sets[np.arange(len(y)), :, y],
        size=sets.sum(2),
        rank=answers.rank,
        right=answers.right(y, found.taxonomy),
    )


def summarise(seen: Outcomes, units: Ints, taxonomy: Taxonomy) -> Reliability:
    """`units` (n,): the group of each image."""
    _, unit, count = np.unique(units, return_inverse=True, return_counts=True)
    weights = 1 / count[unit]

    def mean(values: Bools | Ints) -> float:
        return float(np.average(values, weights=weights))

    p = softmax(seen.scaled)
    guess = p.argmax(1)
    wrong, answered = guess != seen.y, seen.rank >= 0
    coverage, risk = risk_coverage(p.max(1), wrong)
    shown = np.unique(np.linspace(0, len(wrong) - 1, CURVE_POINTS).round().astype(int))
    return Reliability(
        images=len(wrong),
        units=len(count),
        accuracy=1 - float(wrong.mean()),
        calibration_error=(calibration_error(seen.logits, seen.y), calibration_error(seen.scaled, seen.y)),
        sets={
            score: Sets(mean(held), mean(size), mean(size == 0))
            for score, held, size in zip(SCORES, seen.held.T, seen.size.T, strict=True)
        },
        backoff=BackOff(
            answered=mean(answered),
            ranks=tuple(mean(seen.rank == rank) for rank in range(taxonomy.ranks)),
            wrong=mean(answered & ~seen.right) / mean(answered) if answered.any() else None,
        ),
        curve=tuple(zip(coverage[shown].tolist(), risk[shown].tolist(), strict=True)),
        aurc=float(risk.mean()),
        ranks=tuple(taxonomy.errors_by_rank(seen.y, guess)),
        taxonomic_distance=(
            float(taxonomy.distances(seen.y, guess)[wrong].mean()) if wrong.any() and taxonomy.ranks > 1 else None
        ),
    )


def risk_coverage(confidence: Floats, wrong: Bools) -> tuple[Floats, Floats]:
    """(n,), (n,): where the k surest pictures are answered, k / n, and the share of these answers that is wrong.

    The mean of the second is the area under the curve, AURC (Geifman, Uziel and El-Yaniv, ICLR 2019 [mem]): 0 is best.
    Pictures that are equally sure come in no order: each counts their mean error.
    """
    _, place, count = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = (np.bincount(place, wrong) / count)[np.sort(place)]
    answered = np.arange(1, len(errors) + 1)
    return answered / len(errors), errors.cumsum() / answered


# In words.


def describe(found: Calibration, worth: Reliability) -> Row:
    """What the report and predict show, as JSON: `rows` of label, value and meaning; all figures behind them."""
    return {"rows": rows(found, worth), "calibration": asdict(found), "reliability": asdict(worth)}


def rows(found: Calibration, worth: Reliability) -> list[dict[str, str]]:
    """A line for each thing that a reader may ask: label, value, meaning. +- is a standard error over the units."""
    before, after = (percent(error) for error in worth.calibration_error)
    sets, lac = worth.sets[SETS], worth.sets["LAC"]
    chance = percent((sets.coverage * (1 - sets.coverage) / worth.units) ** 0.5)
    held = f"{percent(sets.coverage)} +- {chance} %, with {sets.size:.2f} classes each"
    wrong = None if found.backoff is None else worth.backoff.wrong
    lines = [
        (
            "calibration error",
            f"{after} %",
            f"mean gap of confidence and accuracy; {before} % before the temperature, {found.temperature:.2f}",
        ),
        (
            f"sets that hold the class, asked {percent(1 - found.alpha)} %",
            f"never: too few with {images_of(found)}" if found.limits[SETS] is None else held,
            f"adaptive sets, never empty; the smallest on average (LAC) hold it in {percent(lac.coverage)} %, with"
            f" {lac.size:.2f} classes each, and {percent(lac.empty)} % of them are empty",
        ),
        (
            f"answers that are wrong, asked {percent(found.error)} % at most",
            "no answer" if wrong is None else f"{percent(wrong)} %",
            backoff_words(found),
        ),
        ("pictures with an answer", answered_words(found), ranks_words(found.taxonomy, worth.backoff)),
        ("AURC", f"{percent(worth.aurc)} %", "errors among the surest pictures, on average over all numbers of them"),
    ]
    if found.taxonomy.ranks > 1:
        for row in worth.ranks:
            what = f"{row.taxa} taxa, {row.images} images" if row.rank else f"the class, {row.images} images"
            lines.append((f"wrong at rank {row.rank}", f"{percent(row.errors)} %", what))
    if worth.taxonomic_distance is not None:
        meaning = "ranks to climb from the class of a mistaken picture until the guess is in its taxon, on average"
        lines.append(("taxonomic distance", f"{worth.taxonomic_distance:.2f}", meaning))
    return [dict(zip(("label", "value", "meaning"), line, strict=True)) for line in lines]


def images_of(found: Calibration) -> str:
    return f"{found.images} images" + (f" of {found.units} groups" if found.units < found.images else "")


def backoff_words(found: Calibration) -> str:
    chosen = found.backoff
    if chosen is None:
        return f"never sure enough at {percent(found.error)} % with {images_of(found)}"
    return (
        f"a probability of {chosen.threshold:g} is asked; where that was chosen {chosen.wrong} of {chosen.answered}"
        f" were wrong, so at most {percent(chosen.bound)} % are, with 95 % confidence"
    )


def answered_words(found: Calibration) -> str:
    return "none" if found.backoff is None else f"{percent(found.backoff.answered / found.units)} %"


def ranks_words(taxonomy: Taxonomy, backed: BackOff) -> str:
    shares = f"in cross-fitting {percent(backed.answered)} %"
    if taxonomy.ranks == 1:
        return f"{shares}; the class or none: no lineage and no superclass parts the classes"
    return f"{shares}; " + ", ".join(f"{percent(share)} % at rank {rank}" for rank, share in enumerate(backed.ranks))
