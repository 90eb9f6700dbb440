"""The journal: nothing that was written whole is ever lost, and nothing torn is ever read."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fieldmark.llm.journal import Entry, Journal, journal_path, read_journal
from tests.fieldmark.llm.workspace import row_with

KEYS = [f"key{number}" for number in range(40)]


def row(key: str, status: str = "ok", response: str = '"é \u2028"') -> dict[str, Any]:
    return row_with(item_key=key, status=status, response_json=response)


def test_every_cut_keeps_the_lines_before_it_and_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(Entry(row("key0"), "http://a"))
        first = path.stat().st_size
        journal.append(Entry(row("key1"), None))
    whole = path.read_bytes()
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        # A line that lacks nothing but its end is whole.
        survivors = {"key0", "key1"} if cut >= len(whole) - 1 else {"key0"}
        assert set(read_journal(path, KEYS)) == survivors
        with Journal(path) as journal:
            journal.append(Entry(row("key2"), None))
        entries = read_journal(path, KEYS)
        assert set(entries) == survivors | {"key2"}
        assert entries["key0"] == Entry(row("key0"), "http://a")


def test_later_lines_count_but_an_answer_outlives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for entry in [row("key0", "refused"), row("key0", "ok", "1"), row("key0", "ok", "2"), row("key0", "invalid")]:
            journal.append(Entry(entry, None))
    assert read_journal(path, KEYS)["key0"].row["response_json"] == "2"
    assert read_journal(path, ["other"]) == {}
    assert read_journal(tmp_path / "none.jsonl", KEYS) == {}


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep/journal.jsonl"
    with Journal(path) as journal:
        entries = [Entry(row(key, response=json.dumps("x" * 5000)), None) for key in KEYS]
        threads = [threading.Thread(target=journal.append, args=(entry,)) for entry in entries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(read_journal(path, KEYS)) == set(KEYS)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FIELDMARK_CACHE", raising=False)
    assert journal_path("stage") == Path(".cache/stage.jsonl")
    monkeypatch.setenv("FIELDMARK_CACHE", "/elsewhere")
    assert journal_path("stage") == Path("/elsewhere/stage.jsonl")
