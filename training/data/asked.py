"""What a question of one's own about images or texts was answered: vectors of its texts, and guesses of classes.

Each question has a NAME, its key under `ask` in params.yaml. READS names one as `asked/NAME`. What an answer holds is
told apart by its fields (`field` of asked/1): the keys that lead to a text, with a dot between them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError, say_once
from fieldmark.concepts.guesses import Guessed
from fieldmark.store import read_header, read_table
from training.data.arrays import Arrays, Zeros
from training.data.descriptions import mean_sentence, place_sentences
from training.data.part import NAME, Part, Parts
from training.data.rows import EncoderFiles, column, slots

if TYPE_CHECKING:
    from training.data.cache import Fields

WORD, MASK, TOLD = "asked", "asked_mask", "asked_told"
SCHEMA = "asked/1"
MOST = 32  # texts of a field that are read of one answer: a model that repeats itself writes no end of them
OF_IMAGES = ("image", "text")
T = TypeVar("T")


@dataclass(frozen=True)
class Asked(Part):
    """A batch has under asked/NAME/FIELD (B, S, D) float32 vectors of unit length, in the order of sample and rank, and
    under asked_mask/NAME/FIELD (B, S) which of them an image has; `texts_said` gives both.

    Of the field that guesses classes it has (B, k) int64 under asked/NAME/FIELD, the likeliest first: 0 is none, else
    the position of the class + 1; `classes_guessed` gives it.

    Where a prompt was told the class of what it asks about, asked_told/NAME (B,) is there, and true: its texts know the
    label. A method may learn from those of training images, and reads none where it judges: under folds, images that
    are judged have such texts too. No probe takes them as a feature.
    """

    provides: ClassVar[frozenset[str]] = frozenset({WORD})
    named: ClassVar[str] = WORD
    shows: ClassVar[tuple[str, ...]] = (WORD, MASK, TOLD)
    of_text: ClassVar[bool] = True
    by_image: ClassVar[bool] = True

    said: Mapping[str, tuple[Tensor, Tensor]]  # by NAME/FIELD (n, S, D) float16, and (n, S) bool
    guesses: Mapping[str, Tensor]  # by NAME/FIELD (n, k) int32
    told: Mapping[str, Tensor]  # by the NAME of each prompt that was told the class (n,) bool, true

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        texts = {texts_of(name): SCHEMA for name in asked_names(words)}
        return texts | {vectors_of(name, encoder): "embed.text/1" for name in asked_names(words)}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        said: dict[str, tuple[Tensor, Tensor]] = {}
        guesses: dict[str, Tensor] = {}
        told: dict[str, Tensor] = {}
        for name in asked_names(source.reads):
            made_by = made_by_of(source.folder / texts_of(name))
            of_classes = made_by["guesses"]
            if made_by["told"]:
                told[name] = torch.ones(len(source.image_ids), dtype=torch.bool)
            for field in fields_in(source.folder / texts_of(name)):
                key = f"{name}/{field}"
                if field == of_classes:
                    guesses[key] = kept_guesses(source, name, field)
                else:
                    said[key] = kept_texts(source, name, field)
        return cls(said, guesses, told)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{WORD}/{key}": vectors for key, (vectors, _) in self.said.items()}
        found |= {f"{MASK}/{key}": mask for key, (_, mask) in self.said.items()}
        found |= {f"{WORD}/{key}": places for key, places in self.guesses.items()}
        return found | {f"{TOLD}/{name}": told for name, told in self.told.items()}

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        said = {key: (values[f"{WORD}/{key}"], values[f"{MASK}/{key}"]) for key in self.said}
        guesses = {key: values[f"{WORD}/{key}"] for key in self.guesses}
        return replace(self, said=said, guesses=guesses, told={name: values[f"{TOLD}/{name}"] for name in self.told})

    def of_classes(self, classes: Tensor, parts: Parts) -> Self:
        """A guess of a class that is gone is none."""
        place = torch.where(classes, classes.cumsum(0), 0)
        place = torch.cat([place.new_zeros(1), place])
        moved = {key: place[guesses.long()].to(guesses.dtype) for key, guesses in self.guesses.items()}
        return replace(self, guesses=moved)

    def only(self, names: Collection[str]) -> Self:
        if WORD in names:  # the word alone stands for whatever a run's settings name
            return self
        kept = set(asked_names(names))
        return replace(self, said=of_names(self.said, kept), guesses=of_names(self.guesses, kept),
                       told=of_names(self.told, kept))  # fmt: skip

    def hide(self, images: Tensor) -> Self:
        """Of a prompt that was told the class, nothing about these images."""
        seen = ~images
        said = {
            key: (vectors * seen[:, None, None], mask & seen[:, None]) if self.is_told(key) else (vectors, mask)
            for key, (vectors, mask) in self.said.items()
        }
        guesses = {
            key: places * seen[:, None] if self.is_told(key) else places for key, places in self.guesses.items()
        }
        return replace(self, said=said, guesses=guesses)

    def is_told(self, key: str) -> bool:
        return key.partition("/")[0] in self.told


def of_names(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """Those of values by NAME or NAME/FIELD."""
    return {key: value for key, value in values.items() if key.partition("/")[0] in names}


def texts_said(batch: "Fields", name: str, field: str) -> tuple[Tensor, Tensor]:
    """Vectors (B, S, D) of a field's texts, and which of them an image has, (B, S) bool.

    Raises UserError where the method's READS does not name asked/NAME, or no answer has a text in that field.
    """
    key = f"{name}/{field}"
    if not batch.has(f"{MASK}/{key}"):
        raise missing(batch, name, field, "texts")
    return batch.of(f"{WORD}/{key}"), batch.of(f"{MASK}/{key}")


def classes_guessed(batch: "Fields", name: str, field: str) -> Tensor:
    """(B, k) int64: the classes that were guessed, the likeliest first; 0 is none, else the position + 1.

    Raises UserError where the method's READS does not name asked/NAME, or that is no field of guesses.
    """
    key = f"{name}/{field}"
    if not batch.has(f"{WORD}/{key}") or batch.has(f"{MASK}/{key}"):
        raise missing(batch, name, field, "guesses of classes")
    return batch.of(f"{WORD}/{key}")


def missing(batch: "Fields", name: str, field: str, what: str) -> UserError:
    fields = sorted(key.split("/", 2)[2] for key in batch.values if key.startswith(f"{WORD}/{name}/"))
    if not fields:
        return UserError(f"{WORD}/{name}: is a part that the method's READS does not name; add it there")
    return UserError(f"{texts_of(name)}: has no {what} in a field {field!r}; its fields: {', '.join(fields)}")


def is_asked(feature: str) -> bool:
    """Whether a name in `features` is one of an answer: asked/NAME/FIELD."""
    return feature.startswith(f"{WORD}/")


def asked_word(feature: str) -> str:
    """The word of READS behind asked/NAME/FIELD. Raises ValueError where it has not that form."""
    _, name, field = [*feature.split("/", 2), "", ""][:3]
    if not NAME.fullmatch(name) or not field:
        raise ValueError(f"{feature!r} should be {WORD}/NAME/FIELD, NAME a key under ask in params.yaml")
    return f"{WORD}/{name}"


def mean_said(feature: str, batch: "Fields") -> Tensor:
    """The mean (B, D), of unit length, of what was answered in a field, as asked/NAME/FIELD; 0 where nothing was.

    Raises UserError as texts_said does, and where the prompt was told the class.
    """
    _, name, field = feature.split("/", 2)
    if batch.has(f"{TOLD}/{name}"):
        raise UserError(
            f"{feature}: the prompt of this question is told the class of an image, so that its texts are for training"
            " alone and no feature; take it out of `features`"
        )
    return mean_sentence(*texts_said(batch, name, field))


def asked_names(words: Collection[str]) -> list[str]:
    """The NAMEs that words of READS name. Raises UserError for `asked` alone, which names none."""
    if WORD in words:
        raise UserError(f"READS: `{WORD}` alone names no question; say {WORD}/NAME, NAME a key under `ask`")
    return sorted(word.partition("/")[2] for word in words if is_asked(word))


def texts_of(name: str) -> str:
    return f"asked/{name}/texts.parquet"


def vectors_of(name: str, encoder: str) -> str:
    return f"asked/{name}/vectors/{encoder}.parquet"


def made_by_of(path: Path) -> dict[str, Any]:
    """What a table says of its question. Raises UserError where that was not about images or their texts."""
    made_by = read_header(path, SCHEMA).params
    if made_by["subject"] not in OF_IMAGES:
        what = f"is of a question about each {made_by['subject']}"
        raise UserError(f"{path}: {what}, and a run reads what was asked of images or texts; take another question")
    return made_by


def fields_in(path: Path) -> list[str]:
    return sorted(set(read_table(path, SCHEMA, ["field"])["field"].to_pylist()))


def rows_of(path: Path, field: str, image_ids: pa.Array) -> pa.Table:
    """image_id, rank and text of a field, MOST an answer, image by image in the order of sample and rank."""
    table = read_table(path, SCHEMA).rename_columns({"subject_id": "image_id"})
    wanted = pc.and_(pc.equal(table["field"], field), pc.is_in(table["image_id"], value_set=image_ids))
    table = table.filter(wanted).sort_by([(name, "ascending") for name in ("image_id", "sample", "rank")])
    return table.filter(pc.less(table["rank"], MOST))


def kept_texts(source: EncoderFiles, name: str, field: str) -> tuple[Tensor, Tensor]:
    path, vectors = (source.folder / file for file in (texts_of(name), vectors_of(name, source.encoder)))
    kept = source.keep(f"asked {field}", [path, vectors], lambda zeros: read_texts(path, vectors, field, source))
    return torch.from_numpy(kept["vectors"]), torch.from_numpy(kept["mask"])


def read_texts(path: Path, vectors: Path, field: str, source: EncoderFiles) -> Arrays:
    """`vectors` (n, S, D) float16 and `mask` (n, S) bool."""
    table = rows_of(path, field, source.image_ids)
    found, mask = place_sentences(table, path, vectors, source.image_ids, "embed_asked")
    return {"vectors": found, "mask": mask}


def kept_guesses(source: EncoderFiles, name: str, field: str) -> Tensor:
    """(n, k) int32. Says on stderr, once, how many guesses mean no class."""
    path, classes = source.folder / texts_of(name), source.folder / "index/classes.parquet"
    make = partial(read_guesses, path, classes, field, source.image_ids)
    kept = source.keep(f"asked {field}, classes", [path, classes], make)
    if wrong := int((kept["mask"] & (kept["places"] == 0)).sum()):
        count = int(kept["mask"].sum())
        say_once(f"{path}: of {count} guesses in {field!r} {wrong} name no class, and count as none")
    return torch.from_numpy(kept["places"])


def read_guesses(path: Path, classes: Path, field: str, image_ids: pa.Array, zeros: Zeros) -> Arrays:
    """`places` (n, k) int32 of classes, in the order of their ids, + 1; `mask` (n, k) bool, where there is a guess."""
    rows = sorted(read_table(classes, "index.classes/2").to_pylist(), key=lambda row: row["class_id"])
    table, known = rows_of(path, field, image_ids), Guessed(rows)
    image = pc.index_in(table["image_id"], value_set=image_ids).to_numpy().astype(np.int64)
    lengths = np.unique_counts(column(table, "image_id")).counts if table.num_rows else np.zeros(0, dtype=np.int64)
    said = table["text"].combine_chunks().dictionary_encode()
    meant = [known.place(text) for text in said.dictionary.to_pylist()]
    place_of = np.array([0 if place is None else place + 1 for place in meant], dtype=np.int32)
    places = np.zeros((len(image_ids), int(lengths.max(initial=0))), dtype=np.int32)
    mask = np.zeros(places.shape, dtype=bool)
    if table.num_rows:
        found = place_of[said.indices.to_numpy()]
        places[image, slots(lengths)], mask[image, slots(lengths)] = found, True
    return {"places": places, "mask": mask}
