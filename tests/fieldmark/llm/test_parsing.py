"""The answer in a completion: found wherever servers put it, and never made of drafts or of what was cut short."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.llm.parsing import NoAnswer, find_answer

SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}
GOOD = '{"x": "é"}'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, {"x": "é"}),
        (f"  \n{GOOD}\n", {"x": "é"}),
        (f"Here it is:\n```json\n{GOOD}\n```\nHope that helps {{you}} [1].", {"x": "é"}),
        (f"```\n{GOOD}```", {"x": "é"}),
        (f"no opening tag</think>{GOOD}", {"x": "é"}),
        (f"<think>{{</think><think>twice</think>{GOOD}", {"x": "é"}),
        (f'The form {{"x": ...}} and [{{a}}], so {GOOD}', {"x": "é"}),
        (f'Not {{"y": 1}}, but {GOOD}, of the set {{1, 2}}', {"x": "é"}),
        (f'First {{"x": "a draft"}}, then {GOOD}.', {"x": "é"}),
        ('{"x": "</think> and <think>"}', {"x": "</think> and <think>"}),
        ('So: {"x": "a {brace} and \\"quote\\""} {', {"x": 'a {brace} and "quote"'}),
        ('\ufeff{"x": "é"}', {"x": "é"}),
    ],
)
def test_the_value_that_fits_is_found(text: str, value: Any) -> None:
    assert find_answer(text, SCHEMA) == value


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "the answer is empty"),
        ("no JSON", "not JSON"),
        (f"<think>never closed {GOOD}", "not JSON"),
        ('[{"x": "one"}, {"x": "two"}]', "answer is not of type object"),
        ('So: [{"x": "one"}, {"x": "two"}]', "answer is not of type object"),
        ('{"wrapped": {"x": "one"}}', "answer lacks x"),
        ('See [1]: {"y": "the longest value is meant"}, as in [2].', "answer lacks x"),
        ('Cut: {"a": [{"x": "inner"}, ', "not JSON"),
        ('Cut: {"a": {"x": "inner"}, "b": tr', "not JSON"),
        ('Cut: {"a": {"x": "inner"}, "b": "in a str', "not JSON"),
        ('{"x": 1}', "answer.x is not of type string"),
        ('{"x": "a", "y": 1e999}', "not JSON"),
        ('{"x": "a", "y": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"x":' * 5000, "not JSON"),
    ],
)
def test_what_does_not_fit_is_said(text: str, wrong: str) -> None:
    with pytest.raises(NoAnswer, match=wrong):
        find_answer(text, SCHEMA)


PROSE = st.text(st.characters(exclude_characters="{[<", exclude_categories=["Cs"]), max_size=20)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.integers()), PROSE, PROSE)
def test_prose_without_brackets_hides_nothing(x: str, y: list[int], before: str, after: str) -> None:
    value = {"x": x, "y": y}
    assert find_answer(f"{before} {json.dumps(value)} {after}", SCHEMA) == value


@given(st.text(st.sampled_from('{}[]":,x1\\ </think>'), max_size=60))
def test_whatever_comes_either_fits_or_is_refused(text: str) -> None:
    try:
        value = find_answer(text, SCHEMA)
    except NoAnswer:
        return
    assert isinstance(value["x"], str)
