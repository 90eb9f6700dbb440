"""Classes as the report tells them: how many pictures, how often right, and with which others they are confused."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from evaluation.runs import Row, Run
from training.metrics import Floats, Ints

PAIRS = 15  # most confused pairs shown
CLOSE = 0.1  # probability that a pair without a mistake shares to be shown


def confusion(y: Ints, predicted: Ints, classes: int) -> Ints:
    """(C, C): how many images of each true class (rows) were taken for each class."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (y, predicted), 1)
    return matrix


def mean_doubt(y: Ints, probabilities: Floats) -> Floats:
    """(C, C): the mean probability of each class over the images of each true class (rows); 0 without any."""
    sums = np.zeros((probabilities.shape[1],) * 2)
    np.add.at(sums, y, probabilities)
    return sums / np.maximum(np.bincount(y, minlength=len(sums)), 1)[:, None]


def confused_pairs(matrix: Ints, doubt: Floats) -> list[tuple[int, int, int, int]]:
    """The PAIRS of classes that are most often taken for one another: (a, b, a taken for b, b taken for a).

    Of pairs with as many mistakes, those come first that share more probability in `doubt` (C, C): on a few hundred
    pictures most pairs have one mistake or none.
    """
    between, share = matrix + matrix.T, doubt + doubt.T
    a, b = np.nonzero(np.triu((between > 0) | (share >= CLOSE), 1))
    mistakes, shared = between[a, b], share[a, b]
    order = np.lexsort((b, a, -shared, -mistakes))[:PAIRS]
    return [(int(a[at]), int(b[at]), int(matrix[a[at], b[at]]), int(matrix[b[at], a[at]])) for at in order]


def order_classes(classes: pa.Table, chosen: Sequence[str]) -> list[int]:
    """Positions in `chosen`, such that classes of one superclass stand together."""
    row = {row["class_id"]: row for row in classes.to_pylist()}

    def place(position: int) -> tuple[str, str, str]:
        class_id = chosen[position]
        return row[class_id]["superclass"] or "", row[class_id]["name"], class_id

    return sorted(range(len(chosen)), key=place)


def class_rows(run: Run, matrix: Ints, doubt: Floats, order: Sequence[int], concepts: Mapping[int, int]) -> list[Row]:
    """A row for each class, the least accurate first: images, how many of val are right, what it is most confused with.

    `matrix` (C, C) and `doubt` (C, C) are of val; `concepts` counts the kept concepts that a class owns. Classes that
    are as accurate stand in `order`.
    """
    train = np.bincount(run.y[run.split == "train"], minlength=len(matrix))
    val, right = matrix.sum(axis=1), matrix.diagonal()
    mistakes = matrix + matrix.T
    rows = []
    for label in order:
        others = [other for other in order if other != label]
        other = max(others, key=lambda one: (mistakes[label, one], doubt[label, one]), default=label)
        count = int(mistakes[label, other]) if others else 0
        rows.append(
            {
                "label": label,
                "train": int(train[label]),
                "val": int(val[label]),
                "right": int(right[label]),
                "accuracy": float(right[label] / val[label]) if val[label] else None,
                "other": other if count else None,
                "mistakes": count,
                "concepts": concepts.get(label, 0),
            }
        )
    return sorted(rows, key=lambda row: 2.0 if row["accuracy"] is None else row["accuracy"])
