"""What label_patches says: which concepts a node shows, how dense it is, what is selected, the gains of rings."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from training.data.arrays import Arrays, Zeros
from training.data.bank import Bank
from training.data.part import Origin, Part, Parts
from training.data.rows import EncoderFiles, column, flat, slots

OF_IMAGES = ("ring_gains", "selected_concepts")  # columns that node 0 alone has


@dataclass(frozen=True)
class Labels(Part):
    provides: ClassVar[frozenset[str]] = frozenset({"labels"})
    shows: ClassVar[tuple[str, ...]] = (
        "concept_idx", "concept_weight", "selected", "density", "ring_gains", "selected_concepts",
    )  # fmt: skip
    of_text: ClassVar[bool] = True

    path: str  # the folder it was read from, for messages
    concept_idx: Tensor  # (n V, N+1, k) int32, rows of the bank; 0 at weight 0 where a node has fewer
    concept_weight: Tensor  # (n V, N+1, k) float16, >= 0, sum <= 1 (what the labelling cut off is missing)
    selected: Tensor  # (n V, N+1) bool: the patches that label_patches selected
    density: Tensor  # (n V, N+1) float32: information density
    ring_gains: Tensor  # (n V, R) float32: information gained from ring to ring; R is 0 where labels have none
    selected_concepts: Tensor  # (n V, Mc) int32, rows of the bank, best first; -1 where a row has fewer

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"labels/{encoder}": "labels/1"}

    @classmethod
    def origins(cls, encoder: str) -> list[Origin]:
        made = f"labels/{encoder}"
        return [
            Origin(made, "embed", f"embed/{encoder}/images", "label_patches"),
            Origin(made, "bank", f"bank/{encoder}.parquet", "label_patches"),
        ]

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        folder = source.folder / f"labels/{source.encoder}"
        kept = source.keep("labels", [folder, source.nodes_folder], partial(read_labels, folder, source))
        return cls(str(folder), **{name: torch.from_numpy(value) for name, value in kept.items()})

    def check(self, parts: Parts) -> None:
        if parts.has(Bank) and self.largest >= len(parts.part(Bank).kind):
            path = parts.part(Bank).path
            raise UserError(f"{self.path}: names concepts that {path} does not hold; run label_patches again")

    @property
    def largest(self) -> int:
        """The largest row of the bank that is named, -1 where none is."""
        named = [values.max().item() for values in (self.concept_idx, self.selected_concepts) if values.numel()]
        return int(max(named, default=-1))

    def of_classes(self, classes: Tensor, parts: Parts) -> Self:
        return self.without(parts.part(Bank).lost(classes))

    def without(self, lost: Tensor) -> Self:
        """Without the concepts `lost` (M,) bool: they weigh nothing and are none of an image's selected concepts.

        What is left of a label is not scaled up; density, ring gains and the selection of nodes stay as they are.
        """
        of_lost = (
            lost[self.concept_idx.long()] if self.concept_idx.numel() else torch.zeros_like(self.concept_idx).bool()
        )
        shown = self.selected_concepts
        shown = shown.masked_fill((shown >= 0) & lost[shown.clamp(min=0).long()], -1) if shown.numel() else shown
        return replace(
            self,
            concept_idx=self.concept_idx.masked_fill(of_lost, 0),
            concept_weight=self.concept_weight.masked_fill(of_lost, 0),
            # Best first, as they were, and those that are gone at the end.
            selected_concepts=shown.gather(1, (shown < 0).int().argsort(dim=1, stable=True)),
        )


def read_labels(folder: Path, source: EncoderFiles, zeros: Zeros) -> Arrays:
    """The tensors of `Labels` by name: one bucket at a time beside them in memory."""
    mask, (k, gains, shown) = source.mask, longest(folder, source)
    found = {
        "concept_idx": zeros((*mask.shape, k), np.int32),
        "concept_weight": zeros((*mask.shape, k)),
        "selected": np.zeros_like(mask),
        "density": zeros(mask.shape, np.float32),
        # Missing gains are 0 and missing concepts -1.
        "ring_gains": np.zeros((len(mask), gains), np.float32),
        "selected_concepts": np.full((len(mask), shown), -1, np.int32),
    }
    labelled = np.zeros_like(mask)
    columns = ["image_id", "view", "node", "concept_idx", "concept_weight", "density", "selected", *OF_IMAGES]
    for table, row in source.tables(folder, "labels/1", columns):
        node = column(table, "node")
        if node.size and node.max() >= mask.shape[1]:
            raise UserError(f"{folder}: labels nodes that the embeddings do not have; run label_patches again")
        concepts, lengths = flat(table["concept_idx"])
        place = (np.repeat(row, lengths), np.repeat(node, lengths), slots(lengths))
        found["concept_idx"][place], found["concept_weight"][place] = concepts, flat(table["concept_weight"])[0]
        found["selected"][row, node], found["density"][row, node] = column(table, "selected"), column(table, "density")
        labelled[row, node] = True
        whole = node == 0
        for name in OF_IMAGES:
            values, lengths = flat(of_images(table, name))
            found[name][np.repeat(row[whole], lengths), slots(lengths)] = values
    source.rows.require((labelled | ~mask).all(axis=1), folder, "label_patches")
    return found


def longest(folder: Path, source: EncoderFiles) -> tuple[int, int, int]:
    """The most labels of a node, ring gains of an image and selected concepts of an image; 0 where there are none."""
    most = [0, 0, 0]
    for table, _ in source.tables(folder, "labels/1", ["image_id", "view", "node", "concept_idx", *OF_IMAGES]):
        lists = table["concept_idx"], *(of_images(table, name) for name in OF_IMAGES)
        most = [max(known, int(flat(each)[1].max(initial=0))) for known, each in zip(most, lists, strict=True)]
    return most[0], most[1], most[2]


def of_images(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A list that labels give of whole images, on node 0."""
    return pc.fill_null(table.filter(pc.equal(table["node"], 0))[name], [])
