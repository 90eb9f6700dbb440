"""Pointing against planted answers: which concepts name a part, what a patch is, a patch that is the part, noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluation.pointing import (
    OTHERS,
    PARTS,
    RIVALS,
    Hits,
    Marked,
    PartWords,
    best_patch,
    covers,
    directions,
    finest,
    judge_part,
    judge_parts,
    named_part,
    others,
    part_concepts,
)
from tests.evaluation.scene import N, cells, judged, scene
from training.data import Cache
from training.data.bank import Bank
from training.data.nodes import Nodes

BIRD = {name: PARTS[name] for name in ("bill", "crown", "wing", "tail", "eye")}


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


@settings(max_examples=25)
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
    loud, bank = cue.part(Nodes).nodes.clone(), cue.part(Bank)
    loud[:, 0] = 100 * bank.K[bank.kept].mean(0).half()
    for changed in (replace(cue, y=y, target=y), cue.change(Nodes, nodes=loud)):
        after = part_hits(changed, predicted)
        assert before.keys() == after.keys() == {"bill", "tail"}
        assert all(same(before[name], after[name]) for name in before)
    other = part_hits(cue, predicted.roll(1))
    assert not all(same(before[name], other[name]) for name in before)  # the predicted class is read


def test_patches_count_by_their_norms(cue: Cache) -> None:
    predicted = torch.arange(len(cue.images("val"))) % len(cue.classes)
    norms = torch.rand(len(cue.paths), cue.part(Nodes).mask.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    plain, weighed, doubled = (part_hits(cue, predicted, norm) for norm in (None, norms, 2 * norms))
    assert all(same(weighed[name], doubled[name]) for name in weighed)
    assert not all(same(weighed[name], plain[name]) for name in weighed)


def test_every_part_has_words_and_points() -> None:
    assert all(isinstance(part, PartWords) and part.words and part.points for part in PARTS.values())
    points = [point for part in PARTS.values() for point in part.points]
    assert len(points) == len(set(points))
