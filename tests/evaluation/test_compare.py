"""The tables of a study: files in three formats, answers on a page, and test that is read for one list only."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation import compare as module
from evaluation import opened
from evaluation.compare import MARKER, compare, describe_commit, read_test_images
from evaluation.fitting import prepare
from evaluation.plan import Cell, Plan
from evaluation.report import HEALTH
from evaluation.study import run_study
from fieldmark.command import UserError
from fieldmark.store import make_table, read_header, read_table, vectors_of, write_table
from tests.evaluation.test_study import planned, with_run
from tests.training.cache import Plan as Planted
from tests.training.cache import write_cache
from training.data import SPLITS


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_cache(folder / "data", Planted(classes=6, train=8, val=12, test=6, noise=1.5))
    return folder


STUDY: dict[str, Any] = {
    "methods": ["linear_probe", "zero_shot", "description_zero_shot"],
    "controls": ["none", "random_vectors"],
    "regimes": ["full", {"kind": "long_tail", "exponent": 0.5}],
}


def made(project: Path, **changes: Any) -> tuple[Plan, list[Cell]]:
    plan, grid = planned(project, **STUDY, **changes)
    run_study(plan, grid, 1)
    return plan, grid


def test_three_files_of_one_table(project: Path) -> None:
    plan, grid = made(project)
    text = compare(plan, grid)
    assert (plan.folder / "tables.txt").read_text() == text
    assert text.startswith("study small, read on val")
    assert "the other half of val chose settings and epochs under full, long-tail-0.5" in text
    # Its plain run stands for the probe under a control that it does not read, and the table says so.
    idle = "left out: random_vectors changes nothing that is computed by linear_probe: the plain run stands for it"
    assert idle in text
    titles = [
        "tiny, full: val, 36 images of 6 classes, 2 runs",
        "tiny, long-tail-0.5: val, 36 images of 6 classes, 2 runs",
    ]
    assert [line for line in text.splitlines() if line.startswith("tiny, ")] == titles
    foot = (
        "decided over 36 images; p corrected (Holm) for the 4 comparisons with the probe in this study (2 here) and,"
        " apart, for the 4 with controls (2 here)"
    )
    assert text.count(f"\n{foot}\n") == 2
    assert "few" in text.split(titles[1])[1].splitlines()[1]
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert len(rows) == 2 * (1 + 2 + 2)  # the probe reads nothing that random vectors change
    for row in rows:
        runs = [
            cell
            for cell in grid
            if (cell.method, cell.control.label, cell.regime.label) == (row["method"], row["control"], row["regime"])
        ]
        assert int(row["runs"]) == len(runs)
        accuracies = [
            json.loads((plan.folder / cell.run / "metrics.json").read_text())["val"]["accuracy"] for cell in runs
        ]
        assert float(row["accuracy mean"]) == pytest.approx(np.mean(accuracies))
        assert float(row["accuracy deviation"]) == pytest.approx(np.std(accuracies, ddof=1) if len(runs) > 1 else 0)
    probe, described = rows[0], rows[3]
    assert (probe["method"], described["method"], described["control"]) == (
        "linear_probe",
        "description_zero_shot",
        "none",
    )
    assert float(described["difference"]) == pytest.approx(
        float(described["accuracy mean"]) - float(probe["accuracy mean"])
    )
    assert (described["unit"], described["units"]) == ("images", "36")
    ends = float(described["images low"]), float(described["images high"])
    assert float(described["could show"]) == pytest.approx((ends[1] - ends[0]) / 2)
    assert f"{100 * float(described['could show']):.1f}" in text
    latex = (plan.folder / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert r"description\_zero\_shot & random\_vectors" in latex
    widths = {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 2  # each table has rows of one width


def test_what_is_transductive_is_said_beside_its_numbers(project: Path) -> None:
    every = {"spread_all": {"method": "label_propagation", "settings": {"sources": "all"}}}
    methods, controls = ["linear_probe", "label_propagation"], ["none", "links_removed"]
    near = {"links": {"near": {"kind": "group", "vectors": "data/none", "texts": "data/none"}}}
    plan, grid = planned(project, near, methods=methods, controls=controls, regimes=["full"], variants=every)
    run_study(plan, grid, 1)
    text = compare(plan, grid)
    words = "spread_all is transductive, linear_probe is not"
    assert re.search(rf"^spread_all \(transductive\) +none .*; {words}$", text, re.M)
    assert re.search(r"^spread_all \(transductive\) +links_removed ", text, re.M)
    assert re.search(r"^label_propagation +links_removed ", text, re.M)
    heard = "images that are judged send to each other (never their labels), in no other row"
    assert f"\ntransductive: spread_all: {heard}\n" in text
    assert "left out: links_removed changes nothing that is computed by linear_probe: the plain run" in text
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert {row["method"] for row in rows if row["transductive"] == "yes"} == {"spread_all"}
    for cell in grid:
        metrics = json.loads((plan.folder / cell.run / "metrics.json").read_text())
        assert metrics.get("transductive", False) == (cell.method == "spread_all")
    # Nobody sends: every image is told how frequent classes are.
    [none] = [row for row in rows if (row["method"], row["control"]) == ("label_propagation", "links_removed")]
    assert float(none["accuracy mean"]) == pytest.approx(1 / 6)


QUESTIONS: dict[str, Any] = {
    "variants": {"named": {"method": "description_zero_shot", "settings": {"class_names": True}}},
    "questions": [
        {"ask": "Do names | help?", "of": "named", "against": "description_zero_shot"},
        {"ask": "Do texts beat names?", "of": "description_zero_shot", "against": "zero_shot"},
    ],
    "open": [{"ask": "Are mountains high?", "because": "no picture shows one"}],
}


def test_answers_stand_on_a_page(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "describe_commit", lambda: "abc1234")
    plan, grid = made(project, **QUESTIONS)
    text = compare(plan, grid)
    assert len(re.findall(r"^named +(none|random_vectors) ", text, re.MULTILINE)) == 2 * 2
    page = (plan.folder / "answers.md").read_text()
    assert page.startswith(
        "# What study small answers\n\nRead on val, code abc1234; made by `make compare NAME=small`."
    )
    assert "the other half of val chose settings and epochs under full, long-tail-0.5" in page
    heads = re.findall("^## (.*)$", page, re.MULTILINE)
    titles = [f"tiny, {name}: val, 36 images of 6 classes, 2 runs" for name in ("full", "long-tail-0.5")]
    assert heads == [*titles, "Not answered"]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    over = ["over images", "over classes", "could show"]
    assert rows[0] == ["question", "compared", "difference", *over, "p (Holm)", "answer"]
    assert rows[1][:2] == ["Do names &#124; help?", "named - description_zero_shot"]
    assert {len(row) for row in rows[:6]} == {8}
    assert page.count("\n\nDecided over 36 images.\n\n") == 2
    assert "p is corrected (Holm) over the 4 answers on this page" in page
    assert rows[-1] == ["Are mountains high?", "no picture shows one"]
    means = {
        row["method"]: 100 * float(row["accuracy mean"])
        for row in csv.DictReader((plan.folder / "tables.csv").open())
        if (row["control"], row["regime"]) == ("none", "full")
    }
    assert float(rows[2][2]) == pytest.approx(means["description_zero_shot"] - means["zero_shot"], abs=0.051)


def test_the_commit_stands_in_the_header(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, grid = made(project)
    monkeypatch.setattr(module, "describe_commit", lambda: "abc1234-dirty")
    assert compare(plan, grid).splitlines()[0] == "study small, read on val, code abc1234-dirty"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert compare(plan, grid).splitlines()[0] == "study small, read on val"


def test_a_missing_or_stale_run_is_named(project: Path) -> None:
    plan, grid = made(project)
    stale = replace(plan, code=dict.fromkeys(plan.code, "edited"))
    with pytest.raises(UserError, match=rf"lacks {len(grid)} of {len(grid)} runs \(first tiny\.linear_probe\.none"):
        compare(stale, grid)


def test_a_study_without_the_probe_cannot_be_compared(project: Path) -> None:
    plan, grid = planned(project, **STUDY | {"methods": ["zero_shot"]})
    with pytest.raises(UserError, match="methods: lacks linear_probe, which the others"):
        compare(plan, grid)


def write_health(data: Path, contaminated: int) -> None:
    """data/index/metrics.json as index_images writes it, with so many test images that train gives away."""
    health: dict[str, Any] = {}
    keys = [(line.key, line.spread) for lines in HEALTH.values() for line in lines]
    values = {"health.contaminated_test.images": contaminated, "health.contaminated_test.near_duplicates": contaminated}
    for key, spread in keys:
        place = health
        *folders, last = key.split(".")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = {"min": 1, "median": 1, "max": 1} if spread else values.get(key, 0)
    splits = read_table(data / "index/images.parquet", "index.images/1").filter(pa.compute.field("status") == "ok")[
        "split"
    ]
    health["images"] = {split: splits.to_pylist().count(split) for split in SPLITS}
    (data / "index/metrics.json").write_text(json.dumps(health))


def test_test_is_read_for_one_list_only(project: Path) -> None:
    write_health(project / "data", contaminated=2)
    plan, grid = made(project, declared_test=True)
    (plan.data / MARKER).unlink(missing_ok=True)
    text = compare(plan, grid)
    assert text.startswith("study small, read on test")
    assert "warning: 2 of 36 test images are contaminated: 2 with a near duplicate in train or val" in text
    assert "half of val" not in text
    assert "test was read once, for these runs (data/studies/test_was_read.json)" in text
    [reading] = json.loads((plan.data / MARKER).read_text())
    assert (reading["study"], reading["methods"]) == ("small", STUDY["methods"])
    assert reading["runs"] == {cell.run: plan.mark(cell) for cell in grid}
    assert compare(plan, grid) == text
    fewer, fewer_grid = planned(project, **STUDY | {"methods": ["linear_probe", "zero_shot"]}, declared_test=True)
    with pytest.raises(
        UserError, match=r"studies/small\.yaml: methods: test was read for \[.*\] already .*declared_test: false"
    ):
        compare(fewer, fewer_grid)
    more, more_grid = made(project, declared_test=True, questions=QUESTIONS["questions"][1:])
    with pytest.raises(UserError, match=r"studies/small\.yaml: questions: test was read for \[\] already"):
        compare(more, more_grid)
    (plan.data / MARKER).write_text("[")
    with pytest.raises(UserError, match=r"test_was_read\.json: is not readable JSON .*: restore it"):
        compare(plan, grid)
    on_val, val_grid = planned(project, **STUDY | {"methods": ["linear_probe", "zero_shot"]})
    assert compare(on_val, val_grid).startswith("study small, read on val")


@pytest.fixture
def declared(project: Path, tmp_path: Path) -> Path:
    """A folder with the cache in which a study of two runs has read test."""
    shutil.copytree(project / "data", tmp_path / "data", ignore=shutil.ignore_patterns("studies"))
    write_health(tmp_path / "data", contaminated=0)
    plan, grid = planned(tmp_path, **DECLARED)
    run_study(plan, grid, 1)
    compare(plan, grid)
    return tmp_path


DECLARED: dict[str, Any] = {
    "methods": ["linear_probe", "zero_shot"],
    "controls": ["none"],
    "regimes": ["full"],
    "declared_test": True,
}


def refused(plan: Plan, grid: list[Cell], why: str) -> None:
    """Refused before the study is run, and after it; what was read stays as it was."""
    files = plan.data / MARKER, plan.folder / "tables.txt"
    before = [file.read_bytes() if file.is_file() else None for file in files]
    for _ in range(2):
        with pytest.raises(UserError, match=why):
            compare(plan, grid)
        run_study(plan, grid, 1)
    assert [file.read_bytes() if file.is_file() else None for file in files] == before


def test_a_changed_setting_does_not_read_test_again(declared: Path) -> None:
    plan, grid = planned(declared, with_run("linear_probe", l2=[0.3]), **DECLARED)
    changed = r"small\.yaml: declared_test: .* of 1 of 2 runs have changed \(first tiny\.linear_probe\.none\.full\.0\)"
    refused(plan, grid, rf"{changed}; go back to those, or choose on val \(declared_test: false\)")
    plan, grid = planned(declared, **DECLARED)
    run_study(plan, grid, 1)
    assert compare(plan, grid).startswith("study small, read on test")


def test_a_changed_input_does_not_read_test_again(declared: Path) -> None:
    path = declared / "data/bank/tiny.parquet"
    header, table = read_header(path, "bank/1"), read_table(path, "bank/1")
    write_table(table, path, "bank/1", header.params, "edited")
    refused(*planned(declared, **DECLARED), r"of 1 of 2 runs have changed \(first tiny\.zero_shot\.none\.full\.0\)")


def test_a_renamed_study_does_not_read_test_again(declared: Path) -> None:
    plan, grid = planned(declared, **DECLARED)
    why = r"studies/other\.yaml: .* read already, for study small .* go back to that name, or choose on val"
    refused(replace(plan, name="other"), grid, why)
    plan, grid = planned(declared, with_run("linear_probe", l2=[0.3]), **DECLARED)
    refused(replace(plan, name="other"), grid, why)


def test_other_test_images_are_another_reading(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, grid = planned(declared, **DECLARED)
    other = replace(plan, name="other")
    run_study(other, grid, 1)
    images = module.read_test_images(plan.data)
    assert len(images) == 36
    monkeypatch.setattr(module, "read_test_images", lambda data: {"0" * 16, min(images)})  # one of them is known
    with pytest.raises(UserError, match="for study small"):
        compare(other, grid)
    monkeypatch.setattr(module, "read_test_images", lambda data: {"0" * 16})
    compare(other, grid)
    assert [reading["study"] for reading in json.loads((plan.data / MARKER).read_text())] == ["small", "other"]


def test_unseen_classes_have_a_table_for_each_measure(project: Path) -> None:
    regime = {"kind": "unseen", "seen": 0.5, "development": 0.7}
    changes = STUDY | {"regimes": [regime], "questions": QUESTIONS["questions"][1:]}
    plan, grid = planned(project, **changes)
    run_study(plan, grid, 1)
    text = compare(plan, grid)
    # Of six classes three are seen in a draw, and two are for development: half of their training and val images is
    # val. The two draws have three of the latter between them.
    assert re.findall("^tiny, .*$", text, re.MULTILINE) == [
        "tiny, unseen-0.5, accuracy on unseen classes, among these: val, 30 images of 3 classes, 2 runs",
        "tiny, unseen-0.5, harmonic mean of the accuracies on seen and on unseen classes, among all: val,"
        " 51 images of 6 classes, 2 runs",
    ]
    assert text.count("no verdict: 3 classes, and it takes 20") > 2
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert [row["measure"] for row in rows] == ["unseen"] * 5 + ["harmonic"] * 5
    for row in (rows[1], rows[6]):
        [probe] = [other for other in rows if other["measure"] == row["measure"] and other["method"] == "linear_probe"]
        figure = f"{row['measure']} mean"
        assert row["method"] == "zero_shot"
        assert float(row["difference"]) == pytest.approx(float(row[figure]) - float(probe[figure]), abs=1e-6)
    page = (plan.folder / "answers.md").read_text()
    assert page.count("no verdict: 3 classes, and it takes 20 |") == 2


@pytest.mark.slow
def test_a_method_that_cannot_work_is_left_out_with_a_note(tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Planted(classes=6, train=8, val=6, test=6, noise=1.5, concepts=0))
    regimes = ["full", {"kind": "shots", "shots": 1}]
    asked = {"questions": [*QUESTIONS["questions"], {"ask": "Do names say more?", "of": "zero_shot", "against": "knn"}]}
    changes = STUDY | QUESTIONS | asked | {"regimes": regimes, "methods": [*STUDY["methods"], "knn"], "seeds": 2}
    plan, grid = planned(tmp_path, **changes)
    run_study(plan, grid, 1)
    described = [cell for cell in grid if plan.entries[cell.method].method == "description_zero_shot"]
    folders = {plan.folder / folder for cell in described for folder in (cell.run, cell.search)}
    for folder in filter(Path.is_dir, folders):
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        assert "has no kept concept" in json.loads((folder / "config.json").read_text())["not_possible"]
    text = compare(plan, grid)
    rows = {(row["method"], row["regime"]) for row in csv.DictReader((plan.folder / "tables.csv").open())}
    assert rows == {(name, label) for name in ("linear_probe", "zero_shot", "knn") for label in ("full", "1-shot")}
    for label in ("full", "1-shot"):
        for name in ("description_zero_shot", "named"):
            for control in ("none", "random_vectors"):
                found = re.findall(rf"^left out: {name} on tiny, {control}, {label}: .*: class .* has no", text, re.M)
                assert len(found) == 1
    page = (plan.folder / "answers.md").read_text()
    assert page.count("none: a method cannot work on this data |") == 2 * 2
    assert len(re.findall(r"^\| Do names say more\? .* (not shown|yes|no)", page, re.M)) == 2
    # What is known to be impossible is not tried again.
    again, again_grid = planned(tmp_path, **changes)
    assert run_study(again, again_grid, 1) == 0


def test_a_row_without_one_of_its_draws_is_left_out(project: Path) -> None:
    plan, grid = made(project)
    cell = next(cell for cell in grid if cell.method == "zero_shot" and cell.regime.label != "full")
    config = plan.folder / cell.run / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"not_possible": "class-00 has no image"}))
        text = compare(plan, grid)
    finally:
        config.write_text(before)
    assert "left out: zero_shot on tiny, none, long-tail-0.5: class-00 has no image" in text
    rows = [(row["method"], row["control"]) for row in csv.DictReader((plan.folder / "tables.csv").open())]
    assert rows.count(("zero_shot", "none")) == 1  # under full
    assert "control of none, which the table does not have" in text


def test_a_probe_that_cannot_work_leaves_nothing_to_compare_with(project: Path) -> None:
    plan, grid = made(project)
    config = plan.folder / grid[0].run / "config.json"
    before = config.read_text()
    assert grid[0].method == "linear_probe"
    try:
        config.write_text(json.dumps(json.loads(before) | {"not_possible": "no image"}))
        with pytest.raises(UserError, match="linear_probe cannot work on this data: no image"):
            compare(plan, grid)
    finally:
        config.write_text(before)


def test_groups_have_an_interval_of_their_own(tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Planted(classes=4, train=6, val=12, test=4))
    path = tmp_path / "data/index/images.parquet"
    header, rows = read_header(path, "index.images/1"), read_table(path, "index.images/1").to_pylist()
    for number, row in enumerate(rows):
        row["group"] = None if number % 5 == 0 else f"track {number // 3}"
    write_table(make_table("index.images/1", rows), path, "index.images/1", header.params, header.fingerprint)
    changes = {"methods": ["linear_probe", "zero_shot"], "controls": ["none"], "regimes": ["full"]}
    plan, grid = planned(tmp_path, **changes)
    run_study(plan, grid, 1)
    text = compare(plan, grid)
    assert re.search(r"over classes +over groups +could show", text)
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert [bool(row["groups low"]) for row in rows] == [False, True]
    assert (rows[1]["unit"], rows[1]["units"], rows[1]["p_holm"]) == ("groups", "12", "")
    assert rows[1]["verdict"] == "no verdict: 12 groups, and it takes 20"
    assert "\nno verdict: 12 groups, and it takes 20: intervals alone\n" in text
    assert pq.read_schema(plan.folder / grid[0].run / "predictions.parquet").metadata[b"schema"] == b"run.predictions/1"


def test_a_commit_is_dirty_where_more_than_the_parameters_was_edited(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    assert describe_commit(tmp_path) == ""
    for name in ("params.yaml", "code.py"):
        (tmp_path / name).write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    commit = describe_commit(tmp_path)
    (tmp_path / "params.yaml").write_text("b")
    assert commit
    assert describe_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("b")
    assert describe_commit(tmp_path) == f"{commit}-dirty"


def test_test_pictures_that_were_opened_are_told_with_the_figures_of_test(project: Path) -> None:
    write_health(project / "data", contaminated=0)
    plan, grid = made(project, declared_test=True)
    (plan.data / MARKER).unlink(missing_ok=True)
    path = plan.data / opened.MARKER
    opening = {"run": "linear_probe", "fingerprint": "f", "images": "0123456789abcdef"}
    path.write_text(json.dumps([opening]))
    assert "looked at" not in compare(plan, grid)  # other images
    opening["images"] += f" {min(read_test_images(plan.data))}"
    path.write_text(json.dumps([opening]))
    said = "warning: test pictures were looked at in the report (data/studies/test_was_opened.json)"
    assert said in compare(plan, grid)
    path.unlink()


def test_a_study_of_candidates_says_how_many_were_told_apart(project: Path) -> None:
    partial = {"kind": "partial", "wrong": "random", "q": 0.5}
    plan, grid = planned(project, methods=["linear_probe"], regimes=[partial], controls=["none"], seeds=1)
    run_study(plan, grid, 1)
    text = compare(plan, grid)
    assert "disambiguated: training images whose true class is the likeliest of their candidates, in %" in text
    [cell] = grid
    share = json.loads((plan.folder / cell.run / "metrics.json").read_text())["train"]["disambiguated"]
    prepared = prepare(plan, cell.encoder, cell.control, cell.regime, cell.draw, plan.entries[cell.method].variation)
    target = prepared.whole.target.numpy()
    table = read_table(plan.folder / cell.run / "predictions.parquet", "run.predictions/1")
    rows = dict(zip(table["path"].to_pylist(), vectors_of(table, "logits"), strict=True))
    right = []
    for image in prepared.whole.images("train").tolist():
        candidates = np.flatnonzero(target[image])
        favoured = candidates[rows[prepared.whole.paths[image]][candidates].argmax()]
        right.append(favoured == prepared.whole.y[image].item())
    assert share == np.mean(right)
    assert f"{100 * share:.1f}" in text.split("verdict\n")[1].splitlines()[0]
