"""What a study is: its file, checked, and the grid of runs that follows from it.

studies/NAME.yaml names encoders, methods and variants of them, controls, regimes and seeds. `cells` lays them out run
by run; what the outcome of a run follows from is its identity (`Plan.identity`), with the sha256 of every file that it
reads and of every module that it executes: a run under the same identity is not made again.
"""

import difflib
import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from fieldmark.command import UserError
from fieldmark.params import NAME, Block, Count, Labels, Params, read_block, read_yaml
from fieldmark.store import canonical_json, class_id_of, read_table, sha256
from training.controls import Control, read_control
from training.data import CPU, files_of
from training.data.part import word_of
from training.hashes import hash_data
from training.inputs import ROOT, Reading, check_questions, check_told, code_of, reading_of
from training.links import check_links, is_transductive
from training.looks import check_looks
from training.methods import (
    check_also,
    check_texts,
    load_method,
    method_names,
    read_settings,
    reads_of,
    search_points,
)
from training.regimes import Classes, Folds, Full, Regime, Shots, read_classes, read_lines, read_regime

STUDIES = Path("studies")
REFERENCE = "linear_probe"  # what every row of a table is compared with
RIVAL = "rival"  # the row of what a study's `rival` chooses inside folds
DEVELOPMENT_SHARE = 5  # one class in five, where no file names them
MAIN = ROOT / "evaluation/fitting.py"  # what makes a run
FROM_IMAGES = frozenset({"names", "concepts", "owners", "labels"})  # what training images have a say in
# What a run executes besides whose bank or labels are not those on disk.
OTHER_LABELS = ROOT / "evaluation/other_labels.py"


class Variant(Block):
    """One method with other settings than its run in params.yaml has, maybe with other labels than those on disk.

    `also` names encoders or towers that it reads beside the run's own encoder.
    """

    method: str
    also: list[str] = Field(default=[])
    settings: dict[str, Any] = Field(default={})
    labels: dict[str, Any] = Field(default={})


class Question(Block):
    """Whether the method or variant `of` is better than `against`."""

    ask: str
    of: str
    against: str


class Open(Block):
    """A question that the study does not answer."""

    ask: str
    because: str


class Published(Block):
    """What was published of a system, which a row follows."""

    figure: str  # with its data, its backbone, and a tag that says where it was read
    carries_over: str  # why it does, or does not, carry over to frozen features


class Study(Block):
    """A file of studies/. Without `encoders` it is of all that params.yaml has under that name."""

    encoders: Annotated[list[str], Field(min_length=1)] | None = None
    methods: Annotated[list[str], Field(min_length=1)]
    variants: dict[str, Variant] = Field(default={})
    questions: list[Question] = Field(default=[])
    open: list[Open] = Field(default=[])
    published: dict[str, Published] = Field(default={})
    stand_in: list[str] = Field(default=[])
    controls: Annotated[list[Control], Field(min_length=1)] = Field(default=[Control()])
    regimes: Annotated[list[Regime], Field(min_length=1)] = Field(default=[Full()])
    seeds: Count = 5
    declared_test: bool = False
    development: Classes | None = None
    class_seed: int | None = None
    left_out: Classes | None = None
    clean: str | list[str] | None = None
    rival: list[str] = Field(default=[])


RowKey = tuple[str, Control, Regime, str]  # of a table: encoder, control, regime, method


class Cell(NamedTuple):
    """One run. `draw` is the seed of its control and regime, 0 where neither draws, or the number of its fold.

    `method` may name a variant. A fold has one seed, its number.
    """

    encoder: str
    control: Control
    regime: Regime
    draw: int
    method: str
    seed: int

    @property
    def row(self) -> RowKey:
        """What it shares with the runs that differ from it in draw and seed alone."""
        return self.encoder, self.control, self.regime, self.method

    @property
    def search(self) -> str:
        """The folder of what was chosen on development classes."""
        return f"{self.encoder}.{self.method}.{self.control.label}.{self.regime.label}.development"

    @property
    def run(self) -> str:
        """The folder of the run."""
        return f"{self.encoder}.{self.method}.{self.control.label}.{self.regime.label}.{self.seed}"


Overrides = tuple[tuple[str, Any], ...]  # of `labels`: a cache is remembered by them


class Variation(NamedTuple):
    """What a variant reads that is not its encoder's cache as it lies on disk."""

    labels: Overrides = ()
    also: tuple[str, ...] = ()  # other encoders


PLAIN = Variation()


@dataclass(frozen=True)
class Entry:
    """A method as a study runs it, by its own name or as a variant."""

    method: str
    settings: Block
    variation: Variation = PLAIN


