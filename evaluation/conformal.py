"""Split conformal prediction: sets of classes that hold the true one at an asked rate. Pure functions.

A score says how strange a class would be for a picture, by its probabilities; a set holds the classes that are no
stranger than the true class of most calibrating pictures was (Vovk, Gammerman and Shafer 2005 [mem]). It promises that
of pictures drawn as these were, 1 - alpha have their class in the set, on average over pictures and over draws of the
calibrating ones; not within each class, and not for pictures from elsewhere.
"""

from collections.abc import Callable, Mapping

import numpy as np

from training.metrics import Bools, Floats, Ints

ROUNDING = 1e-9  # sums in another order differ by less, and other scores by more


def lac(p: Floats) -> Floats:
    """(n, C): 1 - p (Sadinle, Lei and Wasserman, JASA 2019 [mem]). The smallest sets on average; some are empty."""
    return 1 - p


def aps(p: Floats) -> Floats:
    """(n, C): the probability of all classes that stand ahead of a class, for adaptive prediction sets.

    Romano, Sesia and Candes, NeurIPS 2020 [mem], with u = 1: a class's own probability does not count. So no picture
    gets one set today and another tomorrow, the most probable class is always in the set, and hard pictures get more.
    With u = 0, the class itself counted, sets promise as much and are several times as large.
    """
    order = np.argsort(-p, axis=1, kind="stable")
    sums = np.take_along_axis(p, order, axis=1).cumsum(axis=1)
    ahead = np.empty_like(sums)
    np.put_along_axis(ahead, order, np.concatenate([np.zeros((len(p), 1)), sums[:, :-1]], axis=1), axis=1)
    return ahead


SCORES: Mapping[str, Callable[[Floats], Floats]] = {"APS": aps, "LAC": lac}


def quantile(scores: Floats, units: Ints, alpha: float) -> float | None:
    """The score (n,) that at most alpha of new pictures exceed; None where there are too few units to say.

    Where each picture is a unit of its own it is the ceil((n + 1)(1 - alpha))-th smallest score. Pictures of one group
    are no independent draws: each of G groups weighs 1 / (G + 1), shared by its pictures, and the group to come weighs
    as much, at infinity. The promise is then of a picture of a new group, each group counting alike (hierarchical
    conformal prediction, Lee, Barber and Willett 2023 [mem]).
    """
    _, unit, size = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(scores)
    below = np.cumsum(1 / size[unit][order]) / (len(size) + 1)
    place = int(np.searchsorted(below, 1 - alpha - ROUNDING))
    return None if place == len(scores) else float(scores[order[place]])


def prediction_sets(scores: Floats, limit: float | None) -> Bools:
    """(n, C): which classes are in each picture's set; all of them where no quantile could be said."""
    return np.ones(scores.shape, dtype=bool) if limit is None else scores <= limit + ROUNDING
