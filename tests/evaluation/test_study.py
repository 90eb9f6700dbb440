"""The study runner on a tiny cache: what it writes, what it never does twice, and what fit is not told."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from evaluation import study
from evaluation.compare import compare
from evaluation.study import (
    CHANGED,
    PLAIN,
    Cell,
    Entry,
    Plan,
    Variation,
    cells,
    changed_by,
    controlled_cache,
    make_plan,
    run_study,
)
from fieldmark.command import UserError
from fieldmark.params import Block, load_params
from fieldmark.store import read_folder_header, read_header, read_table, write_table
from tests.checkout import ROOT
from tests.project import write_thumbs
from tests.training.cache import Plan as Planted
from tests.training.cache import unit, with_vectors, write_cache
from training.controls import Control, apply_control, read_materials
from training.data import Batch, Cache, read_cache
from training.data.bank import Bank
from training.data.edges import Edges
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.loop import untrained
from training.methods import Fitted, Output, load_method

PARAMS: dict[str, Any] = {
    "domain": {"noun": "fish", "group": "fish"},
    "dataset": {"root": "data/raw", "buckets": 3},
    "llm": {"model": "none"},
    "encoders": {"tiny": {"model": "none"}, "other": {"model": "none"}},
    "report": {"reference": "linear_probe"},
    "train": {
        "methods": {
            "linear_probe": {"encoder": "tiny", "l2": [0.01, 1.0]},
            "attention_pool": {"encoder": "tiny", "epochs": 2, "hidden": 8, "weight_decay": [0.1, 0.2]},
            "concept_graph": {"encoder": "tiny", "epochs": 2, "hidden": 16, "weight_decay": [0.1]},
        }
    },
}
SMALL: dict[str, Any] = {
    "encoders": ["tiny"],
    "methods": ["linear_probe", "attention_pool", "concept_graph"],
    "controls": ["none", "random_vectors"],
    "regimes": ["full", {"kind": "shots", "shots": 2}],
    "seeds": 2,
}
# Under none and full the seeded methods twice, the probe once; all in every draw of shots. concept_graph reads texts.
RUNS = (1 + 2 + 2) + 2 * 3 + (2 + 2)
SEARCHES = 3 + 1
WRITTEN = ["config.json", "metrics.json", "predictions.parquet", "timing.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten classes, the same for two encoders."""
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder, Planted(classes=10, train=6, val=4, test=6, noise=1.5))
    for name in ("embed", "labels", "graphs"):
        shutil.copytree(folder / name / "tiny", folder / name / "other")
    shutil.copy(folder / "bank/tiny.parquet", folder / "bank/other.parquet")
    return folder


@pytest.fixture
def project(data: Path, tmp_path: Path) -> Path:
    """A folder with that cache as data/, in which studies are run."""
    (tmp_path / "data").mkdir()
    for entry in data.iterdir():
        (tmp_path / "data" / entry.name).symlink_to(entry)
    return tmp_path


def write_params(folder: Path, **studies: dict[str, Any]) -> Path:
    with open(folder / "params.yaml", "w") as file:
        YAML().dump({**PARAMS, "studies": studies}, file)
    return folder / "params.yaml"


def planned(folder: Path, **changes: Any) -> tuple[Plan, list[Cell]]:
    path = write_params(folder, small=SMALL | changes)
    plan = make_plan(str(path), load_params(path), "small", folder / "data")
    return plan, cells(plan, 0)


def ran(folder: Path, **changes: Any) -> Plan:
    plan, grid = planned(folder, **changes)
    run_study(plan, grid, 1)
    return plan


def made(plan: Plan) -> dict[str, tuple[int, int]]:
    """Every finished run and search: the file that is written first, and when."""
    found = {}
    for folder in plan.folder.glob("[a-z]*"):
        if folder.is_dir():
            state = (folder / "config.json").stat()
            found[folder.name] = (state.st_ino, state.st_mtime_ns)
    return found


