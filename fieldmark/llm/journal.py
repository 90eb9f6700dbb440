"""The lower layer of the item cache: every answer is appended to a file before anything else is done with it.

One JSON object a line, one file a stage, in the original checkout's `.cache/` or $FIELDMARK_CACHE. It outlives
`kill -9`, a full disk, a change of branch, a reverted prompt, and the workspace that an experiment ran in. Of two lines
with one key the later counts, and an `ok` before others; nothing but fieldmark.llm.compaction takes out the one that
does not. A line that is no entry is passed over, and said. Who appends has the Turn (fieldmark.llm.turn).
"""

import errno
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, TypeGuard

from fieldmark.checkout import cache_folder
from fieldmark.command import UserError
from fieldmark.store import canonical_json

Row = dict[str, Any]
STATUSES = {"ok", "refused", "invalid", "truncated", "error"}
SOURCES = {"live", "batch", "replay", "import", "edited"}
# An answer's body ends at bounds.LARGEST_BODY; in JSON a byte of it may take six.
LONGEST_LINE = 32 * 2**20
# A count of tokens beyond this is none: no number of a JSON file is exact there.
MOST_TOKENS = 2**53
MOST_USD = 1e12
# How long the answers in memory wait for room on a full disk, and how often they are tried again.
DISK_PATIENCE_S = 30.0
DISK_PAUSE_S = 1.0
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Entry(NamedTuple):
    """A row of llm.answers/1, the server it came from, which is no part of an answer's identity, and the US dollars
    that it counts for against llm.max_usd (None: no price)."""

    row: Row
    base_url: str | None
    charged: float | None = None


def journal_path(stage: str) -> Path:
    return cache_folder() / f"{stage}.jsonl"


def read_journal(path: Path, keys: Container[str], bad: list[str] | None = None) -> dict[str, Entry]:
    """The entries of the wanted item keys; the lines that are none are added to `bad`, in words. A last line without an
    end was torn by a kill and is passed over in silence."""
    entries: dict[str, Entry] = {}
    for _, entry in entries_in(read_lines(path), bad):
        key = entry.row["item_key"]
        if key in keys and supersedes(entry, key in entries and entries[key].row["status"] == "ok"):
            entries[key] = entry
    return entries


def supersedes(entry: Entry, held_is_ok: bool) -> bool:
    """Whether an entry counts in the place of earlier ones with its key."""
    return entry.row["status"] == "ok" or not held_is_ok


def entries_in(lines: Iterator["Line"], bad: list[str] | None) -> Iterator[tuple["Line", Entry]]:
    """The lines that are entries; the others are added to `bad`, in words."""
    for line in lines:
        try:
            entry = entry_of(line.content)
        except BadLine as error:
            if bad is not None and line.is_whole:
                bad.append(f"line {line.number} ({error})")
        else:
            yield line, entry


def warn_of_bad(path: Path, bad: list[str]) -> None:
    """Say on stderr which lines of a file are passed over."""
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        lines = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
        print(f"warning: {path}: {lines} set aside and not read: {', '.join(bad[:5])}{more}", file=sys.stderr)


class Line(NamedTuple):
    """A line by its number from 1, the byte at which it begins, and what it holds (None: too much for memory)."""

    number: int
    start: int
    content: bytes | None

    @property
    def is_whole(self) -> bool:
        """False for the last line where it has no end: a kill tore it."""
        return self.content is None or self.content.endswith(b"\n")


def open_lines(path: Path) -> IO[bytes] | None:
    """A file of lines, or None where there is none. Raises UserError where there is something that cannot be read."""
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path}: is no file; take it away, or let FIELDMARK_CACHE name another folder")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that before answers are paid again") from None


def read_lines(path: Path, start: int = 0) -> Iterator[Line]:
    """The lines of a file from a byte on; no file has no lines. Raises UserError as open_lines does."""
    file = open_lines(path)
    if file is not None:
        with file:
            yield from lines_of(file, start)


