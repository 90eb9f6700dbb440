"""Explanations against planted answers: a patch that is the part, a patch that is the decision, and noise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor, nn

from evaluation.explanations import (
    TOP,
    against_rivals,
    compare_decisions,
    compare_parts,
    judge_decisions,
    judge_explanations,
    read_model,
    read_norms,
    top,
    with_verdicts,
)
from evaluation.pointing import PLACE_RIVALS, WEIGHTS, Marked, best_cell, judge_part, judged_patches
from fieldmark.command import UserError
from fieldmark.params import load_params
from fieldmark.store import read_table
from tests.evaluation.scene import N, judged, name_concepts, scene, write_parts
from tests.training.cache import ALL, ENCODER, Plan, write_cache, write_other
from tests.training.test_train import PARAMS
from training.data import CPU, Batch, Cache, read_cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.explain import keep_nodes
from training.loop import predict
from training.methods import Output
from training.methods.cate import class_anchors
from training.train import plan_run, train


def test_a_planted_part_wins_against_every_rival() -> None:
    rows = with_verdicts(compare_parts(judged(planted=True), np.arange(400) % 20))
    assert [row.what for row in rows] == [*["bill"] * 3, *["tail"] * 3, *["all parts"] * 3]
    assert {row.verdict for row in rows} == {"won"}
    assert [row.difference for row in rows if row.rival == "another part"] == [1.0] * 3


def test_noise_shows_no_difference() -> None:
    rows = with_verdicts(compare_parts(judged(planted=False), np.arange(400) % 20))
    assert {row.verdict for row in rows} == {"no difference shown"}
    assert all(row.over_images[0] <= row.difference <= row.over_images[1] for row in rows)


def test_a_fixed_place_that_is_better_is_said_to_win() -> None:
    asked, vectors, marked = scene(400, planted=False)
    marked["bill"] = Marked(marked["bill"].seen, np.broadcast_to(np.arange(N) == 5, (400, N)))
    cell = best_cell(marked["bill"], np.ones((400, N), bool))
    assert cell == 5
    hits = judge_part("bill", asked, vectors, np.ones((400, N), bool), marked, cell, seed=0)
    assert hits is not None
    verdicts = {row.rival: row.verdict for row in with_verdicts(compare_parts({"bill": hits}, np.arange(400) % 20))}
    assert verdicts["best fixed place"] == "lost"


def test_top_patches_are_patches_alone() -> None:
    rank = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    patches = torch.tensor([[False, True, True, True, True]])
    assert top(rank, patches).tolist() == [[False, True, True, True, False]]
    few = torch.tensor([[False, True, False, False, False]])
    assert top(rank, few).tolist() == few.tolist()
    assert TOP == 3


def test_groups_of_alike_images_are_drawn_anew_as_wholes() -> None:
    """Each image thrice, in a group with itself: nothing is surer than with each image once."""
    rng = np.random.default_rng(0)
    own, theirs = (rng.random(60) < 0.6).astype(float), (rng.random((1, 60)) < 0.4).astype(float)
    once = against_rivals("part", ["rival"], own, theirs, np.arange(60), np.arange(60) % 20)
    thrice = own.repeat(3), theirs.repeat(3, axis=1), np.arange(180), np.arange(60).repeat(3) % 20
    (grouped,) = against_rivals("part", ["rival"], *thrice, groups=np.arange(60).repeat(3))
    (alone,) = against_rivals("part", ["rival"], *thrice)
    assert grouped.over_images == pytest.approx(once[0].over_images)
    assert grouped.p == pytest.approx(once[0].p)
    assert grouped.over_classes == alone.over_classes
    assert np.ptp(alone.over_images) < 0.7 * np.ptp(grouped.over_images)
    assert alone.p < grouped.p


class BestPatch(nn.Module):
    """Decides by the local node that is most like a class's concepts, and says so in its node scores."""

    def __init__(self, anchors: Tensor, bound: str = "local") -> None:
        super().__init__()
        self.anchors, self.bound = anchors, bound

    def forward(self, batch: Batch) -> Output:
        like = (batch.nodes @ self.anchors.T).masked_fill(~batch.mask[..., None], -1.0)  # (B, N+1, C)
        if self.bound == "global":
            return Output(like[:, 0], {}, batch.mask / batch.mask.sum(1, keepdim=True))
        scores = (20 * like.amax(-1)).masked_fill(torch.arange(like.shape[1]) == 0, -torch.inf).softmax(-1)
        return Output(20 * like[:, 1:].amax(1), {}, scores.where(batch.mask, 0.0))


