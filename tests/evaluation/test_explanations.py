"""Explanations against planted answers: a patch that is the part, a patch that is the decision, and noise."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evaluation.explanations import (
    OTHERS,
    PARTS,
    RIVALS,
    TOP,
    Hits,
    Marked,
    Part,
    best_cell,
    best_patch,
    covers,
    decision_rows,
    directions,
    explain,
    finest,
    judge_decisions,
    judge_part,
    judge_parts,
    judged_patches,
    keep_nodes,
    named_part,
    others,
    part_concepts,
    part_rows,
    read_model,
    read_norms,
    top,
    with_verdicts,
)
from fieldmark.command import UserError
from fieldmark.params import load_params
from fieldmark.store import make_table, read_header, read_table, write_table
from tests.training.cache import ALL, ENCODER, Plan, write_cache
from tests.training.test_train import PARAMS
from training.data import Batch, Cache, read_cache
from training.data.bank import Bank
from training.data.nodes import Nodes
from training.loop import predict
from training.methods import Output, read_settings
from training.methods.concept_graph import class_anchors
from training.train import train

SIDE, N, D = 3, 9, 16
BIRD = {name: PARTS[name] for name in ("bill", "crown", "wing", "tail", "eye")}


def cells(images: int) -> np.ndarray:
    """(images, N, 4): the boxes of a 3 x 3 grid."""
    row, col = np.divmod(np.arange(N), SIDE)
    corner = np.stack([col, row], axis=1) / SIDE
    return np.broadcast_to(np.concatenate([corner, corner + 1 / SIDE], axis=1), (images, N, 4))


def scene(images: int, planted: bool, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, dict[str, Marked]]:
    """Directions, vectors and marks: bill and tail in two cells drawn anew for each image; noise unless `planted`."""
    rng = np.random.default_rng(seed)
    place = np.stack([rng.permutation(N)[:2] for _ in range(images)])
    vectors = torch.from_numpy(rng.standard_normal((images, N, D))).float()
    asked = {name: torch.eye(D)[number].expand(images, D) for number, name in enumerate(("bill", "tail"))}
    if planted:
        for number in (0, 1):
            vectors[torch.arange(images), torch.from_numpy(place[:, number]), number] = 9.0
    marked = {
        name: Marked(np.ones(images, bool), place[:, [number]] == np.arange(N)) for number, name in enumerate(asked)
    }
    return asked, vectors, marked


def judged(planted: bool, cell: int = 4) -> dict[str, Hits]:
    asked, vectors, marked = scene(400, planted)
    patches = np.ones((400, N), bool)
    found = {name: judge_part(name, asked, vectors, patches, marked, cell, seed=0) for name in asked}
    return {name: hits for name, hits in found.items() if hits is not None}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a bird with a long, pointed bill", "bill"),
        ("a bird with a Beak", "bill"),
        ("a bird with two white wing-bars", "wing"),
        ("a bird with a white eye-ring", "eye"),
        ("a bird with a black cap and a black bill", None),
        ("a bird with a black head and bill", None),
        ("a bird with a capped look", None),
        ("a bird with yellow underparts", None),
        ("a bird with bright plumage", None),
    ],
)
def test_a_text_names_one_part_by_whole_words(text: str, name: str | None) -> None:
    assert named_part(text, BIRD) == name


def test_markings_are_parts_only_where_the_data_mark_them() -> None:
    text = "a fish with stripes down its tail"
    assert named_part(text, {"tail": PARTS["tail"]}) == "tail"
    assert named_part(text, {"tail": PARTS["tail"], "stripes": PARTS["stripes"]}) is None


def test_concepts_are_kept_ones_and_parts_without_any_are_left_out() -> None:
    texts = ["a red bill", "a long bill", None, "a red tail"]
    found = part_concepts(texts, torch.tensor([True, False, True, False]), BIRD)
    assert {name: rows.tolist() for name, rows in found.items()} == {"bill": [True, False, False, False]}


def test_an_image_is_asked_with_what_its_predicted_class_owns_else_with_all() -> None:
    concepts = torch.eye(4)
    kept, chosen = torch.tensor([True, True, True, False]), torch.tensor([True, True, False, False])
    own = torch.tensor([[True, False], [False, False], [True, True], [True, True]])
    mean = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0])
    found = directions(concepts, kept, chosen, own, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.stack([torch.tensor([0.5, 0.5, 0, 0]), concepts[0]]) - mean)


def test_patches_are_the_finest_boxes_never_the_whole_picture() -> None:
    whole, quarter = [[0.0, 0, 1, 1]], [[0.0, 0, 0.5, 0.5]]
    boxes = torch.tensor([[*whole, *quarter, *cells(1)[0].tolist()]])
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, 4] = False
    assert finest(boxes, mask)[0].tolist() == [False, False, True, True, False, *[True] * 6]


def test_a_box_holds_any_of_the_parts_points() -> None:
    points = np.array([[[0.1, 0.5], [np.nan, np.nan]], [[0.1, 0.5], [0.9, 0.9]], [[np.nan] * 2] * 2])
    held = covers(cells(3), points)
    assert [np.flatnonzero(row).tolist() for row in held] == [[3], [3, 8], []]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99))
def test_other_images_are_never_the_image_itself(count: int, seed: int) -> None:
    found = list(others(count, seed))
    assert len(found) == min(OTHERS, count - 1)
    for other in found:
        assert sorted(other) == list(range(count))
        assert (other != np.arange(count)).all()
    assert all(len(set(column)) == len(found) for column in np.stack(found).T)


def test_a_planted_part_is_hit_and_rivals_are_not() -> None:
    for hits in judged(planted=True).values():
        assert hits.own.min() == 1
        rivals = dict(zip(RIVALS, hits.rivals.mean(1), strict=True))
        assert rivals["another part"] == 0
        assert rivals["another image"] == pytest.approx(1 / N, abs=0.03)
        assert rivals["best fixed place"] == pytest.approx(1 / N, abs=0.05)
        assert hits.random == pytest.approx(1 / N)
    rows = with_verdicts(part_rows(judged(planted=True), np.arange(400) % 20))
    assert [row.what for row in rows] == [*["bill"] * 3, *["tail"] * 3, *["all parts"] * 3]
    assert {row.verdict for row in rows} == {"won"}
    assert [row.difference for row in rows if row.rival == "another part"] == [1.0] * 3


def test_noise_shows_no_difference() -> None:
    rows = with_verdicts(part_rows(judged(planted=False), np.arange(400) % 20))
    assert {row.verdict for row in rows} == {"no difference shown"}
    assert all(row.over_images[0] <= row.difference <= row.over_images[1] for row in rows)


def test_a_fixed_place_that_is_better_is_said_to_win() -> None:
    asked, vectors, marked = scene(400, planted=False)
    marked["bill"] = Marked(marked["bill"].seen, np.broadcast_to(np.arange(N) == 5, (400, N)))
    cell = best_cell(marked["bill"], np.ones((400, N), bool))
    assert cell == 5
    hits = judge_part("bill", asked, vectors, np.ones((400, N), bool), marked, cell, seed=0)
    assert hits is not None
    verdicts = {row.rival: row.verdict for row in with_verdicts(part_rows({"bill": hits}, np.arange(400) % 20))}
    assert verdicts["best fixed place"] == "lost"


def test_only_images_that_show_the_part_and_another_are_judged() -> None:
    asked, vectors, marked = scene(4, planted=True)
    bill, tail = np.array([True, True, True, False]), np.array([True, True, False, True])
    marked = {
        "bill": Marked(bill, marked["bill"].covered & bill[:, None]),
        "tail": Marked(tail, marked["tail"].covered & tail[:, None]),
    }
    patches = np.ones((4, N), bool)
    hits = judge_part("bill", asked, vectors, patches, marked, 0, seed=0)
    assert hits is not None
    assert hits.images.tolist() == [0, 1]
    marked["tail"] = Marked(tail & (np.arange(4) == 0), marked["tail"].covered)
    assert judge_part("bill", asked, vectors, patches, marked, 0, seed=0) is None


def test_a_patch_is_chosen_among_patches_alone() -> None:
    vectors = torch.tensor([[[9.0], [1.0], [2.0]]])
    assert best_patch(torch.ones(1, 1), vectors, np.array([[True, True, True]])).tolist() == [0]
    assert best_patch(torch.ones(1, 1), vectors, np.array([[False, True, True]])).tolist() == [2]
    rank = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    patches = torch.tensor([[False, True, True, True, True]])
    assert top(rank, patches).tolist() == [[False, True, True, True, False]]
    few = torch.tensor([[False, True, False, False, False]])
    assert top(rank, few).tolist() == few.tolist()
    assert TOP == 3


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


@pytest.fixture
def cue(planted: Callable[[Plan], Cache]) -> Cache:
    """A class shows in one patch, and in nothing else."""
    return planted(Plan(cue="local", noise=0.3, val=40))


def ask(cache: Cache, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    images = cache.images("val")
    patches = torch.from_numpy(judged_patches(cache, images))
    norms = torch.rand(patches.shape, generator=torch.Generator().manual_seed(0))
    return images, patches, norms


def test_removing_the_planted_patch_flips_the_decision(cue: Cache) -> None:
    model = BestPatch(class_anchors(cue.bank))
    images, patches, norms = ask(cue, model)
    found = judge_decisions(model, cue, images, patches, norms, seed=0)
    assert found is not None
    for own in found.own.values():
        removed, kept = own.flip.mean(1)
        assert removed > 0.5
        assert kept < 0.05
    rows = with_verdicts(decision_rows(found, cue.y[images].numpy()))
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row.verdict for row in rows} == {"won"}


def test_where_patches_do_nothing_there_is_no_effect(cue: Cache) -> None:
    model = BestPatch(class_anchors(cue.bank), "global")
    images, patches, norms = ask(cue, model)
    found = judge_decisions(model, cue, images, patches, norms, seed=0)
    assert found is not None
    assert not found.alone.fall.any()
    rows = with_verdicts(decision_rows(found, cue.y[images].numpy()))
    assert {row.verdict for row in rows} == {"no difference shown"}


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


def part_points(cache: Cache) -> dict[str, np.ndarray]:
    points = np.random.default_rng(0).uniform(size=(2, len(cache.paths), 1, 2)).astype(np.float32)
    return dict(zip(("bill", "tail"), points, strict=True))


def part_hits(cache: Cache, predicted: Tensor, norms: Tensor | None = None) -> dict[str, Hits]:
    """Hits with the concepts of even and odd rows for those of two parts."""
    even = torch.arange(len(cache.part(Bank).kind)) % 2 == 0
    concepts = {"bill": even & cache.part(Bank).kept, "tail": ~even & cache.part(Bank).kept}
    norms = torch.ones(len(cache.paths), cache.part(Nodes).mask.shape[1] - 1) if norms is None else norms
    return judge_parts(cache, cache.images("val"), norms, concepts, part_points(cache), predicted, seed=0)


def same(a: Hits, b: Hits) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def test_choices_read_no_true_label_and_not_the_global_node(cue: Cache) -> None:
    val = cue.images("val")
    predicted = torch.arange(len(val)) % len(cue.classes)
    before = part_hits(cue, predicted)
    y = cue.y.clone()
    y[val] = y[val].roll(7)
    assert not torch.equal(y, cue.y)
    loud = cue.vectors.clone()
    loud[:, 0] = 100 * cue.bank.K[cue.bank.kept].mean(0).half()
    for changed in (replace(cue, y=y, target=y), replace(cue, vectors=loud)):
        after = part_hits(changed, predicted)
        assert before.keys() == after.keys() == {"bill", "tail"}
        assert all(same(before[name], after[name]) for name in before)
    other = part_hits(cue, predicted.roll(1))
    assert not all(same(before[name], other[name]) for name in before)  # the predicted class is read

    model = BestPatch(class_anchors(cue.bank))
    images, patches, norms = ask(cue, model)
    found, moved = (
        judge_decisions(model, cache, images, patches, norms, seed=0) for cache in (cue, replace(cue, y=y, target=y))
    )
    assert found is not None
    assert moved is not None
    assert all(np.array_equal(found.own[name].fall, moved.own[name].fall) for name in found.own)


def test_patches_count_by_their_norms(cue: Cache) -> None:
    predicted = torch.arange(len(cue.images("val"))) % len(cue.classes)
    norms = torch.rand(len(cue.paths), cue.mask.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    plain, weighed, doubled = (part_hits(cue, predicted, norm) for norm in (None, norms, 2 * norms))
    assert all(same(weighed[name], doubled[name]) for name in weighed)
    assert not all(same(weighed[name], plain[name]) for name in weighed)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A cache whose concepts name two parts, with points of both on every image."""
    data = tmp_path / "data"
    write_cache(data, Plan())
    path = data / f"bank/{ENCODER}.parquet"
    header, bank = read_header(path, "bank/1"), read_table(path, "bank/1")
    texts = [f"a {('bill', 'tail')[number % 2]} {number}" for number in range(bank.num_rows)]
    bank = bank.set_column(bank.schema.get_field_index("text"), "text", pa.array(texts))
    write_table(bank, path, "bank/1", header.params, header.fingerprint)
    paths = read_table(data / "index/images.parquet", "index.images/1")["path"].to_pylist()
    rng = np.random.default_rng(0)
    write_parts(data, [
        {"path": path, "part": name, "x": rng.uniform(), "y": rng.uniform(), "visible": True}
        for path in paths for name in ("beak", "tail")
    ])  # fmt: skip
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def write_parts(data: Path, rows: list[dict[str, object]]) -> None:
    write_table(make_table("index.parts/1", rows), data / "index/parts.parquet", "index.parts/1", {}, "mark")


