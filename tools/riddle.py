"""Which known faults of public code open a gap between training images and others, on frozen features.

Reads   of one encoder what the methods read of it, as a study does: images of train and val, never test.
Writes  data/studies/riddle/{tables.txt,tables.json}, and fits/KEY.json for each fit: one that is there is not made
        again. KEY is the sha256 of settings, seed and fold, of the files that the fit reads and of the code it runs.
Costs   two fits for each method, fault, fold and seed (one where the fold's own images choose), on the CPU or a GPU.

Methods are those with `faults` among their settings. Each is cross-fitted without a fault, with each alone and with
all; and with `peeking`, the fault of the protocol, alone and beside all. What the figures mean stands in
evaluation/riddle_tables.py, how images are asked in evaluation/riddle.py. --set gives a setting to each of the methods
that has it.

    python -m tools.riddle
    python -m tools.riddle --methods trd --folds 2 --seeds 1 --epochs 30 --set object=global --set regions=grid
    python -m tools.riddle --methods trd --faults threshold_precedence --set edges=similar
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from pydantic import ValidationError
from tqdm import tqdm

from evaluation import riddle
from evaluation.compare import describe_commit
from evaluation.riddle import Answers, Fold, Source, cross_fit, held_out, needs_of
from evaluation.riddle_tables import NONE, Told, as_json, as_text, joined, rows_of
from evaluation.runs import group_numbers, groups_of
from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.devices import choose_device, has_bf16, set_up_torch
from fieldmark.params import Block, load_params
from fieldmark.store import canonical_json, read_table, sha256, write_text
from tools.predict import DATA, say
from training.controls import Control
from training.data import INDEX, Cache, files_of, read_cache
from training.hashes import hash_data
from training.inputs import code_of
from training.methods import NotPossible, load_method, method_names, reads_of
from training.runs import write_json

FOLDER = DATA / "studies/riddle"
ALL, PEEKING = "all", "peeking"


class Case(NamedTuple):
    """A method with some faults, and whether held-out images choose."""

    method: str
    name: str
    settings: Block
    peeking: bool = False


def faults_of(method: str) -> tuple[str, ...]:
    """The names that a method's `faults` may hold; none where it has no such setting."""
    field = load_method(method).Settings.model_fields.get("faults")
    return () if field is None else get_args(get_args(field.annotation)[0])


