"""Run a grid of encoders, methods, controls, regimes and seeds over the cache, run by run.

Reads   studies/NAME.yaml; for each encoder what its runs read (training/inputs.py), and data/embed/E/controls.parquet
        where a control takes its texts from there; data/thumbs/ where a variant has labels.density pixel; the file that
        `development` names.
Writes  data/studies/NAME/RUN/, RUN being ENCODER.METHOD.CONTROL.REGIME.SEED: metrics.json (of train and val: test is
        for evaluation.compare), predictions.parquet (every logit of every image), config.json (settings, what was
        chosen, the sha256 of what was read and of the run itself), timing.json. Where settings come from development
        classes, `development` in the seed's place holds what was tried and chosen. Where a method cannot work on this
        data, config.json stands alone and says why (`not_possible`).
Costs   processor time only. Every process (--jobs) has one thread, so that figures do not depend on how many there are,
        and holds the cache of one encoder at a time.

A run appears whole or not at all, and one that is there under the same identity (settings, control, regime, seed, the
sha256 of the files that it reads and of the code that it executes) is not made again: a killed study goes on where it
was. Methods that draw nothing run once a control and regime, unless those draw. A method has no run under a control
that changes nothing it reads (READS in its module): its plain run stands for it. Fit is told no label of a test image.

METHOD may be the name of one of `variants`: a method with other `settings`, with nodes labelled by other `labels` than
those on disk, made anew in memory, or with other encoders beside its own (`also`). `questions` and `open` are for
evaluation.compare.

Few-shot (`shots`) leaves nothing to choose settings by, so they come from other classes, those of `development` or,
where that is null, one in five, drawn by train.seed. On these, each point of a method's grid is fitted SEARCH_DRAWS
times with as many shots, and scored on the training and val images that the draw leaves over (val alone is too few: on
cub100's 40 it chose a strength with which the probe lost 8 points on the other classes); the best mean is kept, and the
median of the epochs that were best. The runs have the remaining classes only, without those of `left_out`: classes that
an encoder has seen with their texts say nothing of few images.

    python -m evaluation.study --name baselines
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.plan import Cell, Plan, Variation, cells, make_plan
from fieldmark.command import UserError, run, stage_parser
from fieldmark.labels.pixels import pixel_density
from fieldmark.params import Block, load_params
from fieldmark.store import read_buckets, read_table
from training.controls import Control, Request, apply_control
from training.data import SPLITS, Cache, read_cache
from training.data.boxes import Boxes
from training.data.labels import Labels
from training.layers.logistic import assess
from training.loop import predict, set_up_torch
from training.methods import NotPossible, load_method, reads_of, single_points
from training.metrics import (
    calibration_error,
    class_accuracy,
    fit_temperature,
    log_loss,
    tier_accuracy,
    tiers,
    top_k_accuracy,
)
from training.regimes import Regime, Shots, hide_test, restrict_classes
from training.relabelling import read_labelling, relabel
from training.runs import write_json, write_predictions

SEARCH_DRAWS = 5


# What a process makes of a cell. Caches are remembered for the cells that follow.


@lru_cache(maxsize=1)
def base_cache(plan: Plan, encoder: str, variation: Variation) -> Cache:
    """All that the runs of an encoder and a variation read."""
    needs, also_reads = plan.reads_of(encoder, variation)
    return read_cache(plan.data, encoder, plan.buckets, needs, variation.also, also_reads)


@lru_cache(maxsize=1)
def controlled_cache(plan: Plan, encoder: str, control: Control, draw: int, variation: Variation) -> Cache:
    """The cache under a control, its nodes labelled with a variation's settings in the place of those on disk."""
    cache, labels = base_cache(plan, encoder, variation), dict(variation.labels)
    if labels.get("density") == "pixel":
        cache = cache.change(Labels, density=read_pixels(plan.data, plan.buckets, cache))
    generator = torch.Generator().manual_seed(draw)
    request = Request(control, plan.data, encoder, plan.buckets, generator, labels)
    controlled = apply_control(cache, request)
    # A control that replaces texts has labelled anew already.
    if not labels or control.afterwards({"labels"}):
        return controlled
    return relabel(controlled, read_labelling(plan.data, encoder, plan.buckets, labels))


def read_pixels(data: Path, buckets: int, cache: Cache) -> Tensor:
    """Density (n V, N+1) by entropy of pixels of a cache's nodes, from data/thumbs."""
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "image_id"])
    of_path = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    image_ids = [of_path[path] for path in cache.paths for _ in range(cache.views)]
    thumbs = read_buckets(data / "thumbs", "thumbs/1", buckets)
    return torch.from_numpy(pixel_density(thumbs, image_ids, cache.part(Boxes).box.numpy()))


class Prepared(NamedTuple):
    told: Cache  # what fit gets: the training images of the regime's draw, val unless it is few-shot, no test
    whole: Cache  # what is predicted: all images and the truth, with the splits that are reported


