"""The journal: nothing that was written whole is ever lost, and nothing torn is ever read."""

import contextlib
import json
import os
import re
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.llm.journal import Entry, Journal, journal_path, read_journal, warn_of_bad
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
    for cut in (*range(first, len(whole) - 8, 7), *range(len(whole) - 8, len(whole) + 1)):
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


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / ".dvc/tmp/exps/tmpabc"
    place.mkdir(parents=True)
    monkeypatch.setenv("FIELDMARK_CACHE", "")
    monkeypatch.chdir(tmp_path)
    assert journal_path("stage") == Path(".cache/stage.jsonl")
    monkeypatch.chdir(place)
    assert journal_path("stage") == tmp_path / ".cache/stage.jsonl"
    monkeypatch.setenv("FIELDMARK_CACHE", "relative")
    assert journal_path("stage") == tmp_path / "relative/stage.jsonl"


BAD = [
    (b"[" * 200_000, "not JSON"),
    (b"not JSON", "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    (b"9" * 10_000, "not JSON"),
    (b"1", "no JSON object"),
    (b"{}", "no row"),
    (b'{"base_url": 7, "row": {}}', "base_url is no text"),
    (b'{"row": [1]}', "no row"),
]
WRONG: list[tuple[str, Any]] = [
    ("item_key", None), ("item_key", ["a"]), ("status", None), ("status", "fine"), ("status", []), ("attempts", "two"),
    ("attempts", 1e400), ("attempts", True), ("sample", 2**31), ("response_json", "{"), ("response_json", None),
    ("response_json", "[" * 100_000), ("subject_id", "\ud800"), ("source", {}), ("response_id", 7),
]  # fmt: skip


def test_bad_lines_are_named_and_the_others_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    wrong = [json.dumps({"base_url": None, "row": row("key9") | {name: value}}) for name, value in WRONG]
    lines = [line for line, _ in BAD] + [line.encode() for line in wrong]
    with Journal(path) as journal:
        for number, line in enumerate(lines):
            journal.write(line + b"\n")
            journal.append(Entry(row(f"key{number}"), None))
    bad: list[str] = []
    assert len(read_journal(path, KEYS, bad)) == len(lines)
    assert bad[: len(BAD)] == [f"line {2 * number + 1} ({why})" for number, (_, why) in enumerate(BAD)]
    assert all(name in said for (name, _), said in zip(WRONG, bad[len(BAD) :], strict=True))
    warn_of_bad(path, bad)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path}: {len(lines)} lines are set aside and not read: line 1 (not JSON), line 3")
    assert said.endswith(f" and {len(lines) - 5} more\n")


def test_nonsense_about_tokens_loses_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for tokens in (2**63, -5, 1.5, "7", [1]):
        content = {"base_url": None, "row": row("key0") | {"input_tokens": tokens, "cost_usd": 1e300}}
        path.write_text(json.dumps(content) + "\n")
        [entry] = read_journal(path, KEYS).values()
        assert (entry.row["input_tokens"], entry.row["output_tokens"], entry.row["cost_usd"]) == (None, 50, None)


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fieldmark.llm.journal.LONGEST_LINE", 1000)
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(Entry(row("key0"), None))
        journal.write(b"x" * 10_500 + b"\n" + b"y" * 999 + b"\n" + b"z" * 1000 + b"\n")
        journal.append(Entry(row("key1"), None))
        journal.write(b"{" * 5000)
    bad: list[str] = []
    assert set(read_journal(path, KEYS, bad)) == {"key0", "key1"}
    assert bad == ["line 2 (over 0 MB)", "line 3 (not JSON)", "line 4 (over 0 MB)", "line 6 (over 0 MB)"]
    with Journal(path) as journal:
        journal.append(Entry(row("key2"), None))
    assert set(read_journal(path, KEYS)) == {"key0", "key1", "key2"}


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes: what a full disk looks like to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_tears_is_taken_back_and_tried_again(
    tmp_path: Path,
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fieldmark.llm.journal.DISK_PAUSE_S", 0.05)
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(Entry(row("key0"), None))
        whole = path.read_bytes()
        # Room for a line and a half.
        small_disk(int(2.5 * len(whole)))
        journal.append(Entry(row("key1"), None))
        for key in ("key2", "key3"):
            with pytest.raises(UserError, match=r"journal\.jsonl: disk full \(.*\); make room there and run again"):
                journal.append(Entry(row(key), None))
        assert set(read_journal(path, KEYS)) == {"key0", "key1"}
        assert path.read_bytes().endswith(b"\n")
        threading.Timer(0.3, small_disk, [2**30]).start()
    assert "disk full; 2 paid answers are in memory" in capsys.readouterr().err
    assert set(read_journal(path, KEYS)) == {"key0", "key1", "key2", "key3"}


def test_a_disk_that_stays_full_sends_answers_elsewhere(
    tmp_path: Path, small_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fieldmark.llm.journal.DISK_PATIENCE_S", 0.1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(4):
            journal.append(Entry(row(f"key{number}"), None))
    small_disk(path.stat().st_size)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(
            pytest.raises(UserError, match=r"2 paid answers are in (\S+): make room, then `cat")
        )
        journal = stack.enter_context(Journal(path))
        for key in ("key8", "key9"):
            with contextlib.suppress(UserError):
                journal.append(Entry(row(key), None))
    small_disk(2**30)
    command = re.search("`(.*)`", str(caught.value))
    assert command
    subprocess.run(command[1], shell=True, check=True)
    assert set(read_journal(path, KEYS)) == {"key0", "key1", "key2", "key3", "key8", "key9"}


def test_a_file_that_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fieldmark.llm.journal.DISK_PATIENCE_S", 0.0)
    path = tmp_path / "journal.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk full .*1 paid answers are in"), Journal(path) as journal:
        journal.append(Entry(row("key0"), None))


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl: is no file; take it away"):
            read_journal(tmp_path / f"{name}.jsonl", KEYS)
    with pytest.raises(UserError, match=r"folder\.jsonl: cannot be written \(Is a directory\)"):
        Journal(tmp_path / "folder.jsonl")