def command(folder: Path, *arguments: str, module: str = "evaluation.study") -> list[str]:
    return [
        sys.executable,
        "-m",
        module,
        "--params",
        str(folder / "params.yaml"),
        "--data",
        str(folder / "data"),
        *arguments,
    ]


def test_every_run_is_written_whole(project: Path) -> None:
    plan = ran(project)
    assert len(made(plan)) == RUNS + SEARCHES
    for cell in cells(plan, 0):
        folder = plan.folder / cell.run
        assert sorted(file.name for file in folder.iterdir()) == WRITTEN
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        table = pq.read_table(folder / "predictions.parquet")
        assert table.column_names == ["path", "split", "seed", "class_id", "logits"]
        few = cell.regime.label == "2-shot"
        assert len(table) == 16 * (10 - len(plan.development) * few)
        assert set(table["seed"].to_pylist()) == {cell.seed}
        assert set(table["split"].to_pylist()) == {"train", "val", "test"} | ({"unused"} if few else set())
        # The figures are those of the predictions, and none is of test.
        classes, logits = np.array(config["classes"]), np.array(table["logits"].to_pylist())
        right = classes[logits.argmax(1)] == np.array(table["class_id"].to_pylist())
        for split in ("train", "val"):
            of_split = np.array(table["split"].to_pylist()) == split
            assert metrics[split]["accuracy"] == pytest.approx(right[of_split].mean())
            assert metrics[split]["images"] == of_split.sum()
        assert metrics["test"] == {"images": 6 * len(classes)}
        assert config["control"]["name"] == cell.control.name
        assert not any(str(project) in (folder / name).read_text(errors="ignore") for name in WRITTEN)


def test_few_shot_settings_come_from_development_classes_only(project: Path) -> None:
    plan = ran(project, controls=["none"], methods=["attention_pool", "linear_probe"])
    run = next(cell for cell in cells(plan, 0) if plan.searched(cell))
    chosen = json.loads((plan.folder / run.search / "config.json").read_text())
    config = json.loads((plan.folder / run.run / "config.json").read_text())
    assert len(plan.development) == 2
    assert not set(plan.development) & set(config["classes"])
    assert config["settings"] == chosen["settings"]
    assert [tried["settings"]["weight_decay"] for tried in chosen["tried"]] == [[0.1], [0.2]]
    best = max(
        chosen["tried"],
        key=lambda tried: (
            np.mean([d["accuracy"] for d in tried["draws"]]),
            -np.mean([d["log_loss"] for d in tried["draws"]]),
        ),
    )
    assert config["settings"]["weight_decay"] == best["settings"]["weight_decay"]
    assert config["settings"]["epochs"] == np.median([draw["epoch"] for draw in best["draws"]])
    assert len(best["draws"]) == study.SEARCH_DRAWS


