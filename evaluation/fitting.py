"""One run of a study: its caches, its fit, what it writes. The module study goes through the grid of them.

This module and what it imports are the code that a run's identity counts (evaluation/plan.py); another way to go
through the grid makes no run anew. Caches are remembered for the cells that follow.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.plan import Cell, Plan, Variation, load_other_labels, read_config
from fieldmark.params import Block
from training.controls import Control, Request, apply_control
from training.data import SPLITS, Cache, read_cache
from training.folds import HELD_OUT, refit, settle
from training.layers.logistic import L2_WITHOUT_VAL, assess
from training.layers.partial_labels import among_candidates
from training.links import TRANSDUCTIVE, is_transductive
from training.loop import assess_split, predict, predict_all
from training.methods import Fitted, NotPossible, borrows_others, load_method, reads_of, single_points
from training.metrics import (
    Measure,
    ahead,
    calibration_gap,
    class_rates,
    confidence,
    correct,
    fit_temperature,
    in_blocks,
    log_losses,
    tier_rates,
    tiers,
)
from training.regimes import Folds, Full, Regime, Shots, hide_test, restrict_classes
from training.runs import write_json, write_predictions

SEARCH_DRAWS = 5


@lru_cache(maxsize=1)
def base_cache(plan: Plan, encoder: str, also: tuple[str, ...]) -> Cache:
    """All that the runs of an encoder, and of these beside it, read."""
    needs, also_reads = plan.shared_parts(encoder, also)
    return read_cache(plan.data, encoder, plan.buckets, needs, also, also_reads)


@lru_cache(maxsize=1)
def development_cache(plan: Plan, encoder: str, also: tuple[str, ...]) -> Cache:
    """That of train and val alone, for folds."""
    cache = base_cache(plan, encoder, also)
    return cache.take(torch.from_numpy(np.flatnonzero(np.isin(cache.split, ("train", "choose", "val")))))


def controlled_cache(
    plan: Plan,
    cache: Cache,
    encoder: str,
    control: Control,
    draw: int,
    variation: Variation,
    anew: bool = False,
    inner: Cache | None = None,
) -> Cache:
    """A cache under a control, its nodes labelled with a variation's settings in the place of those on disk.

    `anew`: its bank and labels are made from its own training images; `inner` as in training/reselection.py.
    """
    labels = dict(variation.labels)
    request = Request(control, plan.data, encoder, plan.buckets, torch.Generator().manual_seed(draw), labels)
    if labels or anew:
        made: Cache = load_other_labels().apply(cache, request, anew, inner)
        return made
    return apply_control(cache, request)


class Prepared(NamedTuple):
    told: Cache  # what fit gets: training images of the regime's draw, the half of val that chooses unless few-shot
    whole: Cache  # what is predicted: all images and the truth, with the splits that are reported


@lru_cache(maxsize=2)  # a fold has two
def prepare(
    plan: Plan, encoder: str, control: Control, regime: Regime, draw: int, variation: Variation, last: bool = False
) -> Prepared:
    """The two caches that cells of one encoder, control, regime, draw and variation share.

    Whatever the regime hides is hidden from bank and labels too. `last`: the images of a fold that chose train too.
    """
    if isinstance(regime, Folds):
        whole = development_cache(plan, encoder, variation.also)
    else:
        whole = base_cache(plan, encoder, variation.also)
    if isinstance(regime, Shots):
        apart = {*plan.development, *plan.left_out}
        whole = restrict_classes(whole, [name for name in whole.classes if name not in apart], plan.left_out)
    # A control may draw where the regime does not: its splits stay those of the plain run.
    drawn = regime.apply(whole, draw if regime.draws else 0)
    told, inner = (refit(drawn), drawn) if last else (drawn, None)
    told = controlled_cache(plan, told, encoder, control, draw, variation, anew=regime != Full(), inner=inner)
    # Few-shot fits get no val image, so that both halves may be reported like test images.
    shown = told
    if isinstance(regime, Shots):
        shown = replace(told, split=np.where(np.isin(whole.split, ("choose", "val")), "val", told.split))
    return Prepared(hide_test(told), shown)


@lru_cache(maxsize=2)
def seen_by(
    plan: Plan,
    encoder: str,
    control: Control,
    regime: Regime,
    draw: int,
    variation: Variation,
    reads: frozenset[str],
    borrows: bool,
    last: bool = False,
) -> Prepared:
    """The two caches as a method sees them that reads these parts alone, on the study's device.

    Of classes that the study leaves out nothing is seen, unless the method borrows.
    """
    told, whole = (one.only(reads) for one in prepare(plan, encoder, control, regime, draw, variation, last))
    told, whole = told if borrows else replace(told, others=None), replace(whole, others=None)
    return Prepared(told.on(plan.device), whole.on(plan.device))


class Fit(NamedTuple):
    """A fit, what it is to predict, and the seconds that the caches and the fit took."""

    fitted: Fitted
    whole: Cache
    prepare_seconds: float
    fit_seconds: float


def fit_cell(plan: Plan, cell: Cell, settings: Block, last: bool = False) -> Fit:
    """Fit a cell's method under these settings; `last` as in `prepare`."""
    started = perf_counter()
    entry = plan.entries[cell.method]
    reads, borrows = reads_of(entry.method, settings), borrows_others(entry.method)
    told, whole = seen_by(plan, *cell[:4], entry.variation, reads, borrows, last)
    prepared = perf_counter()
    fitted = load_method(entry.method).fit(told, settings, cell.seed)
    return Fit(fitted, whole, prepared - started, perf_counter() - prepared)