def test_a_run_of_the_same_settings_is_judged_and_another_is_not(project: Path) -> None:
    path, data = project / "params.yaml", project / "data"
    train(load_params(path), str(path), "concept_graph", data)
    text = explain(load_params(path), str(path), "concept_graph", None, data)
    folder = data / f"explanations/concept_graph.{ENCODER}"
    content = json.loads((folder / "tables.json").read_text())
    assert (folder / "tables.txt").read_text() == text
    assert content["model"].startswith(f"of {data / 'runs/concept_graph'}")
    assert content["concepts"].keys() == content["random"].keys() - {"all parts"} == {"bill", "tail"}
    assert [len(content["rows"][name]) for name in ("parts", "decisions")] == [9, 24]
    assert all(row["images"] == content["images"] == 32 for row in content["rows"]["parts"])
    assert all(row["what"] in text for row in content["rows"]["parts"])

    cache, params = read_cache(data, ENCODER, 3, ALL), load_params(path)
    settings = read_settings(str(path), params, "concept_graph")
    model, which = read_model(data / "runs/concept_graph", "concept_graph", ENCODER, settings, cache, 3)
    assert which == content["model"]
    seed = json.loads((data / "runs/concept_graph/config.json").read_text())["model_seed"]
    run = read_table(data / "runs/concept_graph/predictions.parquet", "run.predictions/1")
    logits = torch.tensor(run.filter(pc.field("seed") == seed)["logits"].to_pylist())
    torch.testing.assert_close(predict(model, cache, torch.arange(len(cache.paths))), logits)

    path.write_text(PARAMS.replace("hidden: 16", "hidden: 8"))
    text = explain(load_params(path), str(path), "concept_graph", None, data)
    assert "model fitted here, seed 3" in text


def test_norms_stand_where_their_nodes_do(project: Path) -> None:
    cache = read_cache(project / "data", ENCODER, 3, ALL)
    norms = read_norms(project / "data", ENCODER, cache, 3)
    assert torch.equal(norms, cache.part(Nodes).mask[:: cache.views].float())  # all are 1


def test_what_cannot_be_judged_is_said_in_one_line(project: Path) -> None:
    path, data = project / "params.yaml", project / "data"
    with pytest.raises(UserError, match="zero_shot: gives no node scores"):
        explain(load_params(path), str(path), "zero_shot", None, data)
    with pytest.raises(UserError, match=r"train\.methods: has no knn"):
        explain(load_params(path), str(path), "knn", None, data)
    write_parts(data, [{"path": "train/a.png", "part": "antenna", "x": 0.5, "y": 0.5, "visible": True}])
    with pytest.raises(UserError, match=r"parts\.parquet: marks no part that .* knows"):
        explain(load_params(path), str(path), "concept_graph", None, data)


def test_every_part_has_words_and_points() -> None:
    assert all(isinstance(part, Part) and part.words and part.points for part in PARTS.values())
    points = [point for part in PARTS.values() for point in part.points]
    assert len(points) == len(set(points))
