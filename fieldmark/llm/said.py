"""The texts of an answer: every string of its JSON, as it goes into a table."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from fieldmark.store import nfc

# In characters; a model that repeats itself writes no end of them.
LONGEST = 2_000


def tidy(text: str) -> str:
    """A model's text on one line, no longer than LONGEST, each accent on its letter."""
    return nfc(" ".join(text[:LONGEST].split()))


class Said(NamedTuple):
    """A string of an answer. `field` is where it stands: the keys that lead there, with a dot between them; `rank` its
    place among what stands there, from 0."""

    field: str
    rank: int
    text: str


def strings_in(answer: Any) -> Iterator[Said]:
    """Every string of an answer that holds more than spaces, in order, tidied.

    What is no string, or holds none, takes a rank as well: of a list of objects that all have the same keys, what has
    the same rank in two fields belongs together.
    """
    ranks: Counter[str] = Counter()
    for field, value in leaves(answer, ""):
        if isinstance(value, str) and (text := tidy(value)):
            yield Said(field, ranks[field], text)
        ranks[field] += 1


def leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, field)
    else:
        yield field, value
