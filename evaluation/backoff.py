"""Back-off: the most exact answer that is sure enough, at an asked error rate. Pure functions.

A picture's answer climbs from its most probable class until the classes of the taxon add up to a threshold in
probability. Where no taxon does there is no answer; where classes lie in no taxa it is the class or none, which is
selective classification. The threshold is chosen on images that chose nothing, such that with 95 % confidence at most
the asked share of the answers is wrong (Geifman and El-Yaniv, NeurIPS 2017 [mem]).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evaluation.taxonomy import Taxonomy
from training.metrics import Bools, Floats, Ints

DOUBT = 0.05  # that more answers are wrong than asked
# Fixed beforehand, the most careful first.
THRESHOLDS = (0.995, 0.99, 0.98, 0.97, 0.95, 0.925, *(round(0.9 - 0.05 * step, 2) for step in range(19)))


class Answers(NamedTuple):
    """Of n pictures: the rank that each is answered at, -1 for none, and the node there and its probability."""

    rank: Ints
    node: Ints
    p: Floats

    def right(self, y: Ints, taxonomy: Taxonomy) -> Bools:
        """(n,): whether the true class is in what was answered; false where nothing was."""
        return (self.rank >= 0) & taxonomy.members[self.node, y]


def back_off(p: Floats, taxonomy: Taxonomy, threshold: float | None) -> Answers:
    """The lowest rank at which each picture's probabilities (n, C) reach the threshold; none where that is None."""
    nodes = taxonomy.chains[p.argmax(1)]
    sums = np.where(nodes >= 0, np.take_along_axis(p @ taxonomy.members.T, nodes, axis=1), 0)
    reached = (sums >= (np.inf if threshold is None else threshold)) & (nodes >= 0)
    rank = np.where(reached.any(1), reached.argmax(1), -1)
    at = np.maximum(rank, 0)[:, None]
    return Answers(rank, np.take_along_axis(nodes, at, axis=1)[:, 0], np.take_along_axis(sums, at, axis=1)[:, 0])


class Chosen(NamedTuple):
    """A threshold, and what came of it on the images that chose it."""

    threshold: float
    answered: int
    wrong: int
    bound: float  # of the share of wrong answers, at 95 % confidence


def choose_threshold(p: Floats, y: Ints, taxonomy: Taxonomy, error: float) -> Chosen | None:
    """The lowest threshold that is shown to keep wrong answers at `error` of all answers or less; None: none is.

    p (n, C) and y (n,) are of independent images, so of one image a group. Many thresholds are tested, and no
    correction is needed, because they are tested in an order fixed beforehand until one fails (fixed sequence testing,
    Angelopoulos et al., "Learn then Test", 2021 [mem]). Those under which so few images are answered that not even all
    of them right would pass are passed over, which looks at no label.
    """
    found = None
    for threshold in THRESHOLDS:
        answers = back_off(p, taxonomy, threshold)
        answered = int((answers.rank >= 0).sum())
        wrong = answered - int(answers.right(y, taxonomy).sum())
        # Where more than `error` were wrong in truth, so few mistakes would be a rare chance.
        if chance(0, answered, error) > DOUBT:
            continue
        if chance(wrong, answered, error) > DOUBT:
            break
        found = Chosen(threshold, answered, wrong, bound=error)
    return None if found is None else found._replace(bound=upper_bound(found.wrong, found.answered))


def chance(wrong: int, of: int, share: float) -> float:
    """The chance of `wrong` or fewer, where each is wrong by chance with probability `share` in (0, 1)."""
    counts, log = np.arange(wrong + 1), log_factorials(of)
    ways = log[of] - log[counts] - log[of - counts]
    return float(np.exp(ways + counts * np.log(share) + (of - counts) * np.log1p(-share)).sum())


@lru_cache(maxsize=8)
def log_factorials(of: int) -> Floats:
    """(of + 1,): the logarithms of 0!, 1!, ..."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + 1)))])


def upper_bound(wrong: int, of: int) -> float:
    """The upper end of a one-sided 95 % interval of a share (Clopper and Pearson 1934 [mem]).

    It is the share with which `wrong` or fewer would be seen in 5 % of samples, found by bisection.
    """
    low, high = 0.0, 1.0
    for _ in range(50 if wrong < of else 0):
        share = (low + high) / 2
        low, high = (share, high) if chance(wrong, of, share) > DOUBT else (low, share)
    return high
