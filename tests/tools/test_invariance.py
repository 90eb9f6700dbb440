"""Changed pictures pass the pipeline's own encoding, and every run is asked about them."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.invariance import Images
from evaluation.runs import read_run
from fieldmark.command import UserError
from fieldmark.params import load_params
from fieldmark.pictures.transforms import UNCHANGED, Transform, transformed
from tests.tools.conftest import RUNS, Write, run_module
from tools import invariance
from tools.prediction.features import Features
from tools.prediction.pictures import Picture, Question, look
from training.data import CPU, Batch
from training.methods import Output

FEW = [Transform("shift 20 %", shift=0.2), Transform("rotate 90", degrees=90), Transform("darken 0.5", light=0.5)]


@pytest.fixture
def copied(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, the working directory from now on."""
    shutil.copytree(asked, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "transform", [*FEW, Transform("crop", crop=0.75), Transform("in place", degrees=20, in_place=True), UNCHANGED],
    ids=lambda each: each.name,
)  # fmt: skip
def test_a_changed_picture_is_shown_as_if_it_were_a_file(transform: Transform, asked: Path, tmp_path: Path) -> None:
    features = Features(load_params(), {"vit": frozenset({"nodes", "boxes"})}, {}, ["a", "b", "c"], CPU)
    source = next(Path("images/test").rglob("*.png"))

    def views(folder: Path, name: str, transform: Transform) -> tuple[torch.Tensor, list[object]]:
        question = Question(folder, [Picture(name)])
        [found] = look(question, (), partial(features.prepare, transform=transform), 1)
        [[view]] = found.views
        return view.pixels, list(view.boxes)

    [before] = look(Question(Path(), [Picture(str(source))]), (), features.prepare, 1)
    with Image.open(source) as picture:
        transformed(picture.convert("RGB"), transform, before.image_id).save(tmp_path / "changed.png")
    pixels, boxes = views(Path(), str(source), transform)
    expected, same = views(tmp_path, "changed.png", UNCHANGED)
    assert torch.equal(pixels, expected)
    assert boxes == same


class LooksAtAPlace(nn.Module):
    """A planted method: it counts a patch by how far left it is, and says the first class of everything."""

    def forward(self, batch: Batch) -> Output:
        left = 1 - batch.box[..., 0]
        scores = torch.cat([torch.zeros_like(left[:, :1]), left], dim=1)
        return Output(torch.eye(3)[torch.zeros(len(left), dtype=torch.long)], {}, scores)


def test_a_method_that_looks_at_a_place_is_found_out(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariance, "TRANSFORMS", [Transform("flip", flip=True), Transform("darken", light=0.5)])
    params = load_params()
    [(restored, run)] = invariance.choose_runs(params, "params.yaml", ["attention_pool"])
    planted = replace(restored, model=LooksAtAPlace(), reads=restored.reads | {"boxes"})
    judged = invariance.choose_pictures([run], None)
    features = Features(params, invariance.what_is_read(params, [planted]), {}, planted.classes, CPU)
    kept = invariance.Asking(params, judged, [planted], features, CPU).collect()
    unchanged, flip, dark = invariance.rows_of(kept, judged, [run])
    assert flip.scores["follow"] == flip.scores["other"] == pytest.approx(-1)
    assert flip.scores["stay"] == pytest.approx(1)
    assert flip.scores["off_if_still"] == pytest.approx(0, abs=1e-6)
    assert dark.scores["follow"] == dark.scores["stay"] == pytest.approx(1)
    assert flip.same == dark.same == 1
    assert unchanged.accuracy == float((judged.images.y == 0).mean())


def test_only_the_half_of_val_that_chose_nothing_is_judged(asked: Path) -> None:
    run = read_run(Path("data"), "attention_pool", "vit")
    judged = invariance.choose_pictures([run], None)  # type: ignore[list-item]
    val = {path for path, split in zip(run.paths, run.split, strict=True) if split == "val"}  # type: ignore[union-attr]
    assert {picture.path for picture in judged.pictures} == val
    fewer = invariance.choose_pictures([run], 2)  # type: ignore[list-item]
    assert fewer.image_ids == [each for each in judged.image_ids if each in sorted(judged.image_ids)[:2]]


