"""Every method's run is trained, restored from its folder, and says what it said."""

import functools
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from fieldmark.command import UserError
from fieldmark.params import Params, load_params
from tests.training.cache import ENCODER, Plan, write_cache, write_other
from tests.training.methods.test_universal import FIRST_STEPS, WHOLE
from training import train
from training.data import read_cache
from training.loop import predict
from training.methods import load_method, method_names
from training.restore import Restored, restore

PLAN = Plan(train=6, val=6, test=2, rings=2, sentences=2)
SMALL = {"epochs": 1, "hidden": 16, "weight_decay": [0.1], "precision": "fp32", "start_l2": 0.1}
FEW = {"l2": [0.1, 0.01], "text_scale": [1.0, 3.0], "alpha": [0.9], "lr": [0.01]}  # points of grids
RIDGE = {"method": "ridge", "settings": {"features": ["nodes"]}}
KERNELS = [{"method": "rbf_ridge", "settings": {"transform": transform}} for transform in ("none", "signed_sqrt")]
# Beside a run of each method: those whose model depends on more than its defaults.
OTHERS: dict[str, dict[str, Any]] = {
    "every part": {"method": "concept_graph", "settings": {**SMALL, **WHOLE["concept_graph"]}},
    "graph beside a probe": {"method": "concept_graph", "settings": {**SMALL, "with_probe": RIDGE}, "also": ["wide"]},
    "graph of tokens": {"method": "concept_graph", "settings": {**SMALL, "nodes": "tokens", "texts": 0}},
    "pool beside probes": {
        "method": "attention_pool",
        "settings": {**SMALL, "with_probe": {"method": "probes", "settings": {"candidates": KERNELS}}},
    },
    "pool of tokens": {"method": "attention_pool", "settings": {**SMALL, "nodes": "tokens"}},
    "probe of several": {
        "method": "linear_probe",
        "settings": {"features": ["global", "nodes"], "transform": "signed_sqrt", "l2": [0.1]},
        "also": ["wide"],
    },
}


def runs() -> dict[str, dict[str, Any]]:
    found = {}
    for method in method_names():
        fields = load_method(method).Settings.model_fields
        grids = {name: few for name, few in FEW.items() if name in fields and isinstance(fields[name].default, list)}
        known = {name: value for name, value in (SMALL | FIRST_STEPS).items() if name in fields} | grids
        found[method] = {"method": method, "settings": known}
    return {name: {"encoder": ENCODER, **given} for name, given in (found | OTHERS).items()}


