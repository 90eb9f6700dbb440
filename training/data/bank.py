"""The concept bank: the vectors of class names and of concepts, and which class owns a text."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import read_table, vectors_of
from training.data.part import Origin, Part, Parts
from training.data.rows import EncoderFiles, column


@dataclass(frozen=True)
class Bank(Part):
    """M texts. Those of kind `name` are class names: `kept` is false for them, and they label no patch.

    It has three sides: vectors of `names` and of `concepts` (all others) are zero where a method does not read them,
    and `own` is there for methods that read `owners`. A batch has nothing of it.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"names", "concepts", "owners"})
    of_text: ClassVar[bool] = True

    path: str  # the file it was read from, for messages
    K: Tensor  # (M, D) float32, unit length
    kind: tuple[str, ...]  # M of name, visual, habitat, generic, proto
    kept: Tensor  # (M,) bool
    owners: Tensor | None  # (M, C) bool: the classes that own a text; a generic one has none

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"bank/{encoder}.parquet": "bank/1"}

    @classmethod
    def origins(cls, encoder: str) -> list[Origin]:
        made = f"bank/{encoder}.parquet"
        return [
            Origin(made, "embed", f"embed/{encoder}/images", "select_concepts"),
            Origin(made, "text", f"embed/{encoder}/text.parquet", "select_concepts"),
        ]

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        path = source.folder / f"bank/{source.encoder}.parquet"
        table = read_table(path, "bank/1").sort_by("concept_idx")
        if (column(table, "concept_idx") != np.arange(table.num_rows)).any():
            raise UserError(f"{path}: concept_idx does not count from 0 without a gap; run select_concepts again")
        position = {class_id: column for column, class_id in enumerate(source.classes)}
        own = np.zeros((table.num_rows, len(source.classes)), dtype=bool)
        for concept, owners in enumerate(table["class_ids"].to_pylist()):
            own[concept, [position[owner] for owner in owners if owner in position]] = True
        return cls(
            path=str(path),
            K=torch.from_numpy(vectors_of(table).astype(np.float32)),
            kind=tuple(table["kind"].to_pylist()),
            kept=torch.from_numpy(np.array(table["kept"].to_pylist(), dtype=bool)),
            owners=torch.from_numpy(own),
        )

    @property
    def own(self) -> Tensor:
        """(M, C) bool: the classes that own a text. Raises UserError where the method's READS lacks `owners`."""
        if self.owners is None:
            raise UserError("who owns a text is of the part `owners`, and the method's READS does not name it; add it")
        return self.owners

    def of_kind(self, *kinds: str) -> Tensor:
        """(M,) bool: the rows of these kinds."""
        return torch.tensor([kind in kinds for kind in self.kind], dtype=torch.bool)

    def rows(self, chosen: Tensor) -> Self:
        """The bank with these rows (M,) bool only."""
        kind = tuple(kind for kind, taken in zip(self.kind, chosen.tolist(), strict=True) if taken)
        return replace(self, K=self.K[chosen], kind=kind, kept=self.kept[chosen], owners=self.own[chosen])

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return self

    def lost(self, classes: Tensor) -> Tensor:
        """(M,) bool: the texts whose owners are all gone where only these classes (C,) bool are left."""
        return self.own.any(1) & ~self.own[:, classes].any(1)

    def of_classes(self, classes: Tensor, parts: Parts) -> Self:
        if self.owners is None:
            return self
        return replace(self, owners=self.own[:, classes], kept=self.kept & ~self.lost(classes))

    def only(self, names: Collection[str]) -> Self:
        is_name = self.of_kind("name")
        seen = is_name & ("names" in names) | ~is_name & ("concepts" in names)
        owners = self.owners if "owners" in names else None
        return replace(self, K=self.K if seen.all() else self.K * seen[:, None], owners=owners)
