"""Run a grid of encoders, methods, controls, regimes and seeds over the cache, run by run.

Reads   studies.NAME of params.yaml; for each encoder E what training.train reads, and data/embed/E/controls.parquet
        where a control takes its texts from there; data/thumbs/ where a variant has labels.density pixel; the file that
        `development` names.
Writes  data/studies/NAME/RUN/, RUN being ENCODER.METHOD.CONTROL.REGIME.SEED: metrics.json (of train and val: test is
        for evaluation.compare), predictions.parquet (every logit of every image), config.json (settings, what was
        chosen, fingerprints of what was read and of the run itself), timing.json. Where settings come from development
        classes, `development` in the seed's place holds what was tried and chosen.
Costs   processor time only. Every process (--jobs) has one thread, so that figures do not depend on how many there are,
        and holds the cache of one encoder at a time.

A run appears whole or not at all, and one that is there under the same fingerprint (settings, control, regime, seed,
the cache's fingerprints, the code that made it) is not made again: a killed study goes on where it was. Methods that
draw nothing run once a control and regime, unless those draw. A method has no run under a control that changes nothing
it reads (READS in its module): its plain run stands for it. Fit is told no label of a test image.

METHOD may be the name of one of `variants`: a method with `settings` other than those of train.methods, with nodes
labelled by other `labels` than those on disk, made anew in memory, or with the nodes of other encoders beside its own
(`also`). `questions` and `open` are for evaluation.compare.

Few-shot (`shots`) leaves nothing to choose settings by, so they come from other classes, those of `development` or,
where that is null, one in five, drawn by train.seed. On these, each point of a method's grid is fitted SEARCH_DRAWS
times with as many shots, and scored on the training and val images that the draw leaves over (val alone is too few: on
cub100's 40 it chose a strength with which the probe lost 8 points on the other classes); the best mean is kept, and the
median of the epochs that were best. The runs have the remaining classes only, without those of `left_out`: classes that
an encoder has seen with their texts say nothing of few images.

    python -m evaluation.study --name baselines
"""

import ast
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from fieldmark.command import UserError, run, stage_parser
from fieldmark.labels.labelling import read_reference
from fieldmark.labels.pixels import pixel_density
from fieldmark.params import NAME, Block, Count, Labels, Params, load_params
from fieldmark.store import canonical_json, fingerprint, read_buckets, read_folder_header, read_table, sha256
from training.controls import Control, apply_control, read_materials, relabel
from training.data import SPLITS, Cache, check_origins, read_cache
from training.layers.logistic import assess
from training.loop import predict, set_up_torch
from training.methods import load_method, read_settings, require_others, search_points, single_points
from training.metrics import (
    calibration_error,
    class_accuracy,
    fit_temperature,
    log_loss,
    tier_accuracy,
    tiers,
    top_k_accuracy,
)
from training.regimes import Full, Regime, Shots, Unseen, apply_regime, hide_test, read_classes, restrict_classes
from training.train import SCHEMA, predictions_table, read_block, read_control, read_regime, write_json

DEVELOPMENT_SHARE = 5  # one class in five, where no file names them
SEARCH_DRAWS = 5
TRAINING = Path(__file__).parents[1] / "training"
# What a control changes, in the words of a method's READS. An owner of a concept that is replaced goes with it.
CHANGED = {
    "none": frozenset[str](),
    "edges_removed": frozenset({"edges"}),
    "edges_rewired": frozenset({"edges"}),
    "random_vectors": frozenset({"names", "concepts", "labels"}),
    "unrelated_texts": frozenset({"concepts", "labels"}),
    "random_descriptors": frozenset({"concepts", "labels"}),
    "owners_permuted": frozenset({"owners"}),
}
FEWER_CONCEPTS = frozenset({"concepts", "labels"})  # what `concepts: M` of a control changes


