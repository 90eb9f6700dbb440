"""The lower layer of the item cache: every answer is appended to a file before anything else is done with it.

One JSON object a line, one file a stage, under `.cache/` or $FIELDMARK_CACHE. It outlives `kill -9`, a change of branch
and a reverted prompt. Nothing is ever taken out; of two lines with one key the later counts, and an `ok` before others.
"""

import json
import os
import threading
from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fieldmark.store import canonical_json

Row = dict[str, Any]


class Entry(NamedTuple):
    """A row of llm.answers/1 and the server it came from, which is no part of an answer's identity."""

    row: Row
    base_url: str | None


def journal_path(stage: str) -> Path:
    return Path(os.environ.get("FIELDMARK_CACHE", ".cache"), f"{stage}.jsonl")


def read_journal(path: Path, keys: Container[str]) -> dict[str, Entry]:
    """The entries of the wanted item keys. A line that a kill tore is no entry."""
    entries: dict[str, Entry] = {}
    if not path.exists():
        return entries
    with path.open("rb") as lines:
        for line in lines:
            try:
                content = json.loads(line)
                entry = Entry(content["row"], content["base_url"])
                key = entry.row["item_key"]
            except (ValueError, KeyError, TypeError):
                continue
            held = entries.get(key)
            if key in keys and not (held and held.row["status"] == "ok" and entry.row["status"] != "ok"):
                entries[key] = entry
    return entries


class Journal:
    """Appends entries; may be shared by threads. Opened, it first closes a line that a kill left open."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":
            self.write(b"\n")

    def append(self, entry: Entry) -> None:
        self.write(canonical_json(entry._asdict()).encode() + b"\n")
        # Outside the lock, so that threads share one wait for the disk.
        os.fsync(self.file)

    def write(self, line: bytes) -> None:
        with self.lock:
            while line:
                line = line[os.write(self.file, line) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.file)
