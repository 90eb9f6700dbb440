"""The CPU and a GPU: the same batches, draws and starts, models that follow, and the same bits each time."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from fieldmark.devices import choose_device
from fieldmark.params import load_params
from fieldmark.store import read_header
from tests.training.cache import ALL, ENCODER, Plan, write_cache, write_other
from tests.training.methods.test_universal import LOOPED, METHODS, WHOLE, quick
from tests.training.test_train import PARAMS
from training.data import CPU, Batch, Cache, read_cache
from training.data.bank import Bank
from training.data.nodes import Nodes
from training.loop import predict
from training.methods import attention_pool, load_method
from training.train import train

Planted = Callable[[Plan], Cache]
GPU = torch.device("cuda", 0)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
PLAN = Plan(views=2, rings=3, sentences=4, described="all", train=12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and the other tests run on it")
@pytest.mark.slow
def test_no_method_mixes_devices_or_types() -> None:
    """On a device that computes on the CPU and is none (tests/training/elsewhere.py)."""
    found = subprocess.run([sys.executable, "-m", "tests.training.elsewhere"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


def fields(batch: Batch) -> dict[str, torch.Tensor]:
    others = {f"also.{name}": value for other in batch.also for name, value in other.values.items()}
    return {"y": batch.y, "target": batch.target, **batch.values, **others}


@pytest.mark.parametrize("room", [2**63, 0], ids=["parts there", "parts here"])
def test_a_batch_is_the_same_on_every_device_wherever_the_parts_lie(
    tmp_path: Path, device: torch.device, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path, PLAN)
    write_other(tmp_path, "other", 24)
    here = read_cache(tmp_path, ENCODER, PLAN.buckets, ALL, ["other"], {"nodes"})
    monkeypatch.setattr("training.data.part.room", lambda device: room)
    there, images = here.on(device), here.images("train")
    views = torch.arange(len(images)) % 2
    assert there.part(Bank).K.device == device  # no batch is cut of it
    assert there.part(Nodes).nodes.device == (device if room else CPU)
    expected, found = fields(here.batch(images, views)), fields(there.batch(images, views))
    assert expected.keys() == found.keys()
    for name, value in found.items():
        assert value.device == device
        assert torch.equal(value.cpu(), expected[name]), name
    assert torch.equal(there.globals(images, 1).cpu(), here.globals(images, 1))


def test_what_two_caches_share_is_moved_once(planted: Planted, device: torch.device) -> None:
    cache = planted(PLAN)
    first, second = cache.only({"nodes"}).on(device), cache.only({"nodes", "edges"}).on(device)
    assert first.part(Nodes).nodes.data_ptr() == second.part(Nodes).nodes.data_ptr()


@gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_says_on_a_gpu_what_it_says_on_the_cpu_and_always_the_same(planted: Planted, method: str) -> None:
    cache = planted(PLAN)
    images = torch.arange(0, len(cache.paths), 3)
    there = cache.on(GPU)
    # One strength and one rate: of two that do as well on val, rounding would choose. Nothing is drawn on the device.
    knobs = {"epochs": 1, "dropout": 0.0, "mask": 0.0, "drop": 0.0, **WHOLE.get(method, {}), "l2": [0.01], "lr": [0.01]}
    known = {name: value for name, value in knobs.items() if name in load_method(method).Settings.model_fields}
    model, again, on_cpu = (quick(method, one, **known).model for one in (there, there, cache))
    said = predict(model, there, images)
    assert said.device == GPU
    assert {value.device for value in model.state_dict().values() if value.ndim} == {GPU}
    torch.testing.assert_close(said.cpu(), predict(on_cpu, cache, images), atol=2e-2, rtol=2e-2)
    assert torch.equal(predict(again, there, images), said)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_noise_too_is_the_same_each_time(planted: Planted, precision: str) -> None:
    there = planted(PLAN).on(GPU)
    for method in LOOPED:
        knobs = {"precision": precision, **WHOLE.get(method, {})}
        first, second = (predict(quick(method, there, **knobs).model, there, torch.arange(40)) for _ in range(2))
        assert torch.isfinite(first).all()
        assert torch.equal(first, second), method


@gpu
def test_a_model_starts_alike_on_every_device(planted: Planted) -> None:
    caches, settings = (planted(PLAN), planted(PLAN).on(GPU)), attention_pool.Settings(epochs=0, start_l2=1.0)
    here, there = (attention_pool.fit(cache, settings, 7).model.state_dict() for cache in caches)
    for name in ("attention.score.weight", "in_nodes.local.linear.weight"):
        assert torch.equal(there[name].cpu(), here[name])


def test_the_device_is_written_down_and_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    write_cache(tmp_path / "data", Plan())
    params, folder = load_params(tmp_path / "params.yaml"), tmp_path / "data/runs/linear_probe"
    marks, devices = [], []
    for name in ("cpu", "auto"):
        on = params.model_copy(update={"train": params.train.model_copy(update={"device": name})})
        train(on, "params.yaml", "linear_probe", tmp_path / "data")
        marks.append(read_header(folder / "predictions.parquet", "run.predictions/1").fingerprint)
        devices.append(json.loads((folder / "config.json").read_text())["device"])
    assert marks[0] == marks[1]
    assert devices == ["cpu", choose_device("auto").type]
    assert {value.device for value in load_file(folder / "model.safetensors").values()} == {CPU}


def test_another_device_trains_nothing_anew() -> None:
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    counted = stages["train"]["do"]["params"]
    assert not {"train", "train.device"} & set(counted)