@dataclass(frozen=True, eq=False)
class Plan:
    """A study, checked: what every process needs to know of it."""

    name: str
    study: Study
    encoders: tuple[str, ...]
    data: Path
    buckets: int
    entries: dict[str, Entry]  # the study's methods and variants, in its order
    development: tuple[str, ...]  # class_ids that few-shot settings come from
    left_out: tuple[str, ...]  # class_ids that few-shot runs do without
    clean: frozenset[str] | None = None  # paths of the images that are judged; None: all
    device: torch.device = CPU  # what fits and predicts
    # What was found when the study was planned: the sha256 of every file that its runs read, and of their code.
    files: dict[str, str | None] = field(default_factory=dict)
    code: dict[RowKey, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.data / "studies" / self.name

    def is_transductive(self, method: str) -> bool:
        """Whether images that are judged send to each other in runs of that row; of the rival, in any it may be."""
        names = self.study.rival if method == RIVAL else [method]
        return any(is_transductive(self.entries[name].settings) for name in names)

    def searched(self, cell: Cell) -> bool:
        """Whether its settings come from development classes."""
        return isinstance(cell.regime, Shots)

    def reads(self, cell: Cell, changed: frozenset[str]) -> bool:
        """Whether its method looks at any of what is changed."""
        if cell.method == RIVAL:
            return False  # it has no runs under controls
        return looks_at(self.entries[cell.method], changed)

    def anew(self, cell: Cell) -> bool:
        """Whether its bank, and with it labels, are made in memory from the images that its regime shows."""
        return cell.regime != Full() and self.reads(cell, FROM_IMAGES)

    def idle(self) -> dict[str, list[str]]:
        """By control that changes nothing that some entries look at: these."""
        found = {
            control.label: [
                name
                for name, entry in self.entries.items()
                if control.changes and not looks_at(entry, control.changes)
            ]
            for control in self.study.controls
        }
        return {control: names for control, names in found.items() if names}

    def reading(self, cell: Cell) -> Reading:
        """What its run reads."""
        entry = self.entries[cell.method]
        also, labels = entry.variation.also, dict(entry.variation.labels)
        reading = reading_of(entry.method, entry.settings, cell.encoder, also, cell.control, cell.regime)
        needs, files = reading.needs, dict(reading.files)
        anew = self.anew(cell)
        if labels or anew:
            needs |= load_other_labels().needs(reading.reads, anew)
            files |= load_other_labels().files(cell.encoder, reading.reads, labels, anew)
        if self.searched(cell) and "labels" in needs:
            needs |= {"owners"}  # labels are restricted to the classes that are left
        return replace(reading, needs=needs, files=files | files_of(cell.encoder, needs))

    def different_cells(self) -> list[Cell]:
        """One cell for all that differ in draw and seed alone."""
        return list({cell.row: cell for cell in cells(self, 0)}.values())

    def shared_parts(self, encoder: str, also: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
        """The parts that all runs of the same encoders read together: of `encoder`, and of each other one."""
        readings = [
            self.reading(cell)
            for cell in self.different_cells()
            if cell.encoder == encoder and self.entries[cell.method].variation.also == also
        ]
        needs = frozenset[str]().union(*(reading.needs for reading in readings))
        return needs, frozenset[str]().union(*(reading.also_reads for reading in readings))

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What the outcome of a run follows from, its seeds apart."""
        entry, reading = self.entries[cell.method], self.reading(cell)
        left_out = {"left_out": list(self.left_out)} if self.searched(cell) else {}
        return left_out | {
            "encoder": cell.encoder,
            "method": entry.method,
            "control": cell.control.model_dump(),
            "regime": cell.regime.model_dump(),
            "settings": entry.settings.model_dump(),
            "labels": dict(entry.variation.labels),
            "also": list(entry.variation.also),
            "development": list(self.development) if self.searched(cell) else None,
            "files": {path: self.files[path] for path in sorted(reading.files)},
            "code": self.code[cell.row],
        }

    def search_mark(self, cell: Cell) -> str:
        return sha256(canonical_json(["study.search/2", self.identity(cell)]))

    def mark(self, cell: Cell) -> str:
        seeds = {"seed": cell.seed, "draw": cell.draw}
        return sha256(canonical_json(["study.run/2", self.identity(cell) | seeds]))


def looks_at(entry: Entry, changed: frozenset[str]) -> bool:
    """Whether a method looks at any of these parts, in the words of READS: `links` are every NAME of them."""
    reads = reads_of(entry.method, entry.settings)
    return bool(changed & (reads | frozenset(map(word_of, reads))))


def load_other_labels() -> Any:
    """The module behind banks and labels that are not those on disk. By its name: other runs do not execute it."""
    return importlib.import_module(f"evaluation.{OTHER_LABELS.stem}")


def study_names() -> list[str]:
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def read_study(params: Params, name: str) -> Study:
    """studies/NAME.yaml. Raises UserError naming file and key."""
    known = study_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(known) or 'none yet'}"
        raise UserError(f"{STUDIES}/{name}.yaml: is not there; {hint}; or add it")
    path = str(STUDIES / f"{name}.yaml")
    if not NAME.fullmatch(name):
        raise UserError(f"{path}: its name is used as a folder's; use lower-case letters, digits, - and _")
    given = read_yaml(path)
    of_list: dict[str, Callable[[str, str, Any], Block]] = {
        "controls": read_control,
        "regimes": read_regime,
        "questions": partial(read_block, model=Question),
        "open": partial(read_block, model=Open),
    }
    for key, read in of_list.items():
        if isinstance(given.get(key), list):
            given[key] = [read(path, f"{key}.{n}", one) for n, one in enumerate(given[key])]
    study = read_block(path, "", given, Study)
    if study.declared_test and any(isinstance(regime, Folds) for regime in study.regimes):
        raise UserError(f"{path}: declared_test: folds judge train and val, and test stays out; take one of both away")
    check_names(path, params, study)
    return study


def check_names(path: str, params: Params, study: Study) -> None:
    """Raise UserError where a study names what is not there, or one thing twice."""
    methods, entries = method_names(), [*study.methods, *study.variants]
    rows = [*entries, *([RIVAL] if study.rival else [])]
    named_there: list[tuple[str, str, Collection[str]]] = [
        *(("encoders", one, params.image_encoders) for one in study.encoders or []),
        *(("methods", one, methods) for one in study.methods),
        *((f"variants.{variant}.method", block.method, methods) for variant, block in study.variants.items()),
        *(
            (f"variants.{variant}.also", one, params.image_encoders)
            for variant, block in study.variants.items()
            for one in block.also
        ),
        *((f"questions.{n}.of", question.of, rows) for n, question in enumerate(study.questions)),
        *((f"questions.{n}.against", question.against, rows) for n, question in enumerate(study.questions)),
        *((f"stand_in.{n}", row, rows) for n, row in enumerate(study.stand_in)),
        *((f"published.{row}", row, rows) for row in study.published),
        *((f"rival.{n}", one, entries) for n, one in enumerate(study.rival)),
    ]
    for key, one, there in named_there:
        if one not in there:
            raise UserError(f"{path}: {key}: {one!r} is not there; choose from: {', '.join(there)}")
    if study.rival and not all(isinstance(regime, Folds) for regime in study.regimes):
        raise UserError(f"{path}: rival: it is chosen inside folds; take regimes: [{{kind: folds, folds: 5}}] alone")
    for variant in study.variants:
        if variant == RIVAL:
            raise UserError(f"{path}: variants.{variant}: is the name of what `rival` chooses; choose another")
        if variant in methods or not NAME.fullmatch(variant):
            what = "is a method's name" if variant in methods else "is used as a folder name"
            remedy = "choose another" if variant in methods else "use lower-case letters, digits, - and _"
            raise UserError(f"{path}: variants.{variant}: {what}; {remedy}")
    labels = {
        "encoders": study.encoders or [],
        "methods": study.methods,
        "controls": [control.label for control in study.controls],
        "regimes": [regime.label for regime in study.regimes],
    }
    for key, named in labels.items():
        for one in named:
            if named.count(one) > 1:
                raise UserError(f"{path}: {key}: holds {one} more than once; remove one")


def make_plan(path: str, params: Params, name: str, data: Path) -> Plan:
    """Check everything that can be checked before the first run. `path` is the parameters' file. Raises UserError."""
    study, file = read_study(params, name), str(STUDIES / f"{name}.yaml")
    encoders = tuple(study.encoders or params.encoders)
    entries = {
        method: read_entry(path, file, params, f"methods.{method}", Variant(method=method), encoders)
        for method in study.methods
    }
    for variant, block in study.variants.items():
        entries[variant] = read_entry(path, file, params, f"variants.{variant}", block, encoders)
    check_different(file, study, entries)
    few_shot = any(isinstance(regime, Shots) for regime in study.regimes)
    class_seed = params.train.seed if study.class_seed is None else study.class_seed
    left_out, development = few_shot_classes(study, data, class_seed) if few_shot else ((), ())
    clean = None if study.clean is None else read_clean(study.clean, data)
    plan = Plan(name, study, encoders, data, params.dataset.buckets, entries, development, left_out, clean)
    paths, code = set[str](), {}
    mark_code = cache(code_mark)  # many rows run the same code
    for cell in plan.different_cells():
        entry, reading = entries[cell.method], plan.reading(cell)
        key = f"{'variants' if cell.method in study.variants else 'methods'}.{cell.method}"
        check_looks(file, key, params.train.first_looks, reading, cell.regime)
        check_questions(file, key, params.ask, reading, cell.regime)
        check_told(file, key, data, reading, cell.regime)
        paths |= reading.files.keys()
        parts, other_labels = reading.needs | reading.also_reads, bool(entry.variation.labels) or plan.anew(cell)
        code[cell.row] = mark_code(reading.methods, parts, cell.control, other_labels)
    return replace(plan, files=hash_data(data, sorted(paths), plan.buckets), code=code)


def check_different(file: str, study: Study, entries: Mapping[str, Entry]) -> None:
    """No two rows are the same. A variant that names no setting has it from the run of its method in params.yaml."""
    first: dict[str, str] = {}
    for name, entry in entries.items():
        said = canonical_json([entry.method, entry.settings.model_dump(), entry.variation])
        same = first.setdefault(said, name)
        if same != name:
            key = f"{'variants' if name in study.variants else 'methods'}.{name}"
            raise UserError(
                f"{file}: {key}: is {same} once more, for what a variant does not name comes from train.runs of"
                " params.yaml; name what differs there (null turns a part off), or remove one"
            )


def code_mark(methods: tuple[str, ...], parts: frozenset[str], control: Control, other_labels: bool) -> str:
    """One sha256 for all code that a run of a study executes."""
    found = code_of(MAIN, methods, parts, control)
    if other_labels:
        found |= code_of(OTHER_LABELS, methods, parts, control)
    return sha256(canonical_json(found))


def read_entry(
    path: str, file: str, params: Params, key: str, variant: Variant, encoders: Collection[str]
) -> Entry:
    """A method with the settings of the run of its name in params.yaml (or its defaults), changed by the variant.

    `key` is where the variant stands in the study's `file`. Raises UserError naming file and key.
    """
    method, module = variant.method, load_method(variant.method)
    settings = module.Settings()
    if method in params.train.runs and params.train.runs[method].method == method:
        settings = read_settings(path, f"train.runs.{method}", method, params.train.runs[method].settings)
    if variant.settings:
        changed = merge(settings.model_dump(), variant.settings)
        settings = read_block(file, f"{key}.settings", changed, module.Settings)
    points = search_points(settings)
    if points > params.train.budget:
        raise UserError(
            f"{file}: {key}: val would choose among {points} settings, and train.budget allows"
            f" {params.train.budget} to each method; shorten its lists"
        )
    for encoder in encoders:
        check_texts(file, "encoders", params, method, settings, encoder)
    check_also(file, f"{key}.also", method, settings, variant.also)
    check_links(file, key, params.links, reads_of(method, settings))
    if variant.labels:
        labels = read_block(file, f"{key}.labels", variant.labels, Labels)
        if "labels" not in reads_of(method, settings):
            raise UserError(f"{file}: {key}.labels: {method} reads no labels under its settings; remove it")
        if labels.inside_object:
            raise UserError(f"{file}: {key}.labels.inside_object: no study can label nodes so; remove it")
    return Entry(method, settings, Variation(tuple(sorted(variant.labels.items())), tuple(variant.also)))


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with these changes; in a block of settings, what the changes do not name stays."""
    merged = dict(settings)
    for name, value in changes.items():
        within = isinstance(value, dict) and isinstance(settings.get(name), dict)
        merged[name] = merge(settings[name], value) if within else value
    return merged


def few_shot_classes(study: Study, data: Path, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that few-shot runs leave out, and those that their settings come from.

    Both are what their file names, or a share that is drawn: `left_out` of all classes, none where the study names
    none, and `development` of the others, one in DEVELOPMENT_SHARE. Drawn are the first in the order of one hash.
    """
    ids = read_table(data / "index/classes.parquet", "index.classes/2")["class_id"].to_pylist()
    named = set(read_classes(study.development, ids)) if isinstance(study.development, str) else set[str]()
    order = sorted(ids, key=lambda class_id: sha256(f"{seed} {class_id}"))
    if isinstance(study.left_out, str):
        left_out = set(read_classes(study.left_out, ids))
    else:
        free = [class_id for class_id in order if class_id not in named]
        left_out = set(free[: int((study.left_out or 0) * len(ids))])
        if study.left_out and not left_out:
            raise UserError(f"left_out: {study.left_out} of {len(ids)} classes is none; write a larger share")
    others = [class_id for class_id in order if class_id not in left_out]
    if not isinstance(study.development, str):
        if len(others) < 4:
            left = f"left_out: {study.left_out}" if study.left_out else str(data / "index")
            raise UserError(f"{left}: leaves {len(others)} classes, few-shot runs take 4")
        share = study.development or 1 / DEVELOPMENT_SHARE
        found = set(others[: max(2, int(share * len(others)))])
    else:
        found = named
    both = sorted(found & left_out)
    if both:
        raise UserError(f"{study.development}: names {both[0]}, which {study.left_out} leaves out; remove it from one")
    if len(found) < 2 or len(others) - len(found) < 2:
        raise UserError(
            f"development: {study.development} is {len(found)} of {len(others)} classes; it takes 2, and 2 others to"
            " report on"
        )
    return tuple(sorted(left_out)), tuple(sorted(found))


def read_clean(entries: str | Sequence[str], data: Path) -> frozenset[str]:
    """The paths of the images that a study judges, by what any of the entries says.

    An entry is a file that names classes (folder or class_id) or images (path), one a line; `not FILE`, all that the
    file does not name; or the word `val`, what the index has there. Raises UserError for a line that names no image.
    """
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "class_id", "split", "status"])
    rows = [row for row in index.to_pylist() if row["status"] == "ok"]
    of_name: dict[str, set[str]] = {}
    for row in rows:
        of_name.setdefault(row["class_id"], set()).add(row["path"])
    of_name |= {row["path"]: {row["path"]} for row in rows}
    found = set[str]()
    for entry in [entries] if isinstance(entries, str) else entries:
        if entry == "val":
            found |= {row["path"] for row in rows if row["split"] == "val"}
            continue
        file, named = entry.removeprefix("not "), set[str]()
        for number, line in enumerate(read_lines(file), start=1):
            images = of_name.get(line) or of_name.get(class_id_of(line))
            if line and not images:
                remedy = "write a class's folder or class_id, or an image's path"
                raise UserError(f"{file}: line {number}: {line!r} names no image; {remedy}")
            named |= images or set()
        found |= named if entry == file else {row["path"] for row in rows} - named
    return frozenset(found)