def test_the_search_is_scored_on_all_that_a_draw_leaves_over_but_test(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, grid = planned(project, controls=["none"], methods=["linear_probe"])
    scored: list[set[str]] = []

    def predict(model: nn.Module, cache: Cache, images: Tensor) -> Tensor:
        scored.append({cache.paths[image] for image in images.tolist()})
        return study_predict(model, cache, images)

    study_predict = study.predict
    monkeypatch.setattr(study, "predict", predict)
    study.make_search(plan, next(cell for cell in grid if plan.searched(cell)))
    assert len(scored) == 2 * study.SEARCH_DRAWS
    for paths in scored:
        assert len(paths) == 2 * (6 - 2 + 4)  # of each class what 2 of 6 training images leave, and val
        assert {path.split("/")[1] for path in paths} == set(plan.development)
        assert not any(path.startswith(("test", "hidden")) for path in paths)


def test_shots_are_shared_by_methods_and_val_is_not_trained_on(project: Path) -> None:
    plan = ran(project, controls=["none"])
    shots: dict[int, set[frozenset[str]]] = {}
    for cell in cells(plan, 0):
        if plan.searched(cell):
            table = pq.read_table(plan.folder / cell.run / "predictions.parquet")
            rows = zip(table["path"].to_pylist(), table["split"].to_pylist(), strict=True)
            shots.setdefault(cell.seed, set()).add(frozenset(path for path, split in rows if split == "train"))
    assert [len(found) for found in shots.values()] == [1, 1]
    (first,), (second,) = shots.values()
    assert len(first) == len(second) == 2 * 8
    assert first != second


def test_what_is_there_is_not_made_again(project: Path) -> None:
    plan = ran(project)
    before = made(plan)
    assert run_study(plan, cells(plan, 0), 1) == 0
    assert made(plan) == before
    # Another seed adds its runs; another knob makes one method's anew, and nothing else.
    more = ran(project, seeds=3)
    assert {name: made(more)[name] for name in before} == before
    PARAMS["train"]["methods"]["linear_probe"]["l2"] = [0.1, 1.0]
    try:
        again = made(ran(project))
    finally:
        PARAMS["train"]["methods"]["linear_probe"]["l2"] = [0.01, 1.0]
    assert {name.split(".")[1] for name in before if again[name] != before[name]} == {"linear_probe"}


def test_code_and_cache_are_part_of_a_run(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, (first, *_) = planned(project)
    copy = tmp_path / "training"
    shutil.copytree(ROOT / "training", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(study, "TRAINING", copy)

    def mark() -> str:
        return planned(project)[0].mark(first)

    assert mark() == plan.mark(first)
    for name, counts in (
        ("methods/linear_probe.py", True),
        ("logistic.py", True),  # by way of the method
        ("regimes.py", True),
        ("methods/attention_pool.py", False),
        ("compare.py", False),
    ):
        text = (copy / name).read_text()
        (copy / name).write_text(text + "\n# edited\n")
        assert (mark() != plan.mark(first)) == counts, name
        (copy / name).write_text(text)
    other = replace(plan, origins={"tiny": plan.origins["tiny"] | {"index/images.parquet": "another"}})
    assert other.mark(first) != plan.mark(first)
    assert other.search_mark(first) != plan.search_mark(first)


def test_no_run_is_made_that_its_control_cannot_change(project: Path) -> None:
    few = {"name": "random_vectors", "concepts": 5}
    controls = ["none", "edges_removed", "owners_permuted", "unrelated_texts", {"concepts": 5}, few]
    methods = ["linear_probe", "zero_shot", "concept_bottleneck", "concept_graph"]
    path = write_params(project, small=SMALL | {"controls": controls, "methods": methods, "regimes": ["full"]})
    study_of = study.read_study(str(path), load_params(path), "small")
    entries = {name: Entry(name, Block(), "") for name in methods}
    plan = Plan("small", study_of, project, 3, entries, "", (), (), {})
    found: dict[str, list[str]] = {name: [] for name in methods}
    for cell in cells(plan, 0):
        found[cell.method] += [cell.control.label] if cell.control.label not in found[cell.method] else []
    assert found == {
        "linear_probe": ["none"],
        "zero_shot": ["none", "owners_permuted", "random_vectors-5"],
        "concept_bottleneck": ["none", "unrelated_texts", "none-5", "random_vectors-5"],
        "concept_graph": ["none", "edges_removed", "owners_permuted", "unrelated_texts", "none-5", "random_vectors-5"],
    }


def parts_of(cache: Cache) -> dict[str, list[Tensor]]:
    """A cache's tensors, by the words of READS."""
    bank, names = cache.part(Bank), cache.part(Bank).of_kind("name")
    labels = ("concept_idx", "concept_weight", "density", "selected", "selected_concepts", "ring_gains")
    return {
        "names": [bank.K[names], bank.kept[names]],
        "concepts": [bank.K[~names], bank.kept[~names]],
        "owners": [bank.own[names], bank.own[~names]],
        "labels": [getattr(cache, name) for name in labels],
        "edges": [cache.part(Edges).start, cache.part(Edges).count, cache.part(Edges).ends, cache.part(Edges).weight],
    }


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("concepts", [None, 20])
def test_a_control_changes_the_parts_that_are_listed_for_it(
    controlled: Path, data: Path, name: str, concepts: int | None
) -> None:
    control = Control.model_validate({"name": name, "concepts": concepts})
    cache = read_cache(controlled, "tiny", 3)
    made = apply_control(cache, control, 0, read_materials(controlled, "tiny", control, 3))
    before, after, listed = parts_of(cache), parts_of(made), changed_by(control)
    if "concepts" in listed:  # their owners go with them
        before["owners"].pop()
        after["owners"].pop()
    differ = {part for part in before if not all(map(torch.equal, before[part], after[part]))}
    assert differ == listed


@pytest.fixture(scope="module")
def controlled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That cache with texts for the controls: 60 unrelated ones and 4 random descriptors a class."""
    folder = tmp_path_factory.mktemp("controlled")
    shutil.copytree(data, folder, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [{"kind": "unrelated", "rank": rank} for rank in range(60)]
    rows += [{"kind": "random", "class_id": f"class-{c:02d}", "rank": r} for c in range(10) for r in range(4)]
    for row in rows:
        row |= {"text": str(row), "vector": unit(rng.standard_normal(32))}
    made_by = {"encoder": read_header(folder / "embed/tiny/text.parquet", "embed.text/1").params["encoder"]}
    path = folder / "embed/tiny/controls.parquet"
    write_table(with_vectors("embed.controls/1", rows), path, "embed.controls/1", made_by, "texts")
    return folder


GRAPH: dict[str, Any] = {
    "methods": ["linear_probe", "concept_graph"],
    "controls": ["none"],
    "regimes": ["full"],
    "seeds": 1,
    "variants": {
        "plain": {"method": "concept_graph"},
        "quiet": {"method": "concept_graph", "settings": {"texts": 0, "loss_weights": {"contrast": 0.25}}},
        "few": {
            "method": "concept_graph",
            "settings": {"nodes": "selected"},
            "labels": {"select_locals": 2, "mode": "splice", "density": "product", "select_concepts": 3},
        },
    },
}


@pytest.fixture
def quick_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {
        "encoder": "tiny",
        "epochs": 1,
        "hidden": 16,
        "weight_decay": [0.1],
        "streams": ["local"],
        "loss_weights": {"graph": 0.4},
    }
    monkeypatch.setitem(PARAMS["train"]["methods"], "concept_graph", knobs)


def test_a_variant_is_its_method_with_other_settings_and_labels(project: Path, quick_graph: None) -> None:
    plan = ran(project, **GRAPH)
    assert list(plan.entries) == ["linear_probe", "concept_graph", "plain", "quiet", "few"]
    runs = {cell.method: plan.folder / cell.run for cell in cells(plan, 0)}
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in runs.items()}
    assert runs["few"].name == "tiny.few.none.full.0"
    assert [configs[name]["method"] for name in ("plain", "quiet", "few")] == ["concept_graph"] * 3
    own = configs["concept_graph"]["settings"]
    assert configs["quiet"]["settings"] == own | {"texts": 0, "loss_weights": own["loss_weights"] | {"contrast": 0.25}}
    assert own["loss_weights"]["graph"] == 0.4
    assert configs["few"]["labels"] == GRAPH["variants"]["few"]["labels"]
    logits = {name: pq.read_table(folder / "predictions.parquet")["logits"] for name, folder in runs.items()}
    assert logits["plain"].equals(logits["concept_graph"])
    assert not logits["quiet"].equals(logits["plain"])
    assert not logits["few"].equals(logits["plain"])


def test_another_labelling_is_made_in_memory_and_leaves_the_rest(project: Path) -> None:
    base = controlled_cache(project / "data", "tiny", 3, Control(), 0, PLAIN)
    variation = Variation((("select_concepts", 3), ("select_locals", 2)))
    few = controlled_cache(project / "data", "tiny", 3, Control(), 0, variation)
    assert few.part(Labels).selected.sum(1).unique().tolist() == [3]
    assert few.part(Labels).selected_concepts.shape[1] == 3
    assert few.part(Nodes).nodes is base.vectors
    assert few.part(Bank) is base.bank
    variation = Variation((("select_locals", 1),))
    under = controlled_cache(project / "data", "tiny", 3, Control(name="random_vectors"), 0, variation)
    assert under.selected.sum(1).unique().tolist() == [2]
    assert not torch.equal(under.bank.K, base.bank.K)


def test_a_variant_may_read_other_encoders_too(project: Path, quick_graph: None) -> None:
    variants = {"both": {"method": "concept_graph", "also": ["other"]}}
    regimes = ["full", {"kind": "shots", "shots": 2}]
    grid = {"variants": variants, "controls": ["none", "random_vectors"], "regimes": regimes}
    plan = ran(project, **GRAPH | grid)
    runs = {cell.method: plan.folder / cell.run for cell in cells(plan, 0) if cell.control == Control()}
    logits = {name: pq.read_table(folder / "predictions.parquet")["logits"] for name, folder in runs.items()}
    assert not logits["both"].equals(logits["concept_graph"])
    mark = read_folder_header(project / "data/embed/other/images", "embed.nodes/1", 3).fingerprint
    config = json.loads((runs["both"] / "config.json").read_text())
    assert config["also"] == ["other"]
    assert config["fingerprints"]["embed/other/images"] == mark


def test_a_control_that_draws_leaves_the_unseen_classes_as_they_are(project: Path) -> None:
    unseen = [{"kind": "unseen", "seen": 0.5}]
    plan = ran(project, methods=["zero_shot"], controls=["none", "random_vectors"], regimes=unseen)
    files = [plan.folder / cell.run / "predictions.parquet" for cell in cells(plan, 0)]
    assert len(files) == 3
    splits = [pq.read_table(file, columns=["path", "split"]).sort_by("path")["split"].to_pylist() for file in files]
    assert splits[1:] == splits[:1] * 2


def test_overrides_are_part_of_a_run(project: Path, quick_graph: None) -> None:
    def marks(**few: Any) -> dict[str, str]:
        variants = GRAPH["variants"] | {"few": GRAPH["variants"]["few"] | few}
        plan, grid = planned(project, **GRAPH | {"variants": variants})
        return {cell.method: plan.mark(cell) for cell in grid}

    before, labels = marks(), GRAPH["variants"]["few"]["labels"]
    assert len(set(before.values())) == 4
    assert before["plain"] == before["concept_graph"]
    for change in ({"labels": labels | {"select_locals": 3}}, {"labels": {}}, {"settings": {"texts": 2}}):
        after = marks(**change)
        assert {name for name in before if after[name] != before[name]} == {"few"}


def test_a_variant_by_pixels_reads_thumbnails_and_no_other_run_does(project: Path, quick_graph: None) -> None:
    def changed(**few: Any) -> dict[str, Any]:
        return GRAPH | {"variants": GRAPH["variants"] | {"few": GRAPH["variants"]["few"] | few}}

    before, grid = planned(project, **GRAPH)
    by_pixels = changed(labels={"select_locals": 2, "density": "pixel"})
    with pytest.raises(UserError, match=r"data/thumbs/b000\.parquet: is missing"):
        planned(project, **by_pixels)
    index = read_table(project / "data/index/images.parquet", "index.images/1").to_pylist()
    rng = np.random.default_rng(0)
    pictures = {row["image_id"]: rng.integers(0, 256, (6, 6), dtype=np.uint8) for row in index if row["image_id"]}
    write_thumbs(pictures, buckets=3, folder=project / "data/thumbs")
    plan = ran(project, **by_pixels)
    assert {cell.method for cell in grid if plan.mark(cell) != before.mark(cell)} == {"few"}
    for cell in grid:
        config = json.loads((plan.folder / cell.run / "config.json").read_text())
        assert config["fingerprints"].get("thumbs") == ("thumbs" if cell.method == "few" else None)
    # Thumbnails made otherwise are another variant's.
    for path in (project / "data/thumbs").iterdir():
        write_table(read_table(path, "thumbs/1"), path, "thumbs/1", {}, "another")
    again, _ = planned(project, **by_pixels)
    assert {cell.method for cell in grid if again.mark(cell) != plan.mark(cell)} == {"few"}


def test_a_second_encoder_is_a_grid_of_its_own(project: Path) -> None:
    plan = ran(project, encoders=["tiny", "other"], controls=["none"], regimes=["full"], methods=["linear_probe"])
    tiny, other = (plan.folder / f"{name}.linear_probe.none.full.0/predictions.parquet" for name in ("tiny", "other"))
    assert pq.read_table(tiny).equals(pq.read_table(other))


class Leaky(nn.Module):
    """Remembers every image that it was shown with a class, and answers with the nearest one's."""

    def __init__(self, vectors: Tensor, y: Tensor, classes: int) -> None:
        super().__init__()
        self.vectors, self.y, self.classes = vectors, y, classes

    def forward(self, batch: Batch) -> Output:
        nearest = self.y[(batch.g @ self.vectors.T).argmax(1)]
        return Output(nn.functional.one_hot(nearest.clamp_min(0), self.classes).float(), {}, None)


def fit_leaky(cache: Cache, settings: Block, seed: int) -> Fitted:
    images = torch.arange(len(cache.paths))
    return untrained(Leaky(cache.globals(images), cache.y, len(cache.classes)), cache)


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("training.methods.leaky")
    module.Settings, module.SEEDED, module.READS, module.fit = Block, False, frozenset(), fit_leaky
    monkeypatch.setitem(sys.modules, "training.methods.leaky", module)


def test_a_planted_leak_finds_no_test_label(project: Path, leaky: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (cell,) = planned(project, methods=["linear_probe"], controls=["none"], regimes=["full"])
    cell = cell._replace(method="leaky")
    plan = replace(plan, entries={"leaky": Entry("leaky", Block(), "")})

    def test_accuracy() -> float:
        study.prepare.cache_clear()
        study.make_run(plan, cell)
        table = pq.read_table(plan.folder / cell.run / "predictions.parquet").to_pylist()
        classes = json.loads((plan.folder / cell.run / "config.json").read_text())["classes"]
        return float(np.mean([classes[np.argmax(r["logits"])] == r["class_id"] for r in table if r["split"] == "test"]))

    assert test_accuracy() < 0.3  # its own nearest image, the test image itself, has no label
    monkeypatch.setattr(study, "hide_test", lambda cache: cache)
    assert test_accuracy() == 1  # the leak is there to be found
    study.prepare.cache_clear()


def test_permuted_labels_score_at_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "data", Planted(classes=10, train=20, val=20, test=5))
    plan, grid = planned(tmp_path, controls=["none"], regimes=["full"], methods=["linear_probe"])

    def permuted(cache: Cache, regime: object, draw: int) -> Cache:
        train, target = cache.images("train"), cache.y.clone()
        target[train] = target[train][torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))]
        return replace(cache, target=target)

    def val_accuracy() -> float:
        study.prepare.cache_clear()
        study.make_run(plan, grid[0])
        return float(json.loads((plan.folder / grid[0].run / "metrics.json").read_text())["val"]["accuracy"])

    assert val_accuracy() > 0.9
    monkeypatch.setattr(study, "apply_regime", permuted)
    # Ten classes look alike within themselves: the 20 images of one are right or wrong together.
    assert val_accuracy() < 0.1 + 4 * (0.1 * 0.9 / 10) ** 0.5
    study.prepare.cache_clear()


def kill_and_finish(project: Path, kills: int, jobs: int, random_seed: int) -> None:
    """Run a study, killed so many times at random moments, and once to the end: as if it had never been killed."""
    rng = random.Random(random_seed)
    calm = project / "calm"
    calm.mkdir()
    (calm / "data").mkdir()
    for entry in (project / "data").iterdir():
        (calm / "data" / entry.name).symlink_to(entry)
    expected_plan = ran(calm)
    expected = compare(expected_plan, cells(expected_plan, 0))

    plan, grid = planned(project)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in range(1, kills + 1):
        wanted = (RUNS + SEARCHES) * number // (kills + 2)
        process = subprocess.Popen(
            command(project, "--name", "small", "--jobs", str(jobs)), cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        while len(made(plan)) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = made(plan)
        time.sleep(0.1 if jobs > 1 else 0)  # workers end with their parent
    assert 0 < len(before) < RUNS + SEARCHES
    done = subprocess.run(
        command(project, "--name", "small"), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{RUNS - sum('development' not in name for name in before)} runs made" in done.stdout
    after = made(plan)
    assert {name: after[name] for name in before} == before  # nothing ran twice
    assert after.keys() == made(expected_plan).keys()
    assert not list(plan.folder.glob(".*.partial"))
    assert compare(plan, grid) == expected
    for name in ("tables.csv", "tables.tex"):
        assert (plan.folder / name).read_bytes() == (expected_plan.folder / name).read_bytes()


def test_a_killed_study_goes_on_where_it_was(project: Path) -> None:
    kill_and_finish(project, kills=3, jobs=1, random_seed=0)


@pytest.mark.slow
def test_a_study_killed_ten_times_goes_on_where_it_was(project: Path) -> None:
    kill_and_finish(project, kills=10, jobs=2, random_seed=1)


def test_two_processes_do_not_work_at_one_study(project: Path) -> None:
    plan, grid = planned(project)
    plan.folder.mkdir(parents=True)
    with study.lock(plan), pytest.raises(UserError, match="another process is running this study"):
        run_study(plan, grid, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["telepathy"]}, "studies.small.methods: 'telepathy' is not there; choose from: attention_pool"),
        ({"encoders": ["tinny"]}, "studies.small.encoders: 'tinny' is not there; choose from: tiny, other"),
        ({"seed": 3}, "studies.small.seed: unknown key; did you mean `seeds`?"),
        (
            {"regimes": [{"kind": "shots", "shots": 3}]},
            "studies.small.regimes.0.shots: input should be 1, 2, 4, 8 or 16",
        ),
        ({"regimes": ["few"]}, "studies.small.regimes.0: names no regime; give a `kind`, one of: full, shots"),
        ({"controls": ["none", {"nam": "none"}]}, "studies.small.controls.1.nam: unknown key; did you mean `name`?"),
        ({"controls": ["none", "none"]}, "studies.small.controls: holds none more than once"),
        ({"variants": {"v": {"methd": "mlp"}}}, "studies.small.variants.v.methd: unknown key; did you mean `method`?"),
        ({"variants": {"v": {"method": "telepathy"}}}, "studies.small.variants.v.method: 'telepathy' is not there"),
        ({"variants": {"mlp": {"method": "mlp"}}}, "studies.small.variants.mlp: is a method's name; choose another"),
        (
            {"variants": {"v": {"method": "concept_graph", "also": ["clip"]}}},
            "studies.small.variants.v.also: 'clip' is not there; choose from: tiny, other",
        ),
        (
            {"variants": {"v": {"method": "mlp", "also": ["other"]}}},
            "studies.small.variants.v.also: mlp reads one encoder only",
        ),
        ({"variants": {"a.b": {"method": "mlp"}}}, "studies.small.variants.a.b: is used as a folder name"),
        (
            {"variants": {"v": {"method": "concept_graph", "settings": {"loss_weights": {"contrst": 1.0}}}}},
            "studies.small.variants.v.settings.loss_weights.contrst: unknown key; did you mean `contrast`?",
        ),
        (
            {"variants": {"v": {"method": "attention_pool", "settings": {"lr": [0.1] * 9}}}},
            "studies.small.variants.v: val would choose among 18 settings",
        ),
        (
            {"variants": {"v": {"method": "concept_graph", "labels": {"mod": "splice"}}}},
            "studies.small.variants.v.labels.mod: unknown key; did you mean `mode`?",
        ),
        (
            {"variants": {"v": {"method": "mlp", "labels": {"mode": "splice"}}}},
            "studies.small.variants.v.labels: mlp reads no labels; remove it",
        ),
        (
            {"variants": {"v": {"method": "concept_graph", "labels": {"inside_object": True}}}},
            "studies.small.variants.v.labels.inside_object: no study can label nodes so",
        ),
        (
            {"questions": [{"ask": "Is it?", "of": "linear_probe", "against": "gat"}]},
            "studies.small.questions.0.against: 'gat' is not there; choose from: linear_probe",
        ),
        (
            {"questions": [{"ask": "Is it?", "of": "linear_probe", "aganst": "linear_probe"}]},
            "studies.small.questions.0.aganst: unknown key; did you mean `against`?",
        ),
        ({"open": [{"ask": "Is it?"}]}, "studies.small.open.0.because: is missing"),
        ({"development": "classes.txt"}, "classes.txt: cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(project: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(project, **changes)
    assert "\n" not in str(caught.value)
    assert not (project / "data/studies").exists()


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"READS": None}, "training/methods/leaky.py: has no READS"),
        (
            {"READS": frozenset({"label"})},
            "training/methods/leaky.py: READS: 'label' is no part; choose from: concepts",
        ),
    ],
)
def test_a_method_that_is_not_whole_is_named(
    leaky: None, monkeypatch: pytest.MonkeyPatch, lacking: dict[str, Any], message: str
) -> None:
    for name, value in lacking.items():
        if value is None:
            monkeypatch.delattr(sys.modules["training.methods.leaky"], name)
        else:
            monkeypatch.setattr(sys.modules["training.methods.leaky"], name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        load_method("leaky")


def test_a_longer_search_than_the_others_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {"encoder": "tiny", "l2": [10.0**-n for n in range(17)]}
    monkeypatch.setitem(PARAMS["train"]["methods"], "linear_probe", probe)
    with pytest.raises(
        UserError, match=r"train\.methods\.linear_probe: val would choose among 17 settings, and train\.budget"
    ):
        planned(project)


def test_a_missing_file_is_one_line(project: Path) -> None:
    path = write_params(project, small=SMALL)
    (project / "data/bank").unlink()
    done = subprocess.run(command(project, "--name", "small"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "bank/tiny.parquet: is missing" in done.stderr
    assert path.is_file()


def test_development_classes_from_a_file(project: Path) -> None:
    (project / "classes.txt").write_text("class-07\n\nclass-01\n")
    plan, _ = planned(project, development=str(project / "classes.txt"))
    assert plan.development == ("class-01", "class-07")
    (project / "classes.txt").write_text("class-07\n")
    with pytest.raises(UserError, match="names 1 of 10 classes; it takes 2"):
        planned(project, development=str(project / "classes.txt"))


def test_classes_left_out_of_few_shot_runs(project: Path) -> None:
    (project / "seen.txt").write_text("class-02\nclass-05\nclass-06\n")
    plan = ran(project, controls=["none"], methods=["linear_probe"], left_out=str(project / "seen.txt"))
    assert plan.left_out == ("class-02", "class-05", "class-06")
    assert not set(plan.left_out) & set(plan.development)
    sizes = set()
    for cell in cells(plan, 0):
        config = json.loads((plan.folder / cell.run / "config.json").read_text())
        sizes.add((plan.searched(cell), len(config["classes"])))
        assert ("left_out" in config) == plan.searched(cell)
    assert sizes == {(False, 10), (True, 5)}
    (project / "classes.txt").write_text("class-07\nclass-02\n")
    with pytest.raises(UserError, match=r"classes\.txt: names class-02, which .*seen\.txt leaves out"):
        planned(project, left_out=str(project / "seen.txt"), development=str(project / "classes.txt"))
    (project / "seen.txt").write_text("".join(f"class-0{number}\n" for number in range(7)))
    with pytest.raises(UserError, match=r"seen\.txt: leaves 3 classes, few-shot runs take 4"):
        planned(project, left_out=str(project / "seen.txt"))
