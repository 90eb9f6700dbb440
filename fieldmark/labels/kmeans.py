"""k-means of vectors: Lloyd's algorithm from k-means++ seeds, the same for the same vectors.

D. Arthur and S. Vassilvitskii, "k-means++", SODA 2007, for the seeds [mem]. Seeding costs one product of all vectors
with one centre a centre, an iteration one with all of them.
"""

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 25
# Products at once: vectors x centres floats in memory.
PRODUCTS = 2**21
# Vectors a centre is learnt from; more make it no better and the work longer.
PER_CENTRE = 16


def seed_centres(vectors: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """(count, D) of the vectors (n, D), each drawn by its squared distance to those drawn before."""
    squares = vectors.square().sum(dim=1)
    chosen = [int(generator.integers(len(vectors)))]
    distance = torch.full((len(vectors),), torch.inf)
    for _ in range(count - 1):
        centre = vectors[chosen[-1]]
        distance = torch.minimum(distance, (squares - 2 * vectors @ centre + centre.square().sum()).clamp(min=0))
        distance[chosen[-1]] = 0
        reach = distance.double().cumsum(0)
        draw = generator.random() * float(reach[-1])
        # All at a centre already: any vector will do.
        chosen.append(min(int(torch.searchsorted(reach, draw, right=True)), len(vectors) - 1))
    return vectors[chosen].clone()


def nearest_centres(vectors: Tensor, centres: Tensor) -> Tensor:
    """Number (n,) of the nearest of the centres (K, D) to each vector (n, D), n >= 1; the first of equals."""
    squares, twice = centres.square().sum(dim=1), 2 * centres.T
    blocks = vectors.split(max(1, PRODUCTS // len(centres)))
    return torch.cat([(squares - block @ twice).argmin(dim=1) for block in blocks])


def find_centres(vectors: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most `count` centres (K, D) of vectors (n, D), n >= 1: fewer where there are fewer vectors."""
    count = min(count, len(vectors))
    centres = seed_centres(vectors, count, np.random.default_rng(seed))
    before = torch.full((len(vectors),), -1)
    for _ in range(ITERATIONS):
        number = nearest_centres(vectors, centres)
        if torch.equal(number, before):
            break
        before = number
        sums = torch.zeros_like(centres).index_add_(0, number, vectors)
        members = torch.bincount(number, minlength=count)
        # A centre that nothing is nearest to stays where it is.
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
    return centres
