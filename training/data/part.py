"""What a part of the cache is: one class, in a module of this package, found by the names that it provides.

A part is a frozen dataclass of tensors. Each has a row an image and view (row i * V + v is image i in view v), or a row
an image where `by_image` says so, and a batch has a field of the same name: half precision widened to float32 and
integers to int64. A part that is laid out otherwise says how it is cut (`cut`) and reduced to some images (`take`).
Positions (`images`, `rows`) lie on the CPU, wherever the part does.

READS names a part by a word of `provides`. A part that holds many things by NAME (`named`) is asked for one of them by
`WORD/NAME`; the word alone stands for whatever NAMEs a run's settings name.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from fieldmark.command import UserError
from training.data.placement import bring, bytes_to_move, move, room
from training.data.rows import EncoderFiles

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of what a part holds by name; it is a folder's too


class Origin(NamedTuple):
    """That one file was made from another: `param` in the header of `made` is the fingerprint of `source`."""

    made: str  # paths under data/
    param: str
    source: str
    stage: str  # the one that makes it


class Part:
    """One part of the cache, for n images in V views."""

    provides: ClassVar[frozenset[str]] = frozenset()  # what READS calls it; several names where it has several sides
    named: ClassVar[str] = ""  # the word of `provides` behind which a slash and a NAME may stand
    shows: ClassVar[tuple[str, ...]] = ()  # the fields of a batch that come from it
    of_text: ClassVar[bool] = False  # whether it comes from texts: a tower has none
    by_image: ClassVar[bool] = False  # whether its tensors have a row an image, and not one an image and view
    supervises: ClassVar[bool] = False  # whether training alone may look at it: of new pictures it is not made
    # The vectors of whole images that probes may take, by the name in their `features`: from a batch, blocks (B, F).
    features: ClassVar[Mapping[str, Callable[[Any], tuple[Tensor, ...]]]] = {}

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        """What it is read from, and the schema of each: files and folders of buckets, as paths under data/.

        `words` are those of READS that ask for it.
        """
        raise NotImplementedError

    @classmethod
    def origins(cls, encoder: str) -> list[Origin]:
        """What its files were made from, as far as their headers say so."""
        return []

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        """Read it. Raises UserError naming the file and the stage to run where something is missing or broken."""
        raise NotImplementedError

    @classmethod
    def check_beside(cls, source: EncoderFiles, other: EncoderFiles) -> None:
        """Raise UserError where this part of another encoder cannot be read beside the run's own."""

    def check(self, parts: "Parts") -> None:
        """Raise UserError where it does not fit the parts that are read beside it."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def changed(self, values: Mapping[str, Tensor]) -> Self:
        """The same with other tensors, by the names that `tensors` has."""
        changed: Any = replace(self, **values)  # type: ignore[type-var]
        return changed

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """What a batch has of it: of `images` (B,), each seen in one view, which makes it row `rows` (B,).

        Where it lies and as narrow as it is: `Parts.cut` moves and widens.
        """
        # index_select is several times as fast as [rows].
        places = images if self.by_image else rows
        return {name: value.index_select(0, places.to(value.device)) for name, value in self.tensors().items()}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        """The same of some images alone, (m,), with all their views: `rows` (m V,)."""
        places = images if self.by_image else rows
        return self.changed({name: value[places] for name, value in self.tensors().items()})

    def on(self, device: torch.device) -> Self:
        """The same with its tensors on a device."""
        return self.changed({name: move(value, device) for name, value in self.tensors().items()})

    def of_classes(self, classes: Tensor, parts: "Parts") -> Self:
        """The same where only these classes (C,) bool are left; `parts` are all that are read, this one among them."""
        return self

    def only(self, names: Collection[str]) -> Self:
        """The same without the sides of it that `names` does not hold."""
        return self

    def hide(self, images: Tensor) -> Self:
        """What a fit may see of it, where these images (n,) bool neither train nor choose."""
        return self


P = TypeVar("P", bound=Part)


class Parts:
    """Parts by their class."""

    def __init__(self, parts: Collection[Part]) -> None:
        self.by_kind = {type(part): part for part in parts}

    def part(self, kind: type[P]) -> P:
        """The part of a class. Raises UserError where the method does not declare it."""
        found: Any = self.by_kind.get(kind)
        if found is None:
            names = " or ".join(f"`{name}`" for name in sorted(kind.provides)) or kind.__name__
            raise UserError(f"{kind.__name__}: the method's READS does not name {names}; add it there")
        return found

    def has(self, kind: type[Part]) -> bool:
        return kind in self.by_kind

    def with_part(self, part: Part) -> "Parts":
        """These, and one more or another one of its class."""
        return Parts([*(one for one in self.by_kind.values() if type(one) is not type(part)), part])

    def only(self, names: Collection[str]) -> "Parts":
        """Those that `names`, in the words of READS, hold, and those that a method made for itself."""
        words = {word_of(name) for name in names}
        kept = (one for one in self.by_kind.values() if not one.provides or one.provides & words)
        return Parts([one.only(names) for one in kept])

    def of_classes(self, classes: Tensor) -> "Parts":
        return Parts([part.of_classes(classes, self) for part in self.by_kind.values()])

    def hide(self, images: Tensor) -> "Parts":
        return Parts([part.hide(images) for part in self.by_kind.values()])

    def take(self, images: Tensor, rows: Tensor) -> "Parts":
        return Parts([part.take(images, rows) for part in self.by_kind.values()])

    def cut(self, images: Tensor, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for part in self.by_kind.values():
            values |= part.cut(images, rows)
        return {name: widen(bring(value, device)) for name, value in values.items()}

    def on(self, device: torch.device) -> "Parts":
        """These with what fits on a device, the smallest first; a part that no batch is cut of has to."""
        sizes = {kind: bytes_to_move(part.tensors().values(), device) for kind, part in self.by_kind.items()}
        placed = {}
        for kind in sorted(sizes, key=sizes.__getitem__):
            part = self.by_kind[kind]
            placed[kind] = part.on(device) if not part.shows or sizes[kind] <= room(device) else part
        return Parts([placed[kind] for kind in self.by_kind])


def widen(value: Tensor) -> Tensor:
    """Half precision as float32 and narrow integers as int64; anything else as it is."""
    if value.dtype == torch.float16:
        return value.float()
    return value.long() if value.dtype in (torch.int16, torch.int32) else value


@functools.cache
def part_kinds() -> dict[str, type[Part]]:
    """Every part by the names that READS may hold: what the modules of this package define."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"training.data.{module.name}")
    return {name: kind for kind in Part.__subclasses__() for name in sorted(kind.provides)}


def word_of(name: str) -> str:
    """The word of `provides` in what READS names: `moments` of moments/NAME."""
    return name.partition("/")[0]


def kind_of(name: str) -> type[Part]:
    """The part that READS names. Raises UserError where there is none."""
    word, slash, rest = name.partition("/")
    kind = part_kinds().get(word)
    if kind is None or (slash and not (word == kind.named and NAME.fullmatch(rest))):
        raise UserError(f"{name!r} is no part of the cache; choose from: {', '.join(part_words())}")
    return kind


def part_words() -> list[str]:
    """What READS may name, for messages."""
    return sorted(f"{word}/NAME" if word == kind.named else word for word, kind in part_kinds().items())