def score_val(fit: Fit) -> dict[str, float]:
    """How good a fit is on the images that chose its settings."""
    accuracy, loss = assess_split(fit.fitted.model, fit.whole, "choose")
    return {"accuracy": accuracy, "log_loss": loss}


def make_run(plan: Plan, cell: Cell) -> None:
    """Fit, predict and write one run; where its method cannot work on this data, config.json says why and is alone.

    A fold is fitted twice: what the first fit chose is what the second one, of all the fold's training images, is
    made with.
    """
    entry = plan.entries[cell.method]
    settings, is_fold = entry.settings, isinstance(cell.regime, Folds)
    config = {"fingerprint": plan.mark(cell), **plan.identity(cell), "seed": cell.seed, "draw": cell.draw}
    config |= {"device": plan.device.type}
    if plan.searched(cell):
        found = read_config(plan, cell.search)
        if "not_possible" in found:
            write_not_possible(plan.folder / cell.run, config, found["not_possible"])
            return
        settings = load_method(entry.method).Settings.model_validate(found["settings"])
    try:
        fits = [fit_cell(plan, cell, settings)]
        if is_fold:
            config["inner"] = score_val(fits[0])
            settings = settle(settings, fits[0].fitted.chosen)
            fits.append(fit_cell(plan, cell, settings, last=True))
    except NotPossible as error:
        config.pop("inner", None)
        write_not_possible(plan.folder / cell.run, config, str(error))
        return
    model, whole = fits[-1].fitted.model, fits[-1].whole
    started = perf_counter()
    logits = predict_all(model, whole, plan.folder)
    config |= {"settings": settings.model_dump(), "chosen": fits[0].fitted.chosen, "classes": whole.classes}
    timing = {
        "epoch_seconds": fits[-1].fitted.epoch_seconds,
        "prepare_seconds": sum(fit.prepare_seconds for fit in fits),
        "fit_seconds": sum(fit.fit_seconds for fit in fits),
        "predict_seconds": perf_counter() - started,
    }

    def write(folder: Path) -> None:
        mark: dict[str, Any] = {TRANSDUCTIVE: True} if is_transductive(settings) else {}
        write_json(folder / "metrics.json", measure_run(logits, whole, HELD_OUT if is_fold else "val") | mark)
        write_predictions(folder / "predictions.parquet", [(cell.seed, logits)], whole, plan.mark(cell))
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", timing)

    write_folder(plan.folder / cell.run, write)


def write_not_possible(folder: Path, config: dict[str, Any], reason: str) -> None:
    write_folder(folder, lambda partial: write_json(partial / "config.json", config | {"not_possible": reason}))


def measure_run(logits: np.ndarray, cache: Cache, judged: str) -> dict[str, Any]:
    """metrics.json: what the logits (n, C) are worth on train and on the split `judged`; of other splits, their sizes.

    Val is the half that chose nothing. The temperature is fitted on it, where there is one, so that what is left of the
    calibration error compares methods whose logits have different scales. Few, medium and many are thirds of the
    classes by their training images. Where these have candidates, `disambiguated` is the share of them whose true class
    is the candidate that the logits favour.
    """
    y = cache.y.cpu().numpy()
    tier = tiers(np.bincount(y[cache.split == "train"], minlength=len(cache.classes)), limits=None)
    metrics: dict[str, Any] = {
        split: {"images": int((cache.split == split).sum())} for split in dict.fromkeys((*SPLITS, judged))
    }
    val = cache.split == "val"
    temperature = fit_temperature(logits[val], y[val]) if val.any() else None
    for split in ("train", judged):
        images = np.flatnonzero(cache.split == split)
        if not len(images):
            continue
        measures: tuple[Measure, ...] = (correct, ahead, log_losses, confidence)
        right, before, losses, sure = (in_blocks(measure, logits, y, images) for measure in measures)
        within = class_rates(right, y[images], logits.shape[1])
        metrics[split] |= {
            "accuracy": float(right.mean()),
            "macro_accuracy": float(np.nanmean(within)),
            "top5_accuracy": float((before < 5).mean()),
            "log_loss": float(losses.mean()),
            "calibration_error": calibration_gap(sure, right),
            "scaled_calibration_error": None if temperature is None else scaled_gap(logits, y, images, temperature),
            "tiers": tier_rates(within, tier),
            "classes": {name: rate for name, rate in zip(cache.classes, within.tolist(), strict=True) if rate == rate},
        }
    if cache.target.ndim == 2:
        train = cache.images("train")
        favoured = among_candidates(cache.target[train].cpu(), torch.from_numpy(logits)[train]).argmax(1)
        metrics["train"]["disambiguated"] = float((favoured.numpy() == y[train]).mean())
    return {**metrics, "temperature": temperature}


