"""When a run is unsure: what its logits are worth on new pictures, calibrated on the half of val that chose nothing.

Functions take logits (n, C), y (n,), positions in the C classes, and the groups (n,) of images that are no independent
draws (None: each stands for itself). `read_half` reads them of a run, `calibrate` fits what `Calibration.answer` needs.
Neither `choose` nor test has a part in it. What is promised holds for pictures drawn as the calibrating ones were, and
for no others; evaluation/reliability.py says what it is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.backoff import Answers, Chosen, back_off, choose_threshold
from evaluation.conformal import SCORES, prediction_sets, quantile
from evaluation.runs import PREDICTIONS, Row, groups_of, read_json, read_seed
from evaluation.taxonomy import Lineages, Taxonomy, lineages_of
from fieldmark import store
from fieldmark.command import UserError
from training.metrics import Bools, Floats, Ints, correct, fit_temperature, softmax

ALPHA = 0.1  # share of pictures whose set may lack their class
ERROR = 0.05  # share of answers that may be wrong
SETS = "APS"  # of conformal.SCORES, the one that answers


class Half(NamedTuple):
    """What a run says of the n images of the half of val that calibrates."""

    logits: Floats  # (n, C), of the seed whose model is kept
    y: Ints
    groups: list[str] | None
    classes: list[str]
    lineages: Lineages | None
    paths: list[str]


def read_half(data: Path, name: str) -> Half:
    """Read it of data/runs/NAME and data/index.

    Raises UserError where the run is not made, not possible, or was made from another index.
    """
    folder = data / "runs" / name
    again = f"run `python -m training.train --run {name}` (dvc repro train@{name})"
    config = read_json(folder / "config.json", again)
    if "not_possible" in config:
        raise UserError(f"{folder}: cannot work on this data ({config['not_possible']}); choose another run")
    path = folder / "predictions.parquet"
    classes = store.read_header(path, PREDICTIONS).params["classes"]
    table = read_seed(path, config["model_seed"], ["val"])
    paths = table["path"].to_pylist()
    images = store.read_table(data / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    index = store.read_table(data / "index/classes.parquet", "index.classes/2")
    usable = images.filter(pc.field("status") == "ok")["path"].to_pylist()
    if set(paths) - set(usable) or set(classes) - set(index["class_id"].to_pylist()):
        raise UserError(f"{folder}: was made from other images or classes than {data}/index holds; {again}")
    groups = groups_of(images)
    return Half(
        logits=store.vectors_of(table, "logits"),
        y=pc.index_in(table["class_id"], value_set=pa.array(classes)).to_numpy().astype(np.int64),
        groups=None if groups is None else [groups[path] for path in paths],
        classes=classes,
        lineages=lineages_of(index, classes),
        paths=paths,
    )


@dataclass(frozen=True)
class Calibration:
    """What was fitted on the calibrating images; `dataclasses.asdict` of it is JSON."""

    classes: tuple[str, ...]
    lineages: Lineages | None
    alpha: float
    error: float
    images: int
    units: int  # groups, or images where none is named
    temperature: float
    limits: dict[str, float | None]  # by conformal.SCORES; None: too few units for this alpha
    backoff: Chosen | None  # None: no threshold is shown to keep the error
    farthest: float | None  # a picture farther than this is none of these; None: not calibrated, or too few units

    @cached_property
    def taxonomy(self) -> Taxonomy:
        return Taxonomy(self.classes, self.lineages or [()] * len(self.classes))

    def probabilities(self, logits: Floats) -> Floats:
        """(n, C) float64."""
        return softmax(logits / self.temperature)

    def sets(self, p: Floats, score: str = SETS) -> Bools:
        """(n, C): which classes are in each picture's set, by its probabilities."""
        return prediction_sets(SCORES[score](p), self.limits[score])

    def back_off(self, p: Floats) -> Answers:
        return back_off(p, self.taxonomy, None if self.backoff is None else self.backoff.threshold)

    def answer(self, logits: Floats, distances: Floats | None = None) -> list[Row]:
        """What may be said of n pictures, by their logits (n, C) and `rejection.distance` (n,). Each has

        - `set`: class_ids, the most probable first, that hold the true class but for alpha of pictures; None where
          there were too few images to say;
        - `rank`, `name`, `p`: the most exact answer that keeps the error: 0 is the class, 1 the taxon that it lies in;
          all None where there is no such answer;
        - `none_of_these`: whether it is farther from training pictures than all but alpha of known pictures are; None
          where no distance is given or calibrated.
        """
        p = self.probabilities(logits)
        sets, answers = self.sets(p), self.back_off(p)
        far = None if distances is None or self.farthest is None else distances > self.farthest
        rows = []
        for image, order in enumerate(np.argsort(-p, axis=1, kind="stable")):
            known = answers.rank[image] >= 0
            rows.append({
                "set": None if self.limits[SETS] is None else [self.classes[c] for c in order[sets[image, order]]],
                "rank": int(answers.rank[image]) if known else None,
                "name": self.taxonomy.names[answers.node[image]] if known else None,
                "p": float(answers.p[image]) if known else None,
                "none_of_these": None if far is None else bool(far[image]),
            })
        return rows