@lru_cache(maxsize=1)
def prepare(plan: Plan, encoder: str, control: Control, regime: Regime, draw: int, variation: Variation) -> Prepared:
    """The two caches that cells of one encoder, control, regime, draw and variation share."""
    whole = controlled_cache(plan, encoder, control, draw, variation)
    if isinstance(regime, Shots):
        apart = {*plan.development, *plan.left_out}
        whole = restrict_classes(whole, [name for name in whole.classes if name not in apart])
    # A control may draw where the regime does not: its splits stay those of the plain run.
    told = regime.apply(whole, draw if regime.draws else 0)
    # Few-shot fits get no val image, so that these may be reported like test images.
    shown = told
    if isinstance(regime, Shots):
        shown = replace(told, split=np.where(whole.split == "val", "val", told.split))
    return Prepared(hide_test(told), shown)


@lru_cache(maxsize=1)
def seen_by(
    plan: Plan, encoder: str, control: Control, regime: Regime, draw: int, variation: Variation, reads: frozenset[str]
) -> Prepared:
    """The two caches as a method sees them that reads these parts alone."""
    told, whole = prepare(plan, encoder, control, regime, draw, variation)
    return Prepared(told.only(reads), whole.only(reads))


def make_run(plan: Plan, cell: Cell) -> None:
    """Fit, predict and write one run; where its method cannot work on this data, config.json says why and is alone."""
    started = perf_counter()
    entry = plan.entries[cell.method]
    module, settings = load_method(entry.method), entry.settings
    config = {"fingerprint": plan.mark(cell), **plan.identity(cell), "seed": cell.seed, "draw": cell.draw}
    if plan.searched(cell):
        chosen = json.loads((plan.folder / cell.search / "config.json").read_text(encoding="utf-8"))
        if "not_possible" in chosen:
            write_not_possible(plan.folder / cell.run, config, chosen["not_possible"])
            return
        settings = module.Settings.model_validate(chosen["settings"])
    told, whole = seen_by(plan, *cell[:4], entry.variation, reads_of(entry.method, settings))
    prepared = perf_counter()
    try:
        fitted = module.fit(told, settings, cell.seed)
    except NotPossible as error:
        write_not_possible(plan.folder / cell.run, config, str(error))
        return
    fit = perf_counter()
    logits = predict(fitted.model, whole, torch.arange(len(whole.paths))).numpy()
    predicted = perf_counter()
    config |= {"settings": settings.model_dump(), "chosen": fitted.chosen, "classes": whole.classes}
    timing = {
        "epoch_seconds": fitted.epoch_seconds,
        "prepare_seconds": prepared - started,
        "fit_seconds": fit - prepared,
        "predict_seconds": predicted - fit,
    }

    def write(folder: Path) -> None:
        write_json(folder / "metrics.json", measure_run(logits, whole))
        write_predictions(folder / "predictions.parquet", {cell.seed: logits}, whole, plan.mark(cell))
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", timing)

    write_folder(plan.folder / cell.run, write)


def write_not_possible(folder: Path, config: dict[str, Any], reason: str) -> None:
    write_folder(folder, lambda partial: write_json(partial / "config.json", config | {"not_possible": reason}))


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
    points = single_points(entry.settings)
    config: dict[str, Any] = {"fingerprint": plan.search_mark(cell), **plan.identity(cell)}
    try:
        tried = try_points(plan, cell, points)
    except NotPossible as error:
        write_not_possible(plan.folder / cell.search, config, str(error))
        return
    scores = [(fmean(row["accuracy"] for row in rows), -fmean(row["log_loss"] for row in rows)) for rows in tried]
    best = max(range(len(points)), key=lambda number: scores[number])
    settings = points[best].model_dump()
    if "epochs" in settings:
        settings["epochs"] = round(median(row["epoch"] for row in tried[best]))
    config |= {
        "settings": settings,
        "tried": [{"settings": point.model_dump(), "draws": rows} for point, rows in zip(points, tried, strict=True)],
    }

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", {"total_seconds": perf_counter() - started})

    write_folder(plan.folder / cell.search, write)


def try_points(plan: Plan, cell: Cell, points: list[Block]) -> list[list[dict[str, float]]]:
    """By point of the grid and draw: accuracy and log loss on development images that training left, the best epoch."""
    entry = plan.entries[cell.method]
    module = load_method(entry.method)
    tried: list[list[dict[str, float]]] = [[] for _ in points]
    for draw in range(SEARCH_DRAWS):
        control_seed = draw if cell.control.draws else 0
        whole = controlled_cache(plan, cell.encoder, cell.control, control_seed, entry.variation)
        few = restrict_classes(whole, plan.development)
        drawn = cell.regime.apply(few, draw)
        told = hide_test(replace(drawn, split=np.where(drawn.split == "unused", "val", drawn.split)))
        told = told.only(reads_of(entry.method, entry.settings))
        val = told.images("val")
        for point, found in zip(points, tried, strict=True):
            fitted = module.fit(told, point, draw)
            accuracy, loss = assess(predict(fitted.model, told, val), told.y[val])
            found.append({"accuracy": accuracy, "log_loss": loss, "epoch": float(fitted.chosen.get("epoch", 0))})
    return tried


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
    return *cell[:4], None if cell.control.draws or cell.regime.draws else cell.method


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
    parser.add_argument("--name", required=True, help="a file of studies/, without .yaml")
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
