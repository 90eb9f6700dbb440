"""What every stage's command line shares: a help page made of the module's docstring, and errors in one line."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


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
    """Run a stage's `main`. Exit 0, 1 after a UserError printed as one line, or 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