def calibrate(
    logits: Floats,
    y: Ints,
    groups: Sequence[Any] | None,
    classes: Sequence[str],
    lineages: Lineages | None = None,
    alpha: float = ALPHA,
    error: float = ERROR,
    distances: Floats | None = None,
) -> Calibration:
    """Fit temperature, sets, back-off and, from `distances` (n,), rejection. Raises UserError where there is none.

    The temperature is fitted on the same images as the limits. It is one number, and in simulation neither promise
    suffers. Back-off takes one image a group, drawn (Dunn, Wasserman and Ramdas, JASA 2022 [mem]).
    """
    if not (0 < alpha < 1 and 0 < error < 1):
        raise UserError(f"alpha {alpha} and error {error}: are shares; give numbers between 0 and 1")
    if not len(y):
        raise UserError("val: none of its images is in the half that calibrates; add images or groups to val")
    units = units_of(groups, len(y))
    temperature = fit_calibrating_temperature(logits, y)
    p = softmax(logits / temperature)
    limits = {name: quantile(score(p)[np.arange(len(y)), y], units, alpha) for name, score in SCORES.items()}
    taxonomy = Taxonomy(tuple(classes), lineages or [()] * len(classes))
    drawn = one_of_each(units)
    return Calibration(
        classes=tuple(classes),
        lineages=lineages,
        alpha=alpha,
        error=error,
        images=len(y),
        units=len(drawn),
        temperature=temperature,
        limits=limits,
        backoff=choose_threshold(p[drawn], y[drawn], taxonomy, error),
        farthest=None if distances is None else quantile(distances, units, alpha),
    )


def fit_calibrating_temperature(logits: Floats, y: Ints) -> float:
    """fit_temperature, but where all n images are right, and so none says how sure is too sure.

    Then the mean confidence is (n + 1) / (n + 2), Laplace's rule of succession: 31 of 31 right is no certainty.
    """
    if not correct(logits, y).all():
        return fit_temperature(logits, y)
    wanted, low, high = (len(y) + 1) / (len(y) + 2), -4.0, 4.0  # log10 of T
    for _ in range(40):
        middle = (low + high) / 2
        too_sure = softmax(logits / 10**middle).max(1).mean() > wanted
        low, high = (middle, high) if too_sure else (low, middle)
    return float(10**high)


def units_of(groups: Sequence[Any] | None, images: int) -> Ints:
    """(n,): a number for the group of each image, or for each image."""
    return np.arange(images) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def one_of_each(units: Ints) -> Ints:
    """(units,): the position of one image of each unit, drawn."""
    shuffled = np.random.default_rng(0).permutation(len(units))
    return shuffled[np.unique(units[shuffled], return_index=True)[1]]
