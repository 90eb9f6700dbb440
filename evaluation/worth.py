"""What texts are worth in images: with how many more images a class nothing but images would be as accurate.

The curve without texts is followed from k = 0 (a guess) on; between two numbers of images accuracy is taken to rise in
a straight line, and where more images did worse by chance, the curve stays where it was. Texts at k images that reach
what the curve reaches at k' are worth k' - k images a class: less than one is a result, and so is less than none. Where
texts reach what no number of images on the curve does, they are worth more than the curve can say (inf). So it is, as a
rule, beside the greatest number.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.referee import Answers
from evaluation.statistics import DRAWS, bootstrap, interval
from training.metrics import Floats, Ints


class Worth(NamedTuple):
    """Texts beside k images a class; a 95 % interval over classes and splits, or draws where there is one split."""

    k: float
    texts: float  # accuracy
    shuffled: float
    none: float
    images: float  # k' - k
    interval: tuple[float, float]
    shuffled_images: float  # what texts of other classes are worth
    over: float  # what texts are worth more than these; 0 where the curve reaches neither
    over_interval: tuple[float, float]


def images_for(ks: Sequence[float], curve: Floats, reached: Floats) -> Floats:
    """(B,): at how many images each of B curves (B, K) over ks (K,) reaches an accuracy (B,); inf where none does.

    ks ascend. An accuracy under the first of the curve takes as many images as that.
    """
    rising = np.maximum.accumulate(np.asarray(curve, dtype=float), axis=1)
    at = (rising < np.asarray(reached)[:, None]).sum(1)  # the first that is not under it
    last = np.minimum(np.maximum(at, 1), len(ks) - 1)
    rows, x = np.arange(len(rising)), np.asarray(ks, dtype=float)
    low, high = rising[rows, last - 1], rising[rows, last]
    share = np.clip((reached - low) / np.maximum(high - low, 1e-12), 0, 1)
    found = x[last - 1] + share * (x[last] - x[last - 1])
    return np.where(at == 0, x[0], np.where(at == len(x), np.inf, found))


def worth(ks: Sequence[float], arms: Mapping[str, Sequence[Answers]], y: Ints, part: Ints) -> list[Worth]:
    """A row for each k of ks: arms `texts`, `shuffled` and `none`, each with its answers at every k.

    y (n,), part (S, n) as for paired_differences. All accuracies of a bootstrap are of the same classes.
    """
    names = ("texts", "shuffled", "none")
    seeds = max(len(one.right) for name in names for one in arms[name])
    told = np.stack([np.broadcast_to(one.right, (seeds, len(y))) for name in names for one in arms[name]])
    counted = (part >= 0).any(0)
    told, y, part = told[..., counted], y[counted], part[:, counted]
    asked = np.broadcast_to(part >= 0, told.shape[1:])
    mean = told[:, asked].mean(1).reshape(3, len(ks))
    drawn = bootstrap(told, y, DRAWS, 0, part).reshape(-1, 3, len(ks))
    rows = []
    for place, k in enumerate(ks):
        own, others = (images_for(ks, mean[None, 2], mean[name, place, None]) - k for name in (0, 1))
        spread, beside = (images_for(ks, drawn[:, 2], drawn[:, name, place]) - k for name in (0, 1))
        texts, shuffled, none = (float(value) for value in mean[:, place])
        over, ends = float(lead(own, others)[0]), interval_of(lead(spread, beside))
        rows.append(Worth(k, texts, shuffled, none, float(own[0]), interval_of(spread), float(others[0]), over, ends))
    return rows


def lead(own: Floats, others: Floats) -> Floats:
    """own - others, numbers of images (B,): 0 where both are more than the curve has, which cannot part them."""
    both = np.isinf(own) & np.isinf(others)
    return np.where(both, 0.0, own) - np.where(both, 0.0, others)


def interval_of(values: Floats) -> tuple[float, float]:
    """The 95 % interval of values of which some may be inf."""
    finite = np.isfinite(values)
    if finite.all():
        return interval(values, 0.95)
    low, high = np.quantile(values, [0.025, 0.975], method="higher")
    return float(low), float(high)
