"""Whether a concept set says anything of this data set's classes: asked of validation images, answered in plain words.

An LLM writes field marks for anonymous cultivars as readily as for birds, and random texts have embeddings too. So
[design]: a validation image goes to the class whose own concepts it is most like, by the mean
over them of K_k . (g - mean g), g its global vector, the mean over training images. That accuracy stands against

  permuted     the same with owners permuted, PERMUTATIONS times; how often chance does as well is p;
  random       the same with as many random unit vectors for concepts, DRAWS times;
  class_means  the nearest class mean of training images, which needs no concept.

`share` is how far concepts get from `permuted` (0) to `class_means` (1). Verdicts: `none` where p > MAX_P, else `weak`
where share < MIN_SHARE, else `signal`; `unknown` without validation images, and under MIN_CLASSES classes that own a
concept, where permutations cannot tell. Concepts of no class are not judged. A probe fitted on concept scores would
judge nothing: on 24 axes of cub100 it read as much from random vectors (74 %) as from texts that do carry signal
(73 %), and with as many axes as dimensions any set will do.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

PERMUTATIONS, DRAWS = 1000, 20
MAX_P, MIN_SHARE, MIN_CLASSES = 0.01, 0.1, 6
# Images that are looked at at once: so many cosines with classes, 256 MB of them, and so many rows in float64.
COSINES, ROWS = 2**25, 2**14
Vectors = tuple[np.ndarray, np.ndarray]  # (n, D) and class_ids (n,)

VERDICTS = {
    "signal": "these concepts carry signal on this data set",
    "weak": "these concepts carry little signal on this data set: more than chance, far less than its pictures do",
    "none": "these concepts carry NO signal on this data set: they say no more of its classes than chance does",
    "unknown": "what these concepts carry cannot be told",
}


def nearest_owner(vectors: np.ndarray, centre: np.ndarray, concepts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The class (n,) whose own concepts each of vectors (n, D) is most like, less centre (D,); own (M, C) bool."""
    means = (own / own.sum(axis=0)).T @ concepts
    step = max(1, COSINES // len(means))
    found = [((block - centre) @ means.T).argmax(axis=1) for block in blocks(vectors, step)]
    return np.concatenate(found)


def blocks(vectors: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Vectors (n, D), so many rows at a time, in float64; at least one block, of no row where there is none."""
    for start in range(0, max(len(vectors), 1), rows):
        yield vectors[start : start + rows].astype(np.float64)


def mean_of(vectors: np.ndarray) -> np.ndarray:
    """The mean (D,) of vectors (n, D) in float64, with the bits of vectors.mean(axis=0): rows are added in turn."""
    total = np.zeros(vectors.shape[1])
    for block in blocks(vectors, ROWS):
        total = np.concatenate([total[None], block]).sum(axis=0)
    return total / len(vectors)


def permuted_accuracies(predicted: np.ndarray, true: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """(PERMUTATIONS,) accuracies of predictions whose classes 0..count-1 change names at random."""
    hits = np.zeros((count, count))
    np.add.at(hits, (predicted, true), 1)
    generator, rows = np.random.default_rng(seed), np.arange(count)
    return np.array([hits[rows, generator.permutation(count)].sum() for _ in range(PERMUTATIONS)]) / len(true)


def nearest_mean(vectors: np.ndarray, train: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class (n,) whose mean over train (m, D), labels (m,) in 0..C-1, is nearest to each of vectors (n, D)."""
    sums = np.zeros((labels.max() + 1, train.shape[1]))
    for place, block in enumerate(blocks(train, ROWS)):
        np.add.at(sums, labels[place * ROWS : place * ROWS + len(block)], block)
    means = sums / np.bincount(labels)[:, None]
    lengths, step = np.square(means).sum(axis=1), max(1, COSINES // len(means))
    return np.concatenate([(lengths - 2 * block @ means.T).argmin(axis=1) for block in blocks(vectors, step)])


def random_units(generator: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    rows = generator.standard_normal((count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def judge(train: Vectors, val: Vectors, concepts: np.ndarray, owners: list[set[str]]) -> dict[str, Any]:
    """The comparison and its verdict, of concepts (M, D) and the classes that own each: numbers for a metrics file.

    Only images of classes that own a concept and have training images are asked about.
    """
    trained = set(train[1])
    classes = sorted(trained & set().union(*owners)) if owners else []
    position = {name: number for number, name in enumerate(classes)}

    def of_classes(side: Vectors) -> Vectors:
        rows = np.array([name in position for name in side[1]], dtype=bool)
        vectors = side[0] if rows.all() else side[0][rows]
        return vectors, np.array([position[name] for name in side[1][rows]], dtype=np.int64)

    (x, true), (seen, labels) = of_classes(val), of_classes(train)
    found: dict[str, Any] = {"verdict": "unknown", "images": len(x), "classes": len(classes), "concepts": len(concepts)}
    if len(x) == 0 or len(classes) < MIN_CLASSES:
        return found
    own = np.zeros((len(owners), len(classes)), dtype=bool)
    for row, each in enumerate(owners):
        own[row, [position[name] for name in each if name in position]] = True
    centre = mean_of(seen)
    predicted = nearest_owner(x, centre, concepts, own)
    accuracy = float((predicted == true).mean())
    permuted = permuted_accuracies(predicted, true, len(classes))
    generator = np.random.default_rng(0)
    random = [nearest_owner(x, centre, random_units(generator, *concepts.shape), own) == true for _ in range(DRAWS)]
    means = float((nearest_mean(x, seen, labels) == true).mean())
    chance = float(permuted.mean())
    share = (accuracy - chance) / (means - chance) if means > chance else 0.0
    p = float((1 + (permuted >= accuracy).sum()) / (1 + PERMUTATIONS))
    verdict = "none" if p > MAX_P else "weak" if share < MIN_SHARE else "signal"
    numbers = {
        "accuracy": accuracy,
        "permuted": chance,
        "random": float(np.mean(random)),
        "class_means": means,
        "share": share,
        "p": p,
    }
    return {**found, "verdict": verdict} | {name: round(number, 4) for name, number in numbers.items()}


def say(found: dict[str, Any]) -> str:
    """A judgement as one line of text."""
    verdict = VERDICTS[found["verdict"]]
    if "accuracy" not in found:
        return (
            f"{verdict}: that takes {MIN_CLASSES} classes with training images that own a concept, and a validation"
            f" image of them; there are {found['classes']} such classes and {found['images']} such images"
        )
    return (
        f"{verdict} ({found['accuracy']:.1%} of {found['images']} validation images are most like their own class's"
        f" concepts; {found['permuted']:.1%} with owners permuted, p = {found['p']:.3f}; {found['random']:.1%} with"
        f" random vectors; {found['class_means']:.1%} by class means of training images)"
    )
