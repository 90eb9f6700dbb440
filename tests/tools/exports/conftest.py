"""A small data set with all that an index can say of an image, and a run that predicts it, made once."""

import copy
import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize_scalar

from fieldmark import store
from tests.project import PARAMS, draw
from training.metrics import accuracy

CLASSES = [
    {
        "class_id": "tang", "name": "Blue tang", "superclass": "surgeonfish",
        "scientific_name": "Paracanthurus hepatus", "lineage": "Animalia > Chordata > Acanthuridae",
    },
    {"class_id": "wrasse", "name": "Wrasse | <b>", "superclass": "", "scientific_name": "", "lineage": ""},
    {
        "class_id": "other", "name": "Blue tang", "superclass": "", "scientific_name": "Acanthurus coeruleus",
        "lineage": "Animalia > Acanthuridae > Acanthurus coeruleus",
    },
]  # fmt: skip
SPLITS = ["train"] * 3 + ["val"] * 4 + ["test"] * 3
LICENCES = ["CC-BY-4.0", "CC0 1.0", "", "all rights reserved", "https://creativecommons.org/licenses/by-nc/4.0/"]
DATES = ["2024-05-01", "2024:05:02 10:11:12", "2024-05", "spring", ""]
SEEDS, KEPT = (0, 1), 1
Row = dict[str, Any]


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_run(name: str) -> None:
    """data/runs/NAME of random logits, somewhat higher for the class of the image."""
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    classes = sorted(row["class_id"] for row in CLASSES)
    rng = np.random.default_rng(0)
    y = np.array([classes.index(row["class_id"]) for row in index])
    halves = {"train": ["train", "train"], "val": ["choose", "val"], "test": ["test", "test"]}
    split = np.array([halves[row["split"]][number % 2] for number, row in enumerate(index)])
    logits = {seed: rng.standard_normal((len(y), 3)).astype(np.float32) for seed in SEEDS}
    for values in logits.values():
        values[np.arange(len(y)), y] += 1
    table = pa.table({
        "path": [row["path"] for row in index] * len(SEEDS),
        "split": split.tolist() * len(SEEDS),
        "seed": pa.array(np.repeat(np.array(SEEDS, dtype=np.int32), len(y))),
        "class_id": [row["class_id"] for row in index] * len(SEEDS),
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(list(logits.values())).reshape(-1)), 3),
    })
    metadata = {
        "schema": "run.predictions/1", "fingerprint": "f" * 64, "params": store.canonical_json({"classes": classes}),
    }  # fmt: skip
    folder = Path("data/runs") / name
    folder.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "predictions.parquet")
    config = {
        "method": "zero_shot", "encoder": "conv", "also": [], "settings": {}, "regime": {"kind": "full"},
        "control": {"name": "none"}, "seeds": list(SEEDS), "classes": classes, "model_seed": KEPT, "device": "cpu",
        "fingerprints": {"bank/conv.parquet": "0"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    metrics = {
        part: {"accuracy": float(np.mean([accuracy(logits[seed][split == part], y[split == part]) for seed in SEEDS]))}
        for part in ("train", "val", "test")
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_texts() -> None:
    """Concepts and answers as a model would have given them, and a description of one image in two sentences."""
    concepts = [
        ("a fish with a yellow tail", "tang", "visual", True),
        ("a photo of a Blue tang.", "tang", "name", True),
        ("a loud fish", "tang", "visual", False),
        ("a fish with a palette", "tang", "visual", True),
        ("a fish above sand", None, "generic", True),
    ]
    rows = [
        {
            "concept_id": store.sha256(text), "text": text, "class_id": class_id, "kind": kind, "kept": kept,
            "rank": rank,
        }
        for rank, (text, class_id, kind, kept) in enumerate(concepts)
    ]  # fmt: skip
    table = store.make_table("concepts/1", rows)
    store.write_table(table, "data/concepts/concepts.parquet", "concepts/1", {}, "concepts")
    answers = [
        {
            "item_key": each, "subject_id": each, "sample": 0, "prompt_sha": "p" * 64, "status": status,
            "model_requested": "some-model", "model_reported": "some-model-2024", "attempts": 1, "source": source,
            "created_at": "2024",
        }
        for each, status, source in (("tang", "ok", "live"), ("wrasse", "ok", "import"), ("other", "refused", "live"))
    ]  # fmt: skip
    table = store.make_table("llm.answers/1", answers)
    params = {"prompt_sha": "p" * 64}
    store.write_table(table, "data/concepts/answers.parquet", "llm.answers/1", params, "answers")
    image_id = store.read_table("data/index/images.parquet", "index.images/1").column("image_id")[0].as_py()
    rows = [{"image_id": image_id, "rank": rank, "text": f"Sentence {rank}."} for rank in range(2)]
    table = store.make_table("descriptions/1", rows)
    store.write_table(table, "data/descriptions/descriptions.parquet", "descriptions/1", {}, "descriptions")


@pytest.fixture(scope="session")
def exported_from(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of three classes by a manifest, indexed, with texts and the run `zero_shot`."""
    folder = tmp_path_factory.mktemp("exported")
    rows = []
    for number, (row, split) in enumerate([(row, split) for row in CLASSES for split in SPLITS]):
        path = f"{row['class_id']}/ü {number}.png"
        draw(folder / "images" / path, number)
        box = "0.25 0.5 0.75 1.0" if number % 2 else ""
        rows.append({
            "path": path, "class": row["class_id"], "split": split, "box": box,
            "captured_at": DATES[number % 5], "latitude": "" if number % 3 == 0 else -17.5, "longitude": 210.25,
            "depth_m": number or "", "licence": LICENCES[number % 5], "group": "",
        })  # fmt: skip
    write_csv(folder / "images/manifest.csv", rows)
    write_csv(folder / "images/classes.csv", CLASSES)
    (folder / "data").mkdir()
    (folder / "data/none").touch()
    params = copy.deepcopy(PARAMS)
    params["encoders"] = {"conv": {"model": "local-dir:/home/somebody/models/tiny"}}
    params["dataset"].update(format="manifest", root="images")
    (folder / "params.yaml").write_text(json.dumps(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["index_images"])
        importlib.import_module("stages.index_images").main()
        write_run("zero_shot")
        write_texts()
    return folder


@pytest.fixture
def made(exported_from: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The index's rows; the tests' working directory is the data set's, which they do not change."""
    monkeypatch.chdir(exported_from)
    return store.read_table("data/index/images.parquet", "index.images/1").to_pylist()


@pytest.fixture
def export(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; what it says."""

    def run(to: str, out: Path, *more: str) -> str:
        run_stage("tools.export", "--to", to, str(out), *more)
        return capsys.readouterr().out

    return run


@pytest.fixture
def kept(made: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the seed whose model is kept, read independently: split (n,), y (n,) and the softmax of its logits (n, 3)."""
    table = pq.read_table("data/runs/zero_shot/predictions.parquet").to_pylist()
    rows = sorted((row for row in table if row["seed"] == KEPT), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == [row["path"] for row in made]
    classes = sorted(row["class_id"] for row in CLASSES)
    powers = np.exp(np.array([row["logits"] for row in rows], dtype=np.float64))
    y = np.array([classes.index(row["class_id"]) for row in rows])
    return np.array([row["split"] for row in rows]), y, powers / powers.sum(1, keepdims=True)


@pytest.fixture
def calibrated(kept: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`kept` with the temperature that makes the labels of val most likely, found by scipy."""
    split, y, probabilities = kept
    val = split == "val"

    def scaled(power: float) -> np.ndarray:
        powers = probabilities ** (10**-power)
        return powers / powers.sum(1, keepdims=True)

    def loss(power: float) -> float:
        return float(-np.log(scaled(power)[val, y[val]]).sum())

    return split, y, scaled(minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}).x)
