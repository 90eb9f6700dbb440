"""Train and evaluate one run of `train.runs`: a method on the cached features of its encoder.

Reads   data/index/{images,classes}.parquet and, of what the stages wrote for the run's encoder E, the parts that the
        method declares (READS): data/embed/E/{images/,text.parquet}, data/bank/E.parquet, data/labels/E/,
        data/graphs/E/, data/descriptions/descriptions.parquet. data/inputs/RUN.json lists them (training/plan_runs.py).
Writes  data/runs/RUN/: metrics.json (the dozen figures that people compare, the mean over seeds; `transductive` where
        images that are judged send too, training/links.py), history.csv (a row a look at val), timing.json,
        predictions.parquet (every logit of every image and seed), model.safetensors (the seed that is best on the half
        of val that chooses), config.json (settings, what each seed chose, images by split, class order, device,
        fingerprints of what was read; `told_choose` where a regime tells the half of val that chooses wrong classes:
        accuracy and log loss there by what it is told, the mean over seeds).
        Where the method cannot work on this data, metrics.json and config.json say why (`not_possible`) and the others
        are empty.
Costs   time of the processor, or of the GPU that train.device gives: none to speak of for the zero-shot methods; an
        epoch's seconds stand in timing.json. What was read from Parquet is kept as arrays in .cache/arrays
        (training/data/arrays.py), at most 32 GB of them, and mapped from there the next time: memory holds a batch, the
        first time one bucket of each table beside it, and what the system keeps of the disk. Logits are
        those of one seed; above 256 MB they lie in a file in data/runs/RUN while they are judged and written.

`train.seeds` runs start from train.seed, train.seed + 1, ...; a method that draws nothing is fitted once, and that fit
stands for all seeds. One half of val chooses (fieldmark/halves.py); the other, `val` in what is written, and test
are only read out: fit is told no label of them. `train.regime` limits what fit
sees (training/regimes.py), `train.control` takes something away before (training/controls/); both are drawn once, by
train.seed, and the splits of what is written stay those of the index. Many draws are a study (evaluation/study.py). On
one machine and device and with one thread count (OMP_NUM_THREADS), a second run writes the same bytes, timing.json
apart.

    python -m training.train --run concept_graph
    python -m training.train --check                 # only check method, encoders and settings of runs and first looks
    python -m training.train --knobs concept_graph   # a method's settings, their defaults and what they mean
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fieldmark.command import UserError, run, stage_key, stage_parser
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.params import Block, Params, load_params
from fieldmark.store import fingerprint, write_atomic, write_text
from training.controls import Control, Request, apply_control, read_control
from training.data import SPLITS, Cache, check_origins, read_cache
from training.hashes import hash_file
from training.inputs import Reading, check_questions, check_told, reading_of
from training.knobs import say_knobs
from training.layers.states import state_of
from training.links import TRANSDUCTIVE, check_links, is_transductive, named
from training.looks import check_looks, plan_look
from training.loop import predict_all
from training.methods import Fitted, NotPossible, check_also, check_texts, load_method, read_settings, reads_of
from training.metrics import TOLD_CHOOSE, Measure, ahead, class_rates, correct, in_blocks, log_losses
from training.regimes import Folds, Regime, hide_test, read_regime
from training.runs import SCHEMA, history_csv, write_json, write_predictions

Numbers = dict[str, float]


@dataclass(frozen=True)
class PlannedRun:
    """A run of train.runs, checked."""

    name: str
    method: str
    settings: Block
    regime: Regime
    control: Control
    reading: Reading

    def describe(self) -> dict[str, Any]:
        """What its outcome follows from, the seeds and what it reads apart."""
        return {
            "method": self.method,
            "encoder": self.reading.encoder,
            "also": list(self.reading.also),
            "settings": self.settings.model_dump(),
            "regime": self.regime.model_dump(),
            "control": self.control.model_dump(),
        }


def plan_run(path: str, params: Params, name: str) -> PlannedRun:
    """A run of train.runs, checked as far as no file has to be read. Raises UserError naming file and key."""
    if name not in params.train.runs:
        known = ", ".join(params.train.runs)
        raise UserError(f"{path}: train.runs: has no {name}; choose one of: {known}, or add it")
    key, given = f"train.runs.{name}", params.train.runs[name]
    settings = read_settings(path, key, given.method, given.settings)
    check_texts(path, f"{key}.encoder", params, given.method, settings, given.encoder)
    check_also(path, f"{key}.also", given.method, settings, given.also)
    check_links(path, key, params.links, reads_of(given.method, settings))
    regime = read_regime(path, "train.regime", params.train.regime)
    if isinstance(regime, Folds):
        raise UserError(f"{path}: train.regime: folds are of a study, not of one run; put them in studies/NAME.yaml")
    control = read_control(path, "train.control", params.train.control)
    reading = reading_of(given.method, settings, given.encoder, given.also, control, regime)
    check_looks(path, key, params.train.first_looks, reading, regime)
    check_questions(path, key, params.ask, reading, regime)
    return PlannedRun(name, given.method, settings, regime, control, reading)


def read_controlled(data: Path, reading: Reading, buckets: int, control: Control, seed: int) -> Cache:
    """What a run reads, under its control: what the method sees, and what its regime asks for."""
    cache = read_cache(data, reading.encoder, buckets, reading.needs, reading.also, reading.also_reads)
    generator = torch.Generator().manual_seed(seed)
    return apply_control(cache, Request(control, data, reading.encoder, buckets, generator))


def fit_seeds(method: str, cache: Cache, settings: Block, seeds: list[int]) -> dict[int, Fitted]:
    """A fitted model for every seed; the same one for all where the method draws nothing."""
    module = load_method(method)
    if not module.SEEDED:
        return dict.fromkeys(seeds, module.fit(cache, settings, seeds[0]))
    return {seed: module.fit(cache, settings, seed) for seed in seeds}


def figures_by_split(logits: np.ndarray, cache: Cache) -> dict[str, Numbers]:
    """By split, the half of val that chooses among them: how good logits (n, C) of all images are."""
    numbers = {}
    y = cache.y.numpy()
    measures: tuple[Measure, ...] = (correct, ahead, log_losses)
    right, before, losses = (in_blocks(measure, logits, y) for measure in measures)
    for split in (*SPLITS, "choose"):
        chosen = cache.split == split
        numbers[split] = {
            "accuracy": float(right[chosen].mean()),
            "macro_accuracy": float(np.nanmean(class_rates(right[chosen], y[chosen], logits.shape[1]))),
            "top5_accuracy": float((before[chosen] < 5).mean()),
            "log_loss": float(losses[chosen].mean()),
        }
    return numbers


def summarise(measured: Mapping[int, dict[str, Numbers]]) -> dict[str, Numbers]:
    """metrics.json: means over seeds, and the accuracy's standard deviation (0 for one seed).

    DVC makes a column of each key (`dvc metrics show`, `dvc exp show`): of train there is the accuracy alone, and what
    nobody compares stands in config.json.
    """
    metrics: dict[str, Numbers] = {}
    for split in SPLITS:
        seeds = [numbers[split] for numbers in measured.values()]
        accuracies = [numbers["accuracy"] for numbers in seeds]
        names = ["accuracy"] if split == "train" else list(seeds[0])
        metrics[split] = {name: float(np.mean([numbers[name] for numbers in seeds])) for name in names}
        metrics[split]["accuracy_std"] = float(np.std(accuracies, ddof=1)) if len(seeds) > 1 else 0.0
    return metrics


def train(params: Params, path: str, name: str, data: Path) -> None:
    """Fit the method of run `name` for every seed and write the run. `path` is the parameters' file, for messages."""
    started = perf_counter()
    planned, buckets, folder = plan_run(path, params, name), params.dataset.buckets, data / "runs" / name
    seeds = list(range(params.train.seed, params.train.seed + params.train.seeds))
    reading, device = planned.reading, choose_device(params.train.device, f"{path}: train.device:")
    set_up_torch()
    check_told(path, f"train.runs.{name}", data, reading, planned.regime)
    needed = read_controlled(data, reading, buckets, planned.control, params.train.seed)
    fingerprints = check_origins(data, reading.encoder, buckets, reading.needs, reading.also, reading.also_reads)
    loaded = perf_counter()
    cache = needed.only(reading.reads)
    told = hide_test(planned.regime.apply(needed, params.train.seed)).only(reading.reads)
    # What chooses among seeds is told what training is; what is reported keeps its own labels.
    told_otherwise = torch.from_numpy(cache.split == "choose") & (told.y >= 0)
    judged = replace(cache, y=torch.where(told_otherwise, told.y, cache.y))
    told, seen = told.on(device), cache.on(device)  # both without copies of each other's
    config = {**planned.describe(), "seeds": seeds, "classes": cache.classes, "fingerprints": fingerprints}
    # Rows of a bank are what labels name: the fingerprint of one says how it was made, this, which rows it has.
    config["banks"] = {file: hash_file(data / file) for file, schema in reading.files.items() if schema == "bank/1"}
    config["device"] = device.type  # what figures are the same for, to their last digits; no part of what a run is
    mark = fingerprint(SCHEMA, planned.describe() | {"seeds": seeds}, list(fingerprints.values()))
    fits: dict[int, Fitted] = {}
    try:
        fits = fit_seeds(planned.method, told, planned.settings, seeds)
    except NotPossible as error:
        print(f"{name}: {planned.method} cannot work on this data: {error}")
        reason = {"not_possible": str(error)}
        write_predictions(folder / "predictions.parquet", [], cache, mark)
        write_run(folder, fits, config | reason, reason, {})
    else:
        measured: dict[int, dict[str, Numbers]] = {}

        def predicted() -> Iterator[tuple[int, np.ndarray]]:
            """One seed's logits at a time."""
            for seed, fit in fits.items():
                logits = predict_all(fit.model, seen, folder)
                measured[seed] = figures_by_split(logits, judged)
                yield seed, logits

        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / "predictions.parquet", predicted(), cache, mark)
        summary = summarise(measured)
        said = ", ".join(f"{split} {summary[split]['accuracy']:.4f}" for split in SPLITS)
        transductive = is_transductive(planned.settings)
        print(f"{named(name, transductive)}: accuracy {said} (mean over seeds: {len(seeds)})")
        mark_of_links: dict[str, Any] = {TRANSDUCTIVE: True} if transductive else {}
        metrics = summary | mark_of_links
        chosen_by = {seed: numbers["choose"] for seed, numbers in measured.items()}
        best = max(seeds, key=lambda seed: (chosen_by[seed]["accuracy"], -chosen_by[seed]["log_loss"]))
        config |= {"model_seed": best, "chosen": {str(seed): fitted.chosen for seed, fitted in fits.items()}}
        config |= mark_of_links
        config["images"] = {split: int((cache.split == split).sum()) for split in SPLITS}
        if not torch.equal(judged.y, cache.y):
            # predictions.parquet has the truth: who chooses among runs is to choose by what these were told.
            config[TOLD_CHOOSE] = {
                name: float(np.mean([numbers[name] for numbers in chosen_by.values()]))
                for name in ("accuracy", "log_loss")
            }
        state = state_of(fits[best].model)
        write_run(folder, fits, config, metrics, state)
    timing = {
        "epoch_seconds": float(np.mean([fitted.epoch_seconds for fitted in fits.values()])) if fits else 0.0,
        "load_seconds": loaded - started,
        "total_seconds": perf_counter() - started,
    }
    write_json(folder / "timing.json", timing)


