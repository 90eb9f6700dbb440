"""Who may send, and what reaches a batch: against plain loops over the table."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.cache import Plan
from training.data import Cache
from training.data.links import Links
from training.layers.states import state_of
from training.links import LinkSettings, Memory, senders

Planted = Callable[[Plan], Cache]


@pytest.fixture
def cache(planted: Planted) -> Cache:
    return planted(Plan(classes=3, train=6, val=4, test=3))


def heard(cache: Cache, image: int, allowed: set[int], most: int | None) -> list[tuple[int, float]]:
    """Who sends to an image, and the weight, the nearest first, by a loop."""
    part = cache.part(Links)
    start, source, weight = part.incoming["near"]
    position = {key: place for place, key in enumerate(part.key.tolist())}
    found = []
    for edge in range(int(start[image]), int(start[image + 1])):
        sender = position.get(int(source[edge]))
        if sender is not None and sender != image and sender in allowed:
            found.append((sender, float(weight[edge])))
    return found[:most]


@pytest.mark.parametrize("sources", ["train", "all"])
@pytest.mark.parametrize("neighbours", [1, 3, None])
def test_an_image_hears_the_nearest_that_may_send(cache: Cache, sources: str, neighbours: int | None) -> None:
    settings = LinkSettings(sources=sources, neighbours=neighbours)
    memory, sending = Memory.of(cache, settings), senders(cache, settings)
    images = torch.tensor([5, 0, 17, 38, 1])
    row, place, weight = memory.entering(cache.batch(images))
    for number, image in enumerate(images.tolist()):
        mine = place == number
        wanted = heard(cache, image, set(sending.tolist()), neighbours)
        assert list(zip(sending[row[mine]].tolist(), weight[mine].tolist(), strict=True)) == wanted
    assert any(heard(cache, image, set(sending.tolist()), neighbours) for image in images.tolist())


def test_only_training_images_send_unless_all_may(cache: Cache) -> None:
    assert set(senders(cache, LinkSettings()).tolist()) == set(cache.images("train").tolist())
    assert len(senders(cache, LinkSettings(sources="all"))) == len(cache.paths)


def reach(cache: Cache, settings: LinkSettings, images: Tensor, hops: int) -> list[set[int]]:
    """Positions that are exactly so many steps away from a batch, where a batch is not of the memory."""
    allowed, seen, found, frontier = set(senders(cache, settings).tolist()), set[int](), [], set(images.tolist())
    for _ in range(hops):
        frontier = {sender for image in frontier for sender, _ in heard(cache, image, allowed, settings.neighbours)}
        frontier -= seen
        seen |= frontier
        found.append(frontier)
    return found


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_around_a_batch_is_what_reaches_it(cache: Cache, hops: int) -> None:
    settings = LinkSettings(neighbours=2)
    memory, sending, images = Memory.of(cache, settings), senders(cache, settings), torch.tensor([20, 33, 2])
    around = memory.around(cache.batch(images), hops)
    bounds = list(zip(around.nodes, around.nodes[1:], strict=False))
    layers = [set(sending[around.rows[a - 3 : b - 3]].tolist()) for a, b in bounds]
    assert layers == reach(cache, settings, images, hops)
    position = [*images.tolist(), *sending[around.rows].tolist()]
    edges = around.edges_in.T.tolist()
    wanted = {
        receiver: [sender for sender, _ in heard(cache, position[receiver], set(sending.tolist()), 2)]
        for receiver in range(around.nodes[hops - 1])
    }
    got = {receiver: [position[sender] for sender, to in edges if to == receiver] for receiver in wanted}
    assert got == wanted
    for step in range(hops):
        assert all(to < around.nodes[step] for _, to in edges[: around.edges[step]])
        assert all(to >= around.nodes[step] for _, to in edges[around.edges[step] :])


def test_what_a_cache_lost_sends_nothing_and_the_others_are_found_again(cache: Cache) -> None:
    settings = LinkSettings(sources="train")
    memory = Memory.of(cache, settings)
    few = cache.take(torch.arange(len(cache.paths)).flip(0)[::2])
    image = int(few.images("test")[0])
    row, _, weight = memory.entering(few.batch(torch.tensor([image])))
    before = cache.paths.index(few.paths[image])
    wanted, _, weights = memory.entering(cache.batch(torch.tensor([before])))
    assert len(row)
    assert torch.equal(row, wanted)
    assert torch.equal(weight, weights)
    smaller = Memory.of(few, settings)
    assert set(smaller.key.tolist()) < set(memory.key.tolist())


def test_no_label_and_no_split_but_train_changes_what_is_heard(cache: Cache) -> None:
    settings = LinkSettings()
    others = replace(cache, split=np.where(cache.split == "test", "unused", cache.split), y=cache.y.flip(0))
    for one, other in zip(Memory.of(cache, settings).buffers(), Memory.of(others, settings).buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_memory_comes_back_from_its_state(cache: Cache) -> None:
    settings = LinkSettings(sources="all", neighbours=2)
    memory = Memory.of(cache, settings)
    again, batch = Memory.from_state(state_of(memory), settings), cache.batch(torch.arange(9))
    for one, other in zip(memory.entering(batch), again.entering(batch), strict=True):
        assert torch.equal(one, other)


def test_a_fit_without_training_images_hears_nobody(cache: Cache) -> None:
    none = replace(cache, split=np.full_like(cache.split, "unused"))
    memory = Memory.of(none, LinkSettings())
    around = memory.around(none.batch(torch.arange(4)), 2)
    assert (around.nodes, around.edges) == ([4, 4, 4], [0, 0])