def lines_of(file: IO[bytes], start: int = 0) -> Iterator[Line]:
    """The lines of an open file from a byte on."""
    file.seek(start)
    number = 0
    while content := file.readline(LONGEST_LINE):
        number += 1
        whole, size = content, len(content)
        while content and not content.endswith(b"\n") and len(content) == LONGEST_LINE:
            content = file.readline(LONGEST_LINE)
            size += len(content)
        yield Line(number, start, whole if content is whole else None)
        start += size


class BadLine(ValueError):
    """A line that is no entry. The message says why, in a few words."""


def load_line(line: bytes | None) -> dict[str, Any]:
    """The JSON object of a line. Raises BadLine."""
    if line is None:
        raise BadLine(f"over {LONGEST_LINE // 2**20} MB")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise BadLine("not JSON") from None
    if not isinstance(content, dict):
        raise BadLine("no JSON object")
    return content


def entry_of(line: bytes | None) -> Entry:
    """The entry that a line holds. Raises BadLine."""
    content = load_line(line)
    base_url, charged = content.get("base_url"), content.get("charged")
    if not (base_url is None or isinstance(base_url, str)):
        raise BadLine("base_url is no text")
    row = checked_row(content.get("row"))
    return Entry(row, base_url, charged if is_amount(charged) else row["cost_usd"])


def checked_row(row: Any) -> Row:
    """A row of llm.answers/1 that can be relied on. Raises BadLine.

    Tokens and cost decide nothing of an answer: where a server or a hand wrote nonsense there, they are unknown.
    """
    if not isinstance(row, dict):
        raise BadLine("no row")
    for name in ("item_key", "subject_id", "prompt_sha", "response_json", "model_requested", "created_at"):
        if not is_text(row.get(name)):
            raise BadLine(f"{name} is no text")
    for name in ("model_reported", "response_id", "finish_reason"):
        if not (row.get(name) is None or is_text(row[name])):
            raise BadLine(f"{name} is no text")
    for name in ("sample", "attempts"):
        if type(row.get(name)) is not int or not 0 <= row[name] < 2**31:
            raise BadLine(f"{name} is no number")
    for name, known in (("status", STATUSES), ("source", SOURCES)):
        if not (isinstance(row.get(name), str) and row[name] in known):
            raise BadLine(f"{name} is none of {', '.join(sorted(known))}")
    try:
        json.loads(row["response_json"])
    except (ValueError, RecursionError):
        raise BadLine("response_json is not JSON") from None
    tokens = {name: token_count(row.get(name)) for name in ("input_tokens", "output_tokens")}
    cost = row.get("cost_usd")
    # A server on this machine costs nothing, whether it counts tokens or not.
    cost = float(cost) if is_amount(cost) and (cost == 0 or None not in tokens.values()) else None
    optional = {name: row.get(name) for name in ("model_reported", "response_id", "finish_reason")}
    return {**row, **optional, **tokens, "cost_usd": cost}


