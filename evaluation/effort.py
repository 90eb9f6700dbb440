"""What the fits of a study's methods with epochs took, and whether training stopped before they had stopped to gain.

Reads config.json and timing.json of runs through a plan (evaluation/plan.py). Seconds differ from machine to machine
and from day to day: they stand in a file of their own, and not in the tables.
"""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from evaluation.plan import RIVAL, Cell, Plan, read_config
from evaluation.runs import read_json
from evaluation.words import lay_out
from training.controls import Control
from training.methods import search_points


def epochs_of(plan: Plan, cell: Cell, config: dict[str, Any]) -> tuple[int, int] | None:
    """The epoch that was chosen, and the last one of the search; None for a method without epochs."""
    settings: Any = plan.entries[cell.method].settings
    found = config.get("chosen", {}).get("epoch")
    if found is None or not hasattr(settings, "epochs"):
        return None
    return int(found), settings.epochs if settings.stop is None else min(settings.stop, settings.epochs)


def still_rising(plan: Plan, runs: Sequence[Cell]) -> str:
    """In how many of these runs, all of one method, the last epoch was the best: more epochs might have gained more.

    Empty for a method without epochs.
    """
    if runs[0].method == RIVAL:
        return ""
    chosen = [epochs for cell in runs if (epochs := epochs_of(plan, cell, read_config(plan, cell.run)))]
    rising = sum(epoch == last > 0 for epoch, last in chosen)
    return f"{rising} of {len(chosen)}" if chosen else ""


def seconds_of_fits(plan: Plan, grid: Sequence[Cell]) -> str:
    """A row for each method without a control: epochs, seconds an epoch, and seconds of a fit's updates.

    A fit goes through its schedule once for each point of its grid; looks at val, and the probe beside a method, are
    not counted. A fold's timing is of its last fit, which has one point.
    """
    rows = [["encoder", "regime", "method", "epochs", "s an epoch", "points", "s of updates a fit"]]
    plain = [cell for cell in grid if cell.control == Control()]
    for _, cells in groupby(sorted(plain, key=lambda cell: cell.run.rpartition(".")[0]), lambda cell: cell.row):
        timed, last = [], 0
        for cell in cells:
            if epochs := epochs_of(plan, cell, read_config(plan, cell.run)):
                last = epochs[1]
                path = plan.folder / cell.run / "timing.json"
                timed.append(read_json(path, "make the run again")["epoch_seconds"])
        if timed:
            settings: Any = plan.entries[cell.method].settings
            points, each = search_points(settings), fmean(timed)
            row = [cell.encoder, cell.regime.label, cell.method, str(last), f"{each:.2f}", str(points)]
            total = f"{each * last * points:.1f}"
            rows.append([*row, total])
    return lay_out(rows) + "\n" if len(rows) > 1 else ""