def ask(cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What judge_decisions asks of val: its images, their boxes and patches, and norms that say nothing."""
    images = cache.images("val")
    box, patches = cache.part(Boxes).box[images * cache.views, 1:], torch.from_numpy(judged_patches(cache, images))
    return images, box, patches, torch.rand(patches.shape, generator=torch.Generator().manual_seed(0))


def test_removing_the_planted_patch_flips_the_decision(cue: Cache) -> None:
    model = BestPatch(class_anchors(cue.part(Bank)))
    asked = ask(cue)
    found = judge_decisions(model, cue, *asked, seed=0)
    assert found is not None
    for own in found.own.values():
        removed, kept = own.flip.mean(1)
        assert removed > 0.5
        assert kept < 0.05
    rows = with_verdicts(compare_decisions(found, cue.y[asked[0]].numpy()))
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row.verdict for row in rows} <= {"won", "won on these classes"}  # four classes say little of others


def test_where_patches_do_nothing_there_is_no_effect(cue: Cache) -> None:
    model = BestPatch(class_anchors(cue.part(Bank)), "global")
    asked = ask(cue)
    found = judge_decisions(model, cue, *asked, seed=0)
    assert found is not None
    assert not found.alone.fall.any()
    rows = with_verdicts(compare_decisions(found, cue.y[asked[0]].numpy()))
    assert {row.verdict for row in rows} == {"no difference shown"}


def test_decisions_read_no_true_label(cue: Cache) -> None:
    val = cue.images("val")
    y = cue.y.clone()
    y[val] = y[val].roll(7)
    assert not torch.equal(y, cue.y)
    model = BestPatch(class_anchors(cue.part(Bank)))
    found, moved = (judge_decisions(model, cache, *ask(cue), seed=0) for cache in (cue, replace(cue, y=y, target=y)))
    assert found is not None
    assert moved is not None
    assert all(np.array_equal(found.own[name].fall, moved.own[name].fall) for name in found.own)


def test_a_removed_node_is_as_one_that_was_never_there(cue: Cache) -> None:
    batch = cue.batch(cue.images("val")[:6])
    keep = batch.lm.clone()
    keep[:, 2] = False
    less = keep_nodes(batch, keep)
    assert less.mask[:, 0].all()
    assert torch.equal(less.lm, keep)
    for field in (less.nodes, less.concept_weight, less.adjacency, less.adjacency.transpose(1, 2), less.density):
        assert not field[:, 3].any()
        assert field[:, 1:3].any()
    assert torch.equal(keep_nodes(batch, batch.lm).adjacency, batch.adjacency)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A cache whose concepts name two parts, with points of both on every image."""
    data = tmp_path / "data"
    write_cache(data, Plan())
    name_concepts(data, "bill", "tail")
    rng = np.random.default_rng(0)
    write_parts(data, [
        {"path": path, "part": name, "x": rng.uniform(), "y": rng.uniform(), "visible": True}
        for path in read_table(data / "index/images.parquet", "index.images/1")["path"].to_pylist()
        for name in ("beak", "tail")
    ])  # fmt: skip
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def cache_of(project: Path) -> Cache:
    return read_cache(project / "data", ENCODER, 3, ALL)


def test_a_run_of_the_same_settings_is_judged_and_another_is_not(project: Path) -> None:
    path, data = project / "params.yaml", project / "data"
    train(load_params(path), str(path), "concept_graph", data)
    text = judge_explanations(load_params(path), str(path), "concept_graph", None, data)
    folder = data / f"explanations/concept_graph.{ENCODER}"
    content = json.loads((folder / "tables.json").read_text())
    assert (folder / "tables.txt").read_text() == text
    assert content["model"].startswith(f"of {data / 'runs/concept_graph'}")
    assert content["concepts"].keys() == content["random"].keys() - {"all parts"} == {"bill", "tail"}
    assert [len(content["rows"][name]) for name in ("parts", "places", "decisions")] == [9, 9, 24]
    assert all(row["images"] == content["images"] == 16 for row in content["rows"]["parts"])
    # One lam of all parts, chosen on the half of val that is not judged.
    weighed = content["place and concept"]
    assert weighed["own"] in WEIGHTS
    assert f"lam {weighed['own']:g}, " in text
    half = cache_of(project).images("choose").tolist()
    assert weighed["images"] == len(half) > 0
    assert [row["rival"] for row in content["rows"]["places"]] == [*PLACE_RIVALS] * 3
    assert all(row["images"] == 16 for row in content["rows"]["places"])
    assert all(row["what"] in text for row in content["rows"]["parts"])

    planned = plan_run(str(path), load_params(path), "concept_graph")
    cache = read_cache(data, ENCODER, 3, planned.reading.reads)
    model, which = read_model(data / "runs/concept_graph", planned, ENCODER, cache, 3, CPU)
    assert which == content["model"]
    seed = json.loads((data / "runs/concept_graph/config.json").read_text())["model_seed"]
    run = read_table(data / "runs/concept_graph/predictions.parquet", "run.predictions/1")
    logits = torch.tensor(run.filter(pc.field("seed") == seed)["logits"].to_pylist())
    torch.testing.assert_close(predict(model, cache, torch.arange(len(cache.paths))), logits)

    path.write_text(PARAMS.replace("hidden: 16", "hidden: 8"))
    text = judge_explanations(load_params(path), str(path), "concept_graph", None, data)
    assert "model fitted here, seed 3" in text


def test_a_run_on_several_encoders_is_judged_with_all_of_them(project: Path) -> None:
    path, data = project / "params.yaml", project / "data"
    encoders = "encoders: {tiny: {model: none}, wide: {model: none}}"
    several = "{method: concept_graph, encoder: tiny, also: [wide], settings: {epochs: 1, hidden: 16}}"
    path.write_text(PARAMS.replace("encoders: {tiny: {model: none}}", encoders) + f"    both: {several}\n")
    write_other(data, "wide", 12)
    train(load_params(path), str(path), "both", data)
    judge_explanations(load_params(path), str(path), "both", None, data)
    content = json.loads((data / f"explanations/both.{ENCODER}/tables.json").read_text())
    assert content["model"].startswith(f"of {data / 'runs/both'}")
    assert "embed/wide/images" in content["fingerprints"]
    # A node that is removed is gone from every encoder.
    cache = read_cache(data, ENCODER, 3, {"nodes"}, ["wide"], {"nodes"})
    batch = cache.batch(cache.images("val")[:6])
    (other,) = keep_nodes(batch, torch.zeros_like(batch.lm)).also
    assert other.nodes[:, 0].any(1).all()
    assert not other.nodes[:, 1:].any()
    assert not other.mask[:, 1:].any()


def test_norms_stand_where_their_nodes_do(project: Path) -> None:
    cache = read_cache(project / "data", ENCODER, 3, ALL)
    norms = read_norms(project / "data", ENCODER, cache, 3)
    assert torch.equal(norms, cache.part(Nodes).mask[:: cache.views].float())  # all are 1


def test_what_cannot_be_judged_is_said_in_one_line(project: Path) -> None:
    path, data = project / "params.yaml", project / "data"
    with pytest.raises(UserError, match="zero_shot: gives no node scores"):
        judge_explanations(load_params(path), str(path), "zero_shot", None, data)
    with pytest.raises(UserError, match=r"train\.runs: has no knn"):
        judge_explanations(load_params(path), str(path), "knn", None, data)
    write_parts(data, [{"path": "train/a.png", "part": "antenna", "x": 0.5, "y": 0.5, "visible": True}])
    with pytest.raises(UserError, match=r"parts\.parquet: marks no part that .* knows"):
        judge_explanations(load_params(path), str(path), "concept_graph", None, data)
