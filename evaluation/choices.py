"""Notes on what was chosen: at an end of its grid, on classes that tell little apart, in folds that lack a class.

Reads config.json of runs and searches, and predictions of folds, through a plan (evaluation/plan.py).
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from evaluation.plan import REFERENCE, Cell, Plan, read_config, rival_cells
from evaluation.predictions import chosen_rival
from fieldmark.store import read_table
from training.controls import Control
from training.methods import OwnPoints, grid
from training.regimes import Folds
from training.runs import SCHEMA

SATURATED = 0.99  # accuracy on development classes from which they tell little apart


def choice_notes(plan: Plan, runs: Sequence[Cell]) -> list[str]:
    """The notes under the tables of these runs, without those under a control."""
    plain = [cell for cell in runs if cell.control == Control()]
    place = [(cell.encoder, cell.regime.label) for cell in plain]
    ordered = sorted(zip(place, plain, strict=True), key=lambda one: one[0])
    notes: list[str] = []
    for (encoder, regime), found in groupby(ordered, key=lambda one: one[0]):
        cells = [cell for _, cell in found]
        if ends := at_ends(plan, cells):
            notes.append(f"chosen at an end of its grid, {encoder}, {regime}: {'; '.join(ends)}")
        if full := saturated(plan, cells):
            notes.append(
                f"warning: {encoder}, {regime}: development classes tell little apart, {', '.join(full)}; take more or"
                " harder ones: `development`, a share of the classes or a file that names them"
            )
        if isinstance(cells[0].regime, Folds):
            notes += fold_notes(plan, cells)
        if rivals := Counter(chosen_rival(plan, cell).method for cell in rival_cells(plan, cells)):
            times = ", ".join(f"{name} in {count}" for name, count in rivals.most_common())
            notes.append(f"rival, {encoder}, {regime}: chosen inside each fold: {times} of {rivals.total()}")
    return notes


def at_ends(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """What was chosen where the grid ends, by method, and in how many runs; a grid of two has nothing but ends."""
    ends, count = Counter[tuple[str, str, Any]](), Counter[str]()
    for cell in cells:
        settings, config = plan.entries[cell.method].settings, read_config(plan, cell.run)
        count[cell.method] += 1
        if "chosen" not in config:
            continue  # not possible on this data
        chosen = dict(config["chosen"])
        if isinstance(settings, OwnPoints):
            settings = settings.candidate(chosen)
        elif plan.searched(cell):
            settled = config["settings"]
            chosen = {knob: settled[knob][0] for knob in grid(settings)} | {"epoch": settled.get("stop")}
        for knob, values in grid(settings).items():
            if len(values) > 2 and chosen.get(knob) in (min(values), max(values)):
                ends[cell.method, knob, chosen[knob]] += 1
        last = getattr(settings, "epochs", 0)
        if last and chosen.get("epoch") == last:
            ends[cell.method, "epoch", chosen["epoch"]] += 1
    return [f"{method} {knob} {value:g} ({n} of {count[method]} runs)" for (method, knob, value), n in ends.items()]


def saturated(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """The methods whose chosen settings are nearly always right on development classes, and how often they are."""
    searches = {cell.method: read_config(plan, cell.search) for cell in cells if plan.searched(cell)}
    reached = {method: config["accuracy"] for method, config in searches.items() if "accuracy" in config}
    return [f"{method} {accuracy:.1%}" for method, accuracy in reached.items() if accuracy >= SATURATED]


def fold_notes(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """What folds are, and how many classes have no training image in one of them."""
    label = cells[0].regime.label
    notes = [
        f"{label}: each image of train and val is judged once, by a fit without it; one further split of a fold's"
        " training images chose settings and epochs, and bank and labels are made of these images alone"
    ]
    lacking = set[str]()
    for cell in (cell for cell in cells if cell.method == REFERENCE):
        table = read_table(plan.folder / cell.run / "predictions.parquet", SCHEMA, ["split", "class_id"])
        rows = set(zip(table["split"].to_pylist(), table["class_id"].to_pylist(), strict=True))
        lacking |= {name for _, name in rows if ("train", name) not in rows}
    if lacking:
        names = f"{len(lacking)} classes ({min(lacking)} first)"
        notes.append(f"warning: {label}: {names} have no training image in some fold: there none of theirs is right")
    return notes
