"""Turns: one process asks at a time, and limits count what all of them asked."""

import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.llm.journal import Entry, Journal, journal_path
from fieldmark.llm.turn import Spent, Turn
from tests.fieldmark.llm.workspace import row_with

STAGE = "test_stage"
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path))
    return tmp_path


def hold(folder: str, pipe: Connection) -> None:
    """Have the turn from when that is said until the other end closes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIELDMARK_CACHE", folder)
        with Turn(STAGE):
            pipe.send(None)
            pipe.poll(None)


def journal(key: str, charged: float | None, base_url: str | None = "http://x") -> None:
    with Journal(journal_path(STAGE)) as lines:
        lines.append(Entry(row_with(item_key=key), base_url, charged))


def test_a_turn_is_waited_for_and_ends_with_its_process(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = SPAWN.Pipe()
    other = SPAWN.Process(target=hold, args=(str(cache), there))
    other.start()
    here.recv()
    journal("a", 0.5)
    # Killed while this thread waits: nothing is left behind that would hold it up.
    threading.Timer(0.3, other.kill).start()
    begin = time.monotonic()
    with Turn(STAGE) as turn:
        assert time.monotonic() - begin > 0.2
        # It began while the other was at it, so that the other's calls count.
        assert turn.spent() == Spent(1, 0.5)
        journal("b", 0.25)
        journal("copied", 9.0, None)
        journal("unpriced", None)
        assert turn.spent() == Spent(3, 0.75)
    other.join()
    assert "another process asks" in capsys.readouterr().err
    with Turn(STAGE) as turn:
        assert turn.spent() == Spent(0, 0.0)
    assert capsys.readouterr().err == ""


def test_a_torn_line_and_a_broken_count_do_not_shift_what_is_counted(cache: Path) -> None:
    journal("a", 0.5)
    with journal_path(STAGE).open("ab") as file:
        file.write(b'{"row": {"item_key"')
    with Turn(STAGE) as turn:
        journal("b", 0.25)
        assert turn.spent() == Spent(1, 0.25)
        journal_path(STAGE).with_suffix(".asking").write_bytes(b"\xff nonsense")
        assert turn.spent() == Spent(1, 0.25)


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("FIELDMARK_CACHE", str(cache / "file/inside"))
    with (
        pytest.raises(UserError, match=r"inside: cannot be written \(Not a directory\); mend that, or let FIELDMARK"),
        Turn(STAGE),
    ):
        pass
