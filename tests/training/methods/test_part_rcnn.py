"""A root and its parts among nodes, against going through every choice."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.training.cache import Plan
from tests.training.methods.test_universal import quick, shake
from training.data import Batch, Cache
from training.data.parts import ObjectParts
from training.layers.blocks import Standardise
from training.layers.boxes import overlap
from training.loop import predict
from training.methods import NotPossible
from training.methods.part_rcnn import (
    COLDEST,
    SLACK,
    SMALLEST,
    Geometry,
    PartRCNN,
    Settings,
    detection,
    marked_boxes,
    marked_geometry,
    node_boxes,
    offsets,
)
from training.token_heads import Beside

IMAGES, NODES, PARTS, WIDTH = 6, 5, 2, 8
ALPHA = 0.7


def made(temperature: float = 1.0) -> PartRCNN:
    torch.manual_seed(0)
    geometry = Geometry(torch.randn(PARTS, 2) / 4, torch.rand(PARTS, 2) + 0.2, trained=True)
    settings = Settings(geometry=ALPHA, temperature=temperature, epochs=11)
    return PartRCNN(Standardise(torch.randn(20, WIDTH)), geometry, Beside(None), 3, settings)


def boxes(seed: int = 0) -> Tensor:
    """(IMAGES, NODES, 4), the first of each the whole picture, the others of a third of its sides."""
    low = 0.66 * torch.rand(IMAGES, NODES, 2, generator=torch.Generator().manual_seed(seed))
    box = torch.cat([low, low + 0.34], dim=2)
    box[:, 0] = torch.tensor([0.0, 0, 1, 1])
    return box


def masks() -> Tensor:
    mask = torch.ones(IMAGES, NODES, dtype=torch.bool)
    mask[::2, -2:] = False
    return mask


def worth(head: PartRCNN, scores: Tensor, box: Tensor, chosen: tuple[int, ...]) -> float | None:
    """The log of the product that a choice maximises, of one image; None where a part is not in the root."""
    score = scores.detach().sigmoid()
    root, total = box[chosen[0]], math.log(score[chosen[0], 0])
    for part, node in enumerate(chosen[1:]):
        centre = (box[node, :2] + box[node, 2:]) / 2
        if any(not root[side] - SLACK <= centre[side] <= root[2 + side] + SLACK for side in (0, 1)):
            return None
        total += math.log(score[node, 1 + part])
        for side in (0, 1):
            place = (centre[side] - (root[side] + root[2 + side]) / 2) / (root[2 + side] - root[side])
            spread = 0.5 * head.geometry.log_spread[part, side].exp()
            total -= ALPHA / 2 * ((place - head.geometry.mean[part, side]) / spread).item() ** 2
    return total


def every_choice(head: PartRCNN, scores: Tensor, box: Tensor, mask: Tensor) -> dict[tuple[int, ...], float]:
    nodes = mask.nonzero().flatten().tolist()
    found = {chosen: worth(head, scores, box, chosen) for chosen in itertools.product(nodes, repeat=1 + PARTS)}
    return {chosen: value for chosen, value in found.items() if value is not None}


def test_the_best_choice_is_found_and_none_has_a_part_outside_its_root() -> None:
    head, box, mask = made().eval(), boxes(), masks()
    scores = 2 * torch.randn(IMAGES, NODES, 1 + PARTS, generator=torch.Generator().manual_seed(1))
    scores[:, 0, 0] -= 3  # roots that do not hold everything
    weight = head.weigh(scores, box, mask)
    assert torch.equal(weight.sum(1), torch.ones(IMAGES, 1 + PARTS))
    roots = set()
    for image in range(IMAGES):
        choices = every_choice(head, scores[image], box[image], mask[image])
        chosen = tuple(weight[image].argmax(0).tolist())
        assert chosen == max(choices, key=choices.__getitem__)
        roots.add(chosen[0])
    assert len(roots) > 1


def test_a_perfect_part_outside_the_root_is_left_out() -> None:
    head = made().eval()
    box = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0.4, 0.4], [0.1, 0.1, 0.3, 0.3], [0.7, 0.7, 0.9, 0.9]]])
    scores = torch.full((1, 4, 1 + PARTS), -5.0)
    scores[0, 1, 0] = 200.0  # the root is node 1, whatever the parts
    scores[0, :, 0] -= 100.0
    scores[0, 3, 1:] = 20.0
    assert head.weigh(scores, box, torch.ones(1, 4, dtype=torch.bool))[0, 1, 0] == 1
    assert head.weigh(scores, box, torch.ones(1, 4, dtype=torch.bool))[0, 3, 1:].sum() == 0
    scores[0, :, 0] = 0.0  # the whole picture holds it
    assert head.weigh(scores, box, torch.ones(1, 4, dtype=torch.bool))[0, 3, 1:].sum() == PARTS


def test_in_training_nodes_weigh_what_all_choices_say_of_them() -> None:
    head, box, mask = made(temperature=0.8).train(), boxes(), masks()
    scores = torch.randn(IMAGES, NODES, 1 + PARTS, generator=torch.Generator().manual_seed(1))
    assert head.temperature == 0.8
    weight = head.weigh(scores, box, mask)
    for image in range(IMAGES):
        choices = every_choice(head, scores[image], box[image], mask[image])
        shares = torch.tensor(list(choices.values())).div(0.8).softmax(0)
        expected = torch.zeros(NODES, 1 + PARTS)
        for chosen, share in zip(choices, shares, strict=True):
            expected[chosen, range(1 + PARTS)] += share
        torch.testing.assert_close(weight[image], expected)
    cold = made(temperature=1e-3).train().weigh(scores, box, mask)
    torch.testing.assert_close(cold, head.eval().weigh(scores, box, mask), atol=0.02, rtol=0.0)


def test_the_temperature_falls_to_a_tenth_by_the_last_epoch() -> None:
    head, seen = made(), []
    for _ in range(12):
        head.train()
        seen.append(head.temperature)
        head.eval()
    assert seen[0] == 1.0
    torch.testing.assert_close(seen[5], COLDEST**0.5)
    torch.testing.assert_close(seen[10:], [COLDEST, COLDEST])


def test_the_picture_and_the_nodes_of_the_choice_make_the_logits() -> None:
    head = made().eval()
    shake(head)
    torch.manual_seed(2)
    nodes, box, mask = torch.randn(IMAGES, NODES, WIDTH), boxes(), masks()
    y = torch.zeros(IMAGES, dtype=torch.long)
    output = head(Batch(y, y, {"nodes": nodes, "mask": mask, "box": box[:, 1:]}))
    for image in range(IMAGES):
        x = head.scale(nodes[image])
        choices = every_choice(head, head.detect(x), box[image], mask[image])
        best = max(choices, key=choices.__getitem__)
        expected = head.classify(torch.cat([x[0], *(x[node] for node in best)]))
        torch.testing.assert_close(output.logits[image], expected)
        counted = [best.count(node) / (1 + PARTS) for node in range(NODES)]
        torch.testing.assert_close(output.node_scores[image], torch.tensor(counted))


def test_a_point_counts_as_a_square_and_the_root_holds_what_is_seen() -> None:
    part_box = torch.tensor([[[0.1, 0.2, 0.5, 0.8], [0.6, 0.5, 0.6, 0.5], [0, 0, 0, 0]], [[0.0] * 4] * 3])
    seen = torch.tensor([[True, True, False], [False] * 3])
    marked, told = marked_boxes(part_box, seen)
    assert told.tolist() == [[True, True, True, False], [False] * 4]
    half = SMALLEST / 2
    torch.testing.assert_close(marked[0, 2], torch.tensor([0.6 - half, 0.5 - half, 0.6 + half, 0.5 + half]))
    torch.testing.assert_close(marked[0, 0], torch.tensor([0.1, 0.2, 0.7, 0.8]))
    assert torch.isfinite(marked).all()


def test_detectors_are_told_of_nodes_that_overlap_what_is_marked() -> None:
    overlaps = torch.tensor(
        [[[0.2, 0.75, 0.8, 0.95], [0.1, 0.5, 0.3, 0.9], [0.0, 0.0, 0.0, 0.9], [0.9, 0.1, 0.1, 0.1]]]
    )
    seen = torch.tensor([[True, True, True, False]])  # the third overlaps no node that exists, the fourth is not seen
    mask = torch.tensor([[True, True, True, False]])
    scores = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = []
    for box, shows in ((0, [1, 2]), (1, [1])):
        right = [-math.log(torch.sigmoid(scores[0, node, box])) for node in shows]
        wrong = [-math.log(torch.sigmoid(-scores[0, node, box])) for node in range(3) if node not in shows]
        expected.append((sum(right) / len(right) + sum(wrong) / len(wrong)) / 2)
    torch.testing.assert_close(detection(scores, overlaps, seen, mask), torch.tensor(sum(expected) / 2))


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(cue="local", train=40, val=15, test=40))


STRONG = {"mode": "strong", "lr": [1e-2], "epochs": 20}


def test_gaussians_are_of_where_the_parts_of_training_images_lie(cache: Cache) -> None:
    batch = cache.batch(cache.images("train"))
    box, (marked, seen) = node_boxes(batch), marked_boxes(batch.part_box, batch.part_seen)
    places: list[list[Tensor]] = [[], []]
    for image in range(len(box)):
        existing = box[image][batch.mask[image]]
        root = existing[overlap(marked[image : image + 1, :1], existing[None])[0, 0].argmax()]
        for part in (0, 1):
            if seen[image, 1 + part]:
                middle = (marked[image, 1 + part, :2] + marked[image, 1 + part, 2:]) / 2
                places[part].append(offsets(middle, root))
    geometry = marked_geometry(cache)
    for part, found in enumerate(places):
        assert len(found) < len(box) or part == 0
        torch.testing.assert_close(geometry.mean[part], torch.stack(found).mean(0), atol=1e-4, rtol=1e-4)
        spread = torch.stack(found).std(0, correction=0).clamp(min=0.05)
        torch.testing.assert_close(0.5 * geometry.log_spread[part].exp(), spread, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_marks_of_training_images_alone_are_looked_at(cache: Cache) -> None:
    """Others marked anew change no logit, and at evaluation none need be there."""
    images, parts = torch.arange(len(cache.paths)), cache.part(ObjectParts)
    fitted = quick("part_rcnn", cache, **STRONG)
    said = predict(fitted.model, cache, images)
    noise = torch.rand(parts.part_box.shape, generator=torch.Generator().manual_seed(0))
    for split in ("train", "val", "choose", "test"):
        changed = parts.part_box.clone()
        changed[cache.images(split)] = noise[cache.images(split)]
        other = quick("part_rcnn", cache.change(ObjectParts, part_box=changed), **STRONG)
        assert torch.equal(predict(other.model, cache, images), said) == (split != "train"), split
    blind = cache.only({"nodes", "boxes"})
    assert torch.equal(predict(fitted.model, blind, images), said)


def test_detectors_find_what_is_marked_in_images_that_they_never_saw(cache: Cache) -> None:
    fitted = quick("part_rcnn", cache, **STRONG, loss_weights={"detectors": 5.0})
    batch = cache.batch(cache.images("test"))
    found = fitted.model.detect(fitted.model.scale(batch.nodes))[..., 1].masked_fill(~batch.mask, -torch.inf).argmax(1)
    marked = overlap(batch.part_box[:, :1], node_boxes(batch)).squeeze(1).argmax(1)
    assert (found == marked).float().mean() > 0.5  # of nine nodes


def test_strong_needs_marks(cache: Cache) -> None:
    parts = cache.part(ObjectParts)
    for part_box, part_seen in (
        (parts.part_box[:, :0], parts.part_seen[:, :0]),
        (parts.part_box, torch.zeros_like(parts.part_seen)),
    ):
        with pytest.raises(NotPossible, match=r"marks no part of a training image; take mode: weak"):
            quick("part_rcnn", cache.with_part(ObjectParts(part_box, part_seen)), mode="strong")


def test_a_part_that_no_training_image_shows_is_anywhere(cache: Cache) -> None:
    seen = cache.part(ObjectParts).part_seen.clone()
    seen[cache.images("train"), 1] = False
    geometry = marked_geometry(cache.change(ObjectParts, part_seen=seen))
    assert geometry.mean[1].tolist() == [0, 0]
    assert geometry.log_spread[1].tolist() == [0, 0]
