"""What logits are worth: accuracies, calibration and confusion. Pure functions.

`logits` is (n, C), `y` (n,) holds class positions. A tie goes to the class that stands first, everywhere the same.
Logits may be a mapped array that exceeds memory: they are gone through ROOM numbers at a time (`in_blocks`), and what
is kept is a number an image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
TIERS = ("few", "medium", "many")
TOLD_CHOOSE = "told_choose"  # of config.json: figures of the half of val that chooses, by wrong classes it is told
ROOM = 2**22  # logits that are looked at at a time
Measure = Callable[[Floats, Ints], NDArray[Any]]  # of logits (n, C) and y (n,), a number an image (n,)


def in_blocks(measure: Measure, logits: Floats, y: Ints, images: Ints | None = None) -> NDArray[Any]:
    """(n,): measure(logits, y), a number an image, found for some images at a time; of `images` alone where given."""
    images = np.arange(len(y)) if images is None else images
    step = max(1, ROOM // max(logits.shape[1], 1))
    parts = [images[start : start + step] for start in range(0, max(len(images), 1), step)]
    return np.concatenate([measure(logits[part], y[part]) for part in parts])


def correct(logits: Floats, y: Ints) -> Bools:
    """(n,): whether each image is classified rightly."""
    return logits.argmax(1) == y


def accuracy(logits: Floats, y: Ints) -> float:
    return float(correct(logits, y).mean())


def class_accuracy(logits: Floats, y: Ints) -> Floats:
    """(C,): the accuracy within each class, nan where `y` has none of it."""
    return class_rates(correct(logits, y), y, logits.shape[1])


def class_rates(right: Bools, y: Ints, classes: int) -> Floats:
    """(C,): the share of each class's images that are `right` (n,), nan where `y` has none of it."""
    hits, count = np.bincount(y, right, classes), np.bincount(y, minlength=classes)
    return np.where(count > 0, hits / np.maximum(count, 1), np.nan)


def macro_accuracy(logits: Floats, y: Ints) -> float:
    """The mean over the classes that occur in `y` of the accuracy within each."""
    return float(np.nanmean(class_accuracy(logits, y)))


def tiers(train_counts: Ints, limits: tuple[int, int] | None = (20, 100)) -> Ints:
    """(C,): 0 for the few-shot classes, 1 for medium, 2 for many, by their training images.

    Few is under limits[0] images and many over limits[1], as in Liu et al., CVPR 2019 [mem]. None: thirds of the
    classes in the order of their counts, those of equal count together in the lower one.
    """
    if limits is None:
        below = (train_counts[None, :] < train_counts[:, None]).sum(1)  # how many classes have fewer images
        return below * 3 // len(train_counts)
    return (train_counts >= limits[0]).astype(np.int64) + (train_counts > limits[1])


def tier_accuracy(logits: Floats, y: Ints, tier: Ints) -> dict[str, float]:
    """The mean accuracy of the classes of each tier (C,) that occur in `y`; a tier without any is left out."""
    return tier_rates(class_accuracy(logits, y), tier)


def tier_rates(within: Floats, tier: Ints) -> dict[str, float]:
    """The mean of `within` (C,) over the classes of each tier that have a rate."""
    chosen = {name: within[(tier == number) & ~np.isnan(within)] for number, name in enumerate(TIERS)}
    return {name: float(values.mean()) for name, values in chosen.items() if values.size}


def top_k_accuracy(logits: Floats, y: Ints, k: int) -> float:
    """How often the class is among the k highest logits."""
    return float((in_blocks(ahead, logits, y) < k).mean())


def ahead(logits: Floats, y: Ints) -> Ints:
    """(n,): how many classes stand before the true one."""
    own = np.take_along_axis(logits, y[:, None], 1)
    before: Ints = (logits > own).sum(1) + ((logits == own) & (np.arange(logits.shape[1]) < y[:, None])).sum(1)
    return before


def softmax(logits: Floats) -> Floats:
    """(n, C) float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def calibration_error(logits: Floats, y: Ints, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| over bins of equal width, weighed by their images.

    Confidence is the highest softmax probability; a bin holds its upper end (Guo et al., ICML 2017 [mem]).
    """
    return calibration_gap(in_blocks(confidence, logits, y), correct(logits, y), bins)


def confidence(logits: Floats, y: Ints) -> Floats:
    """(n,): the highest softmax probability, whatever y is."""
    highest: Floats = softmax(logits).max(1)
    return highest


def calibration_gap(sure: Floats, right: Bools, bins: int = 15) -> float:
    """`calibration_error` of the confidence (n,) of each image, and whether it is `right` (n,)."""
    bin_of = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, right - sure, bins)  # of sums, so weighed by the bin's images
    return float(np.abs(gap).sum() / len(right))


def fit_temperature(logits: Floats, y: Ints) -> float:
    """The T that minimises the log loss of logits / T (Guo et al., ICML 2017 [mem]), within 1e-4 .. 1e4.

    The log loss is convex in 1/T; its slope, mean(expected logit - own logit), is brought to 0 by bisection. Where
    every image is classified rightly it falls for ever, and T is the lower end.
    """
    own = logits[np.arange(len(y)), y].astype(np.float64)
    low, high = -4.0, 4.0  # log10 of 1/T
    for _ in range(40):
        middle = (low + high) / 2
        slope = (in_blocks(partial(expected_logit, 10**middle), logits, y) - own).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(10 ** -((low + high) / 2))


def expected_logit(scale: float, logits: Floats, y: Ints) -> Floats:
    """(n,): the mean of an image's logits by their softmax probabilities once they are scaled, whatever y is."""
    z = logits.astype(np.float64)
    mean: Floats = (softmax(z * scale) * z).sum(1)
    return mean


def log_loss(logits: Floats, y: Ints) -> float:
    """Mean cross entropy in nats."""
    return float(in_blocks(log_losses, logits, y).mean())


def log_losses(logits: Floats, y: Ints) -> Floats:
    """(n,): the cross entropy of each image."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses: Floats = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return losses


def confusion(logits: Floats, y: Ints) -> Ints:
    """(C, C) counts: rows are the true classes, columns the predicted ones."""
    classes = logits.shape[1]
    return np.bincount(y * classes + logits.argmax(1), minlength=classes * classes).reshape(classes, classes)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and their standard deviation, 0 for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
