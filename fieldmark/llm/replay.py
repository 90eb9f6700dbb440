"""Answers from recordings in the repository: no network, no key, no journal.

`llm.recordings`/PROMPT.jsonl holds one JSON object a line: prompt, prompt_sha, class_id or image_id, sample, model,
created_at, response. A recording answers one version of the prompt, known by its sha256. The class_id of texts that are
of no class is "*".
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fieldmark.command import UserError, name_some
from fieldmark.llm.answers import Item, Row, item_key
from fieldmark.llm.prompts import Prompt, problem
from fieldmark.params import Llm
from fieldmark.store import canonical_json


def replay(items: Sequence[Item], subject: str, prompt: Prompt, llm: Llm) -> list[Row]:
    """One row an item. `subject` is the key that holds its subject_id. Raises UserError where a recording is missing,
    does not fit the prompt's schema, or answers another version of the prompt."""
    path = Path(llm.recordings, f"{prompt.name}.jsonl")
    recordings = read_recordings(path, subject, prompt, llm)
    unrecorded = [item.subject_id for item in items if (item.subject_id, item.sample) not in recordings]
    missing = list(dict.fromkeys(unrecorded))
    if missing:
        raise UserError(f"{path}: has no recording of {name_some(missing)}; {how_to_go_live(llm)}, or record it there")
    return [row_of(item, recordings[item.subject_id, item.sample], prompt, llm) for item in items]


def read_recordings(path: Path, subject: str, prompt: Prompt, llm: Llm) -> dict[tuple[str, int], dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: there are no recordings of {prompt.path} to replay; {how_to_go_live(llm)}") from None
    recordings = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            key = (record[subject], record["sample"])
            sha, response = record["prompt_sha"], record["response"]
            _ = record["model"], record["created_at"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not a recording ({type(error).__name__}: {error})") from None
        if sha != prompt.sha:
            raise UserError(
                f"{prompt.path}: was edited since its answers were recorded in {path}; undo the edit, or"
                f" {how_to_go_live(llm)}"
            )
        wrong = problem(response, prompt.schema)
        if wrong:
            raise UserError(f"{path}: line {number}: response: {wrong}; the schema stands in {prompt.path}")
        recordings[key] = record
    return recordings


def row_of(item: Item, record: dict[str, Any], prompt: Prompt, llm: Llm) -> Row:
    return {
        "item_key": item_key(item, prompt, llm),
        "subject_id": item.subject_id,
        "sample": item.sample,
        "prompt_sha": prompt.sha,
        "status": "ok",
        "response_json": canonical_json(record["response"]),
        "model_requested": llm.model,
        "model_reported": record["model"],
        "response_id": None,
        "finish_reason": None,
        "input_tokens": 0,
        "output_tokens": 0,
        "cost_usd": None,
        "attempts": 0,
        "source": "replay",
        "created_at": record["created_at"],
    }


def how_to_go_live(llm: Llm) -> str:
    return f"set llm.mode: live and llm.model in params.yaml and export {llm.api_key_env} to ask a model"
