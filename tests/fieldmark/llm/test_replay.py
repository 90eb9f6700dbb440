"""Recordings: what they answer, and how each thing wrong with them is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.llm.answers import Item, item_key
from fieldmark.llm.prompts import Prompt
from fieldmark.llm.replay import replay
from fieldmark.params import Llm
from fieldmark.store import make_table

SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}
PROMPT = Prompt("prompts/concepts.md", "0" * 64, "a test", (), SCHEMA, ())
ITEMS = [Item(subject, sample, [{"role": "user", "content": subject}]) for subject in ("a", "b") for sample in (0, 1)]


def record(subject: str, sample: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": "concepts",
        "prompt_sha": PROMPT.sha,
        "class_id": subject,
        "sample": sample,
        "model": "authored",
        "created_at": "2026-11-21T00:00:00Z",
        "response": {"x": f"{subject}{sample}"},
        **changes,
    }


def play(folder: Path, records: list[Any]) -> list[dict[str, Any]]:
    (folder / "concepts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return replay(ITEMS, "class_id", PROMPT, Llm(model="gpt-x", recordings=str(folder)))


def test_rows_are_marked_as_replayed(tmp_path: Path) -> None:
    rows = play(tmp_path, [record(item.subject_id, item.sample) for item in reversed(ITEMS)] + [record("other", 0)])
    assert [row["response_json"] for row in rows] == ['{"x":"a0"}', '{"x":"a1"}', '{"x":"b0"}', '{"x":"b1"}']
    assert rows[0] == {
        "item_key": item_key(ITEMS[0], PROMPT, Llm(model="gpt-x")),
        "subject_id": "a",
        "sample": 0,
        "prompt_sha": PROMPT.sha,
        "status": "ok",
        "response_json": '{"x":"a0"}',
        "model_requested": "gpt-x",
        "model_reported": "authored",
        "response_id": None,
        "finish_reason": None,
        "input_tokens": 0,
        "output_tokens": 0,
        "cost_usd": None,
        "attempts": 0,
        "source": "replay",
        "created_at": "2026-11-21T00:00:00Z",
    }
    make_table("llm.answers/1", rows)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [record("a", 0, prompt_sha="1" * 64)],
            "prompts/concepts.md: was edited since its answers were recorded in .*"
            "undo the edit, or set llm.mode: live and llm.model in params.yaml and export OPENAI_API_KEY",
        ),
        ([record("a", 0), record("a", 1)], "has no recording of b; set llm.mode: live"),
        ([record("a", 0, response={"x": 1})], "line 1: response: answer.x is not of type string"),
        ([record("a", 0), {"class_id": "b"}], "line 2 is not a recording .KeyError"),
        ([record("a", 0), 3], "line 2 is not a recording .TypeError"),
    ],
)
def test_what_is_wrong_with_a_recording_is_one_line(tmp_path: Path, records: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        play(tmp_path, records)
    assert "\n" not in str(caught.value)


def test_no_recordings_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no recordings of prompts/concepts\.md"):
        replay(ITEMS, "class_id", PROMPT, Llm(model="gpt-x", recordings=str(tmp_path)))
