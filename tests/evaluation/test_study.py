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
from collections.abc import Collection, Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from evaluation import fitting, study
from evaluation.compare import compare
from evaluation.fitting import controlled_cache, prepare
from evaluation.plan import PLAIN, STUDIES, Cell, Entry, Plan, Variant, cells, make_plan, read_entry, read_study
from evaluation.study import run_study
from fieldmark import sources
from fieldmark.command import UserError, run
from fieldmark.params import Block, Params, check_params, load_params
from fieldmark.store import read_header, read_table, write_table
from tests.checkout import ROOT
from tests.project import write_thumbs
from tests.training.cache import ALL, unit, with_vectors, write_again, write_cache
from tests.training.cache import Plan as Planted
from tools.profiles import lay_over
from training.controls import Control, Request, apply_control, control_names
from training.data import Batch, Cache, part_kinds, read_cache
from training.data.bank import Bank
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.hashes import hash_path
from training.layers.logistic import L2_WITHOUT_VAL
from training.loop import untrained
from training.methods import Fitted, Output, load_method
from training.regimes import Full

PARAMS: dict[str, Any] = {
    "domain": {"noun": "fish", "group": "fish"},
    "dataset": {"root": "data/raw", "buckets": 3},
    "llm": {"model": "none"},
    "encoders": {"tiny": {"model": "none"}, "other": {"model": "none"}},
    "report": {"reference": "linear_probe"},
    "train": {
        "runs": {
            name: {"method": name, "encoder": "tiny", "settings": settings}
            for name, settings in {
                "linear_probe": {"l2": [0.01, 1.0]},
                "attention_pool": {"epochs": 2, "hidden": 8, "weight_decay": [0.1, 0.2]},
                "concept_graph": {"epochs": 2, "hidden": 16, "weight_decay": [0.1]},
            }.items()
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


def with_run(name: str, **settings: Any) -> dict[str, Any]:
    """The block `train` of PARAMS with other settings for one run."""
    run = {"method": name, "encoder": "tiny", "settings": settings}
    return {"train": PARAMS["train"] | {"runs": PARAMS["train"]["runs"] | {name: run}}}


# Under none and full the seeded methods twice, the probe once; all in every draw of shots. concept_graph reads texts.
RUNS = (1 + 2 + 2) + 2 * 3 + (2 + 2)
SEARCHES = 3 + 1
WRITTEN = ["config.json", "metrics.json", "predictions.parquet", "timing.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten classes, the same for two encoders."""
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder, Planted(classes=10, train=6, val=4, test=6, noise=1.5, sentences=2))
    for name in ("embed", "labels", "graphs"):
        shutil.copytree(folder / name / "tiny", folder / name / "other")
    shutil.copy(folder / "bank/tiny.parquet", folder / "bank/other.parquet")
    return folder


def with_data(folder: Path, data: Path) -> Path:
    """A folder, with that cache as its data/."""
    (folder / "data").mkdir()
    for entry in data.iterdir():
        (folder / "data" / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def project(data: Path, tmp_path: Path) -> Path:
    """A folder in which studies are run."""
    return with_data(tmp_path, data)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder in which the study SMALL has run. For reading and copies only."""
    folder = with_data(tmp_path_factory.mktemp("finished"), data)
    ran(folder)
    return folder


def write_params(folder: Path, blocks: dict[str, Any] | None = None, **studies: dict[str, Any]) -> Path:
    """Write PARAMS, with these blocks, as params.yaml, and each study as a file of studies/; returns the former."""
    (folder / STUDIES).mkdir(exist_ok=True)
    written = {folder / STUDIES / f"{name}.yaml": study for name, study in studies.items()}
    for path, content in {folder / "params.yaml": PARAMS | (blocks or {}), **written}.items():
        path.write_text(json.dumps(content))  # which is YAML
    return folder / "params.yaml"


def planned(folder: Path, blocks: dict[str, Any] | None = None, **changes: Any) -> tuple[Plan, list[Cell]]:
    """The study SMALL with these changes, under parameters with these blocks."""
    path = write_params(folder, blocks, small=SMALL | changes)
    with chdir(folder):
        plan = make_plan("params.yaml", load_params(path), "small", folder / "data")
    return plan, cells(plan, 0)


def ran(folder: Path, blocks: dict[str, Any] | None = None, **changes: Any) -> Plan:
    plan, grid = planned(folder, blocks, **changes)
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


# Of a command in a project: the code is the repository's.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_small(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m evaluation.study --name small` in a project."""
    words = command(folder, "--name", "small", *arguments)
    environment = ENVIRONMENT | environment
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_run_is_written_whole(finished: Path) -> None:
    plan, grid = planned(finished)
    assert len(made(plan)) == RUNS + SEARCHES
    for cell in grid:
        folder = plan.folder / cell.run
        assert sorted(file.name for file in folder.iterdir()) == WRITTEN
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        table = pq.read_table(folder / "predictions.parquet")
        assert table.column_names == ["path", "split", "seed", "class_id", "logits"]
        few = cell.regime.label == "2-shot"
        assert len(table) == 16 * (10 - len(plan.development) * few)
        assert set(table["seed"].to_pylist()) == {cell.seed}
        assert set(table["split"].to_pylist()) == {"train", "val", "test"} | ({"unused"} if few else {"choose"})
        # Few-shot fits choose nothing on val, so that all of it is reported; others report one half.
        assert table["split"].to_pylist().count("val") == (4 if few else 2) * len(config["classes"])
        # The figures are those of the predictions, and none is of test.
        classes, logits = np.array(config["classes"]), np.array(table["logits"].to_pylist())
        right = classes[logits.argmax(1)] == np.array(table["class_id"].to_pylist())
        for split in ("train", "val"):
            of_split = np.array(table["split"].to_pylist()) == split
            assert metrics[split]["accuracy"] == pytest.approx(right[of_split].mean())
            assert metrics[split]["images"] == of_split.sum()
        assert metrics["test"] == {"images": 6 * len(classes)}
        assert config["control"]["name"] == cell.control.name
        assert not any(str(finished) in (folder / name).read_text(errors="ignore") for name in WRITTEN)


def test_few_shot_settings_come_from_development_classes_only(project: Path) -> None:
    plan = ran(project, controls=["none"], methods=["attention_pool", "linear_probe"])
    run = next(cell for cell in cells(plan, 0) if plan.searched(cell))
    chosen = json.loads((plan.folder / run.search / "config.json").read_text())
    config = json.loads((plan.folder / run.run / "config.json").read_text())
    assert len(plan.development) == 2
    assert not set(plan.development) & set(config["classes"])
    assert config["settings"] == chosen["settings"]
    assert [tried["settings"]["weight_decay"] for tried in chosen["tried"]] == [[0.1], [0.2]]
    best = min(chosen["tried"], key=lambda tried: np.mean([draw["log_loss"] for draw in tried["draws"]]))
    assert config["settings"] == best["settings"]
    assert len(best["draws"]) == fitting.SEARCH_DRAWS
    # The schedule is the searched one, stopped; and no image that scores an epoch has chosen where it starts.
    assert config["settings"]["epochs"] == 2
    assert config["settings"]["stop"] in (0, 1, 2)
    assert config["settings"]["start_l2"] == L2_WITHOUT_VAL


def test_the_search_is_scored_on_all_that_a_draw_leaves_over_but_test(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, grid = planned(project, controls=["none"], methods=["linear_probe"])
    scored: list[set[str]] = []

    def predict(model: nn.Module, cache: Cache, images: Tensor) -> Tensor:
        scored.append({cache.paths[image] for image in images.tolist()})
        return study_predict(model, cache, images)

    study_predict = fitting.predict
    monkeypatch.setattr(fitting, "predict", predict)
    fitting.make_search(plan, next(cell for cell in grid if plan.searched(cell)))
    assert len(scored) == 2 * fitting.SEARCH_DRAWS
    for paths in scored:
        assert len(paths) == 2 * (6 - 2 + 4)  # of each class what 2 of 6 training images leave, and val
        assert {path.split("/")[1] for path in paths} == set(plan.development)
        assert not any(path.startswith(("test", "hidden")) for path in paths)


def test_shots_are_shared_by_methods_and_val_is_not_trained_on(finished: Path) -> None:
    plan, grid = planned(finished)
    shots: dict[int, set[frozenset[str]]] = {}
    for cell in grid:
        if plan.searched(cell):
            table = pq.read_table(plan.folder / cell.run / "predictions.parquet")
            rows = zip(table["path"].to_pylist(), table["split"].to_pylist(), strict=True)
            shots.setdefault(cell.seed, set()).add(frozenset(path for path, split in rows if split == "train"))
    assert [len(found) for found in shots.values()] == [1, 1]
    (first,), (second,) = shots.values()
    assert len(first) == len(second) == 2 * 8
    assert first != second


def test_what_is_there_is_not_made_again(project: Path, finished: Path) -> None:
    shutil.copytree(finished / "data/studies", project / "data/studies")
    plan, grid = planned(project)
    before = made(plan)
    assert len(before) == RUNS + SEARCHES
    assert run_study(plan, grid, 1) == 0
    assert made(plan) == before
    # Another seed adds its runs; another knob makes one method's anew, and nothing else.
    more = ran(project, seeds=3)
    assert {name: made(more)[name] for name in before} == before
    again = made(ran(project, with_run("linear_probe", l2=[0.1, 1.0])))
    assert {name.split(".")[1] for name in before if again[name] != before[name]} == {"linear_probe"}


Made = Collection[tuple[str, str]]  # runs, by method and control
EVERY = {("linear_probe", "none"), ("attention_pool", "none"), ("concept_graph", "none")}
EVERY |= {("concept_graph", "random_vectors")}
GRAPHS = {pair for pair in EVERY if pair[0] == "concept_graph"}


def marks(folder: Path, **changes: Any) -> dict[str, str]:
    """The mark of every run and search of the study."""
    plan, grid = planned(folder, **changes)
    return {cell.run: plan.mark(cell) for cell in grid} | {
        cell.search: plan.search_mark(cell) for cell in grid if plan.searched(cell)
    }


@pytest.fixture(scope="module")
def marked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which nothing has run, and the marks of its study."""
    folder = with_data(tmp_path_factory.mktemp("marked"), data)
    return folder, marks(folder)


def made_anew(before: dict[str, str], after: dict[str, str], regime: str = "full") -> Made:
    """The methods and controls of runs and searches whose mark is another; all of these are, or none."""
    other = {name: before[name] != after[name] for name in before if name.split(".")[3] == regime}
    found = {(method, control) for _, method, control, *_ in (name.split(".") for name in other if other[name])}
    assert all(other[name] for name in other if tuple(name.split(".")[1:3]) in found)
    return found


# Under shots, bank and labels are made from the shots.
FROM_SHOTS = {
    "fieldmark/concepts/selection.py",
    "fieldmark/labels/labelling.py",
    "training/reselection.py",
    "evaluation/other_labels.py",
    "concepts",
    "embed/tiny",
}


@contextmanager
def edited(file: str) -> Iterator[None]:
    """As if someone had written a comment at the end of one module."""

    def read(path: Path, root: Path) -> bytes:
        return read_source(path, root) + (b"\n# edited\n" if str(path) == file else b"")

    read_source = sources.read_source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_source", read)
        yield


@pytest.mark.parametrize(
    ("file", "anew"),
    [
        ("training/methods/linear_probe.py", EVERY),  # where the others start
        ("training/start.py", EVERY - {("linear_probe", "none")}),
        ("training/methods/attention_pool.py", {("attention_pool", "none")}),
        ("training/layers/logistic.py", EVERY),  # by way of the method
        ("training/layers/graphs.py", GRAPHS),
        ("training/data/nodes.py", EVERY),
        ("training/data/labels.py", GRAPHS),
        ("training/regimes.py", EVERY),
        ("evaluation/fitting.py", EVERY),
        # What a control runs is its own runs' alone, and where it changes texts, nodes are labelled anew.
        ("training/controls/random_vectors.py", {("concept_graph", "random_vectors")}),
        ("fieldmark/labels/labelling.py", {("concept_graph", "random_vectors")}),
        ("fieldmark/concepts/selection.py", set()),
        ("training/reselection.py", set()),
        ("evaluation/other_labels.py", set()),
        ("training/controls/edges_removed.py", set()),
        ("training/methods/knn.py", set()),
        ("training/train.py", set()),
        ("evaluation/study.py", set()),
        ("evaluation/compare.py", set()),
    ],
)
def test_code_is_part_of_the_runs_that_execute_it(marked: tuple[Path, dict[str, str]], file: str, anew: Made) -> None:
    """A mark that outlived an edit would be another in the next case too."""
    assert (ROOT / file).is_file()
    folder, before = marked
    with edited(file):
        after = marks(folder)
    assert made_anew(before, after) == anew
    assert made_anew(before, after, "2-shot") == (GRAPHS if file in FROM_SHOTS else anew)


@pytest.mark.slow
def test_labelling_is_code_of_a_variant_with_other_labels(project: Path) -> None:
    for file in ("fieldmark/labels/labelling.py", "fieldmark/labels/pixels.py", "evaluation/other_labels.py"):
        before = marks(project, blocks=QUICK, **GRAPH)
        with edited(file):
            assert made_anew(before, marks(project, blocks=QUICK, **GRAPH)) == {("few", "none")}


@pytest.mark.parametrize(
    ("folder", "schema", "anew"),
    [
        ("embed/tiny/images", "embed.nodes/1", EVERY),
        ("labels/tiny", "labels/1", GRAPHS),
        ("graphs/tiny", "graphs/1", GRAPHS),
        ("embed/tiny", "embed.text/1", {("concept_graph", "random_vectors")}),  # the scale, by which nodes are labelled
        ("index", "index.images/1", EVERY),
        ("concepts", "concepts/1", set()),
        ("embed/other/images", "embed.nodes/1", set()),
        ("descriptions", "descriptions/1", set()),  # this concept graph reads none
    ],
)
def test_files_are_part_of_the_runs_that_read_them(project: Path, folder: str, schema: str, anew: Made) -> None:
    before = marks(project)
    own(project, folder.split("/")[0])
    files = sorted((project / "data" / folder).glob("*.parquet"))
    path = next(file for file in files if pq.read_schema(file).metadata[b"schema"].decode() == schema)
    # The same header over other rows: a fingerprint is never of rows.
    header, table = read_header(path, schema), read_table(path, schema)
    write_table(table.slice(1), path, schema, header.params, header.fingerprint)
    after = marks(project)
    assert made_anew(before, after) == anew
    assert made_anew(before, after, "2-shot") == (GRAPHS if folder in FROM_SHOTS else anew)


def own(project: Path, name: str) -> None:
    """Make a folder of data/ the project's own, which may be changed."""
    path = project / "data" / name
    source = path.resolve()
    path.unlink()
    shutil.copytree(source, path)


def test_images_that_are_gone_are_seen(tmp_path: Path) -> None:
    """Three quarters of the training images removed, and index, vectors, labels and graphs made again."""
    grid = {"controls": ["none"], "regimes": ["full"], "methods": ["linear_probe", "concept_graph"], "seeds": 1}

    def study_of(train: int) -> tuple[Plan, int]:
        write_cache(tmp_path / "data", Planted(classes=4, train=train, val=4, test=4))
        plan, runs = planned(tmp_path, QUICK, **grid)
        return plan, run_study(plan, runs, 1)

    plan, count = study_of(8)
    assert count == 2
    headers = [read_header(tmp_path / "data/index/images.parquet", "index.images/1")]
    plan, count = study_of(2)
    headers.append(read_header(tmp_path / "data/index/images.parquet", "index.images/1"))
    assert headers[0] == headers[1]
    assert count == 2
    for folder in made(plan):
        assert json.loads((plan.folder / folder / "metrics.json").read_text())["train"]["images"] == 4 * 2


@pytest.mark.slow
def test_an_edited_method_is_run_again_and_no_other(project: Path) -> None:
    for name in ("fieldmark", "training", "evaluation"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_params(project, small=SMALL | {"controls": ["none"], "regimes": ["full"], "methods": ["linear_probe", "knn"]})
    said = []
    for _ in range(2):
        done = run_small(project, "--jobs", "1", PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        with open(project / "training/methods/knn.py", "a") as file:
            file.write("\n# edited\n")
    assert [line.split(": ")[1] for line in said] == ["2 runs made, 0 were there\n", "1 runs made, 1 were there\n"]


def test_no_run_is_made_that_its_control_cannot_change(project: Path) -> None:
    few = {"name": "random_vectors", "concepts": 5}
    controls = ["none", "edges_removed", "owners_permuted", "unrelated_texts", {"concepts": 5}, few]
    methods = ["linear_probe", "zero_shot", "concept_bottleneck", "concept_graph"]
    path = write_params(project, small=SMALL | {"controls": controls, "methods": methods, "regimes": ["full"]})
    with chdir(project):
        study_of = read_study(load_params(path), "small")
    entries = {name: Entry(name, load_method(name).Settings()) for name in methods}
    plan = Plan("small", study_of, ("tiny",), project, 3, entries, (), ())
    found: dict[str, list[str]] = {name: [] for name in methods}
    for cell in cells(plan, 0):
        found[cell.method] += [cell.control.label] if cell.control.label not in found[cell.method] else []
    assert found == {
        "linear_probe": ["none"],
        "zero_shot": ["none", "owners_permuted", "random_vectors-5"],
        "concept_bottleneck": ["none", "unrelated_texts", "none-5", "random_vectors-5"],
        "concept_graph": ["none", "edges_removed", "unrelated_texts", "none-5", "random_vectors-5"],
    }
    # What is left out is told beside the tables.
    assert plan.idle() == {
        "edges_removed": ["linear_probe", "zero_shot", "concept_bottleneck"],
        "owners_permuted": ["linear_probe", "concept_bottleneck", "concept_graph"],
        "unrelated_texts": ["linear_probe", "zero_shot"],
        "none-5": ["linear_probe", "zero_shot"],
        "random_vectors-5": ["linear_probe"],
    }


def parts_of(cache: Cache) -> dict[str, list[Tensor]]:
    """A cache's tensors, by the words of READS."""
    bank, names = cache.part(Bank), cache.part(Bank).of_kind("name")
    return {
        "names": [bank.K[names], bank.kept[names]],
        "concepts": [bank.K[~names], bank.kept[~names]],
        "owners": [bank.own[names], bank.own[~names]],
        **{
            name: list(cache.part(kind).tensors().values())
            for name, kind in part_kinds().items()
            if kind is not Bank and cache.has(kind)
        },
    }


@pytest.mark.parametrize("name", control_names())
@pytest.mark.parametrize("concepts", [None, 20])
def test_a_control_changes_the_parts_that_are_listed_for_it(
    controlled: Path, data: Path, name: str, concepts: int | None
) -> None:
    control = Control.model_validate({"name": name, "concepts": concepts})
    cache = read_cache(controlled, "tiny", 3, ALL)
    made = apply_control(cache, Request(control, controlled, "tiny", 3, torch.Generator().manual_seed(0)))
    before, after, listed = parts_of(cache), parts_of(made), control.changes
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
        "quiet": {"method": "concept_graph", "settings": {"texts": 0, "loss_weights": {"graph": 0.25}}},
        "few": {
            "method": "concept_graph",
            "settings": {"nodes": "selected"},
            "labels": {"select_locals": 2, "mode": "splice", "density": "product", "select_concepts": 3},
        },
    },
}


# A concept graph that is fitted in no time.
QUICK = with_run(
    "concept_graph", epochs=1, hidden=16, weight_decay=[0.1], streams=["local"], loss_weights={"graph": 0.4}
)


def test_a_variant_is_its_method_with_other_settings_and_labels(project: Path) -> None:
    plan = ran(project, QUICK, **GRAPH)
    assert list(plan.entries) == ["linear_probe", "concept_graph", "quiet", "few"]
    runs = {cell.method: plan.folder / cell.run for cell in cells(plan, 0)}
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in runs.items()}
    assert runs["few"].name == "tiny.few.none.full.0"
    assert [configs[name]["method"] for name in ("quiet", "few")] == ["concept_graph"] * 2
    own = configs["concept_graph"]["settings"]
    assert configs["quiet"]["settings"] == own | {"texts": 0, "loss_weights": own["loss_weights"] | {"graph": 0.25}}
    assert own["loss_weights"]["graph"] == 0.4
    assert configs["few"]["labels"] == GRAPH["variants"]["few"]["labels"]
    logits = {name: pq.read_table(folder / "predictions.parquet")["logits"] for name, folder in runs.items()}
    assert not logits["quiet"].equals(logits["concept_graph"])
    assert not logits["few"].equals(logits["concept_graph"])


def test_another_labelling_is_made_in_memory_and_leaves_the_rest(project: Path) -> None:
    labels = {"few": {"select_concepts": 3, "select_locals": 2}, "one": {"select_locals": 1}}
    variants = {name: {"method": "concept_graph", "labels": of} for name, of in labels.items()}
    plan, _ = planned(project, variants=variants)
    base = fitting.base_cache(plan, "tiny", ())
    few = controlled_cache(plan, base, "tiny", Control(), 0, plan.entries["few"].variation)
    assert few.part(Labels).selected.sum(1).unique().tolist() == [3]
    assert few.part(Labels).selected_concepts.shape[1] == 3
    assert few.part(Nodes).nodes is base.part(Nodes).nodes
    assert few.part(Bank) is base.part(Bank)
    random_vectors = Control(name="random_vectors")
    under = controlled_cache(plan, base, "tiny", random_vectors, 0, plan.entries["one"].variation)
    assert under.part(Labels).selected.sum(1).unique().tolist() == [2]
    assert not torch.equal(under.part(Bank).K, base.part(Bank).K)


@pytest.mark.slow
def test_a_variant_may_read_other_encoders_too(project: Path) -> None:
    variants = {"both": {"method": "concept_graph", "also": ["other"]}}
    regimes = ["full", {"kind": "shots", "shots": 2}]
    grid = {"variants": variants, "controls": ["none", "random_vectors"], "regimes": regimes}
    plan = ran(project, QUICK, **GRAPH | grid)
    runs = {cell.method: plan.folder / cell.run for cell in cells(plan, 0) if cell.control == Control()}
    logits = {name: pq.read_table(folder / "predictions.parquet")["logits"] for name, folder in runs.items()}
    assert not logits["both"].equals(logits["concept_graph"])
    config = json.loads((runs["both"] / "config.json").read_text())
    assert config["also"] == ["other"]
    assert config["files"]["embed/other/images"] == hash_path(project / "data/embed/other/images", 3)


def splits_of_runs(plan: Plan) -> dict[tuple[str, int], list[str]]:
    """The splits of each run's images, by control and draw."""
    found = {}
    for cell in cells(plan, 0):
        table = pq.read_table(plan.folder / cell.run / "predictions.parquet", columns=["path", "split"])
        found[cell.control.label, cell.draw] = table.sort_by("path")["split"].to_pylist()
    return found


def test_every_draw_of_unseen_classes_is_another_and_controls_share_it(project: Path) -> None:
    unseen = [{"kind": "unseen", "seen": 0.5}]
    grid = {"methods": ["zero_shot"], "controls": ["none", "random_vectors"], "regimes": unseen, "seeds": 5}
    splits = splits_of_runs(ran(project, **grid))
    assert splits.keys() == {(control, draw) for control in ("none", "random_vectors") for draw in range(5)}
    assert all(splits["none", draw] == splits["random_vectors", draw] for draw in range(5))
    assert len({tuple(found) for found in splits.values()}) == 5


def test_unseen_classes_that_files_name_are_the_same_in_all_draws(project: Path) -> None:
    for name, classes in {"seen": range(5), "development": range(5, 7)}.items():
        (project / f"{name}.txt").write_text("".join(f"class-{number:02d}\n" for number in classes))
    unseen = [{"kind": "unseen"} | {name: str(project / f"{name}.txt") for name in ("seen", "development")}]
    plan = ran(project, methods=["zero_shot"], controls=["none", "random_vectors"], regimes=unseen)
    splits = splits_of_runs(plan)
    assert splits.keys() == {("none", 0), ("random_vectors", 0), ("random_vectors", 1)}
    assert len({tuple(found) for found in splits.values()}) == 1


def test_overrides_are_part_of_a_run(project: Path) -> None:
    def marks(**few: Any) -> dict[str, str]:
        variants = GRAPH["variants"] | {"few": GRAPH["variants"]["few"] | few}
        plan, grid = planned(project, QUICK, **GRAPH | {"variants": variants})
        return {cell.method: plan.mark(cell) for cell in grid}

    before, labels = marks(), GRAPH["variants"]["few"]["labels"]
    assert len(set(before.values())) == 4
    for change in ({"labels": labels | {"select_locals": 3}}, {"labels": {}}, {"settings": {"texts": 2}}):
        after = marks(**change)
        assert {name for name in before if after[name] != before[name]} == {"few"}


def test_a_variant_by_pixels_reads_thumbnails_and_no_other_run_does(project: Path) -> None:
    def changed(**few: Any) -> dict[str, Any]:
        return GRAPH | {"variants": GRAPH["variants"] | {"few": GRAPH["variants"]["few"] | few}}

    before, grid = planned(project, QUICK, **GRAPH)
    by_pixels = changed(labels={"select_locals": 2, "density": "pixel"})
    with pytest.raises(UserError, match=r"data/thumbs/b000\.parquet: is missing"):
        ran(project, QUICK, **by_pixels)
    assert not made(before)
    index = read_table(project / "data/index/images.parquet", "index.images/1").to_pylist()
    rng = np.random.default_rng(0)
    pictures = {row["image_id"]: rng.integers(0, 256, (6, 6), dtype=np.uint8) for row in index if row["image_id"]}
    write_thumbs(pictures, buckets=3, folder=project / "data/thumbs")
    plan = ran(project, QUICK, **by_pixels)
    assert {cell.method for cell in grid if plan.mark(cell) != before.mark(cell)} == {"few"}
    for cell in grid:
        config = json.loads((plan.folder / cell.run / "config.json").read_text())
        seen = hash_path(project / "data/thumbs", 3) if cell.method == "few" else None
        assert config["files"].get("thumbs") == seen
    # Thumbnails made otherwise are another variant's.
    for path in (project / "data/thumbs").iterdir():
        write_table(read_table(path, "thumbs/1"), path, "thumbs/1", {}, "another")
    again, _ = planned(project, QUICK, **by_pixels)
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


def forget() -> None:
    """Forget the caches that are remembered for the cells that follow."""
    fitting.prepare.cache_clear()
    fitting.seen_by.cache_clear()


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("training.methods.leaky")
    module.Settings, module.SEEDED, module.READS, module.fit = Block, False, frozenset({"globals"}), fit_leaky
    module.build = Leaky  # never called: the run is not restored
    monkeypatch.setitem(sys.modules, "training.methods.leaky", module)


def test_a_planted_leak_finds_no_test_label(project: Path, leaky: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (cell,) = planned(project, methods=["linear_probe"], controls=["none"], regimes=["full"])
    cell = cell._replace(method="leaky")
    code = {cell.row: "leaky"}
    plan = replace(plan, entries={"leaky": Entry("leaky", Block())}, code=code)

    def test_accuracy() -> float:
        forget()
        fitting.make_run(plan, cell)
        table = pq.read_table(plan.folder / cell.run / "predictions.parquet").to_pylist()
        classes = json.loads((plan.folder / cell.run / "config.json").read_text())["classes"]
        return float(np.mean([classes[np.argmax(r["logits"])] == r["class_id"] for r in table if r["split"] == "test"]))

    assert test_accuracy() < 0.3  # its own nearest image, the test image itself, has no label
    monkeypatch.setattr(fitting, "hide_test", lambda cache: cache)
    assert test_accuracy() == 1  # the leak is there to be found
    forget()


def test_permuted_labels_score_at_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "data", Planted(classes=10, train=20, val=20, test=5))
    plan, grid = planned(tmp_path, controls=["none"], regimes=["full"], methods=["linear_probe"])

    def permuted(regime: Full, cache: Cache, draw: int) -> Cache:
        train, target = cache.images("train"), cache.y.clone()
        target[train] = target[train][torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))]
        return replace(cache, target=target)

    def val_accuracy() -> float:
        forget()
        fitting.make_run(plan, grid[0])
        return float(json.loads((plan.folder / grid[0].run / "metrics.json").read_text())["val"]["accuracy"])

    assert val_accuracy() > 0.9
    monkeypatch.setattr(Full, "apply", permuted)
    # Ten classes look alike within themselves: the 20 images of one are right or wrong together.
    assert val_accuracy() < 0.1 + 4 * (0.1 * 0.9 / 10) ** 0.5
    forget()


def kill_and_finish(project: Path, kills: int, jobs: int, random_seed: int, **changes: Any) -> None:
    """Run a study, killed so many times at random moments, and once to the end: as if it had never been killed."""
    rng = random.Random(random_seed)
    calm = project / "calm"
    calm.mkdir()
    (calm / "data").mkdir()
    for entry in (project / "data").iterdir():
        (calm / "data" / entry.name).symlink_to(entry)
    expected_plan = ran(calm, **changes)
    expected = compare(expected_plan, cells(expected_plan, 0))

    plan, grid = planned(project, **changes)
    runs, everything = len(grid), len(made(expected_plan))
    for number in range(1, kills + 1):
        wanted = everything * number // (kills + 2)
        words = command(project, "--name", "small", "--jobs", str(jobs))
        process = subprocess.Popen(words, cwd=project, env=ENVIRONMENT, stderr=subprocess.PIPE)
        while len(made(plan)) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = made(plan)
        time.sleep(0.1 if jobs > 1 else 0)  # workers end with their parent
    assert 0 < len(before) < everything
    done = run_small(project)
    assert done.returncode == 0, done.stderr
    assert f"{runs - sum('development' not in name for name in before)} runs made" in done.stdout
    after = made(plan)
    assert {name: after[name] for name in before} == before  # nothing ran twice
    assert after.keys() == made(expected_plan).keys()
    assert not list(plan.folder.glob(".*.partial"))
    assert compare(plan, grid) == expected
    for name in ("tables.csv", "tables.tex"):
        assert (plan.folder / name).read_bytes() == (expected_plan.folder / name).read_bytes()


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(project: Path) -> None:
    kill_and_finish(project, kills=1, jobs=1, random_seed=0, controls=["none"], regimes=["full"])


@pytest.mark.slow
def test_a_study_killed_three_times_goes_on_where_it_was(project: Path) -> None:
    kill_and_finish(project, kills=3, jobs=1, random_seed=0)


@pytest.mark.slow
def test_killed_folds_go_on_where_they_were(project: Path) -> None:
    folds = [{"kind": "folds", "folds": 3}]
    kill_and_finish(project, kills=2, jobs=1, random_seed=2, regimes=folds, methods=["linear_probe", "concept_graph"])


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
        ({"methods": ["telepathy"]}, "small.yaml: methods: 'telepathy' is not there; choose from: attention_pool"),
        ({"encoders": ["tinny"]}, "small.yaml: encoders: 'tinny' is not there; choose from: tiny, other"),
        ({"seed": 3}, "small.yaml: seed: unknown key; did you mean `seeds`?"),
        (
            {"regimes": [{"kind": "shots", "shots": 3}]},
            "small.yaml: regimes.0.shots: input should be 1, 2, 4, 8 or 16",
        ),
        ({"regimes": ["few"]}, "small.yaml: regimes.0: names no regime; give a `kind`, one of: full, shots"),
        ({"controls": ["none", {"nam": "none"}]}, "small.yaml: controls.1.nam: unknown key; did you mean `name`?"),
        ({"controls": ["none", "none"]}, "small.yaml: controls: holds none more than once"),
        ({"variants": {"v": {"methd": "mlp"}}}, "small.yaml: variants.v.methd: unknown key; did you mean `method`?"),
        ({"variants": {"v": {"method": "telepathy"}}}, "small.yaml: variants.v.method: 'telepathy' is not there"),
        ({"variants": {"mlp": {"method": "mlp"}}}, "small.yaml: variants.mlp: is a method's name; choose another"),
        ({"methods": ["mlp"], "variants": {"v": {"method": "mlp"}}}, "small.yaml: variants.v: is mlp once more"),
        (
            {"variants": {"v": {"method": "concept_graph", "also": ["clip"]}}},
            "small.yaml: variants.v.also: 'clip' is not there; choose from: tiny, other",
        ),
        (
            {"variants": {"v": {"method": "mlp", "also": ["other"]}}},
            "small.yaml: variants.v.also: mlp reads one encoder only",
        ),
        ({"variants": {"a.b": {"method": "mlp"}}}, "small.yaml: variants.a.b: is used as a folder name"),
        (
            {"variants": {"v": {"method": "concept_graph", "settings": {"loss_weights": {"imge": 1.0}}}}},
            "small.yaml: variants.v.settings.loss_weights.imge: unknown key; did you mean `image`?",
        ),
        (
            {"variants": {"v": {"method": "attention_pool", "settings": {"lr": [0.1] * 9}}}},
            "small.yaml: variants.v: val would choose among 18 settings",
        ),
        (
            {"variants": {"v": {"method": "concept_graph", "labels": {"mod": "splice"}}}},
            "small.yaml: variants.v.labels.mod: unknown key; did you mean `mode`?",
        ),
        (
            {"variants": {"v": {"method": "mlp", "labels": {"mode": "splice"}}}},
            "small.yaml: variants.v.labels: mlp reads no labels under its settings; remove it",
        ),
        (
            {"variants": {"v": {"method": "concept_graph", "labels": {"inside_object": True}}}},
            "small.yaml: variants.v.labels.inside_object: no study can label nodes so",
        ),
        (
            {"questions": [{"ask": "Is it?", "of": "linear_probe", "against": "gat"}]},
            "small.yaml: questions.0.against: 'gat' is not there; choose from: linear_probe",
        ),
        (
            {"questions": [{"ask": "Is it?", "of": "linear_probe", "aganst": "linear_probe"}]},
            "small.yaml: questions.0.aganst: unknown key; did you mean `against`?",
        ),
        ({"open": [{"ask": "Is it?"}]}, "small.yaml: open.0.because: is missing"),
        ({"development": "classes.txt"}, "classes.txt: cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(project: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(project, **changes)
    assert "\n" not in str(caught.value)
    assert not (project / "data/studies").exists()


@cache
def params_with(profile: Path | None) -> Params:
    """The parameters of the repository, with a profile laid over them: many studies have the same."""
    text = Path("params.yaml").read_text()
    text = lay_over(text, profile) if profile else text
    return check_params("params.yaml", YAML(typ="safe", pure=True).load(text))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / STUDIES).glob("*.yaml")))
