"""What logits are worth: accuracies, confusion, and the difference of two methods with its interval. Pure functions.

`logits` is (n, C), `y` (n,) holds class positions. A tie goes to the class that stands first, everywhere the same.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]


def correct(logits: Floats, y: Ints) -> Bools:
    """(n,): whether each image is classified rightly."""
    return logits.argmax(1) == y


def accuracy(logits: Floats, y: Ints) -> float:
    return float(correct(logits, y).mean())


def macro_accuracy(logits: Floats, y: Ints) -> float:
    """The mean over the classes that occur in `y` of the accuracy within each."""
    right, count = np.bincount(y, correct(logits, y)), np.bincount(y)
    return float((right[count > 0] / count[count > 0]).mean())


def top_k_accuracy(logits: Floats, y: Ints, k: int) -> float:
    """How often the class is among the k highest logits."""
    own = np.take_along_axis(logits, y[:, None], 1)
    ahead = (logits > own).sum(1) + ((logits == own) & (np.arange(logits.shape[1]) < y[:, None])).sum(1)
    return float((ahead < k).mean())


def log_loss(logits: Floats, y: Ints) -> float:
    """Mean cross entropy in nats."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]).mean())


def confusion(logits: Floats, y: Ints) -> Ints:
    """(C, C) counts: rows are the true classes, columns the predicted ones."""
    classes = logits.shape[1]
    return np.bincount(y * classes + logits.argmax(1), minlength=classes * classes).reshape(classes, classes)


class Paired(NamedTuple):
    """The accuracy of a minus that of b, and bootstrap intervals of it: over images, and over whole classes."""

    difference: float
    images: tuple[float, float]
    classes: tuple[float, float]


def paired_difference(
    correct_a: Bools, correct_b: Bools, classes: Ints, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Paired:
    """Compare two methods on the same images: correct_* are (n,), or (seeds, n) whose seeds are averaged first.

    Percentile bootstrap (Efron and Tibshirani 1993 [mem]). Resampling images says what other pictures of these classes
    would show; resampling `classes` (n,), whole, what other classes would. Raises ValueError where shapes differ.
    """
    if correct_a.shape[-1:] != correct_b.shape[-1:] or correct_a.shape[-1:] != classes.shape:
        raise ValueError(f"not the same images: {correct_a.shape}, {correct_b.shape}, {classes.shape}")
    gain = np.atleast_2d(correct_a).mean(0) - np.atleast_2d(correct_b).mean(0)
    _, group = np.unique(classes, return_inverse=True)
    sizes = np.bincount(group).astype(float)
    return Paired(
        float(gain.mean()),
        bootstrap_interval(gain, np.ones_like(gain), draws, level, seed),
        bootstrap_interval(np.bincount(group, gain).astype(float), sizes, draws, level, seed),
    )


def bootstrap_interval(sums: Floats, counts: Floats, draws: int, level: float, seed: int) -> tuple[float, float]:
    """The interval of sum(sums) / sum(counts) when whole units, of which each has a sum and a count, are drawn anew."""
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, 256):  # 256 draws at a time keep the memory flat
        unit = rng.integers(len(sums), size=(min(256, draws - start), len(sums)))
        means.append(sums[unit].sum(1) / counts[unit].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
