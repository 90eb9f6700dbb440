"""What every stage's command line shares: a help page made of the module's docstring, and one way out.

A command ends with one line on stderr, whatever went wrong: what, where, and what to do. What it prints holds no
character that a terminal obeys and no secret of an address, since class names, paths and answers come from others.
"""

import argparse
import errno
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Formatting characters that let a text be read in another order than it stands in (CVE-2021-42574).
REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# Categories of Unicode: control characters, lone surrogates, separators of lines and of paragraphs.
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
# How tqdm goes back from a second bar to the first one; it writes nothing else with it.
UP = re.compile(r"(\x1b\[A)+")
USER_PART = re.compile(r"([a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?#]*\?)[^\s#]+", re.IGNORECASE)

FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
CROWDED = {errno.EMFILE, errno.ENFILE}
# What libraries that pass no errno on say of the same.
SAYS_FULL = re.compile(r"no space left on device|disk quota exceeded|disk is full", re.IGNORECASE)
SAYS_FORBIDDEN = re.compile(r"read-only file system|permission denied|operation not permitted", re.IGNORECASE)
SAYS_NO_MEMORY = re.compile(r"out of memory|not enough memory|(?:can't|cannot|failed to) allocate|bad_alloc", re.I)
# The packages whose errors are those of a connection, a proxy or a certificate.
NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub", "ssl", "socket"}
# Set to anything, it shows where an error came from.
TRACE = "FIELDMARK_TRACE"
# How a params.yaml begins that tools/profiles.py made; the profile's name follows.
LAID_OVER = "# params.yaml with profiles/"
# What speaks of a value in params.yaml, but not of the file itself.
OF_A_VALUE = re.compile(r"^params\.yaml: [a-z_]+[`.:][^\n]*$|^[^\n]* in params\.yaml\b[^\n]*$")
HOW_TO_TELL = f"report it with what the same command prints under {TRACE}=1"
PROJECT = Path(__file__).parents[1]

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
PARENT_LOOK_S = 0.5


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP (its number is the argument), which end a stage as Ctrl-C does."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, in which file and key, what to do."""


def stage_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the stage's docstring, with the one option that every stage has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="parameters (default: params.yaml)")
    return parser


def encoder_parser(doc: str | None) -> argparse.ArgumentParser:
    """A stage's parser for the stages that work on one encoder at a time."""
    return key_parser(doc, "--encoder", "encoders")


def key_parser(doc: str | None, option: str, block: str) -> argparse.ArgumentParser:
    """A stage's parser for the stages that work on one key of a block of params.yaml at a time."""
    parser = stage_parser(doc)
    key = stage_key()
    said = f"a name under `{block}` in params.yaml (in a stage that DVC runs: its own)"
    parser.add_argument(option, default=key, required=key is None, help=said)
    return parser


def stage_key() -> str | None:
    """The name behind @ of the stage that DVC runs this process for, or None.

    Names in params.yaml come from whoever wrote that file. dvc.yaml does not put them into its commands, since DVC
    hands these to a shell, which would run what a name holds.
    """
    _, at, key = os.environ.get("DVC_STAGE", "").rpartition("@")
    return key if at else None


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with every character that a terminal or a page obeys, but those in `keep`, written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(escape(char) if is_unseen(char) and char not in keep else char for char in text)


def is_unseen(char: str) -> bool:
    return unicodedata.category(char) in UNSEEN or char in REORDERING


def escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def redact(text: str) -> str:
    """The text without what may be secret in the addresses in it: the part before @, and what follows ?."""
    if "://" not in text:
        return text
    return QUERY.sub(r"\1***", USER_PART.sub(r"\1***@", text))


def counted(number: int, one: str, many: str) -> str:
    """A number and what follows it: `1 file is` or `2 files are`."""
    return f"{number} {one if number == 1 else many}"


