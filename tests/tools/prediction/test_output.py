"""What people read of an answer: reasons, sets and columns that line up."""

import io
import json
from typing import Any

import pytest

from tools.prediction.output import JsonLines, Table, Text, empty_row, limits_of, nothing_moves
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
    return render({**said, "answers": [row | {"webp": None, "limits": limits_of(row, NAMES)} for row in rows]})


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


def test_what_is_promised_of_sets_and_sure_answers_is_printed() -> None:
    """Of a class beyond the most probable ones, the name too."""
    for found in (["a"], ["a", "c"]):
        said = f"90.0 % set: {', '.join(NAMES[each] for each in found)}"
        row = answer(set=found, sure_rank=0, sure_name="Angel", sure_p=0.97) | {"top": TOP[:1]}
        assert f"  {said}\n  sure enough: Angel (97.0 %)\n" in text_of(row)
        assert f">{said}</p>\n<p class=\"soft\">sure enough: Angel (97.0 %)</p>" in page_of(row)
    assert "set" not in text_of(answer())


def test_what_four_numbers_say_of_a_patch_is_said() -> None:
    text = text_of(answer(patches=[PATCH, PATCH]))
    assert "in logits (a patch is x0 y0 x1 y1 of the picture's width and height):" in text
    assert text.count("  +1.50  patch 0.50 0.25 1.00 0.75\n") == 2
    assert "a patch is" not in text_of(answer(patches=[], concepts=[concept("fins", ["a"])]))


def test_columns_of_a_table_line_up() -> None:
    sink = io.StringIO()
    rows = [answer(), answer(none_of_these=True), empty_row() | {"path": "b.txt", "error": "is none of JPEG, PNG"}]
    Table(sink, NAMES).write(rows)
    header, *lines = sink.getvalue().splitlines()
    last = header.index("picture")
    assert [line[last:] for line in lines] == ["a.png", "a.png", "b.txt: is none of JPEG, PNG"]
    assert [line[header.index("none?") :].split()[0] for line in lines[:2]] == ["a.png", "maybe"]
