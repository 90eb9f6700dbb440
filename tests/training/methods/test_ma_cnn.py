"""Parts as groups of channels: losses and grouping on tiny exact maps, and a part that tells the classes."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.cache import GRID, Plan
from tests.training.methods.test_universal import quick
from training.data import Batch, Cache
from training.data.tokens import Cells, Tokens, as_shape
from training.layers.blocks import Standardise
from training.layers.boxes import cell_places
from training.loop import assess_split
from training.methods.ma_cnn import (
    MultiAttention,
    Settings,
    channel_peaks,
    distance,
    diversity,
    group_channels,
)
from training.token_heads import Beside

HEIGHT, WIDTH = GRID
CELLS = HEIGHT * WIDTH
CPU = torch.device("cpu")
PARTS = (1, 6, 11)  # cells that groups of channels peak at


def one_hot(*cells: int) -> Tensor:
    """(1, P, T): all of a map in one cell."""
    return torch.nn.functional.one_hot(torch.tensor([cells]), CELLS).float()


def test_a_map_of_one_cell_has_no_distance_and_others_that_of_the_sum() -> None:
    places = cell_places(GRID, CPU)
    assert distance(one_hot(3, 7), places) == 0
    torch.manual_seed(0)
    maps = torch.rand(2, 3, CELLS).softmax(2)
    total = 0.0
    for image in maps:
        for part in image:
            top = places[part.argmax()]
            total += sum(float(share * (place - top).square().sum()) for share, place in zip(part, places, strict=True))
    torch.testing.assert_close(distance(maps, places), torch.tensor(total / 2))


def test_maps_apart_are_more_diverse_than_maps_alike() -> None:
    apart, alike = diversity(one_hot(0, 1, 2)), diversity(one_hot(4, 4, 4))
    torch.testing.assert_close(apart, torch.tensor(-3 * 0.02))
    torch.testing.assert_close(alike, torch.tensor(3 * (1 - 0.02)))
    torch.manual_seed(0)
    maps = torch.rand(2, 3, CELLS).softmax(2)
    total = 0.0
    for image in maps:
        for i, part in enumerate(image):
            for cell, share in enumerate(part.tolist()):
                total += share * (max(float(image[k, cell]) for k in range(3) if k != i) - 0.02)
    torch.testing.assert_close(diversity(maps), torch.tensor(total / 2))


def planted_tokens(cache: Cache) -> Cache:
    """Each class shows in one channel at the place of one part; elsewhere that channel says another class.

    Channels 0..5 peak, two by two, at the cells PARTS, which wander by the image; 6..9 tell classes at the first.
    """
    generator = torch.Generator().manual_seed(0)
    count, classes = len(cache.y), 4
    tokens = 0.3 * torch.randn(count, CELLS, 10, generator=generator)
    shift = torch.randint(CELLS, (count,), generator=generator)
    images = torch.arange(count)
    for part, cell in enumerate(PARTS):
        tokens[images, (cell + shift) % CELLS, 2 * part] += 6
        tokens[images, (cell + shift) % CELLS, 2 * part + 1] += 6
    first = (PARTS[0] + shift) % CELLS
    marks = 4 * torch.nn.functional.one_hot(cache.y, classes).float()
    tokens[images, first, 6:] += marks
    tokens[images, (first + 1) % CELLS, 6:] -= marks  # so that the mean token tells nothing
    cells = Cells(tokens.half(), GRID)
    return cache.with_part(replace(cache.part(Tokens), layers={"tokens": cells}))


@pytest.mark.slow
def test_channels_that_peak_together_are_one_group(planted: Callable[[Plan], Cache]) -> None:
    cache = planted_tokens(planted(Plan(train=40, val=15, test=40)))
    peaks = channel_peaks(cache, "tokens")
    images, places = cache.images("train"), cell_places(GRID, CPU)
    assert peaks.shape == (10, 2 * len(images))
    batch = cache.batch(images)
    for channel in (0, 7):
        expected = torch.cat([places[x[:, channel].argmax()] for x in batch.tokens])
        torch.testing.assert_close(peaks[channel], expected)
    groups = group_channels(peaks[:6], 3, seed=0)
    assert groups.sum(0).eq(1).all()
    assert {tuple(group.nonzero().flatten().tolist()) for group in groups} == {(0, 1), (2, 3), (4, 5)}
    assert torch.equal(groups, group_channels(peaks[:6], 3, seed=0))


def made(parts: int = 3) -> tuple[MultiAttention, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randn(4, CELLS, 10)
    groups = torch.arange(parts)[:, None] == torch.arange(10) % parts
    scale = Standardise(tokens.flatten(0, 1))
    head = MultiAttention(scale, groups, Beside(None), 4, Settings(parts=parts))
    return head.eval(), tokens, groups


def batch_of(tokens: Tensor) -> Batch:
    y = torch.zeros(len(tokens), dtype=torch.long)
    return Batch(y, y, {"tokens": tokens, "token_grid": as_shape(GRID)})


def test_it_starts_as_the_grouping_in_every_image() -> None:
    head, tokens, groups = made()
    member = head.group(head.scale(tokens).mean(1)).sigmoid().unflatten(1, (3, 10))
    assert torch.equal(member > 0.5, groups.expand(4, 3, 10))
    assert ((member > 0.98) | (member < 0.02)).all()


def test_logits_are_those_of_an_explicit_loop() -> None:
    head, tokens, _ = made()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    for image, x in enumerate(head.scale(tokens)):
        member = head.group(x.mean(0)).sigmoid().reshape(3, 10)
        found = [x.mean(0)]
        for d in member:
            part = torch.stack([torch.sigmoid(d @ token) for token in x])
            part = part / part.sum()
            found.append(sum(share * token for share, token in zip(part, x, strict=True)))
        torch.testing.assert_close(head(batch_of(tokens)).logits[image], head.classify(torch.cat(found)))


def test_maps_sum_to_one_where_every_sigmoid_is_too_small_for_a_float() -> None:
    head, tokens, _ = made()
    maps = head.maps(tokens - 1e4)
    assert torch.isfinite(maps).all()
    torch.testing.assert_close(maps.sum(2), torch.ones(4, 3))


def test_each_part_answers_alone_in_training() -> None:
    head, tokens, _ = made()
    losses = head.train()(batch_of(tokens)).losses
    assert losses.keys() == {"parts", "distance", "diversity"}
    torch.testing.assert_close(losses["parts"], torch.tensor(3 * math.log(4)))  # nothing is said at first


def test_a_class_that_shows_where_a_group_peaks_is_told(planted: Callable[[Plan], Cache]) -> None:
    cache = planted_tokens(planted(Plan(train=40, val=15, test=40)))
    fitted = quick("ma_cnn", cache, epochs=40, lr=[1e-2], parts=3)
    assert assess_split(fitted.model, cache, "test")[0] > 0.95
