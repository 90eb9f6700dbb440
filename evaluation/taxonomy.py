"""The taxa that classes lie in, and how far mistakes go in them. Pure functions over index.classes/2.

A class is at rank 0, the taxon that it lies in at rank 1, the one around that at rank 2, and so on. Names of ranks
(genus, family) are not known, and classes may have different numbers of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fieldmark.store import nfc
from training.metrics import Bools, Ints

Lineages = Sequence[Sequence[str]]  # of each class, the taxa that it lies in, from the highest down


def lineages_of(classes: pa.Table, class_ids: Sequence[str]) -> Lineages | None:
    """The taxa of each of these classes, from the highest down: its lineage, or its superclass where it has none.

    `classes` is the table index.classes/2. A lineage that ends with the class itself counts without that end. None
    where no taxon parts classes from others.
    """
    row = {row["class_id"]: row for row in classes.to_pylist()}
    found = [tuple(row[name]["lineage"] or filter(None, [row[name]["superclass"]])) for name in class_ids]
    count = Counter(line[:end] for line in found for end in range(1, len(line) + 1))

    def without_itself(class_id: str, line: tuple[str, ...]) -> tuple[str, ...]:
        own = {nfc(row[class_id][key] or "").casefold() for key in ("class_id", "name", "scientific_name")}
        return line[:-1] if line and count[line] == 1 and nfc(line[-1]).casefold() in own else line

    lineages = tuple(without_itself(*each) for each in zip(class_ids, found, strict=True))
    return lineages if Taxonomy(tuple(class_ids), lineages).ranks > 1 else None


class RankErrors(NamedTuple):
    """How often the guess is not even in the taxon of the true class, at one rank."""

    rank: int  # 0: the class itself
    taxa: int  # how many there are at this rank
    images: int  # of classes that have this rank
    errors: float  # share of these images


@dataclass(frozen=True)
class Taxonomy:
    """C classes and their taxa. A taxon is told by where it stands, for two may have one name.

    Taxa that hold all classes say nothing and are left out.
    """

    classes: tuple[str, ...]
    lineages: Lineages

    @cached_property
    def paths(self) -> list[tuple[str, ...]]:
        """Where each taxon stands: the names from the highest down to its own; sorted."""
        inside = {tuple(line[:end]) for line in self.lineages for end in range(1, len(line) + 1)}
        return sorted(path for path in inside if any(tuple(line[: len(path)]) != path for line in self.lineages))

    @cached_property
    def names(self) -> list[str]:
        """Of each node: the C classes, then the taxa."""
        return [*self.classes, *(path[-1] for path in self.paths)]

    @cached_property
    def chains(self) -> Ints:
        """(C, R): the node of each class at each rank, -1 above its highest."""
        place = {path: len(self.classes) + number for number, path in enumerate(self.paths)}
        chains = []
        for number, line in enumerate(self.lineages):
            above = [place[tuple(line[:end])] for end in range(len(line), 0, -1) if tuple(line[:end]) in place]
            chains.append([number, *above])
        ranks = max(map(len, chains))
        return np.array([chain + [-1] * (ranks - len(chain)) for chain in chains])

    @property
    def ranks(self) -> int:
        """R, rank 0 among them."""
        return self.chains.shape[1]

    @cached_property
    def members(self) -> Bools:
        """(nodes, C): which classes are in a node."""
        members = np.zeros((len(self.names), len(self.classes)), dtype=bool)
        number, rank = np.nonzero(self.chains >= 0)
        members[self.chains[number, rank], number] = True
        return members

    @cached_property
    def steps(self) -> Ints:
        """(C, C): how many ranks to climb from a class until another one is in its taxon.

        0 for itself; one more than the class has ranks where they share none.
        """
        steps = np.tile((self.chains >= 0).sum(1)[:, None], len(self.classes))
        for rank in range(self.ranks - 1, -1, -1):
            has = self.chains[:, rank] >= 0
            steps[has] = np.where(self.members[self.chains[has, rank]], rank, steps[has])
        return steps

    def distances(self, y: Ints, guess: Ints) -> Ints:
        """(n,): the ranks to climb from the true class until the guess is in its taxon.

        The height of the lowest common ancestor (Bertinetto et al., CVPR 2020 [mem]).
        """
        return self.steps[y, guess]

    def errors_by_rank(self, y: Ints, guess: Ints) -> list[RankErrors]:
        """A row for each rank that occurs in y (n,): how often the guess is in another taxon."""
        rows = []
        for rank in range(self.ranks):
            of_rank = self.chains[y, rank] >= 0
            if of_rank.any():
                wrong = float((self.distances(y, guess)[of_rank] > rank).mean())
                taxa = len(np.unique(self.chains[self.chains[:, rank] >= 0, rank]))
                rows.append(RankErrors(rank, taxa, int(of_rank.sum()), wrong))
        return rows