def test_a_study_of_the_repository_can_stand(name: str, tmp_path: Path) -> None:
    """Under params.yaml, or with the profile laid over it that its name begins with: the longest such name."""
    with chdir(ROOT):
        profiles = [file for file in Path("profiles").glob("*.yaml") if f"{name}-".startswith(f"{file.stem}-")]
        params = params_with(max(profiles, key=lambda file: len(file.stem), default=None))
        found = read_study(params, name)
        variants = {f"methods.{method}": Variant(method=method) for method in found.methods} | found.variants
        for key, variant in variants.items():
            read_entry("params.yaml", name, params, key, variant, found.encoders or params.encoders)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"READS": None}, "training/methods/leaky.py: has no READS"),
        (
            {"READS": frozenset({"label"})},
            "training/methods/leaky.py: READS: 'label' is no part of the cache; choose from: again/NAME, asked/NAME",
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


def test_a_longer_search_than_the_others_is_refused(project: Path) -> None:
    what = r"studies/small\.yaml: methods\.linear_probe: val would choose among 17 settings, and train\.budget"
    with pytest.raises(UserError, match=what):
        planned(project, with_run("linear_probe", l2=[10.0**-n for n in range(17)]))


def test_a_missing_file_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_params(project, small=SMALL)
    (project / "data/bank").unlink()
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", command(project, "--name", "small")[2:])
    with pytest.raises(SystemExit) as ended:
        run(study.main)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert len(said.splitlines()) == 1
    assert "bank/tiny.parquet: is missing" in said
    assert path.is_file()


OF_NODES = {"method": "linear_probe", "settings": {"features": ["nodes"]}}
TOWER: dict[str, Any] = {"encoders": {"clip": {"model": "none"}}, "towers": {"tiny": {"model": "none"}}}


def without_texts(project: Path) -> None:
    """What the stages leave for a tower: vectors and graphs."""
    own(project, "embed")
    (project / "data/embed/tiny/text.parquet").unlink()
    for name in ("labels", "bank"):
        (project / "data" / name).unlink()


def test_a_study_over_a_tower(project: Path) -> None:
    without_texts(project)
    methods, variants = ["linear_probe", "knn", "attention_pool"], {"nodes_probe": OF_NODES}
    plan = ran(project, TOWER, methods=methods, variants=variants, controls=["none", "edges_removed", "random_vectors"])
    assert {cell.control for cell in cells(plan, 0)} == {Control()}  # no control takes anything from these
    assert all((plan.folder / cell.run / "metrics.json").is_file() for cell in cells(plan, 0))
    text = compare(plan, cells(plan, 0))
    titles = [line.split(":")[0] for line in text.splitlines() if line.startswith("tiny")]
    assert titles == ["tiny, full", "tiny, 2-shot"]


def test_a_method_that_reads_texts_has_no_study_on_a_tower(project: Path) -> None:
    what = "'tiny' is a tower, without texts, and zero_shot reads names, owners; choose one of `encoders`: clip,"
    for changes in (
        {"methods": ["linear_probe", "zero_shot"]},
        {"methods": ["linear_probe"], "variants": {"v": {"method": "zero_shot"}}},
    ):
        with pytest.raises(UserError, match=rf"^studies/small\.yaml: encoders: {what}") as caught:
            planned(project, TOWER, **changes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("regime", ["folds", {"kind": "shots", "shots": 2}, {"kind": "unseen", "seen": 0.5}])
def test_a_second_look_is_compared_under_the_regime_full_alone(project: Path, regime: Any) -> None:
    """Its first look was told the labels of all training images, those that a regime holds out among them."""
    train = PARAMS["train"] | {"first_looks": {"zoom": {"method": "s3n", "encoder": "tiny"}}}
    again = {"controls": ["none"], "variants": {"again": {"method": "ridge", "settings": {"features": ["again/zoom"]}}}}
    write_again(project / "data", "zoom", 6)
    plan, grid = planned(project, {"train": train}, regimes=["full"], **again)
    assert "again/zoom" in {path for cell in grid for path in plan.reading(cell).files}
    with pytest.raises(UserError, match=r"^studies/small\.yaml: variants\.again\.settings: reads again/zoom, whose"):
        planned(project, {"train": train}, regimes=["full", regime], **again)


@pytest.mark.parametrize(
    ("links", "told", "regime", "why"),
    [
        ("data/none", False, {"kind": "noise", "wrong": "symmetric", "share": 0.2}, None),
        ("data/none", True, "folds", None),
        ("data/links/near.parquet", True, "folds", r"texts written from those of neighbours .*oversample\.md"),
        ("data/none", True, {"kind": "noise", "wrong": "symmetric", "share": 0.2}, "whose prompt was told the true"),
    ],
)
def test_texts_that_know_what_a_regime_hides_are_read_under_no_such_regime(
    project: Path, links: str, told: bool, regime: Any, why: str | None
) -> None:
    answered = project / "data/asked"
    made = answered.resolve()
    answered.unlink()  # a link to what other tests read
    shutil.copytree(made, answered)
    path = answered / "guess/texts.parquet"
    params = read_header(path, "asked/1").params | {"told": told}
    write_table(read_table(path, "asked/1"), path, "asked/1", params, "again")
    ask = {"ask": {"guess": {"prompt": "prompts/oversample.md", "links": links}}}
    said = {"method": "ridge", "settings": {"features": ["asked/guess/reasons"]}}
    rows: dict[str, Any] = {"methods": ["linear_probe"], "controls": ["none"], "variants": {"said": said}}
    if why is None:
        planned(project, ask, regimes=["full", regime], **rows)
        return
    planned(project, ask, regimes=["full"], **rows)
    with pytest.raises(UserError, match=rf"^studies/small\.yaml: variants\.said\.settings: reads asked/guess, {why}"):
        planned(project, ask, regimes=["full", regime], **rows)


def test_a_study_reads_what_its_methods_declare_and_no_more(project: Path) -> None:
    for name in ("labels", "descriptions"):
        (project / "data" / name).unlink()
    probes, variants = ["linear_probe", "knn", "attention_pool"], {"nodes_probe": OF_NODES}
    plan = ran(project, methods=probes, variants=variants, controls=["none", "random_vectors", "edges_rewired"])
    read = {path for cell in cells(plan, 0) for path in plan.reading(cell).files}
    assert read == {"index/images.parquet", "index/classes.parquet", "embed/tiny/images"}
    assert run_study(plan, cells(plan, 0), 1) == 0
    with pytest.raises(UserError, match=r"labels/tiny: is missing; run label_patches"):
        ran(project, methods=[*probes, "concept_graph"], variants=variants)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"labels/tiny: was not made from .*bank/tiny\.parquet as it is now .*; run label_patches again"),
        ({"methods": ["linear_probe", "concept_bottleneck"], "controls": ["none", "unrelated_texts"]},
         r"controls\.parquet: is missing; add tiny to `controls` in params\.yaml"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_before_the_first_run(
    project: Path, changes: dict[str, Any], message: str
) -> None:
    own(project, "bank")
    path = project / "data/bank/tiny.parquet"
    write_table(read_table(path, "bank/1"), path, "bank/1", read_header(path, "bank/1").params, "another")
    plan, grid = planned(project, **changes)
    with pytest.raises(UserError, match=message):
        run_study(plan, grid, 1)
    assert made(plan) == {}


def test_development_classes_from_a_file(project: Path) -> None:
    (project / "classes.txt").write_text("class-07\n\nclass-01\n")
    plan, _ = planned(project, development=str(project / "classes.txt"))
    assert plan.development == ("class-01", "class-07")
    (project / "classes.txt").write_text("class-07\n")
    with pytest.raises(UserError, match="is 1 of 10 classes; it takes 2"):
        planned(project, development=str(project / "classes.txt"))


@pytest.mark.slow
def test_development_classes_of_another_draw(project: Path) -> None:
    drawn = [development_drawn(project, seed) for seed in (None, 0, 1, 2)]
    assert drawn[0] == drawn[1]  # train.seed is 0
    assert len(set(drawn)) == 3
    assert {len(classes) for classes in drawn} == {2}


def development_drawn(project: Path, seed: int | None) -> tuple[str, ...]:
    return planned(project, development=0.2, class_seed=seed)[0].development


def test_classes_left_out_of_few_shot_runs(project: Path) -> None:
    (project / "seen.txt").write_text("class-02\nclass-05\nclass-06\n")
    methods = ["linear_probe", "transfer_lda"]
    plan = ran(project, controls=["none"], methods=methods, left_out=str(project / "seen.txt"))
    assert plan.left_out == ("class-02", "class-05", "class-06")
    assert not set(plan.left_out) & set(plan.development)
    sizes = set()
    for cell in cells(plan, 0):
        config = json.loads((plan.folder / cell.run / "config.json").read_text())
        # With few shots these classes are lent to a method that borrows; else it has none to learn from.
        if cell.method == "transfer_lda" and not plan.searched(cell):
            assert "no images of two other classes" in config["not_possible"]
            continue
        sizes.add((plan.searched(cell), len(config["classes"])))
        assert ("left_out" in config) == plan.searched(cell)
    assert sizes == {(False, 10), (True, 5)}
    (project / "classes.txt").write_text("class-07\nclass-02\n")
    with pytest.raises(UserError, match=r"classes\.txt: names class-02, which .*seen\.txt leaves out"):
        planned(project, left_out=str(project / "seen.txt"), development=str(project / "classes.txt"))
    (project / "seen.txt").write_text("".join(f"class-0{number}\n" for number in range(7)))
    with pytest.raises(UserError, match=r"seen\.txt: leaves 3 classes, few-shot runs take 4"):
        planned(project, left_out=str(project / "seen.txt"))


@pytest.mark.slow
def test_classes_that_are_lent_may_be_drawn(project: Path) -> None:
    drawn = [planned(project, left_out=0.4, development=0.4, class_seed=seed)[0] for seed in (0, 1)]
    for plan in drawn:
        assert (len(plan.left_out), len(plan.development)) == (4, 2)
        assert not set(plan.left_out) & set(plan.development)
    assert drawn[0].left_out != drawn[1].left_out
    (project / "classes.txt").write_text("class-07\nclass-01\n")
    plan = planned(project, left_out=0.6, development=str(project / "classes.txt"))[0]
    assert len(plan.left_out) == 6
    assert set(plan.left_out) < {f"class-{n:02d}" for n in range(10)} - {"class-01", "class-07"}
    with pytest.raises(UserError, match=r"0\.7: leaves 3 classes, few-shot runs take 4"):
        planned(project, left_out=0.7)


def test_lent_classes_have_the_bank_that_their_own_images_select_and_the_same_control(project: Path) -> None:
    """The bank on disk chose among their texts by images of the classes that are told apart."""
    own(project, "bank")
    path = project / "data/bank/tiny.parquet"
    header, table = read_header(path, "bank/1"), read_table(path, "bank/1")
    every = pa.array([kind != "generic" for kind in table["kind"].to_pylist()])
    said = table.set_column(table.schema.get_field_index("kept"), table.schema.field("kept"), every)
    write_table(said, path, "bank/1", header.params, header.fingerprint)
    shots = [{"kind": "shots", "shots": 1}]
    methods = ["linear_probe", "prior_lda"]
    plan, grid = planned(project, methods=methods, left_out=0.4, regimes=shots, controls=["none", "vectors_shuffled"])
    lent = {}
    for cell in grid:
        if cell.method == "prior_lda":
            told = prepare(plan, cell.encoder, cell.control, cell.regime, cell.draw, PLAIN).told
            assert told.others is not None
            assert told.others.classes == list(plan.left_out)
            bank = told.others.part(Bank)
            assert not bank.kept[bank.of_kind("name")].any()  # the bank on disk says so of them
            lent[cell.control.label, cell.draw] = bank
    assert len(lent) == 4
    assert torch.equal(lent["none", 0].own, lent["none", 1].own)
    shuffled = [lent["vectors_shuffled", draw].own for draw in (0, 1)]
    assert not any(torch.equal(own, lent["none", 0].own) for own in shuffled)
    assert not torch.equal(*shuffled)
    assert torch.equal(lent["vectors_shuffled", 0].K, lent["none", 0].K)
