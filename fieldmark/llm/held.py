"""Answers that are held, by where each lies: in a stage's output or in its journal. Memory holds places, not rows.

A row is read when it is looked at. Whoever looks at them in the order of the output reads each of its row groups once.
Both files stay open, so that a new output or a compacted journal, which are renamed into place, change nothing here.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.command import UserError
from fieldmark.llm.journal import (
    LONGEST_LINE,
    BadLine,
    Row,
    checked_row,
    entries_in,
    entry_of,
    lines_of,
    open_lines,
    supersedes,
)
from fieldmark.store import broken, read_header

SCHEMA = "llm.answers/1"
NOWHERE = -1
T = TypeVar("T")
S = TypeVar("S")


class Output:
    """The rows of a stage's answers.parquet, of which one row group is in memory; none where there is no file.

    Raises UserError where it is broken or of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None
        self.starts = [0]
        self.group, self.rows = NOWHERE, list[Row]()
        if path.exists():
            read_header(path, SCHEMA)
            try:
                self.file = pq.ParquetFile(path, page_checksum_verification=True)
                for group in range(self.file.num_row_groups):
                    self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)
            except (OSError, pa.ArrowException) as error:
                raise broken(path, error) from None

    def row_group(self, group: int) -> list[Row]:
        if group != self.group:
            assert self.file is not None
            try:
                self.rows, self.group = self.file.read_row_group(group).to_pylist(), group
            except (OSError, pa.ArrowException) as error:
                raise broken(self.path, error) from None
        return self.rows

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Each row as it stands there, with its number from 0."""
        for group, start in enumerate(self.starts[:-1]):
            yield from enumerate(self.row_group(group), start)

    def __getitem__(self, number: int) -> Row:
        """A row that can be relied on. Raises BadLine where it cannot."""
        # Mostly the group of the row before, or the one behind it.
        for group in (self.group, self.group + 1, *range(len(self.starts) - 1)):
            if 0 <= group < len(self.starts) - 1 and self.starts[group] <= number < self.starts[group + 1]:
                return checked_row(self.row_group(group)[number - self.starts[group]])
        raise IndexError(number)


def read_rows(output: Output, bad: list[str]) -> Iterator[tuple[int, Row]]:
    """The rows of an output that can be relied on, by number from 0; the others are added to `bad`, in words."""
    for number, row in output:
        try:
            yield number, checked_row(row)
        except BadLine as error:
            bad.append(f"row {number + 1} ({error})")


def entry_at(file: IO[bytes], start: int) -> Row:
    """The row of the entry that begins at a byte of a journal. Raises BadLine."""
    file.seek(start)
    return entry_of(file.readline(LONGEST_LINE)).row


def row_of(key: str, read: Callable[[], Row], path: Path | str) -> Row:
    """The row that stands where that of an item key was found in a file. Raises UserError where it is another one."""
    try:
        row = read()
    except BadLine:
        row = {}
    if row.get("item_key") != key:
        raise UserError(f"{path}: was changed in place while it was read; run again, when nothing else writes there")
    return row


class Held(Mapping[str, Row]):
    """The answers held of some item keys: of `places`, which has the place of each key among the items.

    `answers` says whether a row is one. The output comes before the journal; `bad` gets what could not be read of
    either, in words. `base_urls` are the servers that those came from that the journal has too.
    """

    def __init__(
        self,
        places: dict[str, int],
        output: Path,
        journal: Path,
        answers: Callable[[Row], bool],
        bad: dict[Path, list[str]],
    ) -> None:
        self.places, self.output, self.journal = places, Output(output), open_lines(journal)
        size = max(places.values(), default=-1) + 1
        self.in_output, self.in_journal = array("q", [NOWHERE]) * size, array("q", [NOWHERE]) * size
        for number, row in read_rows(self.output, bad[output]):
            place = places.get(row["item_key"])
            if place is not None and answers(row):
                self.in_output[place] = number
        self.base_urls = self.look_through_journal(size, answers, bad[journal])
        self.count = sum(self.holds(place) for place in places.values())

    def look_through_journal(self, size: int, answers: Callable[[Row], bool], bad: list[str]) -> set[str]:
        if self.journal is None:
            return set()
        is_ok, server = bytearray(size), array("H", [0]) * size
        servers: dict[str | None, int] = {None: 0}
        for line, entry in entries_in(lines_of(self.journal), bad):
            place = self.places.get(entry.row["item_key"])
            if place is None or not supersedes(entry, bool(is_ok[place])):
                continue
            is_ok[place] = entry.row["status"] == "ok"
            self.in_journal[place] = line.start if answers(entry.row) else NOWHERE
            server[place] = servers.setdefault(entry.base_url or None, len(servers))
        seen = {server[place] for place in self.places.values() if self.holds(place)}
        return {url for url, number in servers.items() if url is not None and number in seen}

    def holds(self, place: int) -> bool:
        return self.in_output[place] != NOWHERE or self.in_journal[place] != NOWHERE

    def __getitem__(self, key: str) -> Row:
        place = self.places[key]
        if self.in_output[place] != NOWHERE:
            return row_of(key, lambda: self.output[self.in_output[place]], self.output.path)
        journal = self.journal
        if self.in_journal[place] == NOWHERE or journal is None:
            raise KeyError(key)
        return row_of(key, lambda: entry_at(journal, self.in_journal[place]), journal.name)

    def __contains__(self, key: object) -> bool:
        place = self.places.get(key) if isinstance(key, str) else None
        return place is not None and self.holds(place)

    def __iter__(self) -> Iterator[str]:
        return (key for key, place in self.places.items() if self.holds(place))

    def __len__(self) -> int:
        return self.count


class Made(Sequence[T]):
    """What `make` makes of each of `sources`, when it is looked at and each time anew."""

    def __init__(self, sources: Sequence[S], make: Callable[[S], T]) -> None:
        self.sources, self.make = sources, make

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> "Made[T]": ...

    def __getitem__(self, place: int | slice) -> "T | Made[T]":
        if isinstance(place, slice):
            return Made(self.sources[place], self.make)
        return self.make(self.sources[place])

    def __len__(self) -> int:
        return len(self.sources)


class Named(Mapping[str, str]):
    """What people call each of `subjects`, put together when it is looked at."""

    def __init__(self, subjects: Sequence[str] | Mapping[str, Any], name: Callable[[str], str]) -> None:
        self.subjects, self.name = subjects, name

    def __getitem__(self, subject: str) -> str:
        return self.name(subject)

    def __iter__(self) -> Iterator[str]:
        return iter(self.subjects)

    def __len__(self) -> int:
        return len(self.subjects)


class Missing(Mapping[str, T]):
    """The items of the keys of which no answer is held."""

    def __init__(self, items: Sequence[T], held: Held) -> None:
        self.items_of_all, self.held = items, held

    def __getitem__(self, key: str) -> T:
        if key in self.held:
            raise KeyError(key)
        return self.items_of_all[self.held.places[key]]

    def __contains__(self, key: object) -> bool:
        return key in self.held.places and key not in self.held

    def __iter__(self) -> Iterator[str]:
        return (key for key, place in self.held.places.items() if not self.held.holds(place))

    def __len__(self) -> int:
        return len(self.held.places) - len(self.held)


class Rows(Sequence[Row]):
    """One row an item, read when it is looked at: `told` has the rows of this run by key, or where the journal has
    them."""

    def __init__(
        self,
        keys: Sequence[str],
        items: Sequence[Any],
        held: Mapping[str, Row],
        told: Mapping[str, Row | int],
        journal: Path,
    ) -> None:
        self.keys, self.items, self.held, self.told = keys, items, held, told
        self.journal = open_lines(journal) if told else None

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        key, item = self.keys[place], self.items[place]
        row: Row | int = self.told[key] if key in self.told else self.held[key]
        if isinstance(row, int):
            assert self.journal is not None
            journal, start = self.journal, row
            row = row_of(key, lambda: entry_at(journal, start), journal.name)
        return {**row, "subject_id": item.subject_id, "sample": item.sample}

    def __len__(self) -> int:
        return len(self.keys)
