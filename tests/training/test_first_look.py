"""A first look: what it writes, what it was told, and when its fit is kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fieldmark.params import Params, check_params
from fieldmark.store import read_header, read_table, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training import first_look
from training.data import Cache, read_cache
from training.first_look import is_kept, look, seen_of

SETTINGS = {"epochs": 8, "batch_size": 8, "hidden": 8, "lr": [1e-2], "weight_decay": [0.1], "precision": "fp32"}


VIEWS = [(view, branch) for view in (0, 1) for branch in ("complementary", "discriminative")]


def params(**settings: Any) -> Params:
    return check_params("p.yaml", {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "images", "buckets": 3},
        "llm": {"model": "none"},
        "encoders": {ENCODER: {"model": "x"}},
        "report": {"reference": "r"},
        "train": {
            "runs": {"r": {"method": "zero_shot", "encoder": ENCODER}},
            "first_looks": {"zoom": {"method": "s3n", "encoder": ENCODER, "settings": {**SETTINGS, **settings}}},
        },
    })


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("looked") / "data"
    write_cache(data, Plan(views=2, train=8, val=4, test=2))
    look(params(), "p.yaml", "zoom", data)
    return data


def copied(looked: Path, tmp_path: Path) -> Path:
    shutil.copytree(looked, tmp_path / "data")
    return tmp_path / "data"


def files(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (data / "first_looks/zoom").iterdir()}


def relabel(data: Path, change: dict[str, str], split: str) -> None:
    """Give the images of a split other classes."""
    path = data / "index/images.parquet"
    header, rows = read_header(path, "index.images/1"), read_table(path, "index.images/1").to_pylist()
    for row in rows:
        if row["split"] == split:
            row["class_id"] = change.get(row["class_id"], row["class_id"])
    table = pa.Table.from_pylist(rows, schema=read_table(path, "index.images/1").schema)
    write_table(table, path, "index.images/1", header.params, header.fingerprint)


def test_every_image_and_view_has_two_maps(looked: Path) -> None:
    cache = read_cache(looked, ENCODER, 3, {"tokens"})
    table = read_table(looked / "first_looks/zoom/maps.parquet", "maps/1")
    keys = list(zip(*(table[name].to_pylist() for name in ("image_id", "view", "branch")), strict=True))
    branches = ("complementary", "discriminative")
    assert keys == [(each, view, branch) for each in sorted(cache.image_ids) for view in (0, 1) for branch in branches]
    values = np.array(table["values"].to_pylist(), dtype=np.float32)
    assert values.shape == (len(keys), table["side"][0].as_py() ** 2)
    assert (values.max(1) == 1).all()
    assert values.min() > 0
    assert values.std(1).min() > 0.01  # the model answers something, and every image has peaks
    assert sorted(files(looked)) == [
        "config.json", "history.csv", "maps.parquet", "metrics.json", "model.safetensors", "seen.csv"
    ]  # fmt: skip
    assert json.loads(files(looked)["metrics.json"]).keys() == {"train", "val"}


def test_a_fit_is_kept_and_gives_the_same_bytes(
    looked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copied(looked, tmp_path)
    before = files(data)
    with monkeypatch.context() as patch:
        patch.setattr(first_look, "fit", None)
        look(params(), "p.yaml", "zoom", data)
    assert files(data) == before
    look(params(), "p.yaml", "zoom", data, refit=True)
    assert files(data) == before
    look(params(hidden=9), "p.yaml", "zoom", data)
    assert files(data)["model.safetensors"] != before["model.safetensors"]


def test_no_label_of_test_and_of_the_half_that_is_reported_reaches_a_map(looked: Path, tmp_path: Path) -> None:
    data = copied(looked, tmp_path)
    before = files(data)
    relabel(data, {"class-00": "class-01", "class-01": "class-02", "class-02": "class-00"}, "test")
    look(params(), "p.yaml", "zoom", data, refit=True)
    assert files(data) == before
    cache = read_cache(data, ENCODER, 3, {"tokens"})
    told = {cache.image_ids[image] for image in np.flatnonzero(np.isin(cache.split, ("train", "choose")))}
    assert set(seen_of(cache)) == told
    assert not told & {cache.image_ids[image] for image in np.flatnonzero(np.isin(cache.split, ("val", "test")))}
    relabel(data, {"class-00": "class-01", "class-01": "class-00"}, "train")
    look(params(), "p.yaml", "zoom", data)
    assert files(data)["maps.parquet"] != before["maps.parquet"]


def test_an_image_more_leaves_the_maps_of_the_others(looked: Path, tmp_path: Path) -> None:
    """Bit for bit, wherever in a batch they stand now."""
    data = copied(looked, tmp_path)
    path = data / "index/images.parquet"
    header, table = read_header(path, "index.images/1"), read_table(path, "index.images/1")
    rows = table.to_pylist()
    whole = maps(data)
    gone = [row["image_id"] for row in rows if row["split"] == "test"][:1]
    gone += [row["image_id"] for row in rows if row["split"] == "train"][5:6]
    kept = pa.Table.from_pylist([row for row in rows if row["image_id"] not in gone], schema=table.schema)
    write_table(kept, path, "index.images/1", header.params, header.fingerprint)
    look(params(), "p.yaml", "zoom", data)
    fewer = maps(data)
    assert whole.keys() - fewer.keys() == {(each, view, branch) for each in gone for view, branch in VIEWS}
    assert all(fewer[key] == whole[key] for key in fewer)
    assert fingerprint_of(data) == fingerprint_of(looked)


def fingerprint_of(data: Path) -> str:
    return read_header(data / "first_looks/zoom/maps.parquet", "maps/1").fingerprint


def maps(data: Path) -> dict[tuple[str, int, str], list[float]]:
    rows = read_table(data / "first_looks/zoom/maps.parquet", "maps/1").to_pylist()
    return {(row["image_id"], row["view"], row["branch"]): row["values"] for row in rows}


@pytest.mark.parametrize("split", ["test", "val", "hidden", "unused"])
def test_a_fit_is_not_kept_that_was_told_what_training_may_not_know_now(looked: Path, split: str) -> None:
    cache = read_cache(looked, ENCODER, 3, {"tokens"})
    folder = looked / "first_looks/zoom"
    identity = json.loads((folder / "config.json").read_text())["identity"]
    assert is_kept(folder, identity, cache)

    def moved(image: int, to: str) -> Cache:
        splits = cache.split.astype("<U8")
        splits[image] = to
        return replace(cache, split=splits)

    of = {name: int(np.flatnonzero(cache.split == name)[0]) for name in ("train", "choose", "test")}
    assert not is_kept(folder, identity, moved(of["train"], split))
    assert not is_kept(folder, identity, moved(of["choose"], split))
    assert is_kept(folder, identity, moved(of["test"], split))
    assert is_kept(folder, identity, moved(of["test"], "train"))
    other = cache.y.clone()
    other[of["train"]] = (other[of["train"]] + 1) % len(cache.classes)
    assert not is_kept(folder, identity, replace(cache, y=other))
    assert not is_kept(folder, {**identity, "seed": 7}, cache)
