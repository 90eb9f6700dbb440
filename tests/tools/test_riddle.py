"""The command goes through methods, faults and folds, and makes no fit twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from fieldmark.command import UserError
from tests.tools.conftest import run_module
from tests.training.cache import ENCODER, Plan, write_cache
from tools import riddle

FEW = ["--methods", "trd", "--folds", "2", "--seeds", "1", "--epochs", "1", "--set", "hidden=4", "--set",
       "weight_decay=[0.1]", "--set", "proxies=1", "--device", "cpu"]  # fmt: skip
FOLDER = Path("data/studies/riddle")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A planted cache with its parameters, the working directory."""
    plan = Plan(classes=3, train=8, val=4, test=2, nodes=4, ragged=False)
    write_cache(tmp_path / "data", plan)
    params: dict[str, Any] = {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "images", "buckets": plan.buckets},
        "llm": {"model": "none"},
        "encoders": {ENCODER: {"model": "none"}},
        "report": {"reference": "linear_probe"},
        "train": {"runs": {"linear_probe": {"method": "linear_probe", "encoder": ENCODER}}},
    }
    with open(tmp_path / "params.yaml", "w") as file:
        YAML().dump(params, file)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_faults_are_those_that_the_settings_name() -> None:
    assert "scrambled_crops" in riddle.faults_of("trd")
    assert riddle.faults_of("linear_probe") == ()
    cases, notes = riddle.cases_of("trd", {"hidden": 4, "nobody": 1, "edges": "similar"})
    names = [case.name for case in cases]
    assert names == ["none", *riddle.faults_of("trd"), "all", "peeking", "all, peeking"]
    assert [case.peeking for case in cases] == [False] * (len(cases) - 2) + [True] * 2
    by_name: dict[str, Any] = {case.name: case.settings for case in cases}
    assert by_name["none"].faults == by_name["peeking"].faults == ()
    assert by_name["all"].faults == riddle.faults_of("trd")
    assert {each.hidden for each in by_name.values()} == {4}
    assert notes == []
    [note] = riddle.cases_of("trd", {})[1]
    assert note.startswith("trd: threshold_precedence is left out: faults: Value error, threshold_precedence is a")


def test_faults_that_are_named_are_fitted_alone_beside_none() -> None:
    cases, notes = riddle.cases_of("trd", {})
    assert riddle.only(cases, notes, None) == (cases, notes)
    few, silent = riddle.only(cases, notes, ["peeking", "scrambled_crops"])
    assert ([case.name for case in few], silent) == (["none", "scrambled_crops", "peeking"], [])
    with pytest.raises(UserError, match=r"--faults threshold_precedence: trd: .* is a defect of edges: similar"):
        riddle.only(cases, notes, ["threshold_precedence"])
    with pytest.raises(UserError, match=r"--faults nobody: name some of scrambled_crops, "):
        riddle.only(cases, notes, ["nobody"])
    # A fault that one method has and another leaves out is said to be left out.
    other = riddle.cases_of("notes_graph", {})[0]
    assert riddle.only([*cases, *other], notes, ["threshold_precedence"])[1] == notes


def test_what_is_given_has_to_be_a_setting_of_a_value_that_it_takes() -> None:
    assert riddle.read_given(["epochs=2", "weight_decay=[0.1]", "object=global"], ["trd"]) == {
        "epochs": 2, "weight_decay": [0.1], "object": "global",
    }  # fmt: skip
    for wrong in ("epochs", "nobody=1", "faults=1"):
        with pytest.raises(UserError, match=rf"--set {wrong}: write KEY=VALUE, KEY a setting of trd"):
            riddle.read_given([wrong], ["trd"])
    with pytest.raises(UserError, match=r"--set: trd: object: Input should be 'node' or 'global'"):
        riddle.cases_of("trd", {"object": "nowhere"})


def test_the_command_writes_a_table_and_goes_on_where_it_stopped(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(riddle, "faults_of", lambda method: ("scrambled_crops",) if method == "trd" else ())
    run_module("tools.riddle", *FEW)
    text = (FOLDER / "tables.txt").read_text()
    assert capsys.readouterr().out == text
    assert "--methods trd --encoder tiny --folds 2 --seeds 1" in text.splitlines()[0]
    assert "train and val, 36 images of 3 classes" in text.splitlines()[0]
    rows = json.loads((FOLDER / "tables.json").read_text())["rows"]
    assert [row["faults"] for row in rows] == ["none", "scrambled_crops", "all", "peeking", "all, peeking"]
    assert rows[0]["ordered"] == rows[0]["shuffled"]
    # One fault and all faults are one fit here: a fit is known by its settings.
    fits = {path: path.stat().st_mtime_ns for path in (FOLDER / "fits").iterdir()}
    assert len(fits) == 4 * 2
    stopped = sorted(fits)[0]
    stopped.unlink()
    run_module("tools.riddle", *FEW)
    again = {path: path.stat().st_mtime_ns for path in (FOLDER / "fits").iterdir()}
    assert again.keys() == fits.keys()
    assert {path for path in fits if again[path] != fits[path]} == {stopped}
    assert (FOLDER / "tables.txt").read_text() == text


def test_another_input_or_setting_is_another_fit(project: Path) -> None:
    source = riddle.Source(Path("data"), ENCODER, Plan().buckets, torch.device("cpu"))
    cases, _ = riddle.cases_of("trd", {})
    keys = {riddle.key_of(case, riddle.Fold(2, 0, case.peeking), 0, source) for case in cases}
    assert len(keys) == len(cases)
    asked = [(riddle.Fold(2, 0), 0), (riddle.Fold(2, 1), 0), (riddle.Fold(2, 0), 1), (riddle.Fold(3, 0), 0)]
    plain, *others = (riddle.key_of(cases[0], fold, seed, source) for fold, seed in asked)
    assert len({plain, *others}) == len(asked)
    write_cache(Path("data"), Plan(classes=3, train=8, val=4, test=2, nodes=4, ragged=False, seed=1))
    assert riddle.key_of(cases[0], riddle.Fold(2, 0), 0, source) != plain


def test_an_encoder_that_is_not_there_and_too_few_folds_are_refused(project: Path) -> None:
    with pytest.raises(UserError, match=r"--encoder nobody: is not in params\.yaml; name one of tiny"):
        run_module("tools.riddle", *FEW, "--encoder", "nobody")
    with pytest.raises(UserError, match=r"cross-fitting takes 2 folds or more"):
        run_module("tools.riddle", *FEW, "--folds", "1")