def again(plan: Plan) -> str:
    """The remedy, where runs do not fit."""
    return f"run `make study NAME={plan.name}`"


def read_config(plan: Plan, folder: str) -> dict[str, Any]:
    """config.json of a run or of a search (`Cell.run`, `Cell.search`)."""
    found: dict[str, Any] = json.loads((plan.folder / folder / "config.json").read_text(encoding="utf-8"))
    return found


def check_comparable(plan: Plan) -> None:
    """Raise UserError where a study lacks what its rows are compared with, before its runs are made."""
    where = f"studies/{plan.name}.yaml"
    if REFERENCE not in plan.study.methods:
        raise UserError(f"{where}: methods: lacks {REFERENCE}, which the others are compared with; add it")
    if Control() not in plan.study.controls:
        raise UserError(f"{where}: controls: lacks `none`, the runs that a control is compared with; add it")


def cells(plan: Plan, first_seed: int) -> list[Cell]:
    """Every run of a study, those that share a cache, a control and a regime's draw behind each other.

    Runs that a control cannot change are left out.
    """
    found = []
    every = range(first_seed, first_seed + plan.study.seeds)
    # Those that read the same stand together.
    names = sorted(plan.entries, key=lambda name: repr(plan.entries[name].variation))
    for encoder in plan.encoders:
        for control in plan.study.controls:
            for regime in plan.study.regimes:
                drawn = control.draws or regime.draws
                draws = range(regime.folds) if isinstance(regime, Folds) else every if drawn else [0]
                for draw in draws:
                    for name in names:
                        seeded = load_method(plan.entries[name].method).SEEDED
                        seeds = [draw] if drawn else every if seeded else every[:1]
                        found += [Cell(encoder, control, regime, draw, name, seed) for seed in seeds]
    return [cell for cell in found if cell.control == Control() or plan.reads(cell, cell.control.changes)]


def rival_cells(plan: Plan, grid: Sequence[Cell]) -> list[Cell]:
    """The cells of the row `rival`: no runs of their own, but in each fold one of those that the study names."""
    if not plan.study.rival:
        return []
    first = [cell for cell in grid if cell.method == plan.study.rival[0] and cell.control == Control()]
    return [cell._replace(method=RIVAL) for cell in first]
