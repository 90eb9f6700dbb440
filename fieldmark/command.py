"""What every stage's command line shares: a help page made of its docstring, errors in one line, a calm end."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

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
    parser = stage_parser(doc)
    parser.add_argument("--encoder", required=True, help="a name under `encoders` in params.yaml")
    return parser


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main`. Exit 0, 1 after a UserError printed as one line, 130 after Ctrl-C, 143 after SIGTERM.

    A stage that DVC started ends with DVC: one that lives on would go on paying while a second run begins.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What is ignored stays ignored: that is how nohup works.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, terminate)
    if os.environ.get("DVC_STAGE"):
        threading.Thread(target=end_with_dvc, daemon=True).start()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Terminated as error:
        print("stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(128 + error.args[0])
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


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