RUNS = {name.replace(" ", "_"): given for name, given in runs().items()}
POSSIBLE = [name for name in RUNS if name != "transfer_lda"]  # which is lent other classes in studies alone


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parameters, the cache and, once they were asked for, runs."""
    folder = tmp_path_factory.mktemp("restore")
    write_cache(folder / "data", PLAN)
    write_other(folder / "data", "wide", 12)
    write_params(folder, RUNS)
    return folder


def write_params(folder: Path, of_runs: dict[str, Any], **train: Any) -> None:
    content = {
        "domain": {"noun": "fish", "group": "fish"},
        "links": {"near": {"kind": "group", "vectors": "data/none", "texts": "data/none"}},
        "dataset": {"root": "data/raw", "buckets": PLAN.buckets},
        "llm": {"model": "none"},
        "encoders": {ENCODER: {"model": "none"}, "wide": {"model": "none"}},
        "report": {"reference": next(iter(of_runs))},
        "train": {"seed": 3, "seeds": 2, "runs": of_runs, **train},
    }
    with open(folder / "params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(content, file)


def params_of(folder: Path) -> tuple[Params, str]:
    path = folder / "params.yaml"
    return parsed(path, path.read_text()), str(path)


@functools.cache
def parsed(path: Path, content: str) -> Params:
    """Once for the same content: that of a run of every method is long."""
    return load_params(path)


def train_run(folder: Path, name: str) -> None:
    train.train(*params_of(folder), name, folder / "data")


def restore_run(folder: Path, name: str) -> Restored:
    return restore(*params_of(folder), name, folder / "data")


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_restored_run_says_what_it_said(trained: Path, name: str) -> None:
    train_run(trained, name)
    found, data = restore_run(trained, name), trained / "data"
    given = RUNS[name]
    assert (found.method, found.encoder, found.also) == (given["method"], ENCODER, tuple(given.get("also", ())))
    assert not any(module.training for module in found.model.modules())
    cache = read_cache(data, found.encoder, PLAN.buckets, found.reads, found.also, found.also_reads)
    table = pq.read_table(data / f"runs/{name}/predictions.parquet", filters=[("seed", "=", found.seed)])
    assert (table["path"].to_pylist(), found.classes) == (cache.paths, cache.classes)
    said = predict(found.model, cache, torch.arange(len(cache.paths))).numpy()
    np.testing.assert_allclose(said, np.array(table["logits"].to_pylist()), atol=1e-6, rtol=1e-6)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """One with a run of its own, `linear_probe`, to spoil."""
    if not (trained / "data/runs/linear_probe").exists():
        train_run(trained, "linear_probe")
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path, message: str, name: str = "linear_probe") -> None:
    with pytest.raises(UserError, match=message) as caught:
        restore_run(folder, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"settings": {"l2": [0.1]}}, "settings"),
        ({"method": "ridge", "settings": {}}, "method"),
        ({"encoder": "wide"}, "encoder"),
        ({"also": ["wide"]}, "also"),
    ],
)
def test_a_run_of_other_settings_is_refused(folder: Path, change: dict[str, Any], key: str) -> None:
    write_params(folder, {"linear_probe": RUNS["linear_probe"] | change})
    refused(folder, rf"params\.yaml: train: {key} of linear_probe is not .*dvc repro -s train@linear_probe")


def test_a_run_of_another_regime_or_under_a_control_is_refused(folder: Path) -> None:
    write_params(folder, {"linear_probe": RUNS["linear_probe"]}, regime={"kind": "shots", "shots": 2})
    refused(folder, "regime of linear_probe is not what")
    write_params(folder, {"zero_shot": RUNS["zero_shot"]}, control={"name": "random_vectors"})
    train_run(folder, "zero_shot")
    refused(folder, r"train\.control: zero_shot was trained without something", "zero_shot")


def test_a_run_of_other_data_is_refused(trained: Path, folder: Path) -> None:
    path = folder / "data/index/classes.parquet"
    table = pq.read_table(path)
    changed = table.replace_schema_metadata({**table.schema.metadata, b"fingerprint": b"other"})
    pq.write_table(changed, path)
    refused(folder, r"index/classes\.parquet: was made anew since .*runs/linear_probe was trained")
    path.unlink()
    train_run(trained, "zero_shot")
    shutil.copytree(trained / "data/runs/zero_shot", folder / "data/runs/zero_shot", dirs_exist_ok=True)
    bank = folder / f"data/bank/{ENCODER}.parquet"  # of the same parameters, with another row
    table = pq.read_table(bank)
    pq.write_table(table.slice(1), bank)
    refused(folder, r"bank/tiny\.parquet: was made anew", "zero_shot")
    shutil.rmtree(folder / "data/index")  # a run that was fetched alone
    assert restore_run(folder, "linear_probe").seed in (3, 4)


def test_a_run_of_a_version_before_is_refused(folder: Path) -> None:
    path = folder / "data/runs/linear_probe/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in ("chosen", "banks")}))
    refused(folder, "runs/linear_probe: was trained by a version before; train it again")


def test_a_run_that_was_not_possible_is_refused(folder: Path) -> None:
    train_run(folder, "transfer_lda")
    refused(folder, "holds no model, transfer_lda could not work on its data", "transfer_lda")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_or_cut_off_is_refused(folder: Path, name: str) -> None:
    path = folder / "data/runs/linear_probe" / name
    whole = path.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        refused(folder, rf"{re.escape(name)}: is not readable")
    path.unlink()
    refused(folder, rf"{re.escape(name)}: is missing; train it again .*or fetch it")


def test_weights_of_another_method_are_refused(folder: Path) -> None:
    train_run(folder, "knn")
    runs = folder / "data/runs"
    shutil.copy(runs / "knn/model.safetensors", runs / "linear_probe/model.safetensors")
    refused(folder, "is not of linear_probe as it is now")


class Spring:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("sprung").touch, ())


def test_no_file_that_runs_code_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = folder / "data/runs/linear_probe/model.safetensors"
    for trap in (pickle.dumps(Spring()), None):
        if trap is None:
            torch.save({"layer.weight": Spring()}, path)
        else:
            path.write_bytes(trap)
        refused(folder, r"model\.safetensors: is not readable")
    assert not Path("sprung").exists()


def test_a_method_without_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(load_method("knn"), "build")
    with pytest.raises(UserError, match=r"training/methods/knn\.py: has no build; training/methods/__init__\.py says"):
        load_method("knn")
