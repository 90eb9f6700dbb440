"""What people read of an answer: reasons, sets and columns that line up."""

import io
import json
from typing import Any

import pytest

from tools.prediction.output import JsonLines, Text, empty_row, nothing_moves
from tools.prediction.page import render

Row = dict[str, Any]
NAMES = {"a": "Angel", "b": "Butterfly", "c": "Cardinal"}
TOP = [{"class_id": class_id, "name": NAMES[class_id], "p": p} for class_id, p in (("a", 0.7), ("b", 0.2), ("c", 0.1))]
PATCH = {"x0": 0.5, "y0": 0.25, "x1": 1.0, "y1": 0.75, "gain": 1.5}


def answer(**known: Any) -> Row:
    return empty_row() | TOP[0] | {"path": "a.png", "top": TOP} | known


def text_of(*rows: Row) -> str:
    sink = io.StringIO()
    Text(sink, NAMES).write(rows)
    return sink.getvalue()


def page_of(*rows: Row) -> str:
    said = {"run": "r", "said": "", "pictures": len(rows), "thumbs": {}, "names": NAMES, "splits": {}}
    return render({**said, "answers": [row | {"webp": None} for row in rows]})


def concept(text: str, class_ids: list[str], gain: float = 0.5) -> Row:
    return {"text": text, "class_ids": class_ids, "gain": gain}


@pytest.mark.parametrize(
    ("patches", "concepts", "said"),
    [
        ([], None, "no patch moves this decision towards Angel; it rests on the whole picture"),
        ([], [], "no patch and no text moves this decision towards Angel; it rests on the whole picture"),
        ([], [concept("fins", ["a"])], "no patch moves this decision towards Angel"),
        ([], [concept("fins", [], 0.01)], "no patch moves this decision towards Angel; it rests on the whole picture"),
        ([PATCH], [], "no text moves this decision towards Angel"),
    ],
)
def test_no_reason_is_said_in_words(patches: list[Row], concepts: list[Row] | None, said: str) -> None:
    row = answer(patches=patches, concepts=concepts)
    assert f"  {said}\n" in text_of(row)
    assert f">{said}.</p>" in page_of(row)
    sink = io.StringIO()
    JsonLines(sink).write([row])
    assert json.loads(sink.getvalue())["patches"] == patches


def test_nothing_is_said_where_nobody_asked_why_or_all_is_said() -> None:
    assert nothing_moves(answer()) == nothing_moves(answer(patches=[PATCH], concepts=[concept("fins", ["a"])])) == ""


def test_a_text_of_another_class_says_whose_it_is() -> None:
    own, shared = concept("yellow fins", ["b"]), concept("long tails", ["c", "a"])
    other, many = concept("a red crest", ["c"]), concept("bars", ["c", "<d>", "e", "f"], -0.2)
    row = answer(patches=[], concepts=[own, shared, other, many, concept("prototype of Cardinal", ["c"])])
    text, page = text_of(row), page_of(row)
    assert "  +0.50  a red crest (written for Cardinal)\n" in text
    assert "  -0.20  bars (written for Cardinal, <d>, e and 1 more)\n" in text
    assert "<span>a red crest (written for Cardinal)</span>" in page
    assert "(written for Cardinal, &lt;d&gt;, e and 1 more)" in page
    assert text.count("written for") == page.count("written for") == 2
