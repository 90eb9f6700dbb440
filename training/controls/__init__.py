"""Controls: the same cache without what a method claims to gain from, so that a gain can be laid at its door.

A control is a file of this folder, registered by its name. It takes one thing away and touches nothing else:

    none                as it is; there is no file
    edges_removed       no image has an edge: no message passes
    edges_rewired       the same edges, weights and degrees, between other nodes
    links_removed       no image hears another one
    links_rewired       the same links into each image and out of each, between other ones
    links_random        as many links into each image, from images drawn at random
    random_vectors      every vector of the bank, names too, is a random unit vector
    unrelated_texts     kept concepts become texts about things that are neither animals nor plants
    random_descriptors  each class owns as many texts as before, of words or characters drawn at random
    owners_permuted     a class's texts and names belong to another class
    vectors_shuffled    the same vectors, shuffled between classes text by text
    same_text           every class has one and the same text: a prior without content

`concepts: M` keeps M of the kept concepts first (fewer_concepts.py).

A file holds `CHANGES`, what it changes in the words of a method's READS: a study makes no run of a method that reads
nothing of it under its own settings, and its tables say so; `NEEDS`, the parts that it reads itself; `DRAWS`, whether
another seed makes another cache; `SUBJECT`, what it takes away, as a verdict words it; `apply(cache, request)`; and,
where it has to read files beside the cache, `files(encoder)`, as a part has. `AFTER`, where a file has it, is done once
when all is changed: where vectors or kept concepts change, the nodes' labels are made anew as label_patches makes them.
The bank of a control that replaces texts holds names and the control's texts alone: none of those it stands against is
left to be read. Descriptions of images are not concepts, and stay.

Controls change bank, labels, edges and links, regimes (training/regimes.py) change split and target: they can be
applied in either order.
"""

import difflib
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from fieldmark.command import UserError
from fieldmark.params import Block, Count, read_block
from training.data import Cache, part_kinds

FOLDER = Path(__file__).parent
FEWER = "fewer_concepts"  # the file behind `concepts: M`


@dataclass(frozen=True)
class Request:
    """What a control is asked for, and where it finds what it reads beside the cache."""

    control: "Control"
    data: Path
    encoder: str
    buckets: int
    generator: torch.Generator
    labels: Mapping[str, Any] = field(default_factory=dict)  # settings of labels in the place of those on disk


Apply = Callable[[Cache, Request], Cache]


class ControlModule(Protocol):
    CHANGES: frozenset[str]
    NEEDS: frozenset[str]
    DRAWS: bool
    SUBJECT: str
    apply: Apply


class Control(Block):
    """What is taken away; `concepts` limits the bank to so many kept concepts before."""

    name: str = "none"
    concepts: Count | None = None

    @property
    def label(self) -> str:
        return self.name if self.concepts is None else f"{self.name}-{self.concepts}"

    @property
    def modules(self) -> list[ControlModule]:
        """Its files, in the order in which they are applied."""
        names = [FEWER] if self.concepts is not None else []
        return [load_control(name) for name in (*names, *([self.name] if self.name != "none" else []))]

    @property
    def changes(self) -> frozenset[str]:
        """What it changes, in the words of a method's READS."""
        return frozenset().union(*(module.CHANGES for module in self.modules))

    @property
    def draws(self) -> bool:
        """Whether another seed makes another cache of it."""
        return any(module.DRAWS for module in self.modules)

    @property
    def subject(self) -> str:
        return load_control(self.name).SUBJECT

    def needs(self, reads: Collection[str]) -> frozenset[str]:
        """The parts to read for a method that reads `reads`: these, and what the control itself needs."""
        needed = frozenset(reads).union(*(module.NEEDS for module in self.modules))
        for after in self.afterwards(reads):
            needed |= after.NEEDS
        return needed

    def files(self, encoder: str, reads: Collection[str]) -> dict[str, str]:
        """What it reads beside these parts: paths under data/, and the schema of each."""
        found: dict[str, str] = {}
        for module in (*self.modules, *self.afterwards(reads)):
            found |= getattr(module, "files", lambda encoder: {})(encoder)
        return found

    def afterwards(self, reads: Collection[str]) -> list[Any]:
        """What is to be done once when all is changed, as far as the method reads it."""
        found = {id(after): after for module in self.modules if (after := getattr(module, "AFTER", None)) is not None}
        return [after for after in found.values() if after.MAKES & set(reads)]


def control_names() -> list[str]:
    """Every control by name."""
    return ["none", *sorted(file.stem for file in FOLDER.glob("[a-z]*.py") if file.stem != FEWER)]


def load_control(name: str) -> ControlModule:
    return cast(ControlModule, importlib.import_module(f"training.controls.{name}"))


def read_control(path: str, key: str, given: Any) -> Control:
    """A control, by its name alone or as a block. Raises UserError naming file and key."""
    control = read_block(path, key, {"name": given} if isinstance(given, str) else given, Control)
    known = control_names()
    if control.name not in known:
        close = difflib.get_close_matches(control.name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(known)}"
        raise UserError(f"{path}: {key}: there is no training/controls/{control.name}.py; {hint}")
    return control


def apply_control(cache: Cache, request: Request) -> Cache:
    """The cache under a control. It has to hold what `Control.needs` says.

    Classes that are lent (`Cache.others`) are under the same. A method that learned from their true texts what texts
    are worth, and is then shown others, says what wrong texts cost, and not what right ones are worth.

    Raises UserError where the bank has fewer concepts than `concepts`, or there are fewer control texts than concepts
    to replace.
    """
    held = [name for name, kind in part_kinds().items() if cache.has(kind)]
    for module in request.control.modules:
        cache = module.apply(cache, request)
    for after in request.control.afterwards(held):
        cache = after.apply(cache, request)
    return cache if cache.others is None else replace(cache, others=apply_control(cache.others, request))
