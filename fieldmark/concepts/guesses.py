"""Guesses of a class: which class a text means that a model wrote where it was asked for one."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fieldmark.store import nfc


class Guessed:
    """Finds classes by what they are called: class_id before name, name before scientific name, that before `aliases`.

    Texts are compared after NFC, without regard to case or to spaces around words. What several classes are called
    alike means none of them.
    """

    def __init__(self, classes: Sequence[Mapping[str, Any]]) -> None:
        """`classes`: rows of index.classes, in the order in which places count."""
        self.places: dict[str, int | None] = {}
        for called in (lambda row: [row["class_id"]], lambda row: [row["name"]], scientific, aliases):
            level = defaultdict[str, set[int]](set)
            for place, row in enumerate(classes):
                for text in called(row):
                    level[spelled(text)].add(place)
            for key, places in level.items():
                self.places.setdefault(key, places.pop() if len(places) == 1 else None)

    def place(self, text: str) -> int | None:
        """The place, from 0, of the class that a text means; None where it means none, or no one in particular."""
        return self.places.get(spelled(text))


def scientific(row: Mapping[str, Any]) -> list[str]:
    return list(filter(None, [row.get("scientific_name")]))


def aliases(row: Mapping[str, Any]) -> list[str]:
    return list(row.get("aliases") or [])


def spelled(text: str) -> str:
    return " ".join(nfc(text).casefold().split())