class Variant(Block):
    """One method with other settings than train.methods has, maybe with other labels than those on disk.

    `also` names encoders or towers whose nodes it reads beside those of the run's own encoder.
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


class Study(Block):
    encoders: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    variants: dict[str, Variant] = Field(default={})
    questions: list[Question] = Field(default=[])
    open: list[Open] = Field(default=[])
    controls: Annotated[list[Control], Field(min_length=1)] = Field(default=[Control()])
    regimes: Annotated[list[Regime], Field(min_length=1)] = Field(default=[Full()])
    seeds: Count = 5
    declared_test: bool = False
    development: str | None = None
    left_out: str | None = None


class Cell(NamedTuple):
    """One run. `draw` is the seed of its control and regime, 0 where neither draws; `method` may name a variant."""

    encoder: str
    control: Control
    regime: Regime
    draw: int
    method: str
    seed: int

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
    source: str  # the sha256 of the code that makes its runs
    variation: Variation = PLAIN
    reads: dict[str, str] = field(default_factory=dict)  # the fingerprints of what the variation reads


@dataclass(frozen=True, eq=False)
class Plan:
    """A study, checked: what every process needs to know of it."""

    name: str
    study: Study
    data: Path
    buckets: int
    entries: dict[str, Entry]  # the study's methods and variants, in its order
    control_source: str  # of the code of controls, which label anew too
    development: tuple[str, ...]  # class_ids that few-shot settings come from
    left_out: tuple[str, ...]  # class_ids that few-shot runs do without
    origins: dict[str, dict[str, str]]  # by encoder: the fingerprints of its cache, and of control texts that are read

    @property
    def folder(self) -> Path:
        return self.data / "studies" / self.name

    def searched(self, cell: Cell) -> bool:
        """Whether its settings come from development classes."""
        return isinstance(cell.regime, Shots)

    def reads(self, cell: Cell, changed: frozenset[str]) -> bool:
        """Whether its method looks at any of what is changed."""
        return bool(changed & load_method(self.entries[cell.method].method).READS)

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What the outcome of a run follows from, the cache apart."""
        entry = self.entries[cell.method]
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
            "source": entry.source,
            "control_source": self.control_source if cell.control != Control() or entry.variation.labels else None,
        }

    def read_by(self, cell: Cell) -> dict[str, str]:
        """The fingerprints of what its run reads."""
        return self.origins[cell.encoder] | self.entries[cell.method].reads

    def search_mark(self, cell: Cell) -> str:
        return fingerprint("study.search/1", self.identity(cell), list(self.read_by(cell).values()))

    def mark(self, cell: Cell) -> str:
        seeds = {"seed": cell.seed, "draw": cell.draw}
        return fingerprint(SCHEMA, self.identity(cell) | seeds, list(self.read_by(cell).values()))


def read_study(path: str, params: Params, name: str) -> Study:
    """studies.NAME of params.yaml. Raises UserError naming file and key."""
    if name not in params.studies:
        known = ", ".join(params.studies) or "none yet"
        raise UserError(f"{path}: studies: has no {name!r}; choose one of: {known}; or add it")
    if not NAME.fullmatch(name):
        raise UserError(f"{path}: studies.{name}: is used as a folder name; use lower-case letters, digits, - and _")
    given = dict(params.studies[name])
    of_list: dict[str, Callable[[str, str, Any], Block]] = {
        "controls": read_control,
        "regimes": read_regime,
        "questions": partial(read_block, model=Question),
        "open": partial(read_block, model=Open),
    }
    for key, read in of_list.items():
        if isinstance(given.get(key), list):
            given[key] = [read(path, f"studies.{name}.{key}.{n}", one) for n, one in enumerate(given[key])]
    study = read_block(path, f"studies.{name}", given, Study)
    methods = sorted(file.stem for file in (TRAINING / "methods").glob("[a-z]*.py"))
    entries = [*study.methods, *study.variants]
    named_there: list[tuple[str, str, Collection[str]]] = [
        *(("encoders", one, params.encoders) for one in study.encoders),
        *(("methods", one, methods) for one in study.methods),
        *((f"variants.{variant}.method", block.method, methods) for variant, block in study.variants.items()),
        *(
            (f"variants.{variant}.also", one, params.image_encoders)
            for variant, block in study.variants.items()
            for one in block.also
        ),
        *((f"questions.{n}.of", question.of, entries) for n, question in enumerate(study.questions)),
        *((f"questions.{n}.against", question.against, entries) for n, question in enumerate(study.questions)),
    ]
    for key, one, there in named_there:
        if one not in there:
            raise UserError(f"{path}: studies.{name}.{key}: {one!r} is not there; choose from: {', '.join(there)}")
    for variant in study.variants:
        if variant in methods or not NAME.fullmatch(variant):
            what = "is a method's name" if variant in methods else "is used as a folder name"
            remedy = "choose another" if variant in methods else "use lower-case letters, digits, - and _"
            raise UserError(f"{path}: studies.{name}.variants.{variant}: {what}; {remedy}")
    labels = {
        "encoders": study.encoders,
        "methods": study.methods,
        "controls": [control.label for control in study.controls],
        "regimes": [regime.label for regime in study.regimes],
    }
    for key, named in labels.items():
        for one in named:
            if named.count(one) > 1:
                raise UserError(f"{path}: studies.{name}.{key}: holds {one} more than once; remove one")
    return study


