"""Which pictures tell most about a data set, by their vectors alone: those that stand for many others.

    phi_i = 1 / (1 + |x_i - c|)        c the nearest centre to x_i, of k-means              (GAGA, Xie et al. [web])

The highest phi of all would lie in a few dense clusters. So each cluster gives its share [design]: clusters take turns
in proportion to their sizes (Sainte-Lague), and each gives its highest phi first. The order does not depend on how many
are wanted, so that a larger number takes all of a smaller one. No label is looked at.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fieldmark.labels.kmeans import PER_CENTRE, find_centres, nearest_centres


def cluster_count(images: int) -> int:
    """Clusters of so many images: the power of two nearest to their root, which an image more seldom moves [design]."""
    return 2 ** round(math.log2(math.sqrt(images)))


def densities(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """phi (n,) of vectors (n, D), in (0, 1], and which of the centres (K, D) is nearest to each."""
    number = nearest_centres(vectors, centres)
    return 1 / (1 + (vectors - centres[number]).norm(dim=1)), number


def order_by_quota(phi: Tensor, number: Tensor) -> Tensor:
    """Positions (n,), the most informative first; phi (n,), number (n,) the cluster of each. Of equals the first."""
    values, cluster = phi.double().cpu().numpy(), number.cpu().numpy()
    within = np.lexsort((-values, cluster))
    sizes = np.bincount(cluster)
    rank = np.empty(len(values), dtype=np.int64)
    rank[within] = np.arange(len(values)) - (sizes.cumsum() - sizes)[cluster[within]]
    return torch.from_numpy(np.lexsort((-values, (rank + 0.5) / sizes[cluster])))


def most_informative(vectors: Tensor, names: Sequence[str], count: int, clusters: int) -> Tensor:
    """Positions (count,) of the most informative of vectors (n, D), the first the most.

    names: a sha256 of each, by which what centres are learnt from is drawn. So neither the order of the rows nor a
    block size decides, and where there are many more images than PER_CENTRE a cluster, one more is seldom drawn: then
    it can take the place of one of its own cluster, or of the one whose turn came last, and no others move.
    """
    order = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    x = vectors[order].float()
    centres = find_centres(x[: PER_CENTRE * clusters], clusters)
    return order[order_by_quota(*densities(x, centres))[:count]]


def budget(images: int, share: float) -> int:
    """How many of so many images a share of them is: one at least, where there is one."""
    return min(images, max(1, round(share * images)))
