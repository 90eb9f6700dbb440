"""What a vision model said of each image, sentence by sentence."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.store import read_table, sha256, vectors_of
from training.data.part import Part
from training.data.rows import EncoderFiles, column, slots


def require_described(dm: Tensor) -> None:
    """Raise UserError where an image has no sentence; dm (n, S)."""
    if missing := int((~dm.any(1)).sum()):
        raise UserError(
            f"{missing} of {len(dm)} images have no description, which this run reads; set describe.enabled: true and"
            " run describe_images (dvc repro), or leave descriptions out of the run's settings"
        )


def mean_sentence(d: Tensor, dm: Tensor) -> Tensor:
    """(B, D), unit length: the mean of the sentences d (B, S, D) that an image has, dm (B, S); 0 without any."""
    return F.normalize((d.float() * dm[..., None]).sum(1), dim=-1)


def described(batch: Any) -> tuple[Tensor]:
    """The mean sentence (B, D) of a batch. Raises UserError where no image at all has one."""
    if not batch.d.shape[1]:
        raise UserError("no image has a description, which this run reads; set describe.enabled: true, or leave it out")
    return (mean_sentence(batch.d, batch.dm),)


@dataclass(frozen=True)
class Descriptions(Part):
    provides: ClassVar[frozenset[str]] = frozenset({"descriptions"})
    shows: ClassVar[tuple[str, ...]] = ("d", "dm")
    of_text: ClassVar[bool] = True
    by_image: ClassVar[bool] = True
    features: ClassVar[Mapping[str, Callable[[Any], tuple[Tensor, ...]]]] = {"descriptions": described}

    d: Tensor  # (n, S, D) float16, in the order of their rank; S is 0 where no image has one
    dm: Tensor  # (n, S) bool: the sentences that an image has

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {"descriptions/descriptions.parquet": "descriptions/1", f"embed/{encoder}/text.parquet": "embed.text/1"}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        path, text = (source.folder / name for name in cls.files(source.encoder, source.reads))
        kept = source.keep("descriptions", [path, text], lambda zeros: read_descriptions(path, text, source.image_ids))
        return cls(**{name: torch.from_numpy(value) for name, value in kept.items()})


def read_descriptions(path: Path, text: Path, image_ids: pa.Array) -> dict[str, np.ndarray]:
    """The tensors of `Descriptions` by name."""
    d, dm = read_sentences(path, "descriptions/1", ["image_id", "rank"], text, image_ids)
    return {"d": d, "dm": dm}


def read_sentences(
    path: Path, schema: str, order: Sequence[str], text: Path, image_ids: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, S, D) float16 of the sentences in a table, by image and in an order that begins with image_id.

    Beside them which of them an image has, (n, S) bool. Raises UserError where `text` lacks one.
    """
    table = read_table(path, schema)
    table = table.filter(pc.is_in(table["image_id"], value_set=image_ids))
    table = table.sort_by([(name, "ascending") for name in order])
    return place_sentences(table, path, text, image_ids, "embed_text")


def place_sentences(
    table: pa.Table, path: Path, text: Path, image_ids: pa.Array, stage: str
) -> tuple[np.ndarray, np.ndarray]:
    """read_sentences of the lines of a table that came from `path`: of these images alone, image by image.

    `stage` is the one that writes `text`.
    """
    texts = read_table(text, "embed.text/1", ["text_id", "vector"])
    image = pc.index_in(table["image_id"], value_set=image_ids).to_numpy().astype(np.int64)
    # The lines of one image stand together now: a line's slot is its distance from its image's first.
    lengths = np.unique_counts(column(table, "image_id")).counts if table.num_rows else np.zeros(0, dtype=np.int64)
    dimension = texts.schema.field("vector").type.list_size
    d = np.zeros((len(image_ids), int(lengths.max(initial=0)), dimension), dtype=np.float16)
    dm = np.zeros(d.shape[:2], dtype=bool)
    if table.num_rows:
        wanted = pa.array([sha256(sentence) for sentence in table["text"].to_pylist()])
        found = pc.index_in(wanted, value_set=texts["text_id"].combine_chunks())
        if found.null_count:
            raise UserError(f"{text}: lacks {found.null_count} texts of {path}; run {stage} again (dvc repro)")
        d[image, slots(lengths)] = vectors_of(texts)[found.to_numpy()]
        dm[image, slots(lengths)] = True
    return d, dm
