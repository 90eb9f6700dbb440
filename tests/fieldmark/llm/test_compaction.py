"""Compaction takes lines out and changes nothing of what is read, whoever asks, reads or is killed meanwhile."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm import compaction
from fieldmark.llm import held as held_answers
from fieldmark.llm.batch import read_uploads, record_path
from fieldmark.llm.compaction import compact
from fieldmark.llm.held import SCHEMA, Held
from fieldmark.llm.journal import Entry, Journal, journal_path, read_journal
from fieldmark.llm.turn import Spent, Turn
from fieldmark.store import canonical_json
from tests.fieldmark.llm.workspace import row_with

STAGE = "test_stage"
# By key the statuses that came, one after the other, and which of them counts.
CAME = {
    "mended": ["invalid", "truncated", "ok", "invalid"],
    "twice": ["ok", "ok"],
    "bad": ["refused", "invalid"],
    "once": ["ok"],
}


@pytest.fixture(autouse=True)
def journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path))
    with Journal(journal_path(STAGE)) as lines:
        for turn in range(4):
            for key, statuses in CAME.items():
                if turn < len(statuses):
                    values = {"item_key": key, "status": statuses[turn], "response_json": f'"{key} {turn}"'}
                    lines.append(Entry(row_with(**values), "http://x", 0.5))
    return journal_path(STAGE)


def answers(path: Path) -> dict[str, Entry]:
    return read_journal(path, CAME)


def test_what_is_read_stays_and_the_rest_goes(journal: Path) -> None:
    before, content = answers(journal), journal.read_bytes()
    journal.write_bytes(content + b"no entry\n" + b"x" * 33 * 2**20 + b"\n" + content[-60:-1])
    [done] = compact(STAGE)
    assert answers(journal) == before
    assert [entry.row["response_json"] for entry in before.values()] == [
        '"mended 2"', '"twice 1"', '"bad 1"', '"once 0"',
    ]  # fmt: skip
    # What somebody may mend stays, whole; a line that a kill tore is no line.
    assert done.lines == (11, 6)
    assert [len(line) for line in journal.read_bytes().splitlines()].count(33 * 2**20) == 1
    assert b"no entry\n" in journal.read_bytes()
    again = journal.read_bytes()
    compact(STAGE)
    assert journal.read_bytes() == again


def test_a_last_line_that_lacks_only_its_end_is_kept(journal: Path) -> None:
    """Readers count it, so that it displaces an earlier answer; so does the upload that is noted last."""
    with Journal(journal) as lines:
        lines.append(Entry(row_with(item_key="once", response_json='"once 1"'), "http://x", 0.5))
    journal.write_bytes(journal.read_bytes()[:-1])
    asked = [["key", "subject", 0, None, []]]
    upload = {"base_url": "http://x", "file_id": "f", "prompt_sha": "0", "asked": asked}
    record_path(STAGE).write_text(canonical_json(upload))
    before, uploads = answers(journal), read_uploads(STAGE, {"key"})
    assert before["once"].row["response_json"] == '"once 1"'
    assert len(uploads) == 1
    compact(STAGE)
    assert answers(journal) == before
    assert read_uploads(STAGE, {"key"}) == uploads


def test_the_new_file_has_the_mode_of_the_old_and_partial_ones_go(journal: Path) -> None:
    journal.chmod(0o660)
    left = [path.with_name(f".{path.name}.123.partial") for path in (journal, record_path(STAGE))]
    record_path(STAGE).touch()
    for path in left:
        path.write_text("{")
    compact(STAGE)
    assert journal.stat().st_mode & 0o777 == 0o660
    assert not any(path.exists() for path in left)


def test_one_that_ends_early_leaves_no_byte_of_an_earlier_session(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any) -> Any:
        raise KeyboardInterrupt

    journal.with_suffix(".asking").write_text("0")
    monkeypatch.setattr(compaction, "counted_entries", stops)
    with pytest.raises(KeyboardInterrupt):
        compact(STAGE)
    assert int(journal.with_suffix(".asking").read_bytes()) == journal.stat().st_size


def test_nobody_who_asks_or_counts_is_passed_by(journal: Path) -> None:
    before = journal.read_bytes()
    with Turn(STAGE), pytest.raises(UserError, match="a process asks and keeps its answers there"):
        compact(STAGE)
    assert journal.read_bytes() == before
    compact(STAGE)
    # Limits count from the new end: what is journalled next, and no old line.
    with Turn(STAGE) as turn:
        assert turn.spent() == Spent(0, 0.0)
        with Journal(journal) as lines:
            lines.append(Entry(row_with(item_key="new"), "http://x", 0.25))
        assert turn.spent() == Spent(1, 0.25)
    with pytest.raises(UserError, match="there is no journal of that stage"):
        compact("another")


def test_who_comes_while_it_runs_counts_from_the_new_end(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Turn that waits for the compaction reads the byte that it left."""
    rewrite = compaction.rewrite

    def and_look(*arguments: Any) -> Any:
        done = rewrite(*arguments)
        told = int(journal.with_suffix(".asking").read_bytes())
        assert told == journal.stat().st_size
        return done

    monkeypatch.setattr(compaction, "rewrite", and_look)
    compact(STAGE)


