import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from evaluation.accuracies import accuracy_rows, summarise
from evaluation.report import find_shown
from evaluation.runs import Run, read_run
from fieldmark import command as command_line
from fieldmark.command import UserError
from fieldmark.params import load_params
from fieldmark.store import read_header, read_table, write_table
from tests.training.cache import Plan, write_cache, write_other
from training.data import arrays, read_cache
from training.methods import concept_graph
from training.metrics import accuracy, log_loss
from training.regimes import Noise
from training.train import plan_run, train

PARAMS = """
domain: {noun: fish, group: fish}
dataset: {root: data/raw, buckets: 3}
llm: {model: none}
encoders: {tiny: {model: none}}
report: {reference: zero_shot}
train:
  seed: 3
  seeds: 2
  runs:
    zero_shot: {method: zero_shot, encoder: tiny}
    linear_probe: {method: linear_probe, encoder: tiny, settings: {l2: [0.01, 1.0]}}
    concept_graph:
      {method: concept_graph, encoder: tiny, settings: {epochs: 3, hidden: 16, weight_decay: [0.1]}}
"""
Here = Callable[..., subprocess.CompletedProcess[str]]
WRITTEN = ["config.json", "history.csv", "metrics.json", "model.safetensors", "predictions.parquet", "timing.json"]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FIELDMARK_CACHE": str(arrays.arrays_folder().parent)}
    return subprocess.run(
        [sys.executable, "-m", "training.train", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def here(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Here:
    """The same command in this process: a start of its own costs seconds."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as stop:
            command_line.run(lambda: run_stage("training.train", *map(str, arguments)))
        return subprocess.CompletedProcess(arguments, int(str(stop.value.code)), *capsys.readouterr())

    return run


def test_two_processes_write_the_same_bytes(params: Path, tmp_path: Path, here: Here) -> None:
    """This one and one of its own."""
    write_cache(tmp_path / "data", Plan(views=2))
    folder = tmp_path / "data/runs/concept_graph"
    runs = []
    for start in (here, command):
        result = start("--run", "concept_graph", "--params", params, "--data", tmp_path / "data")
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"concept_graph: accuracy train .*, val .*, test .* \(mean.*: 2\)\n", result.stdout)
        assert sorted(file.name for file in folder.iterdir()) == WRITTEN
        runs.append({name: (folder / name).read_bytes() for name in WRITTEN if name != "timing.json"})
    assert runs[0] == runs[1]


def test_a_run_has_the_same_bytes_with_arrays_and_without(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "data", Plan(views=2))
    folder, kept = tmp_path / "data/runs/concept_graph", tmp_path / "arrays"
    (tmp_path / "no folder").touch()
    runs = []
    for place in (tmp_path / "no folder", kept, kept):
        monkeypatch.setattr(arrays, "arrays_folder", lambda place=place: place)
        train(load_params(params), str(params), "concept_graph", tmp_path / "data")
        runs.append({name: (folder / name).read_bytes() for name in WRITTEN if name != "timing.json"})
    assert runs[0] == runs[1] == runs[2]
    assert len(list(kept.glob("*/*.npy"))) > 5


def test_a_run_holds_what_its_readers_need(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan())
    train(load_params(params), str(params), "concept_graph", tmp_path / "data")
    folder = tmp_path / "data/runs/concept_graph"
    metrics, config = (json.loads((folder / name).read_text()) for name in ("metrics.json", "config.json"))
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names == ["path", "split", "seed", "class_id", "logits"]
    classes = json.loads(table.schema.metadata[b"params"])["classes"]
    assert classes == config["classes"] == sorted(classes)
    logits = np.array(table["logits"].to_pylist())
    right = np.array(classes)[logits.argmax(1)] == np.array(table["class_id"].to_pylist())
    for split, images in (("train", 96), ("val", 16), ("test", 32)):
        chosen = np.array(table["split"].to_pylist()) == split
        assert chosen.sum() == 2 * images == 2 * config["images"][split]
        assert metrics[split]["accuracy"] == pytest.approx(right[chosen].mean())
    # Each key is a column of `dvc metrics show`.
    assert [len(metrics[split]) for split in metrics] == [2, 5, 5]
    # The other half of val chose: it is in no figure.
    assert table["split"].to_pylist().count("choose") == 2 * 16
    assert "choose" not in metrics
    assert set(table["seed"].to_pylist()) == {3, 4} == set(config["seeds"])
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [(row["seed"], row["epoch"]) for row in rows] == [(seed, str(epoch)) for seed in "34" for epoch in range(4)]
    assert config["fingerprints"].keys() >= {"embed/tiny/images", "labels/tiny", "graphs/tiny", "bank/tiny.parquet"}
    assert "descriptions/descriptions.parquet" not in config["fingerprints"]  # the second graph is off
    assert json.loads((folder / "timing.json").read_text())["epoch_seconds"] > 0
    assert not any(str(tmp_path) in (folder / name).read_text(errors="ignore") for name in WRITTEN)


def test_a_run_reads_no_text_that_knows_the_class_where_it_is_told_another(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan())
    path = tmp_path / "data/asked/guess/texts.parquet"
    table, made_by = read_table(path, "asked/1"), read_header(path, "asked/1").params
    write_table(table, path, "asked/1", made_by | {"told": True}, "again")
    run = "    said: {method: linear_probe, encoder: tiny, settings: {features: [asked/guess/reasons]}}\n"
    ask = "ask: {guess: {prompt: prompts/oversample.md, links: data/none}}\n"
    params.write_text(ask + PARAMS + run + "  regime: {kind: noise, wrong: symmetric, share: 0.2}\n")
    with pytest.raises(UserError, match=r"train\.runs\.said\.settings: reads asked/guess, whose prompt was told the"):
        train(load_params(params), str(params), "said", tmp_path / "data")


def test_a_transductive_run_says_so_where_its_numbers_stand(
    params: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(tmp_path / "data", Plan())
    runs = "    heard: {method: label_propagation, encoder: tiny}\n"
    links = "links: {near: {kind: group, vectors: data/none, texts: data/none}}\n"
    both = runs + runs.replace("heard", "spread").replace("}", ", settings: {sources: all}}")
    params.write_text(PARAMS + both)
    said = r"runs\.heard\.settings: reads links/near, and `links` of params\.yaml has no near; add it \(docs/"
    with pytest.raises(UserError, match=said):
        plan_run(str(params), load_params(params), "heard")
    params.write_text(links + PARAMS + both)
    loaded = load_params(params)
    for name, transductive in (("heard", False), ("spread", True)):
        train(loaded, str(params), name, tmp_path / "data")
        folder = tmp_path / "data/runs" / name
        for file in ("metrics.json", "config.json"):
            assert json.loads((folder / file).read_text()).get("transductive", False) is transductive
        assert capsys.readouterr().out.startswith(f"{name}{' (transductive)' * transductive}: accuracy ")
        run = read_run(tmp_path / "data", name, "tiny")
        assert isinstance(run, Run)
        assert run.transductive is transductive
        rows = accuracy_rows([run], run, None)
        said = summarise(rows, [], [], name, None, [], False, Path("page"))
        assert ("\ntransductive: images that are judged send to each other" in said) is transductive
        assert f"\n{name}{' (transductive)' * transductive}  " in said


def test_the_model_that_is_kept_is_best_where_val_chooses(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan(noise=2.5, val=20))
    params.write_text(PARAMS.replace("seeds: 2", "seeds: 6"))
    train(load_params(params), str(params), "concept_graph", tmp_path / "data")
    folder = tmp_path / "data/runs/concept_graph"
    table = pq.read_table(folder / "predictions.parquet")
    config = json.loads((folder / "config.json").read_text())
    logits, seeds, splits = (np.array(table[name].to_pylist()) for name in ("logits", "seed", "split"))
    y = np.array([config["classes"].index(name) for name in table["class_id"].to_pylist()])
    score = {}
    for half in ("choose", "val"):
        images = {seed: (splits == half) & (seeds == seed) for seed in range(3, 9)}
        score[half] = {
            seed: (accuracy(logits[rows], y[rows]), -log_loss(logits[rows], y[rows])) for seed, rows in images.items()
        }
    best = {half: max(of_half, key=of_half.__getitem__) for half, of_half in score.items()}
    assert config["model_seed"] == best["choose"] != best["val"]  # the halves disagree here


def test_where_val_is_told_wrong_classes_these_choose(params: Path, tmp_path: Path) -> None:
    """The seed, and what the report and predict choose a run by, are by what val was told, not by the truth."""
    data = tmp_path / "data"
    write_cache(data, Plan(noise=2.5, val=20))
    regime = "  regime: {kind: noise, wrong: symmetric, share: 0.5, val: noisy}\n"
    params.write_text(PARAMS.replace("seeds: 2", "seeds: 6").replace("  runs:\n", regime + "  runs:\n"))
    read = load_params(params)
    train(read, str(params), "concept_graph", data)
    config = json.loads((data / "runs/concept_graph/config.json").read_text())
    table = pq.read_table(data / "runs/concept_graph/predictions.parquet")
    cache = read_cache(data, "tiny", 3, ["globals"])
    noise = Noise(wrong="symmetric", share=0.5, val="noisy")
    told = dict(zip(cache.paths, noise.apply(cache, 3).target.tolist(), strict=True))
    logits, seeds, splits = (np.array(table[name].to_pylist()) for name in ("logits", "seed", "split"))
    true = np.array([config["classes"].index(name) for name in table["class_id"].to_pylist()])
    score = {}
    for name, y in (("told", np.array([told[path] for path in table["path"].to_pylist()])), ("true", true)):
        images = {seed: (splits == "choose") & (seeds == seed) for seed in range(3, 9)}
        score[name] = {
            seed: (accuracy(logits[rows], y[rows]), -log_loss(logits[rows], y[rows])) for seed, rows in images.items()
        }
    best = {name: max(of, key=of.__getitem__) for name, of in score.items()}
    assert config["model_seed"] == best["told"] != best["true"]
    mean = {name: np.mean(list(of.values()), axis=0) for name, of in score.items()}
    assert config["told_choose"]["accuracy"] == pytest.approx(mean["told"][0])
    assert config["told_choose"]["log_loss"] == pytest.approx(-mean["told"][1])
    found = read_run(data, "concept_graph", "tiny")
    assert isinstance(found, Run)
    assert found.chosen_by == config["told_choose"]["accuracy"] != found.accuracy("choose")[0]
    # Of two runs, report and predict take the one that is better by what was told, though it is worse by the truth.
    other = found._replace(name="other", told=found.chosen_by + 0.01, predicted=np.full_like(found.predicted, -1))
    assert find_shown(data, [found, other], None) is other


def test_a_method_that_draws_nothing_stands_for_every_seed(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan())
    for method, rows in (("zero_shot", 1), ("linear_probe", 2)):
        train(load_params(params), str(params), method, tmp_path / "data")
        folder = tmp_path / f"data/runs/{method}"
        table = pq.read_table(folder / "predictions.parquet")
        half = table.num_rows // 2
        assert table["logits"][:half].to_pylist() == table["logits"][half:].to_pylist()
        assert json.loads((folder / "metrics.json").read_text())["test"]["accuracy_std"] == 0
        assert len((folder / "history.csv").read_text().splitlines()) == 1 + 2 * rows


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "l2: [0.01, 1.0]",
            "max_iteration: 9",
            "linear_probe.settings.max_iteration: unknown key; did you mean `max_iterations`?",
        ),
        ("epochs: 3", "epochs: three", "concept_graph.settings.epochs: input should be a valid integer"),
        (
            "epochs: 3",
            "loss_weights: {grpah: 1.0}",
            "concept_graph.settings.loss_weights.grpah: unknown key; did you mean `graph`?",
        ),
    ],
)
def test_check_names_the_key(params: Path, old: str, new: str, message: str) -> None:
    params.write_text(PARAMS.replace(old, new))
    loaded = load_params(params)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        plan_run(str(params), loaded, message.split(".")[0])
    assert "\n" not in str(caught.value)


def test_check_reads_every_method_and_writes_nothing(params: Path, here: Here) -> None:
    result = here("--check", "--params", params)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    params.write_text(PARAMS.replace("epochs: 3", "epohcs: 3"))
    result = here("--check", "--params", params)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "concept_graph.settings.epohcs: unknown key; did you mean `epochs`?" in result.stderr


def test_an_unknown_method_is_refused(params: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no telepathy; choose one of: zero_shot"):
        train(load_params(params), str(params), "telepathy", tmp_path)


def test_a_refused_run_leaves_nothing(params: Path, tmp_path: Path, here: Here) -> None:
    write_cache(tmp_path / "data", Plan())
    (tmp_path / "data/labels/tiny/b001.parquet").write_bytes(b"PAR1")
    result = here("--run", "concept_graph", "--params", params, "--data", tmp_path / "data")
    assert result.returncode == 1
    assert "b001.parquet: is not readable" in result.stderr
    assert not (tmp_path / "data/runs").exists()
    # What a run does not read cannot stop it.
    result = here("--run", "linear_probe", "--params", params, "--data", tmp_path / "data")
    assert result.returncode == 0, result.stderr


def test_a_method_that_cannot_work_on_this_data_says_why(params: Path, tmp_path: Path, here: Here) -> None:
    write_cache(tmp_path / "data", Plan(concepts=0))
    text = PARAMS.replace("zero_shot: {method: zero_shot,", "zero_shot: {method: description_zero_shot,")
    params.write_text(text)
    result = here("--run", "zero_shot", "--params", params, "--data", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data/runs/zero_shot"
    assert sorted(file.name for file in folder.iterdir()) == WRITTEN
    reason = json.loads((folder / "metrics.json").read_text())["not_possible"]
    assert re.search(r"class class-00 has no kept concept", reason)
    assert json.loads((folder / "config.json").read_text())["not_possible"] == reason
    table = pq.read_table(folder / "predictions.parquet")
    assert (table.num_rows, table.column_names) == (0, ["path", "split", "seed", "class_id", "logits"])


def test_a_probe_stands_on_a_tower_alone(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan())
    for folder in ("graphs", "labels", "bank"):
        shutil.rmtree(tmp_path / "data" / folder)
    (tmp_path / "data/embed/tiny/text.parquet").unlink()
    towers = "encoders: {clip: {model: none}}\ntowers: {tiny: {model: t}}"
    params.write_text(PARAMS.replace("encoders: {tiny: {model: none}}", towers))
    assert config_of(params, tmp_path / "data", "linear_probe")["encoder"] == "tiny"
    what = r"train\.runs\.zero_shot\.encoder: 'tiny' is a tower, .* and zero_shot reads names, owners; choose"
    with pytest.raises(UserError, match=what):
        train(load_params(params), str(params), "zero_shot", tmp_path / "data")


@pytest.mark.parametrize("geometric", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_opens_no_picture_and_calls_no_model(geometric: bool) -> None:
    """All methods, or all but those with PyTorch Geometric, which takes seconds to import."""
    files = sorted(Path("training/methods").glob("[a-z]*.py"))
    if not geometric:
        files = [file for file in files if not re.search("link_heads|convolutions import", file.read_text())]
        assert len(files) > 30
    every = "; ".join(f"import training.methods.{file.stem}" for file in files)
    # What torch-geometric itself imports is its own.
    theirs = "import torch_geometric.nn; [sys.modules.pop(each) for each in [*sys.modules] if each.startswith('PIL')]"
    ours = f"import evaluation.study; {every}"
    strange = {"PIL", "open_clip", "openai"} | (set() if geometric else {"torch_geometric"})
    code = f"import sys; {theirs if geometric else 'pass'}; {ours}; print(*{strange} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def config_of(params: Path, data: Path, method: str) -> dict[str, Any]:
    train(load_params(params), str(params), method, data)
    found: dict[str, Any] = json.loads((data / f"runs/{method}/config.json").read_text())
    return found


def test_regime_and_control_are_recorded_and_limit_what_fit_sees(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan(noise=1.5))
    plain = config_of(params, tmp_path / "data", "linear_probe")
    assert (plain["regime"], plain["control"]) == ({"kind": "full"}, {"name": "none", "concepts": None})
    folder = tmp_path / "data/runs/linear_probe"
    whole = pq.read_table(folder / "predictions.parquet")
    conditions = "  regime: {kind: shots, shots: 1}\n  control: {name: random_vectors}\n  runs:"
    params.write_text(PARAMS.replace("  runs:", conditions).replace("l2: [0.01, 1.0]", "l2: [0.1]"))
    limited = config_of(params, tmp_path / "data", "linear_probe")
    assert (limited["regime"]["shots"], limited["control"]["name"]) == (1, "random_vectors")
    few = pq.read_table(folder / "predictions.parquet")
    assert few["split"].equals(whole["split"])  # those of the index
    accuracies = [json.loads((folder / "metrics.json").read_text())["val"]["accuracy"]]
    config_of(params, tmp_path / "data", "zero_shot")  # names are random vectors too
    metrics = json.loads((tmp_path / "data/runs/zero_shot/metrics.json").read_text())
    assert metrics["val"]["accuracy"] < accuracies[0] < 1


def test_few_shots_leave_val_nothing_to_choose(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan())
    params.write_text(PARAMS.replace("  runs:", "  regime: {kind: shots, shots: 2}\n  runs:"))
    with pytest.raises(UserError, match="val holds no image, so nothing can choose among 2 settings"):
        train(load_params(params), str(params), "linear_probe", tmp_path / "data")
    config = config_of(params, tmp_path / "data", "concept_graph")  # a grid of one: the last epoch is kept
    assert {chosen["epoch"] for chosen in config["chosen"].values()} == {3} == {config["settings"]["epochs"]}
    rows = list(csv.DictReader((tmp_path / "data/runs/concept_graph/history.csv").open()))
    assert {row["val_loss"] for row in rows} == {"nan"}


def test_a_half_of_val_may_lack_classes(params: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Plan(val=1))
    folder = tmp_path / "data/runs/concept_graph"
    config = config_of(params, tmp_path / "data", "concept_graph")
    splits = pq.read_table(folder / "predictions.parquet")["split"].to_pylist()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 1 <= config["images"]["val"] == splits.count("val") / 2 < len(config["classes"])
    assert splits.count("val") + splits.count("choose") == 2 * len(config["classes"])
    assert all(0 <= metrics["val"][name] <= 1 for name in ("accuracy", "macro_accuracy", "top5_accuracy"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("regime: {kind: shots, shot: 1}", "train.regime.shot: unknown key; did you mean `shots`?"),
        ("regime: {kind: few}", "train.regime: names no regime; give a `kind`, one of: full, shots"),
        ("regime: {kind: folds}", "train.regime: folds are of a study, not of one run; put them in studies/NAME.yaml"),
        ("control: {name: edges_remove}", "there is no training/controls/edges_remove.py; did you mean edges_removed?"),
    ],
)
def test_check_names_a_wrong_regime_or_control(params: Path, given: str, message: str, here: Here) -> None:
    params.write_text(PARAMS.replace("  runs:", f"  {given}\n  runs:"))
    result = here("--check", "--params", params)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert message in result.stderr


@pytest.mark.slow
def test_a_run_on_several_encoders(tmp_path: Path) -> None:
    path, data = tmp_path / "params.yaml", tmp_path / "data"
    several = """
    both:
      method: concept_graph
      encoder: tiny
      also: [wide]
      settings: {epochs: 16, hidden: 16, weight_decay: [0.1]}
    probe: {method: linear_probe, encoder: tiny, also: [wide]}
    neighbours: {method: knn, encoder: tiny, also: [wide]}
"""
    encoders = "encoders: {tiny: {model: none}, wide: {model: none}}"
    path.write_text(PARAMS.replace("encoders: {tiny: {model: none}}", encoders) + several)
    write_cache(data, Plan(cue="none"))
    write_other(data, "wide", 12)
    params = load_params(path)
    train(params, str(path), "both", data)
    train(params, str(path), "concept_graph", data)
    train(params, str(path), "probe", data)
    runs = {name: data / "runs" / name for name in ("both", "concept_graph", "probe")}
    config = json.loads((runs["both"] / "config.json").read_text())
    assert (config["method"], config["encoder"], config["also"]) == ("concept_graph", "tiny", ["wide"])
    assert "embed/wide/images" in config["fingerprints"]
    # Only the other encoder sees the class.
    found = {name: json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for name, run in runs.items()}
    assert min(found["both"], found["probe"]) > 0.7 > 0.5 > found["concept_graph"]
    with pytest.raises(UserError, match=r"train\.runs\.neighbours\.also: knn reads one encoder only"):
        train(params, str(path), "neighbours", data)


def test_knobs_are_printed_as_yaml_that_is_valid_settings(here: Here) -> None:
    result = here("--knobs", "concept_graph")
    assert result.returncode == 0
    content = YAML(typ="safe", pure=True).load(result.stdout)
    assert concept_graph.Settings.model_validate(content) == concept_graph.Settings()
    assert "loss_weights:" in result.stdout
    result = here("--knobs", "concept_grahp")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "did you mean concept_graph?" in result.stderr
