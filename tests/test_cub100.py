"""The cub100 profile end to end on a slice of its photographs: `make repro`'s steps in a checkout beside ../shared."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.checkout import ROOT, checkout, command, edit_params

SHARED = ROOT.parent / "shared"
CUB = SHARED / "data/cub100/CUB_200_2011"
CLASSES, TRAIN, TEST, VAL = 6, 14, 6, 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CUB.is_dir() and (SHARED / "models/birds-lit").is_dir()),
        reason="../shared/data/cub100 or ../shared/models/birds-lit is not on this machine",
    ),
]


def cut_slice(target: Path) -> list[str]:
    """A few classes of CUB in its own layout; returns the numbers of the first images for training of each class."""
    lines = {name: [line.split() for line in (CUB / name).read_text().splitlines()]
             for name in ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")}  # fmt: skip
    label, is_train = dict(lines["image_class_labels.txt"]), dict(lines["train_test_split.txt"])
    numbers: list[str] = []
    val: list[str] = []
    for number, _ in lines["classes.txt"][:CLASSES]:
        own = [image for image, _ in lines["images.txt"] if label[image] == number]
        train = [image for image in own if is_train[image] == "1"][:TRAIN]
        numbers += train + [image for image in own if is_train[image] == "0"][:TEST]
        val += train[:VAL]
    for image, path in lines["images.txt"]:
        if image in numbers:
            (target / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CUB / "images" / path, target / "images" / path)
    for name, rows in lines.items():
        kept = rows[:CLASSES] if name == "classes.txt" else [row for row in rows if row[0] in numbers]
        (target / name).write_text("".join(f"{' '.join(row)}\n" for row in kept))
    shutil.copytree(CUB / "parts", target / "parts")
    return val


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cub")
    (base / "shared").symlink_to(SHARED)
    folder = checkout(base / "fieldmark")
    val = cut_slice(base / "CUB")
    (base / "val.txt").write_text("\n".join(val))
    texts = json.loads((SHARED / "data/cub100/concepts_gpt4.json").read_text())
    (base / "texts.json").write_text(json.dumps(dict(list(texts.items())[:CLASSES])))

    def make_small(params: Any) -> None:
        params["dataset"].update(root="../CUB", val_list="../val.txt", buckets=2)
        params["concepts"]["import"] = "../texts.json"
        params["train"]["seeds"] = 1
        # One encoder, and neither texts for controls nor links: those are for studies.
        for block in ("encoders", "moments"):
            params[block] = {"birds-lit": params[block]["birds-lit"]}
        del params["controls"], params["links"]
        for method in ("attention_pool", "concept_graph"):
            params["train"]["runs"][method]["settings"] = {"epochs": 2, "weight_decay": [0.01]}

    edit_params(folder, make_small, "profiles/cub100.yaml")
    command(sys.executable, "-m", "tools.profiles", "cub100", cwd=folder)
    command(sys.executable, "-m", "tools.preflight", cwd=folder)
    command("dvc", "repro", cwd=folder)
    return folder


def test_photographs_come_out_as_a_report(made: Path) -> None:
    metrics = json.loads((made / "data/index/metrics.json").read_text())
    assert metrics["images"] == {"train": CLASSES * (TRAIN - VAL), "val": CLASSES * VAL, "test": CLASSES * TEST}
    assert metrics["unused"] == {"broken": 0, "duplicate": 0, "conflict": 0}
    assert pq.read_table(made / "data/index/parts.parquet").num_rows > CLASSES * TRAIN
    answers = pq.read_table(made / "data/concepts/answers.parquet").to_pylist()
    assert [row["source"] for row in answers] == ["import"] * CLASSES
    nodes = pq.read_table(made / "data/embed/birds-lit/images", columns=["image_id", "kind"], partitioning=None)
    kinds = nodes["kind"].to_pylist()
    assert (kinds.count("global"), kinds.count("grid")) == (CLASSES * (TRAIN + TEST), CLASSES * (TRAIN + TEST) * 9)
    assert len(kinds) == kinds.count("global") + kinds.count("grid")
    page = (made / "data/report/index.html").read_text()
    assert "Black footed Albatross" in page
    assert "linear_probe" in (made / "data/report/summary.txt").read_text()


def test_a_probe_learns_what_it_sees(made: Path) -> None:
    """Six species, some of them alike to nobody: far above the chance of one in six."""
    metrics = json.loads((made / "data/runs/linear_probe/metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.6


def test_a_second_run_runs_nothing(made: Path) -> None:
    assert "Running stage" not in command("dvc", "repro", cwd=made).stdout
