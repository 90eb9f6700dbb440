"""Where the parts of the object lie in each picture, where the data set marks them: what training may be told."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.store import read_table
from training.data.part import Part
from training.data.rows import EncoderFiles, column, flat

IMAGES, PARTS = "index/images.parquet", "index/parts.parquet"


@dataclass(frozen=True)
class ObjectParts(Part):
    """A batch has `part_box` (B, P, 4) and `part_seen` (B, P): P parts by their names, none where no part is marked.

    People marked them, and of a new picture there are none: a method may look at them in training alone.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"parts"})
    shows: ClassVar[tuple[str, ...]] = ("part_box", "part_seen")
    by_image: ClassVar[bool] = True
    supervises: ClassVar[bool] = True

    part_box: Tensor  # (n, P, 4) float32: x0 y0 x1 y1 in [0,1] of the full image; a point twice where there is no box
    part_seen: Tensor  # (n, P) bool: visible, and its place is known; boxes of others are 0

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {PARTS: "index.parts/1"}

    def hide(self, images: Tensor) -> Self:
        return replace(self, part_seen=self.part_seen & ~images[:, None])

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        index = read_table(source.folder / IMAGES, "index.images/1", ["path", "image_id", "status"])
        index = index.filter(pc.equal(index["status"], "ok"))
        order = pc.index_in(source.image_ids, value_set=index["image_id"].combine_chunks())
        paths = index["path"].combine_chunks().take(order)
        table = read_table(source.folder / PARTS, "index.parts/1", ["path", "part", "x", "y", "visible", "box"])
        names = pa.array(sorted(table["part"].unique().to_pylist()), table["part"].type)
        placed = pc.and_(table["visible"], pc.or_(pc.is_valid(table["box"]), pc.is_valid(table["x"])))
        table = table.filter(pc.and_(placed, pc.is_in(table["path"], value_set=paths)))
        of = (
            pc.index_in(table["path"], value_set=paths).to_numpy(),
            pc.index_in(table["part"], value_set=names).to_numpy(),
        )
        sides = np.stack([column(table, name) for name in ("x", "y", "x", "y")], axis=1)
        boxed = pc.is_valid(table["box"]).to_numpy()
        sides[boxed] = flat(table["box"].filter(boxed))[0].reshape(-1, 4)
        part_box = np.zeros((len(paths), len(names), 4), dtype=np.float32)
        part_seen = np.zeros((len(paths), len(names)), dtype=bool)
        part_box[of], part_seen[of] = sides, True
        return cls(torch.from_numpy(part_box), torch.from_numpy(part_seen))
