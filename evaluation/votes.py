"""One answer for several pictures of one thing: a track, an event. Pure functions."""

import numpy as np

from training.metrics import Floats, Ints


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
