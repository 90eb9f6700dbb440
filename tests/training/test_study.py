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
from collections.abc import Callable
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

from stages.command import UserError
from stages.params import Block, load_params
from tests.checkout import ROOT
from tests.training.cache import Plan as Planted
from tests.training.cache import write_cache
from training import study
from training.compare import compare
from training.data import Batch, Cache
from training.loop import untrained
from training.methods import Fitted, Output
from training.study import Cell, Plan, cells, make_plan, run_study

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
        }
    },
}
SMALL: dict[str, Any] = {
    "encoders": ["tiny"],
    "methods": ["linear_probe", "attention_pool"],
    "controls": ["none", "random_vectors"],
    "regimes": ["full", {"kind": "shots", "shots": 2}],
    "seeds": 2,
}
# linear_probe once under full and none; else every method, control and draw.
RUNS = 1 + 2 + 4 + 8
SEARCHES = 2 * 2
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


def command(folder: Path, *arguments: str, module: str = "training.study") -> list[str]:
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
    module.Settings, module.SEEDED, module.fit = Block, False, fit_leaky
    monkeypatch.setitem(sys.modules, "training.methods.leaky", module)


def test_a_planted_leak_finds_no_test_label(project: Path, leaky: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (cell,) = planned(project, methods=["linear_probe"], controls=["none"], regimes=["full"])
    cell = cell._replace(method="leaky")
    plan = replace(plan, settings={"leaky": Block()}, sources={"leaky": ""})

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
        ({"development": "classes.txt"}, "classes.txt: cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(project: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(project, **changes)
    assert "\n" not in str(caught.value)
    assert not (project / "data/studies").exists()


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


def readme(section: str, language: str) -> list[str]:
    found = re.search(rf"^## {section}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(rf"```{language}\n(.*?)```", found[1], re.DOTALL)


def test_the_readmes_method_gets_its_paired_table(project: Path) -> None:
    for name in ("stages", "training"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (method,) = readme("A method in one file", "python")
    (block,) = readme("A method in one file", "yaml")
    (project / "training/methods/nearest_mean.py").write_text(method)
    studies = YAML(typ="safe").load(block)["studies"]
    studies["mine"]["encoders"] = ["tiny"]
    write_params(project, **studies)
    commands = re.findall(r"make (\w+) (NAME|STUDY)=(\w+)", "".join(readme("A method in one file", "sh")))
    assert commands == [("study", "NAME", "mine"), ("compare", "STUDY", "mine")]
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    arguments = {"study": ["--name", "mine", "--jobs", "1"], "compare": ["--study", "mine"]}
    for made_of, _, _ in commands:
        words = command(project, *arguments[made_of], module=f"training.{made_of}")
        done = run(words, cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("nearest_mean")]
    assert len(rows) == len(studies["mine"]["regimes"])
    assert all(re.search(r"\[[-+]\d", row) for row in rows)
