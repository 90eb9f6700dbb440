"""Take out of a stage's journal the lines that no reader counts any more, and of its batches those that have ended.

A journal grows by every answer that was refused, invalid or cut short before the good one, and by answers that two
machines' journals put together both have. What is read of it afterwards is what was read before, key by key: an answer
to a former prompt stays, and so does a line that is no entry, which somebody may mend.

Nobody may be asking, or waiting to: limits count the journal from a byte on. The new file is written beside the old one
and renamed, so that a kill at any moment leaves one of the two, whole; whoever has the old one open reads on in it.
"""

import fcntl
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from fieldmark.command import UserError
from fieldmark.llm.batch import Upload, note, record_path
from fieldmark.llm.journal import (
    BadLine,
    Journal,
    cannot_keep,
    entries_in,
    entry_of,
    journal_path,
    load_line,
    read_lines,
    supersedes,
    whole_lines,
)
from fieldmark.store import write_atomic


class Compacted(NamedTuple):
    """What a file held and holds now, in lines and bytes."""

    path: Path
    lines: tuple[int, int]
    size: tuple[int, int]


def compact(stage: str) -> list[Compacted]:
    """Compact a stage's journal and its record of batches. Raises UserError where someone asks or waits for that stage,
    or where the new file cannot be written: the old one is then as it was."""
    journal, record = journal_path(stage), record_path(stage)
    with alone(journal) as asking:
        written = [path for path in (journal, record) if path.exists()]
        for path in written:
            tidy(path)

        def tell(size: int) -> None:
            """Whoever comes while this runs counts what is journalled from here on. It is told before the rename: of a
            journal that a kill left as it was, too much is counted then, never too little."""
            write_down(size, asking)

        done = [rewrite(record, open_batches(record), lambda size: None)] if record in written else []
        return [rewrite(journal, counted_entries(journal), tell), *done]


@contextmanager
def alone(journal: Path) -> Iterator[IO[bytes]]:
    """Have the turn with nobody waiting for it; gives the file that says where the limits count from."""
    if not journal.is_file():
        raise UserError(f"{journal}: there is no journal of that stage; nothing to compact")
    try:
        with journal.with_suffix(".asking").open("a+b", buffering=0) as asking:
            fcntl.flock(asking, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # As Turn.join does: whoever comes meanwhile reads no byte of an earlier session, wherever this ends.
            write_down(whole_lines(journal), asking)
            yield asking
    except BlockingIOError:
        raise UserError(f"{journal}: a process asks and keeps its answers there; run this when it is done") from None
    except OSError as error:
        raise cannot_keep(journal, error) from None


def write_down(size: int, asking: IO[bytes]) -> None:
    asking.truncate(0)
    asking.write(str(size).encode())


def tidy(path: Path) -> None:
    """Have a file end with a whole line, and remove what a killed compaction left beside it.

    Readers count a last line that lacks nothing but its end, so it gets that; one that a kill tore is taken out.
    """
    with Journal(path):
        pass
    path = path.resolve()
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


def counted_entries(journal: Path) -> Callable[[int, bytes | None], bool]:
    """Says of a line, by its first byte and what it holds, whether it is read: memory holds 0.25 kB an answer."""
    starts, ok = dict[str, int](), set[str]()
    for line, entry in entries_in(read_lines(journal), None):
        key = entry.row["item_key"]
        if supersedes(entry, key in ok):
            starts[key] = line.start
            if entry.row["status"] == "ok":
                ok.add(key)
    read = set(starts.values())
    return lambda start, content: start in read or is_bad(content, entry_of)


def open_batches(record: Path) -> Callable[[int, bytes | None], bool]:
    """Says of a line whether it is of an upload that has not ended."""
    uploads: dict[tuple[str, str], Upload] = {}
    for line in read_lines(record):
        try:
            note(load_line(line.content), uploads)
        except BadLine:
            continue

    def wanted(start: int, content: bytes | None) -> bool:
        return is_bad(content, lambda line: note(load_line(line), {})) or is_of(content, uploads)

    return wanted


def is_of(content: bytes | None, uploads: Container[tuple[str, str]]) -> bool:
    fields = load_line(content)
    return (fields["base_url"], fields["file_id"]) in uploads


def is_bad(content: bytes | None, read: Callable[[bytes | None], Any]) -> bool:
    try:
        read(content)
    except BadLine:
        return True
    return False


def rewrite(path: Path, wanted: Callable[[int, bytes | None], bool], tell: Callable[[int], None]) -> Compacted:
    """Write the wanted lines of a file, all of them whole, in its place and with its permissions."""
    path = path.resolve()
    lines, before = [0, 0], path.stat().st_size
    size = 0

    def write(partial: Path) -> None:
        nonlocal size
        with partial.open("wb") as file, path.open("rb") as old:
            shutil.copymode(path, partial)
            for line in read_lines(path):
                lines[0] += 1
                if not wanted(line.start, line.content):
                    continue
                lines[1] += 1
                content = line.content
                if content is None:
                    # Too long to hold, so that nobody reads it; it is copied all the same.
                    copy_line(old, line.start, file)
                else:
                    file.write(content)
            size = file.tell()
        tell(size)

    write_atomic(path, write)
    return Compacted(path, (lines[0], lines[1]), (before, size))


def copy_line(old: IO[bytes], start: int, new: IO[bytes]) -> None:
    old.seek(start)
    while piece := old.readline(2**20):
        new.write(piece)
        if piece.endswith(b"\n"):
            return
