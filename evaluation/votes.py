"""One answer for several pictures of one thing: a track, an event. Pure functions."""

import numpy as np

from training.metrics import Floats, Ints, softmax


def vote(logits: Floats, groups: Ints) -> tuple[Ints, Floats]:
    """The groups, sorted, and the logits (G, C) of each: the mean of its pictures' log-probabilities, of logits (n, C).

    Sure pictures count more than blurred ones, and no tie is left to break, unlike with a majority. The mean and not
    the sum: frames of a track are nearly one picture, and so no surer than one (the logarithmic opinion pool, Genest
    and Zidek 1986 [mem]).
    """
    names, of = np.unique(groups, return_inverse=True)
    logs = np.log(np.maximum(softmax(logits), np.finfo(np.float64).tiny))
    sums = np.zeros((len(names), logits.shape[1]))
    np.add.at(sums, of, logs)
    return names, sums / np.bincount(of)[:, None]