def read_given(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of the command line, VALUE a number, a list or a word.

    Raises UserError for a key that no method has.
    """
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        known = any(key in load_method(method).Settings.model_fields for method in methods)
        if not equals or not known or key == "faults":
            raise UserError(f"--set {pair}: write KEY=VALUE, KEY a setting of {' or '.join(methods)}")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value  # a word
    return given


def cases_of(method: str, given: Mapping[str, Any]) -> tuple[list[Case], list[str]]:
    """What is fitted of a method under these settings, and why a fault is left out.

    Raises UserError where the method without faults does not take them.
    """
    module = load_method(method)
    known = {key: value for key, value in given.items() if key in module.Settings.model_fields}

    def settings(*faults: str) -> Block:
        return module.Settings.model_validate(known | {"faults": faults})

    try:
        plain = settings()
    except ValidationError as error:
        raise UserError(f"--set: {method}: {reason(error)}") from None
    possible, notes = [], []
    for fault in faults_of(method):
        try:
            settings(fault)
            possible.append(fault)
        except ValidationError as error:
            notes.append(f"{method}: {fault} is left out: {reason(error)}")
    cases = [Case(method, NONE, plain), *(Case(method, fault, settings(fault)) for fault in possible)]
    every = settings(*possible)
    cases += [Case(method, ALL, every), Case(method, PEEKING, plain, True)]
    return [*cases, Case(method, f"{ALL}, {PEEKING}", every, True)], notes


def only(cases: list[Case], notes: list[str], faults: Sequence[str] | None) -> tuple[list[Case], list[str]]:
    """Without a fault and with these; of the notes, why a method leaves one of them out. All of it where none is named.

    Raises UserError for a fault that is in no case, with the note that says why.
    """
    if faults is None:
        return cases, notes
    known = dict.fromkeys(case.name for case in cases if case.name != NONE)
    left_out = list[str]()
    for fault in faults:
        why = [note for note in notes if f": {fault} is left out: " in note]
        if fault not in known:
            raise UserError(f"--faults {fault}: {'; '.join(why) or 'name some of ' + ', '.join(known)}")
        left_out += why
    return [case for case in cases if case.name in {NONE, *faults}], left_out


def reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def key_of(case: Case, fold: Fold, seed: int, source: Source, folder: Path = DATA) -> str:
    """What a fit is known by."""
    needs = needs_of(case.method, case.settings)
    files = [*INDEX, *files_of(source.encoder, needs)]
    if needs != reads_of(case.method, case.settings):
        files += riddle.other_labels.files(source.encoder, needs, {}, anew=True)
    with_probe = getattr(case.settings, "with_probe", None)
    methods = [case.method, *([] if with_probe is None else [with_probe.method])]
    identity = {
        "schema": "riddle/1",
        "method": case.method,
        "settings": case.settings.model_dump(mode="json"),
        "fold": fold._asdict(),
        "seed": seed,
        "inputs": hash_data(folder, files, source.buckets),
        "device": source.device.type,
        "bf16": has_bf16(source.device),
        "code": code_of(Path(riddle.__file__), methods, needs, Control()),
    }
    return sha256(canonical_json(identity))


def answers(cache: Cache, case: Case, fold: Fold, seed: int, source: Source) -> Answers:
    """Of a fit that is there, or made now."""
    path = FOLDER / "fits" / f"{key_of(case, fold, seed, source)}.json"
    if not path.is_file():
        made = cross_fit(cache, case.method, case.settings, fold, seed, source)
        write_json(path, {"method": case.method, "case": case.name, **made._asdict()})
    found = json.loads(path.read_text(encoding="utf-8"))
    return Answers(**{name: found[name] for name in Answers._fields})


def tell(cache: Cache, cases: Sequence[Case], folds: int, seeds: int, source: Source) -> tuple[list[Told], list[str]]:
    """What all cases say, and which of them cannot be fitted on this data."""
    told, notes, out, y = list[Told](), list[str](), set[str](), cache.y.numpy()
    with tqdm(total=len(cases) * seeds * folds, desc="riddle", unit="fit") as progress:
        for case in cases:
            if case.method in out:
                continue
            progress.set_postfix_str(f"{case.method}: {case.name}")
            ordered, shuffled, train = [], [], []
            try:
                for seed in range(seeds):
                    parts = []
                    for number in range(folds):
                        fold = Fold(folds, number, case.peeking)
                        found = answers(cache, case, fold, seed, source)
                        parts.append((held_out(cache, fold).tolist(), found))
                        progress.update()
                    train += [found.train for _, found in parts]
                    ordered.append(joined([(at, found.ordered) for at, found in parts], len(y)) == y)
                    shuffled.append(joined([(at, found.shuffled) for at, found in parts], len(y)) == y)
            except NotPossible as error:
                out |= {case.method} if case.name == NONE else set()  # nothing to compare its faults with
                notes.append(f"{case.method}: {case.name} is left out: {error}")
                continue
            told.append(Told(case.method, case.name, float(np.mean(train)), np.stack(ordered), np.stack(shuffled)))
    return told, notes


def development(cache: Cache) -> Cache:
    """Images of train and val alone."""
    return cache.take(torch.from_numpy(np.flatnonzero(np.isin(cache.split, ("train", "choose", "val")))))


def main() -> None:
    parser = stage_parser(__doc__)
    with_faults = [method for method in method_names() if faults_of(method)]
    known = ", ".join(with_faults)
    parser.add_argument("--methods", nargs="+", choices=with_faults, default=with_faults, metavar="METHOD", help=known)
    said = f"fit without a fault and with these, '{ALL}' and '{PEEKING}' among them (default: every one)"
    parser.add_argument("--faults", nargs="+", metavar="FAULT", help=said)
    parser.add_argument("--encoder", metavar="NAME", help="of `encoders` or `towers` (default: the first encoder)")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="outer folds (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1 (default: 3)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each fit (default: the method's own)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as often as needed")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    arguments = parser.parse_args()
    if arguments.folds < 2 or arguments.seeds < 1:
        raise UserError("--folds, --seeds: cross-fitting takes 2 folds or more, and one seed or more")
    set_up_torch()
    params = load_params(arguments.params)
    encoder = arguments.encoder or next(iter(params.encoders), None)
    if encoder not in params.image_encoders:
        known = ", ".join(params.image_encoders)
        raise UserError(f"--encoder {encoder}: is not in {arguments.params}; name one of {known}")
    pairs = [*arguments.set, *([] if arguments.epochs is None else [f"epochs={arguments.epochs}"])]
    given, cases, notes = read_given(pairs, arguments.methods), list[Case](), list[str]()
    for method in arguments.methods:
        of_method, left_out = cases_of(method, given)
        cases, notes = [*cases, *of_method], [*notes, *left_out]
    cases, notes = only(cases, notes, arguments.faults)
    source = Source(DATA, encoder, params.dataset.buckets, choose_device(arguments.device))
    needs = frozenset[str]().union(*(needs_of(case.method, case.settings) for case in cases))
    cache = development(read_cache(DATA, encoder, source.buckets, needs))
    told, impossible = tell(cache, cases, arguments.folds, arguments.seeds, source)
    if not told:
        raise NotPossible("\n".join(impossible))
    groups = groups_of(read_table(DATA / "index/images.parquet", "index.images/1", ["path", "group", "status"]))
    rows = rows_of(told, cache.y.numpy(), group_numbers(cache.paths, groups))
    command = f"python -m tools.riddle --methods {' '.join(arguments.methods)} --encoder {encoder}"
    command += f" --faults {shlex.join(arguments.faults)}" if arguments.faults else ""
    command += f" --folds {arguments.folds} --seeds {arguments.seeds}" + "".join(f" --set {pair}" for pair in pairs)
    images, classes = counted(len(cache.paths), "image", "images"), len(cache.classes)
    title = f"{command}, code {describe_commit() or 'unknown'}: train and val, {images} of {classes} classes"
    text = as_text(title, rows, [*notes, *impossible])
    write_json(FOLDER / "tables.json", as_json(rows))
    write_text(FOLDER / "tables.txt", text)
    print(text, end="")
    say(f"{FOLDER}: tables.txt and tables.json are written")


if __name__ == "__main__":
    run(main)