def scaled_gap(logits: np.ndarray, y: np.ndarray, images: np.ndarray, temperature: float) -> float:
    """The calibration error of these images' logits / temperature."""
    sure = in_blocks(lambda z, y: confidence(z / temperature, y), logits, y, images)
    return calibration_gap(sure, in_blocks(lambda z, y: correct(z / temperature, y), logits, y, images))


Scores = dict[int, tuple[float, float]]  # log loss and accuracy by epoch; of a method without epochs, under 0


def make_search(plan: Plan, cell: Cell) -> None:
    """Choose a method's settings for a number of shots on development classes, and write what was tried.

    The least log loss, the mean over draws, chooses: accuracy tells nothing apart where it is 1. Where a method has
    epochs, the epoch is chosen with the point of the grid, and the runs stop there: their schedule is the searched one.
    """
    started = perf_counter()
    entry = plan.entries[cell.method]
    points = [with_start(point) for point in single_points(entry.settings)]
    config: dict[str, Any] = {"fingerprint": plan.search_mark(cell), **plan.identity(cell), "device": plan.device.type}
    try:
        tried = try_points(plan, cell, points)
    except NotPossible as error:
        write_not_possible(plan.folder / cell.search, config, str(error))
        return
    rows: list[dict[str, Any]] = []
    for point, draws in zip(points, tried, strict=True):
        epoch = min(draws[0], key=lambda epoch: fmean(scores[epoch][0] for scores in draws))
        stops = {"stop": epoch} if "stop" in type(point).model_fields else {}
        best_of = [dict(zip(("log_loss", "accuracy"), scores[epoch], strict=True)) for scores in draws]
        means = {name: fmean(scores[name] for scores in best_of) for name in ("log_loss", "accuracy")}
        rows.append({"settings": point.model_copy(update=stops).model_dump(), **means, "draws": best_of})
    best = min(rows, key=lambda row: row["log_loss"])
    config |= {"settings": best["settings"], "accuracy": best["accuracy"], "tried": rows}

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        write_json(folder / "timing.json", {"total_seconds": perf_counter() - started})

    write_folder(plan.folder / cell.search, write)


def with_start(settings: Block) -> Block:
    """The settings as few-shot runs, which have no val, start: no image that scores a point chooses its start."""
    if getattr(settings, "start_l2", 0.0) is not None:
        return settings
    return settings.model_copy(update={"start_l2": L2_WITHOUT_VAL})


def try_points(plan: Plan, cell: Cell, points: list[Block]) -> list[list[Scores]]:
    """By point of the grid and draw: the scores on development images that training left."""
    entry = plan.entries[cell.method]
    module = load_method(entry.method)
    tried: list[list[Scores]] = [[] for _ in points]
    lent = plan.left_out if borrows_others(entry.method) else []
    few = restrict_classes(base_cache(plan, cell.encoder, entry.variation.also), plan.development, lent)
    for draw in range(SEARCH_DRAWS):
        drawn, control_seed = cell.regime.apply(few, draw), draw if cell.control.draws else 0
        made = controlled_cache(plan, drawn, cell.encoder, cell.control, control_seed, entry.variation, anew=True)
        told = hide_test(replace(made, split=np.where(made.split == "unused", "choose", made.split)))
        told = told.only(reads_of(entry.method, entry.settings)).on(plan.device)
        val = told.images("val")
        for point, found in zip(points, tried, strict=True):
            fitted = module.fit(told, point, draw)
            if "stop" in type(point).model_fields:
                found.append({int(row["epoch"]): (row["val_loss"], row["val_accuracy"]) for row in fitted.history})
            else:
                accuracy, loss = assess(predict(fitted.model, told, val), told.y[val])
                found.append({0: (loss, accuracy)})
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
