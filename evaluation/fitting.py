"""One run of a study: its caches, its fit, what it writes. The module study goes through the grid of them.

This module and what it imports are the code that a run's identity counts (evaluation/plan.py); another way to go
through the grid makes no run anew. Caches are remembered for the cells that follow.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.plan import Cell, Plan, Variation, load_other_labels
from fieldmark.params import Block
from training.controls import Control, Request, apply_control
from training.data import SPLITS, Cache, read_cache
from training.layers.logistic import assess
from training.loop import predict
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
from training.runs import write_json, write_predictions

SEARCH_DRAWS = 5


@lru_cache(maxsize=1)
def base_cache(plan: Plan, encoder: str, also: tuple[str, ...]) -> Cache:
    """All that the runs of an encoder, and of these beside it, read."""
    needs, also_reads = plan.shared_parts(encoder, also)
    return read_cache(plan.data, encoder, plan.buckets, needs, also, also_reads)


@lru_cache(maxsize=1)
def controlled_cache(plan: Plan, encoder: str, control: Control, draw: int, variation: Variation) -> Cache:
    """The cache under a control, its nodes labelled with a variation's settings in the place of those on disk."""
    cache, labels = base_cache(plan, encoder, variation.also), dict(variation.labels)
    request = Request(control, plan.data, encoder, plan.buckets, torch.Generator().manual_seed(draw), labels)
    return load_other_labels().apply(cache, request) if labels else apply_control(cache, request)


class Prepared(NamedTuple):
    told: Cache  # what fit gets: training images of the regime's draw, the half of val that chooses unless few-shot
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
    # Few-shot fits get no val image, so that both halves may be reported like test images.
    shown = told
    if isinstance(regime, Shots):
        shown = replace(told, split=np.where(np.isin(whole.split, ("choose", "val")), "val", told.split))
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

    Val is the half that chose nothing. The temperature is fitted on it, so that what is left of the calibration error
    compares methods whose logits have different scales. Few, medium and many are thirds of the classes by their
    training images.
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
        told = hide_test(replace(drawn, split=np.where(drawn.split == "unused", "choose", drawn.split)))
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