def test_boxes_of_objects_and_places_of_patches_move_with_their_pictures() -> None:
    ids, images = ["a", "b"], Images(np.zeros(2, int), None, by_class=False)
    pictures = [Picture("1.png", box=[0.1, 0.2, 0.4, 0.6]), Picture("2.png")]
    judged = invariance.Judged(pictures, ids, [(40, 20)] * 2, images)
    flip, places = Transform("flip", flip=True), np.array([[[0.25, 0.5]], [[0.75, 0.1]]])
    moved = judged.some(slice(0, 2), flip)
    assert moved[0].box == pytest.approx([0.6, 0.2, 0.9, 0.6])
    assert moved[1] == pictures[1]
    assert judged.origins(slice(0, 2), flip, places).tolist() == [[[0.75, 0.5]], [[0.25, 0.1]]]
    # What stays in place, and what loses light, lies where it was.
    for transform in (Transform("shift", shift=0.2, in_place=True), Transform("darken", light=0.5)):
        assert judged.some(slice(0, 2), transform) == pictures


def test_a_run_whose_parts_cannot_be_made_is_refused_or_passed_over(
    write_other: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    params = write_other(labels={"density": "pixel"})
    with pytest.raises(UserError, match=r"concept_graph: labels\.density pixel reads stored thumbnails"):
        invariance.choose_runs(params, "other.yaml", ["concept_graph"])
    left = [restored.name for restored, _ in invariance.choose_runs(params, "other.yaml", [])]
    assert left == [name for name in RUNS if name != "concept_graph"]
    assert capsys.readouterr().err.startswith("concept_graph is passed over: concept_graph: labels.density pixel")


def test_the_command_writes_tables_and_answers(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "TRANSFORMS", FEW)
    runs = ["linear_probe", "concept_graph", "two_encoders"]
    run_module("tools.invariance", *(each for name in runs for each in ("--run", name)), "--images", "3")
    said, folder = capsys.readouterr().out, Path("data/studies/invariance")
    assert said == (folder / "tables.txt").read_text()
    assert "--images 3, code" in said.splitlines()[0]
    content = json.loads((folder / "tables.json").read_text())
    assert [(row["run"], row["transform"]) for row in content["runs"]] == [
        (name, transform.name) for name in runs for transform in (UNCHANGED, *FEW)
    ]
    # Unchanged, each run says what it said when it was trained.
    assert {row["same"] for row in content["runs"] if row["transform"] == "unchanged"} == {1}
    assert all((row["lost"] is not None) == row["transform"].startswith("shift") for row in content["runs"])
    assert all(bool(row["scores"]) == (row["run"] == "concept_graph" and row["transform"] != "unchanged")
               for row in content["runs"])  # fmt: skip
    turned = [row for row in content["rings"] if row["transform"].startswith("boxes turned")]
    assert [row["rings"] for row in turned] == pytest.approx([0] * 4, abs=1e-3)
    assert {row["transform"] for row in content["rings"]} > {transform.name for transform in FEW}
    page = (folder / "answers.md").read_text()
    assert all(f"\n## {name}\n" in page for name in [*runs, "Circles or sectors: labels of vit"])


@pytest.mark.slow
def test_all_runs_under_all_transforms(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers are those of the run itself for pictures as they are, and the same in chunks of any size."""
    run_module("tools.invariance")
    whole = json.loads(Path("data/studies/invariance/tables.json").read_text())
    names = [each.name for each in invariance.TRANSFORMS]
    assert len({row["run"] for row in whole["runs"]}) * (1 + len(names)) == len(whole["runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.predict.CHUNK", 4)
        run_module("tools.invariance")
    again = json.loads(Path("data/studies/invariance/tables.json").read_text())
    for one, other in zip(whole["runs"], again["runs"], strict=True):
        assert (one["accuracy"], one["same"]) == (other["accuracy"], other["same"])
    for one, other in zip(whole["rings"], again["rings"], strict=True):
        assert np.isclose(one["rings"], other["rings"], atol=1e-2)