def write_run(
    folder: Path,
    fits: Mapping[int, Fitted],
    config: dict[str, Any],
    metrics: Mapping[str, Any],
    state: dict[str, torch.Tensor],
) -> None:
    """Write the files of a run, predictions and timing apart; `state` are the weights of the model that is kept."""
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "history.csv", history_csv(fits))
    write_json(folder / "config.json", config)
    write_atomic(folder / "model.safetensors", lambda partial: save_file(state, partial))


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    key = stage_key()
    what = parser.add_mutually_exclusive_group(required=key is None)
    said = "a name under train.runs (in a stage that DVC runs: its own)"
    what.add_argument("--run", default=key, metavar="NAME", help=said)
    what.add_argument("--check", action="store_true", help="check every run and first look and stop")
    what.add_argument("--knobs", metavar="METHOD", help="print a method's settings as YAML and stop")
    arguments = parser.parse_args()
    if arguments.knobs is not None:
        print(say_knobs(arguments.knobs), end="")
        return
    params = load_params(arguments.params)
    if arguments.check:
        for name in params.train.runs:
            plan_run(arguments.params, params, name)
        for name in params.train.first_looks:
            plan_look(arguments.params, params, name)
    else:
        try:
            train(params, arguments.params, arguments.run, Path(arguments.data))
        except torch.OutOfMemoryError:
            raise UserError(
                f"{arguments.params}: train.device: the GPU has not the memory for {arguments.run}; end what else runs"
                " on it, or write cpu"
            ) from None


if __name__ == "__main__":
    run(main)
