import math

import pytest
import torch
from torch import Tensor

from fieldmark.labels.rings import ring_centre, ring_gains
from fieldmark.labels.sectors import sector_gains, sector_members
from fieldmark.params import Labels
from tests.fieldmark.labels.test_rings import by_loop, drawn


def turned(places: Tensor, degrees: float) -> Tensor:
    """Places about the origin, turned from the x axis towards the y axis."""
    angle = math.radians(degrees)
    return places @ torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def on_a_circle(degrees: list[float]) -> Tensor:
    """(1, n, 2)"""
    return torch.stack([turned(torch.tensor([0.3, 0.0]), each) for each in degrees])[None]


def test_sectors_are_numbered_from_the_x_axis_to_the_y_axis() -> None:
    places = torch.cat([on_a_circle([10, 80, 100, 190, 350]), torch.zeros(1, 1, 2)], dim=1)
    member = sector_members(places, 4)
    assert member[0, :, :5].argmax(0).tolist() == [0, 0, 1, 2, 3]
    assert member[0, :, 5].tolist() == [0.25] * 4
    assert member.sum(1).tolist() == [[1.0] * 6]


@pytest.mark.parametrize("count", [3, 4, 6])
def test_turned_by_the_width_of_a_sector_each_becomes_the_next(count: int) -> None:
    places = torch.rand(1, 21, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    places[:, 20] = 0
    found = sector_members(turned(places, 360 / count), count)
    assert torch.equal(found, sector_members(places, count).roll(1, dims=1))


def test_gains_by_a_loop() -> None:
    weights, density, places = drawn(12, 5, 3)
    found = sector_gains(weights, density, places, Labels())
    centred = places - ring_centre(density, places, Labels())[:, None]
    for image in range(2):
        angle = [math.degrees(math.atan2(y, x)) % 360 for x, y in centred[image].tolist()]
        sector = torch.tensor([int(each // 90) for each in angle])
        assert found[image].tolist() == pytest.approx(by_loop(weights[image], sector, 4), abs=1e-5)


def test_turns_leave_rings_and_change_sectors() -> None:
    """About mu; by a sector's width JS stays, by half of it nothing does."""
    weights, density, places = drawn(16, 5, 1)
    mu = ring_centre(density, places, Labels())[:, None]
    rings, sectors = (gains(weights, density, places, Labels()) for gains in (ring_gains, sector_gains))
    for degrees in (45, 90):
        moved = turned(places - mu, degrees) + mu
        torch.testing.assert_close(ring_gains(weights, density, moved, Labels()), rings, atol=1e-5, rtol=0)
        found = sector_gains(weights, density, moved, Labels())
        assert ((found - sectors).abs().amax(1) > 0.01).all()
        same = (found[:, -1] - sectors[:, -1]).abs() < 1e-5
        assert same.tolist() == [degrees == 90] * 2


def test_mirroring_turns_the_order_of_sectors_round() -> None:
    weights, density, places = drawn(16, 5, 1)
    mu = ring_centre(density, places, Labels())[:, None]
    member = sector_members(places - mu, 4)
    mirrored = (places - mu) * torch.tensor([-1.0, 1.0])
    assert torch.equal(sector_members(mirrored, 4), member[:, [1, 0, 3, 2]])
    found = sector_gains(weights, density, mirrored + mu, Labels())
    torch.testing.assert_close(found[:, -1], sector_gains(weights, density, places, Labels())[:, -1], atol=1e-5, rtol=0)
