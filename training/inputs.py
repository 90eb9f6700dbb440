"""What a run reads: parts of the cache, the files behind them, and the code that it runs.

A run is made anew exactly when something that it reads changed, so its identity is the sha256 of these files and of
every module of this repository that it imports, followed through, beside its settings. What is loaded by its name (the
method, the parts of the cache, a control) is followed where the run loads it.
"""

import inspect
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.params import Block
from fieldmark.sources import imports_of
from training.controls import Control
from training.data import INDEX, files_of, kind_of
from training.data.asked import is_asked
from training.methods import also_reads_of, method_file, methods_of, reads_of
from training.regimes import Regime, with_globals

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Reading:
    """What one run reads of the cache."""

    methods: tuple[str, ...]  # the run's, and the probe that it fits beside
    encoder: str
    reads: frozenset[str]  # what its method sees, in the words of READS
    needs: frozenset[str]  # that, and what control and regime need beside it
    also: tuple[str, ...]  # other encoders
    also_reads: frozenset[str]
    files: dict[str, str]  # paths under data/, and the schema of each


def reading_of(
    method: str, settings: Block, encoder: str, also: Sequence[str], control: Control, regime: Regime
) -> Reading:
    """What a run of a method reads under these settings."""
    reads = reads_of(method, settings)
    needs = control.needs(reads)
    needs = with_globals(needs) if regime.by_probe else needs
    also_reads = also_reads_of(method, settings) if also else frozenset()
    files = INDEX | files_of(encoder, needs) | control.files(encoder, reads)
    for other in also:
        files |= files_of(other, also_reads)
    files, methods = dict(sorted(files.items())), methods_of(method, settings)
    return Reading(methods, encoder, reads, needs, tuple(also), also_reads, files)


def check_questions(path: str, key: str, known: Collection[str], reading: Reading) -> None:
    """Raise UserError where a run that stands under `key` reads what no question, a key of `ask`, is answered."""
    for word in sorted(filter(is_asked, reading.reads | reading.also_reads)):
        if word.partition("/")[2] not in known:
            what = f"reads {word}, which is no name under ask ({', '.join(known) or 'none is there'})"
            raise UserError(f"{path}: {key}.settings: {what}; add it there")


def code_of(main: Path, methods: Collection[str], parts: Collection[str], control: Control) -> dict[str, str]:
    """The sha256 of every module that a run executes, by its path: `main` is the module that makes the run."""
    files = [main, *map(method_file, methods), *(module_file(kind_of(name)) for name in sorted(parts))]
    files += [Path(str(sys.modules[module.__name__].__file__)) for module in control.modules]  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for file in files:
        found |= {str(path): mark for path, mark in imports_of(file.relative_to(ROOT), ROOT).items()}
    return dict(sorted(found.items()))


def module_file(kind: type) -> Path:
    return Path(inspect.getfile(kind))
