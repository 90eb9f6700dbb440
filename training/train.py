"""Train and evaluate one method on the cached features of its encoder.

Reads   data/index/{images,classes}.parquet and, for the method's encoder E, data/embed/E/{images/,text.parquet},
        data/bank/E.parquet, data/labels/E/, data/graphs/E/; data/descriptions/descriptions.parquet. A run of
        train.several reads data/embed/X/images/ too, of each encoder X of its `also`.
Writes  data/runs/METHOD/, or NAME/ of train.several: metrics.json (accuracies by split, the mean over seeds),
        history.csv (one row an epoch), timing.json, predictions.parquet (every logit of every image and seed),
        model.safetensors (the seed that is best on val), config.json (settings, class order, fingerprints of what was
        read).
Costs   processor time only: none to speak of for the zero-shot methods; an epoch's seconds stand in timing.json. Memory
        holds all vectors as float16, one bucket of data/embed/E/images beside them, and a batch.

`train.seeds` runs start from train.seed, train.seed + 1, ...; a method that draws nothing is fitted once, and that fit
stands for all seeds. Val chooses, test is only read out: fit is told no label of it. `train.regime` limits what fit
sees (training/regimes.py), `train.control` takes something away before (training/controls.py); both are drawn once, by
train.seed, and the splits of what is written stay those of the index. Many draws are a study (evaluation/study.py). On
one machine and with one thread count (OMP_NUM_THREADS), a second run writes the same bytes, timing.json apart.

    python -m training.train --method concept_graph
    python -m training.train --check          # only check every method's settings
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Block, Params, explain, load_params
from fieldmark.store import canonical_json, fingerprint, write_atomic, write_text
from training.controls import Control, apply_control, read_materials
from training.data import SPLITS, Cache, read_cache
from training.loop import predict, set_up_torch
from training.methods import Fitted, load_method, read_settings
from training.metrics import accuracy, log_loss, macro_accuracy, top_k_accuracy
from training.regimes import Regime, apply_regime, hide_test

SCHEMA = "run.predictions/1"
Found = TypeVar("Found", bound=Block)
Numbers = dict[str, float]


REGIMES: dict[str, type[Block]] = {model.model_fields["kind"].default: model for model in get_args(get_args(Regime)[0])}


def read_regime(path: str, key: str, given: Any) -> Regime:
    """A regime, given by its kind alone or as a block with its knobs. Raises UserError naming file and key."""
    given = {"kind": given} if isinstance(given, str) else given
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind not in REGIMES:
        raise UserError(f"{path}: {key}: names no regime; give a `kind`, one of: {', '.join(REGIMES)}")
    regime: Any = read_block(path, key, given, REGIMES[kind])
    return regime


def read_control(path: str, key: str, given: Any) -> Control:
    """A control, by its name alone or as a block."""
    return read_block(path, key, {"name": given} if isinstance(given, str) else given, Control)


def read_block(path: str, key: str, given: Any, model: type[Found]) -> Found:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise UserError(explain(path, error, given, f"{key}.", model)) from None


def fit_seeds(method: str, cache: Cache, settings: Any, seeds: list[int]) -> dict[int, Fitted]:
    """A fitted model for every seed; the same one for all where the method draws nothing."""
    module = load_method(method)
    if not module.SEEDED:
        return dict.fromkeys(seeds, module.fit(cache, settings, seeds[0]))
    fits = {}
    for seed in seeds:
        fits[seed] = module.fit(cache, settings, seed)
    return fits


def measure(logits: np.ndarray, cache: Cache) -> dict[str, Numbers]:
    """By split: how good logits (n, C) of all images are."""
    numbers = {}
    y = cache.y.numpy()
    for split in SPLITS:
        chosen = cache.split == split
        numbers[split] = {
            "accuracy": accuracy(logits[chosen], y[chosen]),
            "macro_accuracy": macro_accuracy(logits[chosen], y[chosen]),
            "top5_accuracy": top_k_accuracy(logits[chosen], y[chosen], 5),
            "log_loss": log_loss(logits[chosen], y[chosen]),
        }
    return numbers


def summarise(measured: dict[int, dict[str, Numbers]], fits: dict[int, Fitted], cache: Cache) -> dict[str, Any]:
    """metrics.json: means over seeds, the accuracy's standard deviation (0 for one seed), sizes, what val chose."""
    metrics: dict[str, Any] = {}
    for split in SPLITS:
        runs = [numbers[split] for numbers in measured.values()]
        metrics[split] = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        accuracies = [run["accuracy"] for run in runs]
        metrics[split]["accuracy_std"] = float(np.std(accuracies, ddof=1)) if len(runs) > 1 else 0.0
        metrics[split]["images"] = int((cache.split == split).sum())
    metrics["seeds"] = len(measured)
    metrics["chosen"] = {str(seed): fitted.chosen for seed, fitted in fits.items()}
    return metrics


