"""None of these: pictures that are far from all that was trained on. Pure functions over vectors of whole pictures.

The distance is that to the nearest class mean, by cosine (the nearest class mean of Mensink et al., PAMI 2013 [mem]).
It needs no label of the picture and nothing of the run; what is far is told by known pictures alone, as farther than
all but alpha of them. With held-out classes as the unknown it was ahead of nearest neighbours and of the energy of a
probe's logits on birds with one of two encoders, and of the energy on the demo.
"""

import numpy as np

from training.metrics import Floats, Ints


def class_means(vectors: Floats, y: Ints) -> Floats:
    """(classes that y has, D) of unit length: the mean of each class's training pictures, vectors (n, D)."""
    _, place, count = np.unique(y, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), vectors.shape[1]))
    np.add.at(sums, place, unit(vectors))
    return unit(sums)


def distance(vectors: Floats, means: Floats) -> Floats:
    """(n,): 1 - the cosine of each picture's vector (n, D) to the nearest mean, in [0, 2]; 1 for a vector of zeros."""
    return 1 - (unit(vectors) @ means.T).max(axis=1)


def unit(vectors: Floats) -> Floats:
    """(n, D) float64 of unit length; zeros stay."""
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
