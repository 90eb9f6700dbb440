"""Which faults of public code open a gap between training images and others: the table of tools.riddle.

A row is a method with some faults: accuracy on training images, and on held-out ones in batches in the order of their
classes (the protocol of that code) and in shuffled batches. What the order adds is what batch-mates of the same class
tell. The gap is train - held out, in class order. The paired difference to the method without faults is of held-out
images in class order too. Nothing here reads a file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.statistics import Paired, holm, paired_difference
from evaluation.words import lay_out, percent, points, points_range, written_p
from fieldmark.command import counted
from training.metrics import Bools, Ints

NONE = "none"


class Told(NamedTuple):
    """What S seeds of a method with some faults told of n held-out images, all folds together."""

    method: str
    faults: str
    train: float  # accuracy, the mean over folds and seeds
    ordered: Bools  # (S, n)
    shuffled: Bools  # (S, n)


class Row(NamedTuple):
    method: str
    faults: str
    train: float
    ordered: float
    shuffled: float
    order: Paired  # what the order adds: ordered - shuffled
    paired: Paired | None  # to the method without faults; None for that itself
    p: float | None = None  # corrected for all rows

    @property
    def gap(self) -> float:
        return self.train - self.ordered


def rows_of(told: Sequence[Told], y: Ints, groups: Ints | None) -> list[Row]:
    """A row for each, p corrected by Holm for all differences to `none`; y (n,) and groups (n,) of the images."""
    rivals = {each.method: each for each in told if each.faults == NONE}
    rows = []
    for each in told:
        rival = rivals[each.method]
        order = paired_difference(each.ordered, each.shuffled, y, groups)
        paired = None if each is rival else paired_difference(each.ordered, rival.ordered, y, groups)
        accuracies = float(each.ordered.mean()), float(each.shuffled.mean())
        rows.append(Row(each.method, each.faults, each.train, *accuracies, order, paired))
    p = iter(holm([row.paired.p for row in rows if row.paired is not None]))
    return [row if row.paired is None else row._replace(p=next(p)) for row in rows]


def table_of(rows: Sequence[Row]) -> str:
    head = ["method", "faults", "train", "class order", "shuffled", "order adds", "interval", "gap"]
    lines = [[*head, f"- {NONE}", "interval", "p (Holm)"]]
    for row in rows:
        line = [row.method, row.faults, percent(row.train), percent(row.ordered), percent(row.shuffled)]
        line += [points(row.order.difference), points_range(row.order.over), points(row.gap)]
        if row.paired is not None and row.p is not None:
            line += [points(row.paired.difference), points_range(row.paired.over), written_p(row.p)]
        lines.append([*line, *[""] * (len(lines[0]) - len(line))])
    return lay_out(lines)


def as_text(title: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """tables.txt: the table, and what it must not be read without."""
    units, unit = rows[0].order.units, rows[0].order.unit
    compared = sum(row.p is not None for row in rows)
    foot = [
        "accuracies in %, differences in points; train: in evaluation mode, on images that trained; class order and"
        " shuffled: on held-out images, by the batches that they are asked in",
        "order adds: class order - shuffled, what batch-mates of the same class tell; gap: train - class order;"
        f" - {NONE}: to the method without faults, in class order",
        f"95 % bootstrap intervals over {units} {unit}; p: two-sided, corrected (Holm) for"
        f" {counted(compared, 'comparison', 'comparisons')} of held-out accuracy; intervals are not,"
        " and the gap has none: a fault that only raises accuracy on training images has a gap and no p",
        "batches train as `batch_size` says and are asked 128 at a time; public code trains with 8 (TRD), 16"
        " (Relational Proxies) and 32 (the notes); a smaller batch of fewer classes may tell more",
        "peeking: no fault of the method but of the protocol, the held-out images themselves choose settings and epoch;"
        " it has one fit a fold where the others have two, and as many training images",
        "on frozen features: what training the backbone does to the gap is not in this table",
    ]
    return "\n\n".join([title, table_of(rows), "\n".join([*foot, *notes])]) + "\n"


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """tables.json: the same figures for programs."""
    return {
        "rows": [
            {
                **row._asdict(),
                "gap": row.gap,
                "order": row.order._asdict(),
                "paired": None if row.paired is None else row.paired._asdict(),
            }
            for row in rows
        ]
    }


def joined(parts: Sequence[tuple[Sequence[int], Sequence[int]]], n: int) -> Ints:
    """(n,): what was said of all images, of folds that each say it of some: their positions, and what was said."""
    said = np.full(n, -1)
    for positions, of_fold in parts:
        said[list(positions)] = of_fold
    return said
