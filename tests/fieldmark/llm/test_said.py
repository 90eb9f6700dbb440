"""The strings of an answer, by field and rank."""

from typing import Any

import pytest

from fieldmark.llm.said import LONGEST, strings_in, tidy


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"text": "a"}, [("text", 0, "a")]),
        ({"b": ["x", "y"], "a": ["z"]}, [("b", 0, "x"), ("b", 1, "y"), ("a", 0, "z")]),
        # What is no string, or blank, takes its rank all the same.
        ({"a": ["x", 3, " ", None, "y"]}, [("a", 0, "x"), ("a", 4, "y")]),
        (
            {"list": [{"name": "n", "why": None}, {"name": "m", "why": "w"}]},
            [("list.name", 0, "n"), ("list.name", 1, "m"), ("list.why", 1, "w")],
        ),
        ({"a": [["x", "y"], ["z"]], "b": {"c": "d"}}, [("a", 0, "x"), ("a", 1, "y"), ("a", 2, "z"), ("b.c", 0, "d")]),
        (["x"], [("", 0, "x")]),
        ({"n": 1, "empty": []}, []),
    ],
)  # fmt: skip
def test_every_string_by_its_field_and_rank(answer: Any, said: list[tuple[str, int, str]]) -> None:
    assert sorted(strings_in(answer)) == sorted(said)


def test_texts_are_on_one_line_whole_letters_and_not_without_end() -> None:
    assert tidy("  a\n\tb  ") == "a b"
    assert tidy("e\u0301") == "\u00e9"
    assert len(tidy("x" * 10 * LONGEST)) == LONGEST
