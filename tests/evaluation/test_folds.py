"""Studies in folds: what is held out has no part in its logits, by no way; and folds make one row."""

import importlib
import json
import re
import shutil
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from evaluation import choices, fitting
from evaluation.compare import compare
from evaluation.plan import PLAIN, Cell, Plan, cells, rival_cells
from evaluation.study import run_study
from evaluation.verdicts import read_results
from fieldmark.command import UserError
from fieldmark.store import read_header, read_table, vectors_of, write_table
from tests.evaluation.test_study import data, planned, project, ran, with_run
from tests.training.cache import Plan as Planted
from tests.training.cache import write_cache
from training.controls import Control, Request
from training.data import Cache, read_cache
from training.data.bank import Bank
from training.folds import HELD_OUT, deal
from training.regimes import Folds, Shots, by_draw
from training.reselection import apply as select_anew
from training.runs import SCHEMA

__all__ = ["data", "project"]
FOLDS = {"kind": "folds", "folds": 3}
STUDY: dict[str, Any] = {
    "methods": ["linear_probe", "description_zero_shot", "concept_graph"],
    "controls": ["none"],
    "regimes": [FOLDS],
}
SELECT = {"select": {"per_class": 2}}  # of 6: so labels have a say in which
METHODS_OF_TEXTS = ("description_zero_shot", "concept_graph")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A project whose bank and labels were made by the stages."""
    write_cache(tmp_path / "data", Planted(classes=6, train=9, val=4, test=2, noise=1.5, concepts=6, ragged=False))
    planned(tmp_path, SELECT, **STUDY)
    run_stages(tmp_path)
    return tmp_path


def run_stages(folder: Path) -> None:
    """select_concepts and label_patches, in this process."""
    for name in ("select_concepts", "label_patches"):
        with chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, "--encoder", "tiny"])
            importlib.import_module(f"stages.{name}").main()


def permute(folder: Path, chosen: set[str]) -> None:
    """Give each of these images (by image_id) the class of the next one, and run the stages again."""
    path = folder / "data/index/images.parquet"
    header, table = read_header(path, "index.images/1"), read_table(path, "index.images/1")
    rows = [place for place, image_id in enumerate(table["image_id"].to_pylist()) if image_id in chosen]
    classes = table["class_id"].to_pylist()
    for place, other in zip(rows, np.roll([classes[place] for place in rows], len(rows) // 3), strict=True):
        classes[place] = str(other)
    table = table.set_column(table.schema.get_field_index("class_id"), "class_id", pa.array(classes, pa.string()))
    write_table(table, path, "index.images/1", header.params, header.fingerprint)
    run_stages(folder)


def images_of(folder: Path, *splits: str) -> list[str]:
    index = read_table(folder / "data/index/images.parquet", "index.images/1", ["image_id", "split", "status"])
    rows = index.filter(pc.equal(index["status"], "ok")).to_pylist()
    return [row["image_id"] for row in rows if row["split"] in splits]


def first_fold(folder: Path) -> dict[str, np.ndarray]:
    """By method: the out-of-fold logits of fold 0, its runs made anew."""
    shutil.rmtree(folder / "data/studies", ignore_errors=True)
    plan, grid = planned(folder, SELECT, **STUDY)
    chosen = [cell for cell in grid if cell.draw == 0]
    run_study(plan, chosen, 1)
    found = {}
    for cell in chosen:
        table = read_table(plan.folder / cell.run / "predictions.parquet", SCHEMA).sort_by("path")
        found[cell.method] = vectors_of(table.filter(pc.equal(table["split"], HELD_OUT)), "logits")
    return found


def test_labels_of_held_out_images_change_no_out_of_fold_logit(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_disk = staged / "data/bank/tiny.parquet"
    bank, before = read_table(of_disk, "bank/1"), first_fold(staged)

    def from_disk(*arguments: Any, anew: bool = False, inner: Cache | None = None) -> Any:
        return controlled_cache(*arguments)

    controlled_cache = fitting.controlled_cache
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "controlled_cache", from_disk)
        before_from_disk = first_fold(staged)

    held = {image_id for image_id in images_of(staged, "train", "val") if deal(f"fold {image_id}", 3) == 0}
    assert len(held) > 12
    permute(staged, held)
    assert not bank["kept"].equals(read_table(of_disk, "bank/1")["kept"])  # the stages do see the labels
    after = first_fold(staged)
    assert before.keys() == after.keys() == set(STUDY["methods"])
    for method in before:
        np.testing.assert_array_equal(before[method], after[method])
    # The same test finds the bank on disk out.
    monkeypatch.setattr(fitting, "controlled_cache", from_disk)
    after_from_disk = first_fold(staged)
    for method in METHODS_OF_TEXTS:
        assert not np.array_equal(before_from_disk[method], after_from_disk[method])


def test_bank_and_labels_under_shots_are_made_from_the_shots(staged: Path) -> None:
    def made() -> tuple[Cache, torch.Tensor]:
        plan, _ = planned(staged, SELECT, **STUDY | {"regimes": [{"kind": "shots", "shots": 2}]})
        whole = fitting.prepare(plan, "tiny", Control(), Shots(shots=2), 0, PLAIN).whole
        return whole, whole.images("train")

    before, shots = made()
    assert len(shots) == 2 * 4  # of the four classes that are not for development
    # Of images that no draw's order puts before a shot, labels may be any.
    key = by_draw(0)
    last = max(key(before.paths[image]) for image in shots.tolist())
    cache = read_cache(staged / "data", "tiny", 3, {"globals"})
    places = zip(cache.image_ids, cache.paths, cache.split, strict=True)
    later = {image_id for image_id, path, split in places if split == "val" or (split == "train" and key(path) > last)}
    bank = read_table(staged / "data/bank/tiny.parquet", "bank/1")
    permute(staged, later)
    assert not bank["kept"].equals(read_table(staged / "data/bank/tiny.parquet", "bank/1")["kept"])
    after, again = made()
    assert [after.image_ids[image] for image in again] == [before.image_ids[image] for image in shots]
    assert after.part(Bank).kept.equal(before.part(Bank).kept)
    assert after.part(Bank).K.equal(before.part(Bank).K)
    assert after.batch(again).concept_weight.equal(before.batch(shots).concept_weight)


def test_what_the_gate_says_inside_a_fold_stands_when_all_of_it_trains(staged: Path) -> None:
    blocks = {"select": {"per_class": 2, "fallback": "auto"}}
    plan, _ = planned(staged, blocks, **STUDY)
    permute(staged, set(images_of(staged, "train", "val")))  # the texts are of other classes, and carry no signal
    found = []
    for number in range(3):
        told = [fitting.prepare(plan, "tiny", Control(), Folds(folds=3), number, PLAIN, last) for last in (False, True)]
        found.append(["proto" in one.told.part(Bank).kind for one in told])
    assert all(inner == last for inner, last in found)
    assert any(inner for inner, _ in found)


@pytest.mark.parametrize("fallback", ["none", "prototypes", "auto"])
def test_of_all_training_images_the_bank_is_the_stage_s(staged: Path, fallback: str) -> None:
    planned(staged, {"select": {"per_class": 2, "fallback": fallback}}, **STUDY)
    run_stages(staged)
    cache = read_cache(staged / "data", "tiny", 3, {"names", "concepts", "owners", "globals"})
    request = Request(Control(), staged / "data", "tiny", 3, generator=None)  # type: ignore[arg-type]  # nothing is drawn
    made, of_stage = select_anew(cache, request).part(Bank), cache.part(Bank)
    assert made.kind == of_stage.kind
    assert ("proto" in made.kind) == (fallback == "prototypes")
    assert made.kept.equal(of_stage.kept)
    assert made.own.equal(of_stage.own)
    assert made.K.equal(of_stage.K)


def test_folds_make_one_row_with_each_image_once(staged: Path) -> None:
    group_images(staged)
    plan = ran(staged, SELECT, **STUDY)
    grid = cells(plan, 0)
    assert sorted({(cell.draw, cell.seed) for cell in grid}) == [(0, 0), (1, 1), (2, 2)]  # whatever `seeds` says
    text = compare(plan, grid)
    development = set(images_of(staged, "train", "val"))
    assert f"tiny, folds-3: out of fold, {len(development)} images of 6 classes, 1 run" in text
    assert "folds-3: each image of train and val is judged once, by a fit without it" in text
    assert "val also chose" not in text

    index = read_table(staged / "data/index/images.parquet", "index.images/1").to_pylist()
    group_of = {row["path"]: row["group"] for row in index}
    runs = [cell for cell in grid if cell.method == "concept_graph"]
    right, fold_of = held_out(plan, runs)
    assert len(right) == len(development)
    assert len({group_of[path] for path in right}) < len(right) / 2
    for group in set(group_of.values()):
        assert len({fold_of[path] for path in right if group_of[path] == group}) <= 1
    [table] = read_results(plan, grid, "val")
    (result,) = [one for one in table.results if one.method == "concept_graph"]
    assert dict(zip(table.paths, result.correct[0].tolist(), strict=True)) == right
    assert result.figures[0]["accuracy"] == pytest.approx(np.mean(list(right.values())))
    assert "ECE, scaled" not in result.figures[0]  # nothing is left to fit a temperature on


def group_images(folder: Path) -> None:
    """Three images of a class to a track."""
    path = folder / "data/index/images.parquet"
    header, rows = read_header(path, "index.images/1"), read_table(path, "index.images/1")
    numbers = [(row["class_id"], int(row["path"][-8:-4]) // 3) if row["image_id"] else None for row in rows.to_pylist()]
    groups = [None if number is None else "{} {}".format(*number) for number in numbers]
    rows = rows.set_column(rows.schema.get_field_index("group"), "group", pa.array(groups, pa.string()))
    write_table(rows, path, "index.images/1", header.params, header.fingerprint)


def held_out(plan: Plan, runs: list[Cell]) -> tuple[dict[str, bool], dict[str, int]]:
    """By path: whether the fold that held an image out is right about it, and which fold that is."""
    right: dict[str, bool] = {}
    fold_of: dict[str, int] = {}
    for cell in runs:
        folder = plan.folder / cell.run
        classes = json.loads((folder / "config.json").read_text())["classes"]
        metrics = json.loads((folder / "metrics.json").read_text())
        rows = read_table(folder / "predictions.parquet", SCHEMA).filter(pc.field("split") == HELD_OUT).to_pylist()
        found = {row["path"]: classes[int(np.argmax(row["logits"]))] == row["class_id"] for row in rows}
        assert not found.keys() & right.keys()
        assert metrics[HELD_OUT]["accuracy"] == pytest.approx(np.mean(list(found.values())))
        right |= found
        fold_of |= dict.fromkeys(found, cell.draw)
    return right, fold_of


def test_clean_images_alone_are_judged(project: Path) -> None:
    (project / "some.txt").write_text("class-03\ntrain/class-05/0001.png\n")
    (project / "most.txt").write_text("".join(f"class-0{number}\n" for number in range(9)))
    some, rest = str(project / "some.txt"), f"not {project / 'most.txt'}"
    grid: dict[str, Any] = {"methods": ["linear_probe"], "controls": ["none"], "regimes": [FOLDS]}
    plan = ran(project, **grid, clean=[some, "val", rest])
    [table] = read_results(plan, cells(plan, 0), "val")
    assert len(table.paths) == 10 * 4 + 6 + 1 + 6  # all val, and of train: class 3, one of class 5, class 9
    trained = {path.split("/")[1] for path in table.paths if path.startswith("train")}
    assert trained == {"class-03", "class-05", "class-09"}
    assert f"judged on clean images alone: {some}, val, {rest}" in compare(plan, cells(plan, 0))
    alone, _ = planned(project, **grid, clean=some)
    [table] = read_results(alone, cells(alone, 0), "val")
    assert len(table.paths) == 6 + 4 + 1
    (project / "some.txt").write_text("class-03\nclass-77\n")
    with pytest.raises(UserError, match=r"some\.txt: line 2: 'class-77' names no image; write a class's folder"):
        planned(project, **grid, clean=some)


def test_the_rival_is_chosen_inside_folds(project: Path) -> None:
    names = ["linear_probe", "knn", "prototypes"]
    grid: dict[str, Any] = {"methods": names, "controls": ["none"], "regimes": [FOLDS], "rival": names}
    questions = [{"ask": "Does it matter which?", "of": "rival", "against": "knn"}]
    plan = ran(project, **grid, questions=questions)
    runs = cells(plan, 0)
    assert len(runs) == 3 * 3  # the rival has none of its own
    expected: dict[str, bool] = {}
    for number in range(3):
        of_fold = [cell for cell in runs if cell.draw == number]
        inner = [json.loads((plan.folder / cell.run / "config.json").read_text())["inner"] for cell in of_fold]
        best = max(zip(inner, of_fold, strict=True), key=lambda one: (one[0]["accuracy"], -one[0]["log_loss"]))[1]
        expected |= held_out(plan, [best])[0]
    [table] = read_results(plan, [*runs, *rival_cells(plan, runs)], "val")
    (rival,) = [result for result in table.results if result.method == "rival"]
    assert dict(zip(table.paths, rival.correct[0].tolist(), strict=True)) == expected
    text = compare(plan, runs)
    assert re.search(r"^rival +none ", text, re.MULTILINE)
    assert re.search(r"rival, tiny, folds-3: chosen inside each fold: \w+ in \d", text)
    assert "Does it matter which?" in (plan.folder / "answers.md").read_text()
    with pytest.raises(UserError, match=r"small\.yaml: rival: it is chosen inside folds"):
        planned(project, **grid | {"regimes": ["full"]})
    with pytest.raises(UserError, match=r"small\.yaml: rival\.0: 'mlp' is not there; choose from: linear_probe"):
        planned(project, **grid | {"rival": ["mlp"]})


def test_a_fold_is_refitted_with_the_probe_that_its_first_fit_chose(project: Path) -> None:
    candidates = [
        {"method": "ridge", "settings": {"penalty": [1.0, 0.01, 1e-4]}},
        {"method": "linear_probe", "settings": {"l2": [10.0, 1.0, 0.1]}},
    ]
    few = {"method": "probes", "settings": {"features": ["global", "pooled"], "candidates": candidates}}
    plan = ran(project, **STUDY | {"methods": ["linear_probe"], "regimes": [FOLDS], "variants": {"few": few}})
    runs = [cell for cell in cells(plan, 0) if cell.method == "few"]
    assert len(runs) == 3
    for cell in runs:
        config = json.loads((plan.folder / cell.run / "config.json").read_text())
        [kept] = config["settings"]["candidates"]
        assert kept["method"] == config["chosen"]["probe"]
        [[knob, values]] = kept["settings"].items()
        assert values == [config["chosen"][knob]]
        assert {"moments/pooled"} <= {path.partition("tiny/")[2] for path in config["files"]}
    # A choice at an end is said by the knob of the probe that was chosen.
    notes = "\n".join(choices.choice_notes(plan, runs))
    assert re.search(r"chosen at an end of its grid, tiny, folds-3: few (l2|penalty) ", notes)


def test_test_stays_out_of_folds(project: Path) -> None:
    with pytest.raises(UserError, match=r"small\.yaml: declared_test: folds judge train and val, and test stays out"):
        planned(project, **STUDY | {"declared_test": True})


def test_choices_at_an_end_of_a_grid_and_saturated_classes_are_said(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = {"kind": "shots", "shots": 4}
    blocks = with_run("linear_probe", l2=[1e-7, 1e-6, 1e-5])
    grid = {"methods": ["linear_probe"], "controls": ["none"], "regimes": [FOLDS, shots]}
    plan = ran(project, blocks, **grid)
    text = compare(plan, cells(plan, 0))
    assert "chosen at an end of its grid, tiny, folds-3: linear_probe l2 " in text
    assert "chosen at an end of its grid, tiny, 4-shot: linear_probe l2 " in text
    (warning,) = [line for line in text.splitlines() if "development classes" in line]
    assert warning.startswith("warning: tiny, 4-shot: development classes tell little apart, linear_probe 100.0%; take")
    assert warning.endswith("`development`, a share of the classes or a file that names them")
    monkeypatch.setattr(choices, "SATURATED", 1.1)
    assert "development classes" not in compare(plan, cells(plan, 0))


@pytest.mark.slow
def test_a_share_of_the_classes_may_be_for_development(project: Path) -> None:
    sizes = {share: len(planned(project, development=share)[0].development) for share in (None, 0.2, 0.45)}
    assert sizes == {None: 2, 0.2: 2, 0.45: 4}
