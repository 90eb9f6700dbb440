"""Greedy choice by worth and coverage: what LaBo's selection maximises (CVPR 2023), in our form.

    f(S) = sum_{k in S} worth_k + weight * sum_i max_{k in S} max(0, <v_i, v_k>)

over unit vectors v_i of all candidates (facility location). Similarities under 0 count as 0 and worth is >= 0, so f is
monotone and submodular, and greedy reaches (1 - 1/e) of the best (Nemhauser et al., 1978 [mem]). A gain never grows as
S does, so an old gain is an upper bound: greedy looks again only at the candidates whose bound is on top (Minoux, 1978
[mem]), and holds BLOCK x n similarities instead of n x n.
"""

import numpy as np

# Candidates looked at at once.
BLOCK = 64


def value(chosen: list[int], worth: np.ndarray, vectors: np.ndarray, weight: float) -> float:
    """f of the chosen; 0 of none."""
    if not chosen:
        return 0.0
    covered = np.maximum(vectors @ vectors[chosen].T, 0).max(axis=1)
    return float(worth[chosen].sum() + weight * covered.sum())


def choose_greedily(count: int, worth: np.ndarray, vectors: np.ndarray, weight: float) -> list[int]:
    """The first `count` candidates that greedy takes, in its order, of worth (n,) >= 0 and unit vectors (n, D).

    Of equal gains, the first candidate's. Without weight these are the most worthy.
    """
    count = min(count, len(worth))
    if weight == 0:
        return np.argsort(-worth, kind="stable")[:count].tolist()
    covered = np.zeros(len(worth), dtype=vectors.dtype)

    def gains(candidates: np.ndarray) -> np.ndarray:
        more = np.maximum(vectors[candidates] @ vectors.T - covered, 0).sum(axis=1, dtype=np.float64)
        gained: np.ndarray = worth[candidates] + weight * more
        return gained

    blocks = np.array_split(np.arange(len(worth)), -(-len(worth) // BLOCK))
    bounds = np.concatenate([gains(block) for block in blocks])
    fresh = np.ones(len(worth), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(bounds.argmax())
        if not fresh[best]:
            stale = np.where(fresh, -np.inf, bounds)
            top = np.argpartition(-stale, min(BLOCK, len(stale)) - 1)[:BLOCK]
            top = top[~fresh[top]]
            bounds[top], fresh[top] = gains(top), True
            continue
        chosen.append(best)
        bounds[best] = -np.inf
        covered = np.maximum(covered, vectors @ vectors[best])
        fresh[:] = False
        fresh[chosen] = True
    return chosen
