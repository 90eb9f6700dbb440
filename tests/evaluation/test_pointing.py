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
    PLACE_RIVALS,
    RIVALS,
    WEIGHTS,
    Hits,
    Marked,
    PartWords,
    Placed,
    Ranked,
    best_patch,
    choose_weight,
    covers,
    directions,
    finest,
    judge_part,
    judge_parts,
    log_places,
    named_part,
    others,
    part_concepts,
    place_parts,
    rank_part,
    rank_parts,
    standard_terms,
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


# Place and concept.


def test_log_places_are_shares_of_training_hits_with_one_more_each() -> None:
    covered = np.array([[True, False, False], [True, True, False], [False, False, True]])
    patches = np.array([[True, True, True], [True, True, True], [True, True, False]])
    found = log_places(Marked(np.ones(3, bool), covered), patches)
    np.testing.assert_allclose(np.exp(found), np.array([3, 2, 1]) / 6)


def test_terms_have_mean_0_and_deviation_1_over_an_images_patches() -> None:
    rng = np.random.default_rng(0)
    vectors, direction = torch.from_numpy(rng.standard_normal((2, 5, 3))), torch.from_numpy(rng.standard_normal((2, 3)))
    patches = np.array([[True] * 5, [True, True, True, False, False]])
    found = standard_terms(direction, vectors, patches)
    for image in range(2):
        raw = [float(vectors[image, n] @ direction[image]) for n in range(5) if patches[image, n]]
        expected = (np.array(raw) - np.mean(raw)) / np.std(raw)
        np.testing.assert_allclose(found[image, patches[image]], expected)
    assert np.isneginf(found[~patches]).all()
    alike = standard_terms(direction, torch.ones(2, 5, 3).double(), patches)
    assert not alike[patches].any()


def ranked(places: np.ndarray, planted: bool, seed: int = 0, images: int = 300) -> dict[str, Ranked]:
    asked, vectors, marked = scene(images, planted, seed)
    patches = np.ones((images, N), bool)
    found = {name: rank_part(name, asked, vectors, patches, marked, places) for name in asked}
    return {name: one for name, one in found.items() if one is not None}


def test_a_ranking_is_place_plus_lam_times_the_concepts_term() -> None:
    """Against a loop over images, patches and lam."""
    asked, vectors, marked = scene(12, planted=False)
    rng = np.random.default_rng(1)
    places, patches = np.log(rng.dirichlet(np.ones(N))), rng.random((12, N)) < 0.8
    found = rank_part("bill", asked, vectors, patches, marked, places)
    assert found is not None
    terms = {part: standard_terms(asked[part], vectors, patches) for part in asked}
    for number, lam in enumerate(WEIGHTS):
        for image in range(12):
            for part, field in (("bill", found.own), ("tail", found.others)):
                mine = np.flatnonzero(patches[image])
                best = max(mine, key=lambda n, part=part, image=image, lam=lam: places[n] + lam * terms[part][image, n])
                assert field[number, image] == marked["bill"].covered[image, best]
    for image in range(12):
        best = max(np.flatnonzero(patches[image]), key=lambda n, image=image: terms["bill"][image, n])
        assert found.concepts[image] == marked["bill"].covered[image, best]


def test_concepts_that_point_are_weighed_in_and_noise_is_not() -> None:
    flat = np.log(np.full(N, 1 / N))
    placed, weights = place_parts(ranked(flat, planted=True, seed=1), ranked(flat, planted=True))
    assert weights is not None
    assert weights.own > 0
    assert weights.images == 300
    assert len(weights.hits) == len(WEIGHTS)
    for one in placed.values():
        assert one.own.min() == 1
        rivals = dict(zip(PLACE_RIVALS, one.rivals.mean(1), strict=True))
        assert rivals["concepts alone"] == 1
        assert rivals["place alone"] == pytest.approx(1 / N, abs=0.05)
        assert rivals["place and another part"] < 0.2

    def told(seed: int) -> dict[str, Ranked]:
        """The part is always in cell 4, and the concepts say nothing."""
        asked, vectors, marked = scene(300, planted=False, seed=seed)
        marked["bill"] = Marked(marked["bill"].seen, np.broadcast_to(np.arange(N) == 4, (300, N)))
        places = log_places(marked["bill"], np.ones((300, N), bool))
        found = rank_part("bill", asked, vectors, np.ones((300, N), bool), marked, places)
        assert found is not None
        return {"bill": found}

    placed, weights = place_parts(told(1), told(0))
    assert weights is not None
    assert weights.own == 0  # the smallest of those that hit best
    assert placed["bill"].own.min() == 1
    assert placed["bill"].rivals[0].min() == 1


def test_lam_is_chosen_on_other_images_over_all_parts() -> None:
    shape = (len(WEIGHTS), 2)
    a, b = np.zeros(shape), np.zeros(shape)
    a[3], b[5], a[5, 0] = 1, 1, 1
    none = np.zeros(2)
    choosing = {"bill": Ranked(np.arange(2), a, b, none), "tail": Ranked(np.arange(1, 3), b, a, none)}
    assert choose_weight(choosing, "own") == 5
    judged = {"bill": Ranked(np.array([7, 9]), b, a, none)}
    placed, weights = place_parts(choosing, judged)
    assert weights is not None
    assert (weights.own, weights.others, weights.images) == (WEIGHTS[5], WEIGHTS[5], 3)
    assert placed["bill"].own.tolist() == [1, 1]
    assert placed["bill"].rivals.tolist() == [[0, 0], [0, 0], [1, 0]]
    assert place_parts({}, judged) == ({}, None)


def placed_hits(cache: Cache, shift: int = 0) -> dict[str, Placed]:
    even = torch.arange(len(cache.part(Bank).kind)) % 2 == 0
    concepts = {"bill": even & cache.part(Bank).kept, "tail": ~even & cache.part(Bank).kept}
    norms = torch.ones(len(cache.paths), cache.part(Nodes).mask.shape[1] - 1)
    found = []
    for split in ("choose", "val"):
        images = cache.images(split)
        predicted = (torch.arange(len(images)) + shift) % len(cache.classes)
        found.append(rank_parts(cache, images, cache.images("train"), norms, concepts, part_points(cache), predicted))
    return place_parts(*found)[0]


def test_place_and_concept_read_no_true_label(cue: Cache) -> None:
    before = placed_hits(cue)
    y = cue.y.roll(7)
    assert not torch.equal(y, cue.y)
    after = placed_hits(replace(cue, y=y, target=y))
    assert before.keys() == after.keys() == {"bill", "tail"}
    for name, one in before.items():
        assert all(np.array_equal(a, b) for a, b in zip(one, after[name], strict=True))


def test_every_part_has_words_and_points() -> None:
    assert all(isinstance(part, PartWords) and part.words and part.points for part in PARTS.values())
    points = [point for part in PARTS.values() for point in part.points]
    assert len(points) == len(set(points))