def token_count(value: Any) -> int | None:
    """A number of tokens; None where a server's word for it cannot be one."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def is_amount(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST_USD


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text that a file can hold: JSON knows half a character, UTF-8 does not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


class Journal:
    """Appends entries; may be shared by threads. Only for who has the Turn.

    Opened, it ends a last line that lacks nothing but its end, and takes back one that a kill tore. What the disk has
    no room for stays in memory, is tried again when the journal is closed, and goes to the system's temporary files
    where that fails. Raises UserError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.unwritten: list[bytes] = []
        self.torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise cannot_keep(path, error) from None
        try:
            self.mend_end()
        except OSError as error:
            os.close(self.file)
            raise cannot_keep(path, error) from None

    def mend_end(self) -> None:
        size = os.fstat(self.file).st_size
        if not size or os.pread(self.file, 1, size - 1) == b"\n":
            return
        start = last_line(self.file, size)
        try:
            load_line(os.pread(self.file, size - start, start) if size - start <= LONGEST_LINE else None)
        except BadLine:
            os.ftruncate(self.file, start)
        else:
            self.write(b"\n")

    def append(self, entry: Entry) -> int:
        """The byte at which the entry stands. Raises UserError where there is no room; it is then kept in memory."""
        return self.add(entry, self.keep)

    def append_unsynced(self, entry: Entry) -> int:
        """append for what can be had again where the power fails before `sync`: of a kill the system keeps it."""
        return self.add(entry, self.write)

    def add(self, entry: Entry, write: Callable[[bytes], int]) -> int:
        line = canonical_json(entry._asdict()).encode() + b"\n"
        try:
            return write(line)
        except OSError as error:
            self.unwritten.append(line)
            raise cannot_keep(self.path, error) from None

    def sync(self) -> None:
        """Have the disk hold all that was appended. Raises UserError."""
        try:
            os.fsync(self.file)
        except OSError as error:
            raise cannot_keep(self.path, error) from None

    def keep(self, line: bytes) -> int:
        start = self.write(line)
        # Outside the lock, so that threads share one wait for the disk.
        os.fsync(self.file)
        return start

    def write(self, line: bytes) -> int:
        """Write a line or nothing of it; the byte that it begins at. Raises OSError."""
        with self.lock:
            end = os.fstat(self.file).st_size
            start = end + self.torn
            rest = b"\n" + line if self.torn else line
            try:
                while rest:
                    rest = rest[os.write(self.file, rest) :]
            except OSError:
                self.torn = not self.cut_back(end)
                raise
            self.torn = False
        return start

    def cut_back(self, end: int) -> bool:
        """Take back what a failed write left; False where that fails too."""
        try:
            os.ftruncate(self.file, end)
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.unwritten:
                self.try_again()
        finally:
            os.close(self.file)

    def try_again(self) -> None:
        """Write what there was no room for, as soon as there is. Raises UserError where it stays elsewhere."""
        last = time.monotonic() + DISK_PATIENCE_S
        count = len(self.unwritten)
        kept = f"{count} paid answers are in memory, and are tried again for {DISK_PATIENCE_S:.0f} s"
        print(f"{self.path}: disk full; {kept}", file=sys.stderr)
        while True:
            try:
                while self.unwritten:
                    self.keep(self.unwritten[0])
                    del self.unwritten[0]
                return
            except KeyboardInterrupt:
                last = 0.0
            except OSError as error:
                if time.monotonic() >= last:
                    raise self.put_aside(error) from None
                wait_for(DISK_PAUSE_S)

    def put_aside(self, error: OSError) -> UserError:
        """Write the answers in memory where temporary files go, and say how they come back."""
        said = f"{self.path}: disk full ({error.strerror})"
        try:
            with tempfile.NamedTemporaryFile("wb", prefix=f"{self.path.stem}-", suffix=".jsonl", delete=False) as file:
                file.write(b"".join(self.unwritten))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return UserError(f"{said}; {len(self.unwritten)} paid answers are lost, make room before the next run")
        return UserError(
            f"{said}; {len(self.unwritten)} paid answers are in {file.name}: make room, then `cat {file.name} >>"
            f" {self.path}` keeps them"
        )


def wait_for(seconds: float) -> None:
    """Sleep; an interruption ends it and nothing else."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return


def last_line(file: int, size: int) -> int:
    """Where the last line of a file begins, in bytes."""
    end = size
    while end > 0:
        start = max(0, end - 2**16)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def whole_lines(path: Path) -> int:
    """How many bytes the whole lines of a file take; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return last_line(file.fileno(), os.fstat(file.fileno()).st_size)


def cannot_keep(path: Path, error: OSError) -> UserError:
    if error.errno in FULL:
        return UserError(
            f"{path}: disk full ({error.strerror}); make room there and run again, what is answered is kept"
        )
    remedy = "mend that, or let FIELDMARK_CACHE name another folder"
    return UserError(f"{path}: cannot be written ({error.strerror}); {remedy}")