def name_some(names: Sequence[str], most: int = 10) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@functools.cache
def say_once(line: str) -> None:
    """Print on stderr; the same line once in a process."""
    print(line, file=sys.stderr)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main`. Exit 0, 1 after an error printed as one line, 130 after Ctrl-C, or 143 after SIGTERM.

    A stage that DVC started ends with DVC: one that lives on would go on paying while a second run begins.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What is ignored stays ignored: that is how nohup works.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, terminate)
    if os.environ.get("DVC_STAGE"):
        threading.Thread(target=end_with_dvc, daemon=True).start()
    with guarded_streams():
        try:
            main()
            sys.stdout.flush()
        except Terminated as error:
            print("stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
            code = 128 + error.args[0]
        except KeyboardInterrupt:
            print("interrupted; what is finished is kept, run the same command again to go on", file=sys.stderr)
            code = 130
        except Exception as error:
            if TRACE in os.environ:
                traceback.print_exc()
            print(f"error: {explain(error)}", file=sys.stderr)
            code = 1
        else:
            code = 0
        drop_unwritten()
    sys.exit(code)


def terminate(number: int, frame: FrameType | None) -> None:
    """Once: what comes while the stage winds up must not cut that short."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Terminated(number)


def end_with_dvc() -> None:
    """Send this process SIGTERM when the DVC that started it is gone."""
    parent = os.getppid()
    name, above = process(parent)
    # DVC runs a command through a shell, which most replace by the command and some stay beside.
    through_shell = name in SHELLS
    while os.getppid() == parent and not (through_shell and process(parent) != (name, above)):
        time.sleep(PARENT_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def process(number: int) -> tuple[str, int]:
    """The name of a process and its parent's number, where the system tells (Linux)."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    head, _, tail = stat.rpartition(")")
    return head.partition("(")[2], int(tail.split()[1])


def explain(error: BaseException) -> str:
    """What went wrong and what to do: a UserError's own line, or one made for a failure of the surroundings."""
    if isinstance(error, UserError):
        return str(error) + where_to_edit(str(error))
    own = error.strerror if isinstance(error, OSError) else None
    said = " ".join(str(own or error).split())[:300]
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL or SAYS_FULL.search(said):
        return f"{where}the disk is full ({said}); free some space and run again: what is finished is kept"
    if isinstance(error, MemoryError) or SAYS_NO_MEMORY.search(said):
        remedy = "end other programs, or lower batch_size under `encoders` in params.yaml, and run again"
        return f"there is not enough memory ({said or type(error).__name__}); {remedy}"
    if type(error).__module__.partition(".")[0] in NETWORK:
        remedy = "look at the connection, and at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
        return f"the network cannot be used ({type(error).__name__}: {said}); {remedy}"
    if isinstance(error, RecursionError):
        return f"something in the input is nested too deeply ({said}); make it flatter"
    if code in FORBIDDEN or SAYS_FORBIDDEN.search(said):
        remedy = "change its permissions or its owner, or work in a folder of your own"
        return f"{where}may not be read or written by you ({said}); {remedy}"
    if code in CROWDED:
        return f"{where}too many files are open ({said}); raise the limit (`ulimit -n 4096`) and run again"
    if isinstance(error, OSError):
        return f"{where}{said or type(error).__name__}; mend that and run again: what is finished is kept"
    remedy = f"this is a fault of the code: mend it where it is yours, else {HOW_TO_TELL}"
    return f"{type(error).__name__} in {place_of(error)} ({said}); {remedy}"


def where_to_edit(message: str) -> str:
    """What to add to a message of a value in params.yaml where that was made of a profile: an edit there is refused."""
    if not OF_A_VALUE.match(message):
        return ""
    try:
        with open("params.yaml", encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError):
        return ""
    name = first.removeprefix(LAID_OVER).partition(" ")[0]
    return f" (in profiles/{name}, which params.yaml was made of)" if first.startswith(LAID_OVER) else ""


def place_of(error: BaseException) -> str:
    """The line of this project that an error was last in."""
    frames = traceback.extract_tb(error.__traceback__)
    # A virtual environment may lie in the project; and every error has passed through this file.
    ours = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(PROJECT)
        and "site-packages" not in frame.filename
        and frame.filename != __file__
    ] or frames
    return f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else "an unknown place"


class Guarded:
    """A stream that writes texts of others so that they can be read and do nothing (printable, redact)."""

    def __init__(self, stream: Any, keep: str) -> None:
        self.stream, self.keep = stream, keep

    def write(self, text: str) -> int:
        if not (self.keep.endswith("\r") and UP.fullmatch(text)):
            text = printable(redact(text), self.keep)
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Guard stdout and stderr; bars on stderr go back to the start of their line."""
    before = sys.stdout, sys.stderr
    guarded: Any = Guarded(sys.stdout, "\n\t"), Guarded(sys.stderr, "\n\t\r")
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def drop_unwritten() -> None:
    """Where stdout can no longer be written, give up what waits there: Python would fail on it again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
