"""Cleaning: every text is a row, and each that is dropped says why."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark import store
from fieldmark.concepts.cleaning import (
    clean_class,
    clean_generic,
    normalise,
    split_text,
    where_it_loops,
    wording,
)
from fieldmark.concepts.names import domain_words
from fieldmark.concepts.visibility import forms
from fieldmark.params import Clean, Domain
from tests.fieldmark.llm.workspace import Row
from tests.project import ROOT

CUB = ROOT.parent / "shared/data/cub100"
BIRD = Domain(noun="bird", group="birds", attributes=["bill", "tail"])
CLASS: Row = {"class_id": "k", "name": "White-breasted Kingfisher", "scientific_name": "Halcyon smyrnensis"}


def answer(*texts: str, kind: str = "visual", key: str = "key", **changes: Any) -> Row:
    concepts = [{"text": text, "kind": kind, "part": None} for text in texts]
    row = {"item_key": key, "subject_id": "k", "sample": 0, "prompt_sha": "s", "status": "ok", "attempts": 1}
    more = {"model_requested": "m", "source": "live", "created_at": "2026-11-21T00:00:00Z"}
    return row | more | {"response_json": json.dumps({"concepts": concepts})} | changes


def clean(*answers: Row, **values: Any) -> list[Row]:
    return clean_class(CLASS, list(answers), BIRD, Clean(**values))


def reasons(*texts: str, **values: Any) -> list[str | None]:
    return [row["drop_reason"] for row in clean(answer(*texts), **values) if row["kind"] != "name"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a bird with a red bill, typical of the White-breasted Kingfisher", "a bird with a red bill"),
        ("a bird with a long, red bill, which tells kingfishers apart, too", "a bird with a long, red bill"),
        ("a bird with a red bill, a white breast", "a bird with a red bill, a white breast"),
        ("Kingfisher, a bird with a red bill", None),
        ("a kingfisher with a red bill, a white breast", None),
    ],
)
def test_a_remark_that_names_the_class_is_cut_off(text: str, kept: str | None) -> None:
    [row] = [row for row in clean(answer(text)) if row["kind"] != "name"]
    assert (row["text"] if row["kept"] else None) == kept
    assert row["concept_id"] == store.sha256(row["text"])
    assert row["drop_reason"] == (None if kept else "class_name")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a bird with a white breast", None),
        ("a bird with a breast as white as its throat", None),
        ("a bird with a long red bill", None),
        ("a bird with spots distributed across the wings", None),
        ("a bird with a colour that ranges from buff to black", None),
        ("a bird with 3 bars on each wing", None),
        ("a bird with a so-called eye ring", None),
        ("a bird with a crest as in kingfishers", "class_name"),
        ("a Halcyon with a red bill", "class_name"),
        ("a White breasted   kingfisher", "class_name"),
        ("a bird with a loud call", "sound"),
        ("a bird with a bill for eating fish", "diet"),
        ("a bird with a home found in South America", "range"),
        ("a bird native to Asia", "range"),
        ("a bird with a body of 25-30 inches", "size"),
        ("a bird with a wingspan of 1.5 m", "size"),
        ("a bird with a 3-cm bill", "size"),
        ("a bird with a weight like an egg's", "size"),
        ("a bird with an endangered status", "population"),
        ("a bird with a habit of diving", "behaviour"),
        ("a bird often seen with others", "behaviour"),
        ("a bird with a bill longer than other birds have", "comparison"),
        ("a bird with a charm of its own", "nothing_visible"),
        ("a bird with a", "fragment"),
        ("crest", "fragment"),
        ("...", "empty"),
        ("", "empty"),
        ("a bird with " + "very " * 30 + "long legs", "too_long"),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    assert reasons(text) == [reason]


def test_what_is_seen_need_not_be_judged() -> None:
    texts = ["a bird with a charm of its own", "a bird with a loud call", "a kingfisher", "a bird with a", "a bird"]
    assert reasons(*texts) == ["nothing_visible", "sound", "class_name", "fragment", "nothing_visible"]
    assert reasons(*texts, visibility="off") == [None, None, "class_name", "fragment", None]
    [row] = clean(answer("a bird on a river bank", kind="habitat"), visibility="off")[1:]
    assert row["drop_reason"] == "habitat"  # the model says so


def test_habitat_is_kept_apart() -> None:
    [row] = [row for row in clean(answer("a bird on a river bank", kind="habitat")) if row["kind"] != "name"]
    assert (row["kind"], row["kept"], row["drop_reason"]) == ("habitat", False, "habitat")


def test_generic_texts_name_no_class() -> None:
    texts = [
        "a bird with a hooked bill",
        "a bird with hooked bills",
        "a bird with the bill of a tern",
        "a bird in a tree",
    ]
    answers = [answer(*texts, "a bird with a black Halcyon's bill"), answer("a bird on a river bank", kind="habitat")]
    rows = clean_generic(answers, [CLASS, CLASS | {"name": "Least Tern", "scientific_name": None}], BIRD, Clean())
    assert [(row["rank"], row["kind"], row["drop_reason"]) for row in rows] == [
        (0, "generic", None),
        (1, "generic", "duplicate"),
        (2, "generic", "class_name"),
        (3, "generic", "habitat"),
        (4, "generic", "class_name"),
        (5, "habitat", "habitat"),
    ]
    assert {row["class_id"] for row in rows} == {None}


def test_a_further_answer_of_a_class_is_merged() -> None:
    [first, again, more] = clean(
        answer("a bird with a red bill", key="own"),
        answer("a bird with red bills", "a bird with a redder bill than terns", key="contrast"),
    )[1:]
    assert [row["drop_reason"] for row in (first, again, more)] == [None, "duplicate", "comparison"]
    assert [row["item_key"] for row in (first, again, more)] == ["own", "contrast", "contrast"]


def test_duplicates_are_the_same_words() -> None:
    texts = [
        "a bird with a forked tail",
        "A bird with forked tails.",
        "a bird with a tail that is forked",
        "a bird with a red tail and a white head",
        "a bird with a white head and a red tail",
        "a bird with a white tail and a red head",
    ]
    assert reasons(*texts) == [None, "duplicate", "duplicate", None, "duplicate", None]


def test_what_was_dropped_makes_no_duplicates() -> None:
    assert reasons("a bird with a tail heard singing", "a bird with a tail heard singing") == ["sound", "sound"]


def test_rows_keep_the_order_of_the_answers() -> None:
    two = answer("a bird with a crest; a bird with a red bill", key="one")
    rows = clean(two, answer("a bird with a tail", key="two"))
    text = "a photo of a White-breasted Kingfisher, a type of bird."
    assert rows[0] == {
        "concept_id": store.sha256(text),
        "text": text,
        "class_id": "k",
        "kind": "name",
        "part": None,
        "rank": 0,
        "kept": True,
        "drop_reason": None,
        "item_key": None,
    }
    assert [(row["rank"], row["text"], row["item_key"]) for row in rows[1:]] == [
        (0, "a bird with a crest", "one"),
        (1, "a bird with a red bill", "one"),
        (2, "a bird with a tail", "two"),
    ]


def test_every_template_is_a_row() -> None:
    rows = clean(name_templates=["{name}", "a {noun}: {name}"])
    assert [(row["text"], row["rank"]) for row in rows] == [
        ("White-breasted Kingfisher", 0),
        ("a bird: White-breasted Kingfisher", 1),
    ]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("  A bird with\ta crest. ", ["a bird with a crest"]),
        ("1. A bird with a crest\n2) a bird with a tail", ["a bird with a crest", "a bird with a tail"]),
        ("- \u201cA bird with a crest.\u201d", ["a bird with a crest"]),
        ("A bird with a crest. A bird with a tail!", ["a bird with a crest", "a bird with a tail"]),
        ("a bird with approx. two bars", ["a bird with approx. two bars"]),
        ("An aircraft with a T-tail", ["an aircraft with a T-tail"]),
        ("UV-like sheen", ["UV-like sheen"]),
        ("Red bill", ["red bill"]),
        (" \n ; ", [""]),
    ],
)
def test_splitting(text: str, pieces: list[str]) -> None:
    assert split_text(text) == pieces


@given(st.text(max_size=80))
def test_normal_texts_stay_as_they_are(text: str) -> None:
    pieces = split_text(text)
    assert pieces
    for piece in pieces:
        assert "\n" not in piece
        assert not piece.endswith((".", " "))
        assert normalise(piece) == piece


@given(st.lists(st.text(max_size=40), max_size=8), st.integers(1, 30))
def test_no_text_vanishes(texts: list[str], most: int) -> None:
    rows = [row for row in clean(answer(*texts), max_words=most) if row["kind"] != "name"]
    assert len(rows) >= len(texts)
    assert [row["rank"] for row in rows] == list(range(len(rows)))
    assert all(row["kept"] == (row["drop_reason"] is None) for row in rows)
    kept = [wording(row["text"], domain_words("bird")) for row in rows if row["kept"]]
    assert len(set(kept)) == len(kept)
    store.make_table("concepts/1", rows)


def test_no_more_are_kept_than_were_asked_for() -> None:
    texts = [f"a bird with a tail of {number} white bars" for number in range(200)]
    rows = clean_class(CLASS, [answer(*texts)], BIRD, Clean(), 10)[1:]
    assert [row["drop_reason"] for row in rows] == [None] * 10 + ["surplus"] * 90
    one = "\n".join(texts)
    rows = clean_class(CLASS, [answer(one)], BIRD, Clean(), 10)[1:]
    assert [row["drop_reason"] for row in rows] == [None] * 10 + ["surplus"] * 90
    # One's own texts are as many as they are, and where nobody says what was asked, all count.
    for answers, asked in ((answer(*texts, source="import"), 10), (answer(*texts), None)):
        assert all(row["kept"] for row in clean_class(CLASS, [answers], BIRD, Clean(), asked))
    assert sum(row["kept"] for row in clean_generic([answer(*texts)], [CLASS], BIRD, Clean(), 30)) == 30


@pytest.mark.parametrize("text", ["x", "x ", "x,", "x-", "a bird with a red bill\n", "ing", "white", "(", "A. "])
def test_a_text_without_end_is_cut_and_dropped_in_no_time(text: str) -> None:
    begin = time.monotonic()
    rows = clean_class(CLASS, [answer(text * (10**6 // len(text)))], BIRD, Clean(), 10)[1:]
    assert time.monotonic() - begin < 5
    assert all(len(row["text"]) <= 2_000 for row in rows)
    assert sum(row["kept"] for row in rows) <= 1


def test_a_word_of_many_letters_counts_as_several() -> None:
    assert reasons("a bird with a " + "z" * 3_000, "a bird with a " + "z" * 900, "a bird with a red bill") == [
        "too_long",
        "too_long",
        None,
    ]
    begin = time.monotonic()
    assert len(forms("white" + "x" * 3_000_000)) == 1
    assert time.monotonic() - begin < 2


def test_an_answer_that_loops_is_cut() -> None:
    said = ["a bird with a hooked yellow bill", "a bird with pale pink legs", "a bird with barred grey flanks"] * 3
    parts = ("crown", "nape", "throat", "breast", "belly", "flank", "rump", "tail", "wing", "cheek")
    opening = [f"a bird with a {colour} {part}" for colour in ("ochre",) for part in parts]
    loop = [f"a bird with a {colour} {part}" for colour in ("black", "white") for part in parts] * 4
    rows = [row for row in clean(answer(*opening, *loop)) if row["kind"] != "name"]
    assert len(rows) == 90
    assert [row["drop_reason"] for row in rows] == [None] * 10 + ["loop"] * 80
    # Said three times, or over and over in other words, it is no loop.
    assert {row["drop_reason"] for row in clean(answer(*said))} == {None, "duplicate"}
    assert "loop" not in {row["drop_reason"] for row in clean(answer(*opening, *loop[:20]))}


@pytest.mark.skipif(not CUB.is_dir(), reason="needs ../shared/data/cub100, which is not here")
def test_the_one_real_answer_that_loops_is_found() -> None:
    for source, looping in (("deepseek", {"192.Downy_Woodpecker": 30}), ("gpt3", {}), ("gpt4", {})):
        texts = json.loads((CUB / f"concepts_{source}.json").read_text())
        cut = {folder: where_it_loops(own) for folder, own in texts.items()}
        assert {folder: place for folder, place in cut.items() if place < len(texts[folder])} == looping