def predictions_table(logits: dict[int, np.ndarray], cache: Cache) -> pa.Table:
    """One row an image and seed: path, split, seed, class_id (the true one), logits in the order of the classes."""
    images, seeds = len(cache.paths), len(logits)
    values = pa.array(np.concatenate(list(logits.values())).astype(np.float32).reshape(-1))
    return pa.table(
        {
            "path": cache.paths * seeds,
            "split": cache.split.tolist() * seeds,
            "seed": pa.array(np.repeat(list(logits), images), pa.int32()),
            "class_id": [cache.classes[label] for label in cache.y.tolist()] * seeds,
            "logits": pa.FixedSizeListArray.from_arrays(
                values, type=pa.list_(pa.field("element", pa.float32()), len(cache.classes))
            ),
        }
    )


def history_csv(fits: dict[int, Fitted]) -> str:
    """Every seed's history; the columns are those of its rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["seed", *next(iter(fits.values())).history[0]], lineterminator="\n")
    writer.writeheader()
    for seed, fitted in fits.items():
        writer.writerows({"seed": seed, **row} for row in fitted.history)
    return text.getvalue()


def controlled(
    data: Path, encoder: str, also: Sequence[str], buckets: int, control: Control, seed: int
) -> tuple[Cache, dict[str, str]]:
    """The cache of an encoder and those of `also` under a control, and the fingerprints of what was read."""
    cache = read_cache(data, encoder, buckets, also)
    if control == Control():
        return cache, cache.fingerprints
    materials = read_materials(data, encoder, control, buckets)
    return apply_control(cache, control, seed, materials), cache.fingerprints | materials.fingerprints


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def train(params: Params, path: str, name: str, data: Path) -> None:
    """Fit the method of run `name` for every seed and write the run. `path` is the parameters' file, for messages."""
    started = perf_counter()
    if name not in params.train.runs:
        known = ", ".join(params.train.runs)
        raise UserError(f"{path}: train.methods: has no {name}; choose one of: {known}, or add it")
    method, settings = params.train.method_of(name), read_settings(path, params, name)
    encoder = params.train.runs[name].encoder
    also = params.train.several[name].also if name in params.train.several else []
    regime = read_regime(path, "train.regime", params.train.regime)
    control = read_control(path, "train.control", params.train.control)
    set_up_torch()
    cache, fingerprints = controlled(data, encoder, also, params.dataset.buckets, control, params.train.seed)
    loaded = perf_counter()

    seeds = list(range(params.train.seed, params.train.seed + params.train.seeds))
    fits = fit_seeds(method, hide_test(apply_regime(cache, regime, params.train.seed)), settings, seeds)
    images = torch.arange(len(cache.paths))
    logits = {seed: predict(fitted.model, cache, images).numpy() for seed, fitted in fits.items()}
    measured = {seed: measure(values, cache) for seed, values in logits.items()}
    for seed, numbers in measured.items():
        print(f"{name} seed {seed}: " + ", ".join(f"{split} {numbers[split]['accuracy']:.4f}" for split in SPLITS))

    best = max(seeds, key=lambda seed: (measured[seed]["val"]["accuracy"], -measured[seed]["val"]["log_loss"]))
    config = {
        "method": method,
        "encoder": encoder,
        "also": also,
        "settings": settings.model_dump(),
        "regime": regime.model_dump(),
        "control": control.model_dump(),
        "seeds": seeds,
        "model_seed": best,
        "classes": cache.classes,
        "fingerprints": fingerprints,
    }
    mark = fingerprint(
        SCHEMA,
        {key: config[key] for key in ("method", "encoder", "also", "settings", "regime", "control", "seeds")},
        list(fingerprints.values()),
    )
    metadata = {"schema": SCHEMA, "fingerprint": mark, "params": canonical_json({"classes": cache.classes})}
    table = predictions_table(logits, cache).replace_schema_metadata(metadata)
    state = {name: value.contiguous() for name, value in fits[best].model.state_dict().items()}

    folder = data / "runs" / name
    write_json(folder / "metrics.json", summarise(measured, fits, cache))
    write_text(folder / "history.csv", history_csv(fits))
    write_json(folder / "config.json", config)
    write_atomic(folder / "predictions.parquet", lambda partial: pq.write_table(table, partial, compression="zstd"))
    write_atomic(folder / "model.safetensors", lambda partial: save_file(state, partial))
    timing = {
        "epoch_seconds": float(np.mean([fitted.epoch_seconds for fitted in fits.values()])),
        "load_seconds": loaded - started,
        "total_seconds": perf_counter() - started,
    }
    write_json(folder / "timing.json", timing)


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", metavar="NAME", help="a name under train.methods or train.several")
    what.add_argument("--check", action="store_true", help="check the settings of every method and stop")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    if arguments.check:
        read_regime(arguments.params, "train.regime", params.train.regime)
        read_control(arguments.params, "train.control", params.train.control)
        for name in params.train.runs:
            read_settings(arguments.params, params, name)
    else:
        train(params, arguments.params, arguments.method, Path(arguments.data))


if __name__ == "__main__":
    run(main)
