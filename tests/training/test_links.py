"""Who may send, and what reaches a batch: against plain loops over the table."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fieldmark.command import UserError, say_once
from fieldmark.links import said_of
from fieldmark.store import read_table, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training.data import Cache, read_cache
from training.data.links import Links
from training.layers.states import state_of
from training.links import LinkSettings, Memory, sample, senders

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


def test_a_layer_passes_what_is_needed_of_a_batch(cache: Cache) -> None:
    settings = LinkSettings(neighbours=2)
    around = Memory.of(cache, settings).around(cache.batch(torch.tensor([20, 33, 2])), 3)
    hops = around.hops()
    assert [hop.count for hop in hops] == around.nodes[2::-1]
    for hop, senders_there in zip(hops, around.nodes[:0:-1], strict=True):
        assert len(hop.degree) == senders_there
        assert (hop.receiver.diff() >= 0).all()
        assert torch.equal(torch.bincount(hop.receiver, minlength=hop.count), hop.start.diff())
        whole = torch.zeros(hop.count).index_add_(0, hop.receiver, hop.weight)
        torch.testing.assert_close(hop.degree[: hop.count], whole)


def test_images_of_the_memory_stand_once_where_they_may(cache: Cache) -> None:
    settings, train = LinkSettings(), cache.images("train")
    memory = Memory.of(cache, settings)
    once = memory.around(cache.batch(train), 2, own=True)
    assert once.nodes == [len(train)] * 3
    first, second = once.hops()
    assert first is second
    assert memory.around(cache.batch(train), 2).nodes[1] > len(train)
    # One that is not of the memory, and none sends from the batch.
    mixed = cache.batch(torch.tensor([int(train[0]), int(cache.images("test")[0])]))
    for one, other in zip(memory.around(mixed, 2, own=True), memory.around(mixed, 2), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_full_fanout_is_all_of_it_bit_for_bit(cache: Cache) -> None:
    memory, batch = Memory.of(cache, LinkSettings(neighbours=4)), cache.batch(torch.tensor([20, 33, 2]))
    before = torch.get_rng_state()
    for one, other in zip(memory.around(batch, 3, fanout=4), memory.around(batch, 3), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(torch.get_rng_state(), before)


def test_at_most_fanout_links_are_drawn_each_as_often_and_sums_are_right_in_the_mean() -> None:
    torch.manual_seed(0)
    receiver = torch.tensor([0] * 5 + [2] * 2 + [3] * 7)
    source, weight = torch.arange(14) + 100, torch.rand(14)
    expected, draws = torch.zeros(4).index_add_(0, receiver, weight), 4000
    total, taken = torch.zeros(4), torch.zeros(14)
    for _ in range(draws):
        drawn, to, own = sample(source, receiver, weight, 3, 4)
        assert torch.bincount(to, minlength=4).tolist() == [3, 0, 2, 3]
        assert (drawn.diff() > 0).all()  # in their order, none twice
        total += torch.zeros(4).index_add_(0, to, own) / draws
        taken[drawn - 100] += 1 / draws
    torch.testing.assert_close(total, expected, atol=0.06, rtol=0)
    torch.testing.assert_close(taken, torch.tensor([0.6] * 5 + [1.0] * 2 + [3 / 7] * 7), atol=0.03, rtol=0)


def test_a_weight_below_zero_passes_nothing(cache: Cache) -> None:
    edges = cache.part(Links).incoming["near"]
    against = cache.change(Links, incoming={"near": edges._replace(weight=-edges.weight)})
    memory = Memory.of(against, LinkSettings())
    assert len(memory.weight)
    assert not memory.weight.any()
    assert not memory.degree.any()


def test_stale_links_are_refused(tmp_path: Path) -> None:
    plan = Plan(classes=3, train=6, val=4, test=3)
    write_cache(tmp_path, plan)
    nodes = tmp_path / f"embed/{ENCODER}/images/b000.parquet"
    said = said_of(nodes, "embed.nodes/1")
    path = tmp_path / "links/near.parquet"
    table = read_table(path, "links/1")
    for mark, fits in (({}, True), ({"fingerprint": "another"}, False)):
        sources = {f"embed/{ENCODER}/images": said | mark}
        write_table(table, path, "links/1", {"kind": "knn", "k": 6, "sources": sources}, "made")
        if fits:
            read_cache(tmp_path, ENCODER, plan.buckets, {"nodes", "links/near"})
        else:
            with pytest.raises(UserError, match=r"near\.parquet: was not made from .*images as it is now; run python"):
                read_cache(tmp_path, ENCODER, plan.buckets, {"nodes", "links/near"})


def test_a_run_says_where_few_of_the_nearest_may_send(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()
    Memory.of(cache, LinkSettings(neighbours=1))
    assert capsys.readouterr().err == ""
    few = replace(cache, split=np.where(np.arange(len(cache.paths)) % 9 == 0, "train", "unused"))
    for _ in range(2):
        Memory.of(few, LinkSettings(neighbours=3))
    [line] = capsys.readouterr().err.splitlines()
    assert "of the 5 that may send, not 3, and" in line
    assert "raise links.near.k" in line
