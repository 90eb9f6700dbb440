"""Which class a guess means."""

import pytest

from fieldmark.concepts.guesses import Guessed
from fieldmark.concepts.siblings import MOST, siblings_of

CLASSES = [
    {"class_id": "tang", "name": "Blue tang", "scientific_name": "Paracanthurus hepatus", "aliases": ["Hippo tang"]},
    {"class_id": "ray", "name": "Caf\u00e9 ray", "scientific_name": None, "aliases": ["tang", "Common one"]},
    {"class_id": "two", "name": "Twin", "scientific_name": None, "aliases": None},
    {"class_id": "three", "name": "twin", "scientific_name": None, "aliases": ["Blue tang", "common  ONE"]},
]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Blue tang", 0), ("  BLUE   Tang ", 0), ("paracanthurus hepatus", 0), ("hippo tang", 0),
        ("Cafe\u0301 ray", 1), ("ray", 1),
        ("tang", 0),  # an id before an alias
        ("three", 3),
        ("Twin", None), ("common one", None),  # of two classes alike
        ("blue", None), ("", None), ("Blue tang.", None),
    ],
)  # fmt: skip
def test_a_guess_means_the_one_class_that_is_called_so(text: str, place: int | None) -> None:
    assert Guessed(CLASSES).place(text) == place


def test_siblings_are_the_others_of_a_superclass() -> None:
    rows = [{"class_id": str(n), "name": f"name {n:02d}", "superclass": "one"} for n in range(MOST + 5)]
    rows += [{"class_id": "alone", "name": "alone", "superclass": "two"}]
    rows += [{"class_id": "a", "name": "a", "superclass": None}, {"class_id": "b", "name": "b", "superclass": None}]
    found = siblings_of(rows)
    assert found.keys() == {str(n) for n in range(MOST + 5)}
    assert found["3"] == [f"name {n:02d}" for n in range(MOST + 1) if n != 3]
