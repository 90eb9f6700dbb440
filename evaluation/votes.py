"""One answer for several pictures of one thing: a track, an event. Pure functions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.calibration import Calibration, calibrate
from evaluation.taxonomy import Lineages
from training.metrics import Bools, Floats, Ints


def vote(logits: Floats, groups: Ints) -> tuple[Ints, Floats]:
    """The groups, sorted, and the logits (G, C) of each: the mean of those of its pictures, (n, C).

    That is the mean of log-probabilities, up to a number that softmax takes out, at any temperature (the logarithmic
    opinion pool, Genest and Zidek 1986 [mem]). Sure pictures count more than blurred ones, and no tie is left to break,
    unlike with a majority. The mean and not the sum: frames of a track are nearly one picture, and no surer than one.
    """
    names, of = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), logits.shape[1]))
    np.add.at(sums, of, logits)
    return names, sums / np.bincount(of)[:, None]


def shown_classes(y: Ints, of: Ints) -> tuple[Ints, Bools]:
    """(G,) each: the class that a group's pictures show, `of` (n,) their groups from 0, and whether they show one."""
    first, last = np.full(of.max(initial=-1) + 1, np.iinfo(np.int64).max), np.full(of.max(initial=-1) + 1, -1)
    np.minimum.at(first, of, y)
    np.maximum.at(last, of, y)
    return first, first == last


def calibrate_votes(
    logits: Floats, y: Ints, groups: Sequence[Any], classes: Sequence[str], lineages: Lineages | None = None
) -> Calibration | None:
    """calibrate() on the votes of groups: its promises are of groups then, drawn as these were, and not of pictures.

    `logits` (n, C), `y` (n,) and `groups` (n,) are of pictures. A group whose pictures show several classes has no one
    class to be right about, and is left out. None where no group is left.
    """
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    first, alike = shown_classes(y, of)
    if not alike.any():
        return None
    return calibrate(vote(logits, of)[1][alike], first[alike], None, classes, lineages)
