"""Run a grid of encoders, methods, controls, regimes and seeds over the cache, run by run.

Reads   studies/NAME.yaml; for each encoder what its runs read (training/inputs.py), and data/embed/E/controls.parquet
        where a control takes its texts from there; data/thumbs/ where a variant has labels.density pixel;
        data/concepts/concepts.parquet where a regime hides images from the bank; the files that `development`,
        `left_out` and `clean` name.
Writes  data/studies/NAME/RUN/, RUN being ENCODER.METHOD.CONTROL.REGIME.SEED: metrics.json (of train and val: test is
        for evaluation.compare), predictions.parquet (every logit of every image), config.json (settings, what was
        chosen, the sha256 of what was read and of the run itself), timing.json. Where settings come from development
        classes, `development` in the seed's place holds what was tried and chosen. Where a method cannot work on this
        data, config.json stands alone and says why (`not_possible`).
Costs   time of the processor, or of the GPU that train.device gives. Every process (--jobs) has one thread, so that
        figures do not depend on how many there are, and holds the cache of one encoder at a time. Processes share a
        GPU: one prepares while another trains, and each takes half a GB of its memory beside its cache.

A run appears whole or not at all, and one that is there under the same identity (settings, control, regime, seed, the
sha256 of the files that it reads and of the code that it executes) is not made again: a killed study goes on where it
was. Methods that draw nothing run once a control and regime, unless those draw. A method has no run under a control
that changes nothing it reads (READS in its module): its plain run stands for it. Fit is told no label of a test image.

METHOD may be the name of one of `variants`: a method with other `settings`, with nodes labelled by other `labels` than
those on disk, made anew in memory, or with other encoders beside its own (`also`). `questions` and `open` are for
evaluation.compare.

In `folds` (training/folds.py) a run is a fold: fitted twice, to choose and with what was chosen. Its predictions are of
train and val, those of the fold under split held_out; config.json says how good the first fit is on the images that
chose (`inner`). Whatever a regime hides is hidden from bank and labels too, which are then made in memory.

Few-shot (`shots`) leaves nothing to choose settings by, so they come from other classes, those of `development`: a
file's, or a share of them that train.seed draws, one in five where it is null. On these, each point of a method's grid
is fitted SEARCH_DRAWS times with as many shots, and scored on the training and val images that the draw leaves over
(val alone is too few: on cub100's 40 it chose a strength with which the probe lost 8 points on the other classes); the
least mean log loss chooses the point, and the epoch with it. The runs have the remaining classes only, without those of
`left_out`: classes that an encoder has seen with their texts say nothing of few images.

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
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.fitting import make_run, make_search
from evaluation.plan import Cell, Overrides, Plan, cells, check_comparable, make_plan
from fieldmark.command import UserError, run, stage_parser
from fieldmark.concepts.selection import read_texts
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.labels.splits import read_split
from fieldmark.params import load_params
from fieldmark.store import read_folder_header
from training.control_texts import CONTROL_TEXTS, read_control_texts
from training.data import check_origins
from training.regimes import Folds
from training.relabelling import read_labelling
from training.reselection import CONCEPTS, read_selection


def is_made(folder: Path, mark: str) -> bool:
    """Whether a run is there, and was made as it would be now."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["fingerprint"] == mark)
    except FileNotFoundError:
        return False


def check_inputs(plan: Plan) -> None:
    """Look at what the runs read, before the first one. Raises UserError as reading it would."""
    for encoder in plan.encoders:
        for also in dict.fromkeys(entry.variation.also for entry in plan.entries.values()):
            needs, also_reads = plan.shared_parts(encoder, also)
            check_origins(plan.data, encoder, plan.buckets, needs, also, also_reads)
    texts, labellings, selected, thumbs = set[str](), set[tuple[str, Overrides]](), set[str](), False
    for cell in plan.different_cells():
        reading, labels = plan.reading(cell), plan.entries[cell.method].variation.labels
        if CONTROL_TEXTS.format(cell.encoder) in reading.files:
            texts.add(cell.encoder)
        anew = plan.anew(cell)
        if labels or cell.control.afterwards(reading.reads) or (anew and "labels" in reading.reads):
            labellings.add((cell.encoder, labels))
        if anew:
            selected.add(cell.encoder)
        thumbs |= "thumbs" in reading.files
    for encoder in sorted(texts):
        read_control_texts(plan.data, encoder)
    for encoder in sorted(selected):
        read_selection(plan.data, encoder)
        read_texts(plan.data / CONCEPTS, plan.data / f"embed/{encoder}/text.parquet")
    images = read_split(plan.data / "index/images.parquet", "train") if labellings else {}
    for encoder, labels in labellings:
        read_labelling(plan.data, encoder, plan.buckets, images, dict(labels))
    if thumbs:
        read_folder_header(plan.data / "thumbs", "thumbs/1", plan.buckets)


def run_study(plan: Plan, grid: list[Cell], jobs: int) -> int:
    """Make every run of the grid that is not there yet; returns how many. Raises UserError."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock(plan), worker_pool(plan, jobs) as map_batches:
        for partial in plan.folder.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(partial)
        by_search = {cell.search: cell for cell in grid if plan.searched(cell)}
        searches = [c for c in by_search.values() if not is_made(plan.folder / c.search, plan.search_mark(c))]
        runs = [cell for cell in grid if not is_made(plan.folder / cell.run, plan.mark(cell))]
        if searches or runs:
            check_inputs(plan)
        with tqdm(total=len(searches) + len(runs), desc=plan.name, unit="run") as bar:
            for work, missing in ((make_search, searches), (make_run, runs)):
                batches = [list(batch) for _, batch in groupby(missing, shared)]
                if work is make_search:
                    batches = [[cell] for cell in missing]
                for made in map_batches(work, batches):
                    bar.update(made)
    return len(runs)


def shared(cell: Cell) -> tuple[Any, ...]:
    """What cells of one batch have in common: a draw, or where little is drawn a method: folds are few and long."""
    by_draw = (cell.control.draws or cell.regime.draws) and not isinstance(cell.regime, Folds)
    return *cell[:4], None if by_draw else cell.method


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
        except (MemoryError, torch.OutOfMemoryError):
            remedy = "run it again with --jobs 1, or with train.device: cpu where that is a GPU's"
            raise UserError(f"{cell.run}: does not fit into memory; {remedy}") from None
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
    check_comparable(plan)
    plan = replace(plan, device=choose_device(params.train.device, f"{arguments.params}: train.device:"))
    grid = cells(plan, params.train.seed)
    made = run_study(plan, grid, arguments.jobs)
    print(f"{plan.folder}: {made} runs made, {len(grid) - made} were there")


if __name__ == "__main__":
    run(main)
