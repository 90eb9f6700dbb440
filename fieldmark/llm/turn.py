"""One process at a time asks for a stage, whatever clones, worktrees and experiments share its journal.

The others wait, and then find what was asked in the journal: no two of them pay for one answer.
"""

import fcntl
import sys
from types import TracebackType
from typing import IO, NamedTuple, Self

from fieldmark.llm.journal import cannot_keep, entries_in, journal_path, read_lines, whole_lines


class Spent(NamedTuple):
    """What was asked of servers, in questions and US dollars."""

    calls: int
    usd: float


NOTHING = Spent(0, 0.0)


class Turn:
    """The right to ask for a stage: of all processes that share its journal one at a time, the others wait.

    Also counts what was asked while one process or another has been at it without a gap: limits hold for all of them
    together. Who asks or waits holds `STAGE.asking` shared; whoever finds it free is the first and writes down how long
    the journal was.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.path = journal_path(stage)
        self.files: list[IO[bytes]] = []
        self.began = 0

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.began = self.join(self.open(".asking"))
            turn = self.open(".turn")
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"{self.stage}: another process asks and keeps its answers in {self.path}; waiting for it, to take"
                    " what is there then",
                    file=sys.stderr,
                )
                fcntl.flock(turn, fcntl.LOCK_EX)
        except OSError as error:
            self.leave()
            raise cannot_keep(self.path.parent, error) from None
        except BaseException:
            self.leave()
            raise
        return self

    def open(self, suffix: str) -> IO[bytes]:
        file = self.path.with_suffix(suffix).open("a+b", buffering=0)
        self.files.append(file)
        return file

    def join(self, asking: IO[bytes]) -> int:
        """How many bytes the journal had when the first of those who ask or wait began."""
        try:
            fcntl.flock(asking, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(asking, fcntl.LOCK_SH)
        else:
            asking.truncate(0)
            asking.write(str(whole_lines(self.path)).encode())
            fcntl.flock(asking, fcntl.LOCK_SH)
        asking.seek(0)
        content = asking.read()
        return int(content) if content.isdigit() and len(content) < 20 else 0

    def spent(self) -> Spent:
        """What those who ask or wait have asked of servers until now."""
        calls, usd = NOTHING
        for _, entry in entries_in(read_lines(self.path, self.began), None):
            # What was merely copied here from an output came from nowhere now.
            if entry.base_url is not None:
                calls += 1
                usd += entry.charged or 0.0
        return Spent(calls, usd)

    def leave(self) -> None:
        for file in self.files:
            file.close()
        self.files.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