def test_places_in_an_old_journal_are_read_after_it_was_compacted(journal: Path, tmp_path: Path) -> None:
    output = tmp_path / "none.parquet"
    places = {key: place for place, key in enumerate(CAME)}
    bad: dict[Path, list[str]] = {output: [], journal: []}
    held = Held(places, output, journal, lambda row: bool(row["status"] == "ok"), bad)
    compact(STAGE)
    assert {key: row["response_json"] for key, row in held.items()} == {
        "mended": '"mended 2"', "twice": '"twice 1"', "once": '"once 0"',
    }  # fmt: skip
    assert held.base_urls == {"http://x"}


def test_an_output_that_is_renamed_into_place_meanwhile_changes_nothing(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.parquet"

    def write(keys: str) -> None:
        rows = [row_with(item_key=key, subject_id=key, response_json=f'"{key}"') for key in keys]
        store.write_table(store.make_table(SCHEMA, rows), output, SCHEMA, {}, "mark")

    def written_anew(*arguments: Any) -> Any:
        write("abcd")
        return read_rows(*arguments)

    write("bcd")
    read_rows = held_answers.read_rows
    monkeypatch.setattr(held_answers, "read_rows", written_anew)
    held = Held({"b": 0, "c": 1}, output, journal, lambda row: True, {output: [], journal: []})
    assert {key: row["item_key"] for key, row in held.items()} == {"b": "b", "c": "c"}


def test_a_journal_that_is_edited_in_place_meanwhile_is_said(journal: Path, tmp_path: Path) -> None:
    output = tmp_path / "none.parquet"
    held = Held({"once": 0}, output, journal, lambda row: True, {output: [], journal: []})
    journal.write_bytes(b"\n" + journal.read_bytes())
    with pytest.raises(UserError, match=r"test_stage\.jsonl: was changed in place while it was read; run again"):
        held["once"]


def test_batches_that_ended_go_and_open_ones_stay(journal: Path) -> None:
    def line(name: str, **content: Any) -> str:
        return canonical_json({"base_url": "http://x", "file_id": name, **content}) + "\n"

    asked = [["key", "subject", 0, None, []]]
    for name in ("done", "open"):
        with record_path(STAGE).open("a") as file:
            file.write(line(name, prompt_sha="0", asked=asked) + line(name, batch_id=f"batch of {name}"))
    with record_path(STAGE).open("a") as file:
        file.write(line("done", ended="completed") + "no record\n")
    before = read_uploads(STAGE, {"key"})
    compact(STAGE)
    assert read_uploads(STAGE, {"key"}) == before
    assert [upload.batch_id for upload in before] == ["batch of open"]
    said = record_path(STAGE).read_text()
    assert (said.count('"done"'), said.count("no record"), said.count("\n")) == (0, 1, 3)


def compact_until(moment: int) -> None:
    """Compact, and die before the given step that writes."""
    count = 0

    def dying(do: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments)

        return step

    for name in ("write", "replace", "fsync", "ftruncate"):
        setattr(os, name, dying(getattr(os, name)))
    compact(STAGE)


def test_killed_at_any_step_it_leaves_all_answers_and_no_lock(journal: Path) -> None:
    before = answers(journal)
    for moment in range(1, 9):
        process = multiprocessing.get_context("fork").Process(target=compact_until, args=(moment,))
        process.start()
        process.join()
        assert answers(journal) == before
        with Turn(STAGE) as turn:
            # Nothing that was asked before counts as free: too much may count, never less than what is asked now.
            with Journal(journal) as lines:
                lines.append(Entry(row_with(item_key="new"), "http://x", 0.25))
            assert turn.spent().usd >= 0.25
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert moment > 2
