"""Write vectors as few concepts as will do: the batched solver behind `labels.mode: splice`.

SpLiCE (Bhalla et al., NeurIPS 2024; objective read in the reference code): a vector, centred and of unit length again,
is a non-negative combination of concepts, centred likewise, under an L1 penalty:

    w* = argmin_{w >= 0} |w C - z|^2 + sparsity * |w|_1,        C (M, D), z (D,)

The solver is our own [design]. Each vector has a working set of concepts, those in use and those that would lower the
objective most; coordinate descent solves the small problem for a block of vectors at once, and what is left out is then
judged over all concepts. Nothing is approximate: it ends when every vector meets the Karush-Kuhn-Tucker conditions over
the whole dictionary, |g_j| <= TOLERANCE where w_j > 0 and g_j >= -TOLERANCE elsewhere, g = 2 C (w C - z) + sparsity. No
random start: the same input gives the same weights. Where M > D, or concepts are alike, w need not be unique; the
objective and w C are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-4
# Concepts a vector starts with, doubled where its support (10 to 30 at usual sparsities) needs more.
WORKING_SET = 16
# Vectors solved at once: BLOCK * WORKING_SET^2 floats hold their small problems.
BLOCK = 4096
# Up to this many concepts all inner products are computed once (64 MB); for more, those of each working set.
GRAM_CONCEPTS = 4096
MAX_SWEEPS, MAX_ROUNDS = 1000, 1000


def centre(vectors: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors (n, D) less a mean (D,) or a mean each (n, D), of unit length again; 0 where nothing is left."""
    return F.normalize(vectors - mean, dim=-1)


def objective(weights: Tensor, targets: Tensor, dictionary: Tensor, sparsity: float) -> Tensor:
    """(n,): what decompose makes as small as can be."""
    return (weights @ dictionary - targets).square().sum(dim=1) + sparsity * weights.sum(dim=1)


def gradient(weights: Tensor, targets: Tensor, dictionary: Tensor, sparsity: float) -> Tensor:
    """(n, M): of the objective, over weights (n, M) that may not go under 0."""
    return 2 * (weights @ dictionary - targets) @ dictionary.T + sparsity


def violation(weights: Tensor, slope: Tensor) -> Tensor:
    """How far each entry is from the optimality conditions: its slope where in use, how far it falls where not."""
    return torch.where(weights > 0, slope.abs(), -slope)


def decompose(targets: Tensor, dictionary: Tensor, sparsity: float) -> Tensor:
    """Weights (n, M) >= 0 of targets (n, D) over a dictionary (M, D) whose rows have unit length, or are 0.

    Raises RuntimeError where it does not converge, which takes numbers that are not finite.
    """
    weights = torch.zeros(len(targets), len(dictionary))
    slope = gradient(weights, targets, dictionary, sparsity)
    gram = dictionary @ dictionary.T if len(dictionary) <= GRAM_CONCEPTS else None
    size = min(WORKING_SET, len(dictionary))
    for _ in range(MAX_ROUNDS):
        # Not `> TOLERANCE`: a slope that is no number must not pass for a small one.
        open_rows = (~(violation(weights, slope).amax(dim=1) <= TOLERANCE)).nonzero().flatten()
        if len(open_rows) == 0:
            return weights
        # Half of a working set stays free for concepts that are not in use yet.
        while size < len(dictionary) and int((weights[open_rows] > 0).sum(dim=1).max()) > size // 2:
            size = min(2 * size, len(dictionary))
        for rows in open_rows.split(max(1, BLOCK * WORKING_SET**2 // size**2)):
            now, fall = weights[rows], -slope[rows]
            chosen = torch.where(now > 0, torch.inf, fall).topk(size, dim=1).indices
            small = now.gather(1, chosen)
            products = working_products(dictionary, gram, chosen)
            # fall + sparsity is twice the products with what the weights in use leave unexplained.
            rest = (fall.gather(1, chosen) + sparsity) / 2
            now.scatter_(1, chosen, descend(products, rest, small, sparsity))
            weights[rows] = now
            slope[rows] = gradient(now, targets[rows], dictionary, sparsity)
    raise RuntimeError(f"splice: {len(open_rows)} vectors are not solved after {MAX_ROUNDS} rounds")


def working_products(dictionary: Tensor, gram: Tensor | None, chosen: Tensor) -> Tensor:
    """(s, n, s) inner products within each row's working set (n, s); [j] is contiguous, as descend reads it."""
    if gram is not None:
        return gram[chosen.T[:, :, None], chosen[None]]
    sets = (dictionary[rows] for rows in chosen.split(64))
    return torch.cat([vectors @ vectors.transpose(1, 2) for vectors in sets]).transpose(0, 1).contiguous()


def descend(products: Tensor, rest: Tensor, weights: Tensor, sparsity: float) -> Tensor:
    """Coordinate descent on n problems of s weights: products (s, n, s), rest and weights (n, s); weights (n, s).

    `rest` are the products with what `weights` leave unexplained; each step makes one coordinate exactly optimal.
    """
    solved, rows = weights.clone(), torch.arange(len(weights))
    squares = products.diagonal(dim1=0, dim2=2).clamp(min=torch.finfo(rest.dtype).tiny)
    for _ in range(MAX_SWEEPS):
        columns = list(weights.unbind(dim=1))
        for j, column in enumerate(columns):
            columns[j] = (column + (rest[:, j] - sparsity / 2) / squares[:, j]).clamp_(min=0)
            rest = rest.addcmul(products[j], (column - columns[j])[:, None])
        weights = torch.stack(columns, dim=1)
        is_open = violation(weights, sparsity - 2 * rest).amax(dim=1) > TOLERANCE / 2
        # A few rows take many sweeps: once half are solved, the rest go on alone.
        if 2 * int(is_open.sum()) <= len(rows):
            solved[rows] = weights
            rows, rest, weights, squares = rows[is_open], rest[is_open], weights[is_open], squares[is_open]
            products = products[:, is_open]
            if len(rows) == 0:
                break
    solved[rows] = weights
    return solved
