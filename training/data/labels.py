"""What label_patches says: which concepts a node shows, how dense it is, what is selected, the gains of rings."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import read_buckets
from training.data.bank import Bank
from training.data.part import Origin, Part, Parts
from training.data.rows import EncoderFiles, Rows, column, flat, slots


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
        kept = source.keep("labels", [folder, source.nodes_folder], lambda zeros: read_labels(folder, source))
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


NodeLabels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read_labels(folder: Path, source: EncoderFiles) -> dict[str, np.ndarray]:
    """The tensors of `Labels` by name."""
    of_nodes = read_node_labels(folder, source.rows, source.mask)
    of_images = read_image_labels(folder, source.rows)
    names = ("concept_idx", "concept_weight", "selected", "density", "ring_gains", "selected_concepts")
    return dict(zip(names, (*of_nodes, *of_images), strict=True))


def read_node_labels(folder: Path, rows: Rows, mask: np.ndarray) -> NodeLabels:
    """concept_idx (n V, N+1, k) int32, concept_weight (same) float16, selected and density (n V, N+1)."""
    columns = ["image_id", "view", "node", "concept_idx", "concept_weight", "density", "selected"]
    table, row = rows.place(read_buckets(folder, "labels/1", rows.buckets, columns), folder)
    node = column(table, "node")
    concepts, lengths = flat(table["concept_idx"])
    weights, _ = flat(table["concept_weight"])
    if node.size and node.max() >= mask.shape[1]:
        raise UserError(f"{folder}: labels nodes that the embeddings do not have; run label_patches again")
    k = int(lengths.max(initial=0))
    concept_idx = np.zeros((*mask.shape, k), dtype=np.int32)
    concept_weight = np.zeros((*mask.shape, k), dtype=np.float16)
    place = (np.repeat(row, lengths), np.repeat(node, lengths), slots(lengths))
    concept_idx[place], concept_weight[place] = concepts, weights
    selected, density, labelled = np.zeros_like(mask), np.zeros(mask.shape, dtype=np.float32), np.zeros_like(mask)
    selected[row, node], density[row, node] = column(table, "selected"), column(table, "density")
    labelled[row, node] = True
    rows.require((labelled | ~mask).all(axis=1), folder, "label_patches")
    return concept_idx, concept_weight, selected, density


def read_image_labels(folder: Path, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """What labels say of whole images, on node 0: ring_gains (n V, R) float32, selected_concepts (n V, Mc) int32.

    Missing gains are 0 and missing concepts -1; R is 0 where no image has gains.
    """
    columns = ["image_id", "view", "node", "ring_gains", "selected_concepts"]
    table = read_buckets(folder, "labels/1", rows.buckets, columns)
    table, row = rows.place(table.filter(pc.equal(table["node"], 0)), folder)
    found = []
    for name, dtype, missing in (("ring_gains", np.float32, 0), ("selected_concepts", np.int32, -1)):
        values, lengths = flat(pc.fill_null(table[name], []))
        wide = np.full((rows.count, int(lengths.max(initial=0))), missing, dtype=dtype)
        wide[np.repeat(row, lengths), slots(lengths)] = values
        found.append(wide)
    return found[0], found[1]
