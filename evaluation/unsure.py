"""How sure the run that is shown may be, as the report draws it: calibration, sets, back-off and risk-coverage.

What is said stands in evaluation/calibration.py and evaluation/reliability.py; here it is made ready to be drawn, in a
square of SIDE.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.calibration import Calibration, Half, calibrate, units_of
from evaluation.reliability import cross_judge, describe
from evaluation.runs import Row
from training.metrics import Bools, Floats

SIDE = 120
BINS = 10


def judge_half(half: Half) -> tuple[Calibration, Row | None]:
    """The calibration on a run's half of val, and what it is worth; None where no two units tell that."""
    found = calibrate(half.logits, half.y, half.groups, half.classes, half.lineages)
    if len(np.unique(units_of(half.groups, len(half.y)))) < 2:
        return found, None
    worth = cross_judge(half.logits, half.y, half.groups, half.classes, half.lineages)
    p = found.probabilities(half.logits)
    bins = reliability(p.max(axis=1), p.argmax(axis=1) == half.y)
    return found, {"rows": describe(found, worth)["rows"], "bins": bins, "curve": risk_curve(worth.curve)}


def reliability(confidence: Floats, right: Bools) -> list[Row]:
    """For each of BINS equal ranges of confidence that has images: how many, how sure, how often right, and where."""
    number = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    found = []
    for one in np.unique(number):
        own = number == one
        sure, often = float(confidence[own].mean()), float(right[own].mean())
        size = 2 + 6 * float(np.sqrt(own.mean()))
        at = {"x": round(SIDE * sure, 1), "y": round(SIDE * (1 - often), 1), "r": round(size, 1)}
        found.append({"images": int(own.sum()), "sure": sure, "right": often, **at})
    return found


def risk_curve(curve: Sequence[tuple[float, float]]) -> Row:
    """Share answered against the errors among these answers, drawn up to the most errors."""
    most = max(0.01, *(errors for _, errors in curve))
    places = (f"{SIDE * answered:.1f},{SIDE * (1 - errors / most):.1f}" for answered, errors in curve)
    return {"points": " ".join(places), "most": most, "all": curve[-1][1]}


def answers(found: Calibration, logits: Floats) -> list[Row]:
    """What may be said of n pictures by their logits (n, C): positions of the classes in the set, and the back-off."""
    place = {class_id: number for number, class_id in enumerate(found.classes)}
    rows: list[Row] = []
    for answer in found.answer(logits):
        held: Any = answer["set"]
        rows.append({
            "set": None if held is None else [place[class_id] for class_id in held],
            "taxon": answer["name"] if answer["rank"] else None,
        })
    return rows
