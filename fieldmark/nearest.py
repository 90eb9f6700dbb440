"""The k nearest of vectors by cosine: exact, by blocks in bounded memory, with bits that no block size changes.

A matrix product of blocks in float32 finds candidates, and no more than that: its last bits depend on the shape of the
blocks, on the processor and on the device. With f the product's cosine and s the true one, |f - s| <= D u for unit
vectors of D numbers, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1 [mem]). So whatever is
among the k nearest by s has f >= F_k - 2 D u, F_k the k-th largest f of its row. All such candidates are scored again,
in float64 and one pair at a time, rounded to float32, and ordered: larger cosine first, then lower position. A row
whose candidates may be more than the k + SPARE that were kept of it is looked at a second time, by that threshold.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Candidates kept of a row beyond k: enough for almost every row to be settled by the first look at it.
SPARE = 16
# A block of cosines, 64 MB. Neither number changes what is found.
ROWS, COLUMNS = 512, 32_768
# Of so many cosines side by side the largest is looked at first: of all of them in turn takes twice as long.
GROUP = 64
# Numbers of vectors that are scored again at a time, 128 MB of them in float64.
RESCORED = 2**24
UNIT = 2.0**-24


class Pairs(NamedTuple):
    """Pairs of a row and one of those nearest to it, sorted by row, then from the nearest on."""

    row: Ints
    near: Ints
    cosine: Floats

    def where(self, kept: Bools) -> "Pairs":
        return Pairs(self.row[kept], self.near[kept], self.cosine[kept])


def unit_rows(blocks: list[np.ndarray]) -> Floats:
    """(n, D) float32 of unit length: vectors of the same n things side by side, each first brought to one length.

    The cosine of two rows is the mean of the cosines of the blocks (n, D_i). A block that is 0 for a thing adds nothing
    to its cosines; a thing whose blocks are all 0 stays 0.
    """
    found = np.empty((len(blocks[0]), sum(block.shape[1] for block in blocks)), dtype=np.float32)
    start = 0
    for block in blocks:
        for rows in range(0, len(block), ROWS):  # float64 of a few rows at a time
            wide = block[rows : rows + ROWS].astype(np.float64)
            length = np.linalg.norm(wide, axis=1, keepdims=True)
            wide /= np.where(length > 0, length, 1.0) * np.sqrt(len(blocks))
            found[rows : rows + ROWS, start : start + block.shape[1]] = wide
        start += block.shape[1]
    return found


def joined(pairs: list[Pairs]) -> Pairs:
    """Pairs of several lists, in their order."""
    return Pairs(*(np.concatenate(column) for column in zip(*pairs, strict=True)))


def ranked(pairs: list[Pairs], k: int) -> Pairs:
    """Of pairs from several sources, no pair in two of them, the k nearest of each row."""
    found = joined(pairs)
    order = np.lexsort((found.near, -found.cosine, found.row))
    found = Pairs(found.row[order], found.near[order], found.cosine[order])
    starts = np.searchsorted(found.row, found.row)
    return found.where(np.arange(len(found.row)) - starts < k)


def nearest(
    vectors: Floats, rows: Ints, among: Ints, k: int, device: torch.device | None = None, said: str | None = None
) -> Pairs:
    """The k nearest of vectors[rows] among vectors[among], (n, D) of unit length; positions are those in `vectors`.

    `rows` and `among` (m,) are sorted, each position once. No vector is near itself, and one that is 0 has no direction
    and is near to none. `said` is what a progress bar calls the work; None shows none. Memory: a copy of
    vectors[among], a block, and what is found.
    """
    live = np.abs(vectors).max(axis=1, initial=0.0) > 0
    rows, among = rows[live[rows]], among[live[among]]
    whole = len(among) == len(vectors)
    keys = torch.from_numpy(vectors if whole else vectors[among]).to(device)
    found = [score(vectors, rows[:0], rows[:0])]
    with tqdm(total=len(rows), desc=said, unit="row", disable=said is None) as progress:
        for start in range(0, len(rows), ROWS):
            block = rows[start : start + ROWS]
            found += [ranked(candidates(vectors, block, keys, among, k), k)]
            progress.update(len(block))
    return joined(found)


def candidates(vectors: Floats, rows: Ints, keys: Tensor, among: Ints, k: int) -> list[Pairs]:
    """Pairs of a block of rows, scored exactly, with the k nearest of each row among them; keys = vectors[among]."""
    queries = torch.from_numpy(vectors[rows]).to(keys.device)
    own = place_of(rows, among)
    wide = min(k + SPARE, len(among))
    top = queries.new_full((len(rows), wide), -torch.inf)
    place = torch.zeros_like(top, dtype=torch.long)
    for start, cosine in cosines(queries, keys, own):
        value, column = largest(cosine, wide)
        top, order = torch.cat([top, value], dim=1).topk(wide, dim=1)
        place = torch.cat([place, column + start], dim=1).gather(1, order)
    if not wide:
        return [score(vectors, rows[:0], rows[:0])]
    floor = top[:, min(k, wide) - 1] - 2 * (vectors.shape[1] + 4) * UNIT
    unsettled = ((top[:, -1] >= floor) & (wide < len(among))).cpu().numpy()
    kept = ((top >= floor[:, None]) & top.isfinite()).cpu().numpy() & ~unsettled[:, None]
    at, slot = np.nonzero(kept)
    found = [score(vectors, rows[at], among[place.cpu().numpy()[at, slot]])]
    again = np.flatnonzero(unsettled)
    if not len(again):
        return found
    left = torch.from_numpy(again).to(keys.device)
    second = [score(vectors, rows[:0], rows[:0])]
    for start, cosine in cosines(queries[left], keys, own[again]):
        at, column = (index.cpu().numpy() for index in (cosine >= floor[left, None]).nonzero(as_tuple=True))
        # Block by block: among thousands of equal vectors all are candidates, and k of them are held.
        second = [ranked([*second, score(vectors, rows[again][at], among[column + start])], k)]
    return [*found, *second]


def place_of(rows: Ints, among: Ints) -> Ints:
    """Where each row stands in `among`, sorted; -1 where it does not."""
    if not len(among):
        return np.full(len(rows), -1)
    place = np.searchsorted(among, rows).clip(max=len(among) - 1)
    return np.where(among[place] == rows, place, -1)


def cosines(queries: Tensor, keys: Tensor, own: Ints) -> Iterator[tuple[int, Tensor]]:
    """Where each block of keys starts, and the cosines (m, c) of the queries with it; -inf with itself, at `own`."""
    out = queries.new_empty(len(queries) * min(COLUMNS, len(keys)))
    for start in range(0, len(keys), COLUMNS):
        block = keys[start : start + COLUMNS]
        cosine = out[: len(queries) * len(block)].view(len(queries), len(block))
        torch.mm(queries, block.T, out=cosine)
        inside = np.flatnonzero((own >= start) & (own < start + len(block)))
        cosine[torch.from_numpy(inside), torch.from_numpy(own[inside] - start)] = -torch.inf
        yield start, cosine


def largest(cosine: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row (m, c), or all of them, and their columns; ties in any order.

    They lie in the `count` groups of columns whose largest are the largest.
    """
    columns = cosine.shape[1]
    count, groups = min(count, columns), columns // GROUP
    if groups < 4 * count:
        value, column = cosine.topk(count, dim=1)
        return value, column
    whole = groups * GROUP
    grouped = cosine[:, :whole].unflatten(1, (groups, GROUP))
    best = grouped.amax(dim=2).topk(count, dim=1).indices
    inner = grouped.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1)
    # What is left over when the columns are grouped stands behind the groups.
    value, slot = torch.cat([inner, cosine[:, whole:]], dim=1).topk(count, dim=1)
    group, rest = slot // GROUP, slot - inner.shape[1]
    column = best.gather(1, group.clamp(max=count - 1)) * GROUP + slot % GROUP
    return value, torch.where(rest >= 0, whole + rest, column)


def score(vectors: Floats, row: Ints, near: Ints) -> Pairs:
    """Pairs with their cosine: a sum in float64, of each pair by itself, as float32."""
    cosine = np.empty(len(row), dtype=np.float32)
    step = max(1, RESCORED // vectors.shape[1])
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        product = vectors[row[part]].astype(np.float64)
        product *= vectors[near[part]]
        cosine[part] = product.sum(axis=1)
    return Pairs(row, near, cosine)
