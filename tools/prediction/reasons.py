"""Why a run says one class and not another of a picture: the patches and the texts that add most to that decision."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.params import Params
from fieldmark.store import read_table
from tools.prediction.output import DIGITS, Row
from training.data import Cache, read_cache
from training.data.boxes import Boxes
from training.explain import LEAST_MOVE, can_say_why, name_pair, name_text, occlude, pairs, reads_of, texts
from training.restore import Restored
from training.train import plan_run

PATCHES, CONCEPTS = 3, 6  # that are named


@dataclass(frozen=True)
class Reasons:
    """A run that is asked why."""

    run: Restored
    params: Params
    data: Path
    names: dict[str, str]  # of classes, by class_id
    device: torch.device

    @cached_property
    def cache(self) -> Cache:
        """All pictures of the index, as the run sees them."""
        run, buckets = self.run, self.params.dataset.buckets
        return read_cache(self.data, run.encoder, buckets, reads_of(run), run.also, run.also_reads).on(self.device)

    @cached_property
    def bank(self) -> list[Row]:
        """The texts by concept_idx."""
        columns = ["concept_idx", "text", "class_ids"]
        bank: pa.Table = read_table(self.data / f"bank/{self.run.encoder}.parquet", "bank/1", columns)
        return bank.sort_by("concept_idx").to_pylist()

    def stored(self, image_ids: Sequence[str]) -> tuple[Cache, Tensor]:
        """Where pictures of the index are."""
        place = {image_id: number for number, image_id in enumerate(self.cache.image_ids)}
        return self.cache, torch.tensor([place[image_id] for image_id in image_ids])

    def of(self, cache: Cache, images: Tensor, classes: Tensor) -> list[Row]:
        """`patches` and `concepts` of images (n,), for the first of classes (n, 2) against the second.

        None where the run reads none.
        """
        seen = cache.only(self.run.reads)
        patches: list[list[Row] | None] = [None] * len(images)
        concepts: list[list[Row] | None] = [None] * len(images)
        fall = occlude(self.run.model, seen, images, classes)
        if fall is not None:
            boxes = cache.part(Boxes).box[images.to(cache.device) * cache.views, 1:].cpu()
            patches = [best_patches(*each) for each in zip(fall.cpu(), boxes, strict=True)]
        found = texts(self.run, seen, images, classes, CONCEPTS)
        if found is not None:
            adds = zip(found.text.tolist(), found.adds.tolist(), strict=True)
            concepts = [self.best_concepts(*each) for each in adds]
        together = pairs(self.run, seen, images, classes, CONCEPTS)
        if together is not None:
            of_pairs = zip(together.text.tolist(), together.adds.tolist(), together.more.tolist(), strict=True)
            concepts = [self.best_pairs(*each) for each in of_pairs]
        return [{"patches": each, "concepts": other} for each, other in zip(patches, concepts, strict=True)]

    def name(self, concept: Row) -> str:
        return name_text(concept["text"], concept["class_ids"], self.names)

    def best_concepts(self, rows: Sequence[int], adds: Sequence[float]) -> list[Row]:
        """Those whose figure is no 0 where it is printed."""
        return [
            {"text": self.name(self.bank[row]), "class_ids": self.bank[row]["class_ids"], "gain": gain}
            for row, gain in zip(rows, adds, strict=True)
            if round(gain, DIGITS)
        ]

    def best_pairs(self, rows: Sequence[Sequence[int]], adds: Sequence[float], more: Sequence[bool]) -> list[Row]:
        """As best_concepts; the classes are those that own either text."""
        return [
            {
                "text": name_pair(self.name(self.bank[a]), self.name(self.bank[b]), shown),
                "class_ids": sorted({*self.bank[a]["class_ids"], *self.bank[b]["class_ids"]}),
                "gain": gain,
            }
            for (a, b), gain, shown in zip(rows, adds, more, strict=True)
            if round(gain, DIGITS)
        ]


def best_patches(fall: Tensor, boxes: Tensor) -> list[Row]:
    """Of patches (N,), boxes (N, 4), those that speak most for the first class, best first, by LEAST_MOVE or more."""
    best = fall.topk(min(PATCHES, len(fall)))
    return [
        dict(zip(("x0", "y0", "x1", "y1"), boxes[place].tolist(), strict=True)) | {"gain": gain}
        for gain, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if gain >= LEAST_MOVE
    ]


def runs_that_say_why(params: Params, path: str, data: Path) -> list[str]:
    """Those of train.runs that are trained and have patches or texts to name; `path` as in restore."""
    found = []
    for name in params.train.runs:
        if not (data / "runs" / name / "model.safetensors").is_file():
            continue
        # That another run cannot stand is no matter of the one that is asked.
        with suppress(UserError):
            planned = plan_run(path, params, name)
            if can_say_why(planned.method, planned.reading.reads):
                found.append(name)
    return found
