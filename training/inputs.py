"""What a run reads: parts of the cache, the files behind them, and the code that it runs.

A run is made anew exactly when something that it reads changed, so its identity is the sha256 of these files and of
every module of this repository that it imports, followed through, beside its settings. What is loaded by its name (the
method, the parts of the cache, a control) is followed where the run loads it.
"""

import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.params import NONE, Ask, Block
from fieldmark.sources import imports_of
from training.controls import Control
from training.data import INDEX, files_of, kind_of
from training.data.asked import asked_names, made_by_of, texts_of
from training.methods import also_reads_of, method_file, methods_of, reads_of
from training.regimes import Full, Noise, Partial, Regime, with_globals

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
    needs = with_globals(needs) if regime.by_vectors else needs
    also_reads = also_reads_of(method, settings) if also else frozenset()
    files = INDEX | files_of(encoder, needs) | control.files(encoder, reads)
    for other in also:
        files |= files_of(other, also_reads)
    files, methods = dict(sorted(files.items())), methods_of(method, settings)
    return Reading(methods, encoder, reads, needs, tuple(also), also_reads, files)


def check_questions(path: str, key: str, known: Mapping[str, Ask], reading: Reading, regime: Regime) -> None:
    """Raise UserError where a run that stands under `key` reads what no question, a key of `ask`, is answered.

    Nor can it read, where its regime hides or splits images, what was written of an image and its neighbours: these are
    of all training images, and their class decided who they are.
    """
    for name in asked_names(reading.reads | reading.also_reads):
        if name not in known:
            what = f"reads asked/{name}, which is no name under ask ({', '.join(known) or 'none is there'})"
            raise UserError(f"{path}: {key}.settings: {what}; add it there")
        if known[name].links != NONE and not isinstance(regime, Full):
            raise UserError(
                f"{path}: {key}.settings: reads asked/{name}, texts written from those of neighbours of the same class,"
                f" whom the regime {regime.label} may hide or judge; ask with a prompt that is given one text alone"
                " (prompts/oversample.md), or compare under regime full"
            )


def check_told(path: str, key: str, data: Path, reading: Reading, regime: Regime) -> None:
    """Raise UserError where a regime tells other classes than the true ones, and a text that is there knows these."""
    if not isinstance(regime, Noise | Partial):
        return
    for name in asked_names(reading.reads | reading.also_reads):
        file = data / texts_of(name)
        if file.is_file() and made_by_of(file)["told"]:
            raise UserError(
                f"{path}: {key}.settings: reads asked/{name}, whose prompt was told the true class of training images,"
                f" which the regime {regime.label} hides; take a question that is not, or another regime"
            )


def code_of(main: Path, methods: Collection[str], parts: Collection[str], control: Control) -> dict[str, str]:
    """The sha256 of every module that a run executes, by its path: `main` is the module that makes the run."""
    files = [main, *map(method_file, methods), *(module_file(kind_of(name)) for name in sorted(parts))]
    files += [Path(str(sys.modules[module.__name__].__file__)) for module in control.modules]  # type: ignore[attr-defined]
    found = imports_of((file.relative_to(ROOT) for file in files), ROOT)
    return dict(sorted((str(path), mark) for path, mark in found.items()))


def module_file(kind: type) -> Path:
    return Path(inspect.getfile(kind))