def make_plan(path: str, params: Params, name: str, data: Path) -> Plan:
    """Check everything that can be checked before the first run. Raises UserError."""
    study = read_study(path, params, name)
    entries = {
        method: read_method(path, params, f"train.methods.{method}", Variant(method=method), data)
        for method in study.methods
    }
    for variant, block in study.variants.items():
        entries[variant] = read_method(path, params, f"studies.{name}.variants.{variant}", block, data)
    origins = {encoder: check_origins(data, encoder, params.dataset.buckets) for encoder in study.encoders}
    for encoder, marks in origins.items():
        for control in study.controls:
            if control != Control():
                marks |= read_materials(data, encoder, control, params.dataset.buckets).fingerprints
    few_shot = any(isinstance(regime, Shots) for regime in study.regimes)
    left_out, development = few_shot_classes(study, data, params.train.seed) if few_shot else ((), ())
    control_source = source_mark(TRAINING / "controls.py")
    return Plan(name, study, data, params.dataset.buckets, entries, control_source, development, left_out, origins)


def read_method(path: str, params: Params, key: str, variant: Variant, data: Path) -> Entry:
    """A method with the settings of train.methods (or its defaults), changed by the variant that stands under `key`.

    Raises UserError naming file and key, or the thumbnails that its labels read and that are missing.
    """
    method, module = variant.method, load_method(variant.method)
    settings = read_settings(path, params, method) if method in params.train.methods else module.Settings()
    if variant.settings:
        changed = merge(settings.model_dump(), variant.settings)
        settings = read_block(path, f"{key}.settings", changed, module.Settings)
    points = search_points(settings)
    if points > params.train.budget:
        raise UserError(
            f"{path}: {key}: val would choose among {points} settings, and train.budget allows"
            f" {params.train.budget} to each method; shorten its lists"
        )
    reads: dict[str, str] = {}
    if variant.also:
        require_others(path, f"{key}.also", method)
    for other in variant.also:
        name = f"embed/{other}/images"
        reads[name] = read_folder_header(data / name, "embed.nodes/1", params.dataset.buckets).fingerprint
    if variant.labels:
        labels = read_block(path, f"{key}.labels", variant.labels, Labels)
        if "labels" not in module.READS:
            raise UserError(f"{path}: {key}.labels: {method} reads no labels; remove it")
        if labels.inside_object:
            raise UserError(f"{path}: {key}.labels.inside_object: no study can label nodes so; remove it")
        if labels.density == "pixel":
            reads["thumbs"] = read_folder_header(data / "thumbs", "thumbs/1", params.dataset.buckets).fingerprint
    source = source_mark(TRAINING / "methods" / f"{method}.py")
    variation = Variation(tuple(sorted(variant.labels.items())), tuple(variant.also))
    return Entry(method, settings, source, variation, reads)


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with these changes; in a block of settings, what the changes do not name stays."""
    merged = dict(settings)
    for name, value in changes.items():
        within = isinstance(value, dict) and isinstance(settings.get(name), dict)
        merged[name] = merge(settings[name], value) if within else value
    return merged


def few_shot_classes(study: Study, data: Path, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that few-shot runs leave out, and those that their settings come from.

    Both are what their file names; without a file none is left out, and of the others one in DEVELOPMENT_SHARE is
    drawn for settings.
    """
    ids = read_table(data / "index/classes.parquet", "index.classes/1")["class_id"].to_pylist()
    left_out = set(read_classes(study.left_out, ids)) if study.left_out is not None else set()
    others = [class_id for class_id in ids if class_id not in left_out]
    if study.development is None:
        if len(others) < 4:
            raise UserError(f"{study.left_out or data / 'index'}: leaves {len(others)} classes, few-shot runs take 4")
        order = sorted(others, key=lambda class_id: sha256(f"{seed} {class_id}"))
        found = set(order[: max(2, len(others) // DEVELOPMENT_SHARE)])
    else:
        found = set(read_classes(study.development, ids))
    both = sorted(found & left_out)
    if both:
        raise UserError(f"{study.development}: names {both[0]}, which {study.left_out} leaves out; remove it from one")
    if len(found) < 2 or len(others) - len(found) < 2:
        raise UserError(
            f"{study.development}: names {len(found)} of {len(others)} classes; it takes 2, and 2 others to report on"
        )
    return tuple(sorted(left_out)), tuple(sorted(found))


def source_mark(file: Path) -> str:
    """One sha256 for a module and every module of training/ that it, or this one, imports, directly or not."""
    found: dict[Path, str] = {}
    waiting = [file, *(TRAINING / f"{name}.py" for name in ("data", "loop", "regimes"))]
    while waiting:
        source = waiting.pop()
        if source in found or not source.is_file():
            continue
        text = source.read_text(encoding="utf-8")
        found[source] = sha256(text)
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                package, *inside = name.split(".")
                if package == "training" and inside:
                    place = TRAINING.joinpath(*inside)
                    waiting += [place.with_suffix(".py"), place / "__init__.py"]
    return sha256(canonical_json({str(source.relative_to(TRAINING)): mark for source, mark in found.items()}))


def control_draws(control: Control) -> bool:
    """Whether another seed makes another cache of it."""
    drawn = ("edges_rewired", "random_vectors", "unrelated_texts", "owners_permuted")
    return control.name in drawn or control.concepts is not None


def regime_draws(regime: Regime) -> bool:
    """Whether another seed makes another cache of it. Unseen classes are the same in all runs: so are their images."""
    return not isinstance(regime, Full | Unseen)


def draws(control: Control, regime: Regime) -> bool:
    """Whether runs with another seed see another cache."""
    return control_draws(control) or regime_draws(regime)


def changed_by(control: Control) -> frozenset[str]:
    """What a control changes, in the words of a method's READS."""
    return CHANGED[control.name] | (FEWER_CONCEPTS if control.concepts is not None else frozenset())


def cells(plan: Plan, first_seed: int) -> list[Cell]:
    """Every run of a study, those that share a cache, a control and a regime's draw behind each other.

    Runs that a control cannot change are left out.
    """
    found = []
    every = range(first_seed, first_seed + plan.study.seeds)
    # Those that read the same stand together.
    names = sorted(plan.entries, key=lambda name: repr(plan.entries[name].variation))
    for encoder in plan.study.encoders:
        for control in plan.study.controls:
            for regime in plan.study.regimes:
                drawn = draws(control, regime)
                for draw in every if drawn else [0]:
                    for name in names:
                        seeded = load_method(plan.entries[name].method).SEEDED
                        seeds = [draw] if drawn else every if seeded else every[:1]
                        found += [Cell(encoder, control, regime, draw, name, seed) for seed in seeds]
    return [cell for cell in found if cell.control == Control() or plan.reads(cell, changed_by(cell.control))]


# What a process makes of a cell. Caches are remembered for the cells that follow.


@lru_cache(maxsize=1)
def base_cache(data: Path, encoder: str, buckets: int, also: tuple[str, ...]) -> Cache:
    return read_cache(data, encoder, buckets, also)


@lru_cache(maxsize=1)
def controlled_cache(
    data: Path, encoder: str, buckets: int, control: Control, draw: int, variation: Variation
) -> Cache:
    """The cache under a control, its nodes labelled with a variation's settings in the place of those on disk."""
    cache, labels = base_cache(data, encoder, buckets, variation.also), variation.labels
    if control == Control() and not labels:
        return cache
    materials = read_materials(data, encoder, control, buckets)
    if not labels:
        return apply_control(cache, control, draw, materials)
    settings = Labels.model_validate(materials.labels.model_dump() | dict(labels))
    reference = read_reference(data / f"embed/{encoder}/images", data / "index/images.parquet", buckets, settings)
    if dict(labels).get("density") == "pixel":
        cache = replace(cache, density=read_pixels(data, buckets, cache))
    materials = replace(materials, labels=settings, reference=reference)
    controlled = apply_control(cache, control, draw, materials)
    # A control that replaces texts has labelled anew already.
    return relabel(controlled, materials) if controlled.bank.K is cache.bank.K else controlled


def read_pixels(data: Path, buckets: int, cache: Cache) -> Tensor:
    """Density (n V, N+1) by entropy of pixels of a cache's nodes, from data/thumbs."""
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "image_id"])
    of_path = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    image_ids = [of_path[path] for path in cache.paths for _ in range(cache.views)]
    thumbs = read_buckets(data / "thumbs", "thumbs/1", buckets)
    return torch.from_numpy(pixel_density(thumbs, image_ids, cache.boxes.numpy()))


class Prepared(NamedTuple):
    told: Cache  # what fit gets: the training images of the regime's draw, val unless it is few-shot, no test
    whole: Cache  # what is predicted: all images and the truth, with the splits that are reported


@lru_cache(maxsize=1)
def prepare(plan: Plan, encoder: str, control: Control, regime: Regime, draw: int, variation: Variation) -> Prepared:
    """The two caches that cells of one encoder, control, regime, draw and variation share."""
    whole = controlled_cache(plan.data, encoder, plan.buckets, control, draw, variation)
    if isinstance(regime, Shots):
        apart = {*plan.development, *plan.left_out}
        whole = restrict_classes(whole, [name for name in whole.classes if name not in apart])
    # A control may draw where the regime does not: its splits stay those of the plain run.
    told = apply_regime(whole, regime, draw if regime_draws(regime) else 0)
    # Few-shot fits get no val image, so that these may be reported like test images.
    shown = told
    if isinstance(regime, Shots):
        shown = replace(told, split=np.where(whole.split == "val", "val", told.split))
    return Prepared(hide_test(told), shown)


def make_run(plan: Plan, cell: Cell) -> None:
    """Fit, predict and write one run."""
    started = perf_counter()
    entry = plan.entries[cell.method]
    told, whole = prepare(plan, *cell[:4], entry.variation)
    module, settings = load_method(entry.method), entry.settings
    if plan.searched(cell):
        chosen = json.loads((plan.folder / cell.search / "config.json").read_text(encoding="utf-8"))
        settings = module.Settings.model_validate(chosen["settings"])
    prepared = perf_counter()
    fitted = module.fit(told, settings, cell.seed)
    fit = perf_counter()
    logits = predict(fitted.model, whole, torch.arange(len(whole.paths))).numpy()
    predicted = perf_counter()
    config = {
        "fingerprint": plan.mark(cell),
        **plan.identity(cell),
        "settings": settings.model_dump(),
        "seed": cell.seed,
        "draw": cell.draw,
        "chosen": fitted.chosen,
        "classes": whole.classes,
        "fingerprints": plan.read_by(cell),
    }
    metadata = {
        "schema": SCHEMA,
        "fingerprint": plan.mark(cell),
        "params": canonical_json({"classes": whole.classes}),
    }
    table = predictions_table({cell.seed: logits}, whole).replace_schema_metadata(metadata)
    timing = {
        "epoch_seconds": fitted.epoch_seconds,
        "prepare_seconds": prepared - started,
        "fit_seconds": fit - prepared,
        "predict_seconds": predicted - fit,
    }

    def write(folder: Path) -> None:
        write_json(folder / "metrics.json", measure_run(logits, whole))
        pq.write_table(table, folder / "predictions.parquet", compression="zstd")
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", timing)

    write_folder(plan.folder / cell.run, write)


def measure_run(logits: np.ndarray, cache: Cache) -> dict[str, Any]:
    """metrics.json: what the logits (n, C) are worth on train and val; a split without images has its count only.

    The temperature is fitted on val, so that what is left of the calibration error compares methods whose logits have
    different scales. Few, medium and many are thirds of the classes by their training images.
    """
    y = cache.y.numpy()
    chosen = {split: cache.split == split for split in SPLITS}
    tier = tiers(np.bincount(y[chosen["train"]], minlength=len(cache.classes)), limits=None)
    metrics: dict[str, Any] = {split: {"images": int(chosen[split].sum())} for split in SPLITS}
    val = chosen["val"]
    temperature = fit_temperature(logits[val], y[val]) if val.any() else None
    for split in SPLITS[:2]:
        z, truth = logits[chosen[split]], y[chosen[split]]
        if not len(truth):
            continue
        within = class_accuracy(z, truth)
        metrics[split] |= {
            "accuracy": float((z.argmax(1) == truth).mean()),
            "macro_accuracy": float(np.nanmean(within)),
            "top5_accuracy": top_k_accuracy(z, truth, 5),
            "log_loss": log_loss(z, truth),
            "calibration_error": calibration_error(z, truth),
            "scaled_calibration_error": None if temperature is None else calibration_error(z / temperature, truth),
            "tiers": tier_accuracy(z, truth, tier),
            "classes": {name: rate for name, rate in zip(cache.classes, within.tolist(), strict=True) if rate == rate},
        }
    return {**metrics, "temperature": temperature}


def make_search(plan: Plan, cell: Cell) -> None:
    """Choose a method's settings for a number of shots on development classes, and write what was tried."""
    started = perf_counter()
    entry = plan.entries[cell.method]
    module, points = load_method(entry.method), single_points(entry.settings)
    tried: list[list[dict[str, float]]] = [[] for _ in points]
    for draw in range(SEARCH_DRAWS):
        control_seed = draw if control_draws(cell.control) else 0
        whole = controlled_cache(plan.data, cell.encoder, plan.buckets, cell.control, control_seed, entry.variation)
        few = restrict_classes(whole, plan.development)
        drawn = apply_regime(few, cell.regime, draw)
        told = hide_test(replace(drawn, split=np.where(drawn.split == "unused", "val", drawn.split)))
        val = told.images("val")
        for point, found in zip(points, tried, strict=True):
            fitted = module.fit(told, point, draw)
            accuracy, loss = assess(predict(fitted.model, told, val), told.y[val])
            found.append({"accuracy": accuracy, "log_loss": loss, "epoch": float(fitted.chosen.get("epoch", 0))})
    scores = [(fmean(row["accuracy"] for row in rows), -fmean(row["log_loss"] for row in rows)) for rows in tried]
    best = max(range(len(points)), key=lambda number: scores[number])
    settings = points[best].model_dump()
    if "epochs" in settings:
        settings["epochs"] = round(median(row["epoch"] for row in tried[best]))
    config = {
        "fingerprint": plan.search_mark(cell),
        **plan.identity(cell),
        "settings": settings,
        "tried": [{"settings": point.model_dump(), "draws": rows} for point, rows in zip(points, tried, strict=True)],
        "fingerprints": plan.read_by(cell),
    }

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", {"total_seconds": perf_counter() - started})

    write_folder(plan.folder / cell.search, write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then rename it: a reader sees the old one, the new one, or none."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


# The grid.


def is_made(folder: Path, mark: str) -> bool:
    """Whether a run is there, and was made as it would be now."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["fingerprint"] == mark)
    except FileNotFoundError:
        return False


def run_study(plan: Plan, grid: list[Cell], jobs: int) -> int:
    """Make every run of the grid that is not there yet; returns how many. Raises UserError."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock(plan), worker_pool(plan, jobs) as map_batches:
        for partial in plan.folder.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(partial)
        by_search = {cell.search: cell for cell in grid if plan.searched(cell)}
        searches = [c for c in by_search.values() if not is_made(plan.folder / c.search, plan.search_mark(c))]
        runs = [cell for cell in grid if not is_made(plan.folder / cell.run, plan.mark(cell))]
        with tqdm(total=len(searches) + len(runs), desc=plan.name, unit="run", disable=None) as bar:
            for work, missing in ((make_search, searches), (make_run, runs)):
                batches = [list(batch) for _, batch in groupby(missing, shared)]
                if work is make_search:
                    batches = [[cell] for cell in missing]
                for made in map_batches(work, batches):
                    bar.update(made)
    return len(runs)


def shared(cell: Cell) -> tuple[Any, ...]:
    """What cells of one batch have in common: a draw, or where nothing is drawn a method, of which seeds differ."""
    return *cell[:4], None if draws(cell.control, cell.regime) else cell.method


@contextmanager
def lock(plan: Plan) -> Iterator[None]:
    """Keep a second process from the same study. Raises UserError where one is at it."""
    with open(plan.folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{plan.folder}: another process is running this study; wait for it or stop it") from None
        yield


Work = Callable[[Plan, Cell], None]
MapBatches = Callable[[Work, list[list[Cell]]], Iterator[int]]


@contextmanager
def worker_pool(plan: Plan, jobs: int) -> Iterator[MapBatches]:
    """How to work through batches of cells, here or in `jobs` processes; it yields the size of each batch done."""
    if jobs == 1:
        start_worker(plan)
        yield lambda work, batches: (work_through(work, batch) for batch in batches)
        return
    executor = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(plan,)
    )

    def map_batches(work: Work, batches: list[list[Cell]]) -> Iterator[int]:
        futures = [executor.submit(work_through, work, batch) for batch in batches]
        for future in as_completed(futures):
            yield future.result()

    try:
        yield map_batches
    except BrokenProcessPool:
        raise UserError(
            f"{plan.folder}: a process was killed, most likely for want of memory; what is finished is kept: run it"
            f" again with fewer than --jobs {jobs}"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


worker_plan: Plan  # of this process: caches are remembered by it


def start_worker(plan: Plan) -> None:
    """One thread, the same bits each time, and an end when the study is killed or interrupted."""
    global worker_plan
    worker_plan = plan
    torch.set_num_threads(1)
    set_up_torch()
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def work_through(work: Work, batch: list[Cell]) -> int:
    for cell in batch:
        try:
            work(worker_plan, cell)
        except MemoryError:
            raise UserError(f"{cell.run}: does not fit into memory; run it again with --jobs 1") from None
    return len(batch)


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    parser.add_argument("--name", required=True, help="a name under `studies` in params.yaml")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: it takes at least 1")
    params = load_params(arguments.params)
    plan = make_plan(arguments.params, params, arguments.name, Path(arguments.data))
    grid = cells(plan, params.train.seed)
    made = run_study(plan, grid, arguments.jobs)
    print(f"{plan.folder}: {made} runs made, {len(grid) - made} were there")


if __name__ == "__main__":
    run(main)
