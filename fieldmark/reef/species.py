"""The field marks a reef fish can show, and the table of the 24 species.

A combination of field marks is a mapping from every attribute of `VOCABULARY` to one of its values. Values read as
"a fish with PHRASE"; absence ("none") is not a field mark and has no phrase.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from fieldmark.command import UserError

SPECIES_FILE = Path("data/demo/species.yaml")

# attribute -> value -> phrase; "none" stands for the absence of a mark.
VOCABULARY: dict[str, dict[str, str | None]] = {
    "body_shape": {
        "slender": "a slender body",
        "oval": "an oval body",
        "tall": "a tall disc-shaped body",
    },
    "tail_shape": {
        "forked": "a forked tail",
        "rounded": "a rounded tail",
        "pointed": "a pointed tail",
        "square": "a square tail",
    },
    "dorsal_fin": {
        "sail": "a tall sail-like dorsal fin",
        "low": "a low dorsal fin",
        "spiny": "a spiny dorsal fin",
    },
    "body_colour": {
        "yellow": "a yellow body",
        "blue": "a blue body",
        "orange": "an orange body",
        "silver": "a silver body",
        "green": "a green body",
        "purple": "a purple body",
    },
    "fin_colour": {
        "yellow": "yellow fins",
        "dark": "dark fins",
        "red": "red fins",
        "white": "white fins",
    },
    "bars": {
        "none": None,
        "single": "a single dark bar behind the head",
        "many": "several dark vertical bars",
    },
    "stripes": {
        "none": None,
        "single": "a single dark stripe along the flank",
        "many": "several thin horizontal stripes",
    },
    "spots": {
        "none": None,
        "scattered": "dark spots scattered over the flank",
        "back": "a large dark spot below the dorsal fin",
    },
    "eye_mask": {"none": None, "mask": "a dark mask across the eye"},
    "tail_spot": {"none": None, "spot": "a dark spot at the base of the tail"},
    "cheek": {"none": None, "patch": "a pale patch on the cheek"},
}


@dataclass(frozen=True)
class Species:
    """One invented species: its names, its group and its value of every attribute."""

    class_id: str
    name: str
    superclass: str
    scientific_name: str
    note: str
    attributes: dict[str, str]


def phrases() -> dict[tuple[str, str], str]:
    """(attribute, value) -> phrase, for every value that has one, in the order of the vocabulary."""
    return {
        (attribute, value): phrase
        for attribute, values in VOCABULARY.items()
        for value, phrase in values.items()
        if phrase is not None
    }


def complete(marks: Mapping[str, str], where: str) -> dict[str, str]:
    """`marks` with every absent attribute set to "none", in the order of the vocabulary.

    Raises UserError, naming `where`, on an unknown attribute or value and on an attribute that cannot be absent.
    """
    for attribute in marks:
        if attribute not in VOCABULARY:
            raise UserError(f"{where}: unknown attribute '{attribute}'; known are {', '.join(VOCABULARY)}")
    completed = {attribute: str(marks.get(attribute, "none")) for attribute in VOCABULARY}
    for attribute, value in completed.items():
        if value not in VOCABULARY[attribute]:
            known = ", ".join(VOCABULARY[attribute])
            raise UserError(f"{where}: {attribute} is '{value}'; use one of {known}")
    return completed


def load_species(path: Path = SPECIES_FILE) -> list[Species]:
    """The species of `path`, sorted by class_id. Raises UserError where the table is missing or wrong."""
    try:
        groups = YAML(typ="safe").load(path.read_text(encoding="utf-8"))["groups"]
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the root of the repository") from None
    species = []
    for superclass, group in groups.items():
        for class_id, entry in group["species"].items():
            marks = group["body_plan"] | entry["marks"]
            species.append(
                Species(
                    class_id=class_id,
                    name=entry["name"],
                    superclass=superclass,
                    scientific_name=entry["scientific_name"],
                    note=entry["note"],
                    attributes=complete(marks, f"{path}: {class_id}"),
                )
            )
    return sorted(species, key=lambda one: one.class_id)


def random_attributes(rng: np.random.Generator, exclude: list[Species]) -> dict[str, str]:
    """A combination of field marks, uniform over the values of each attribute, that is none of `exclude`'s."""
    taken = [one.attributes for one in exclude]
    while True:
        drawn = {attribute: list(values)[rng.integers(len(values))] for attribute, values in VOCABULARY.items()}
        if drawn not in taken:
            return drawn
