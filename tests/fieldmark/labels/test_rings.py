import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fieldmark.labels.rings import ring_centre, ring_gains, ring_numbers, sector_gains, sector_members
from fieldmark.params import Labels

RADII = st.sampled_from(["equal_count", "equal_width"])
CENTRE = st.sampled_from(["density", "peak"])


def drawn(nodes: int, concepts: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (2, N, M), density (2, N) and places (2, N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.softmax(3 * torch.randn(2, nodes, concepts, generator=generator), dim=2)
    return weights, torch.rand(2, nodes, generator=generator), torch.rand(2, nodes, 2, generator=generator)


def grid(side: int) -> Tensor:
    """(1, side * side, 2) centres of cells."""
    at = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(at, at)[None]


def by_loop(weights: Tensor, ring: Tensor, rings: int) -> list[float]:
    """dH_2 .. dH_K, JS of one image, ring by ring."""

    def entropy(rows: Tensor) -> float:
        return -sum(p * math.log(p) for p in rows.mean(dim=0).tolist() if p > 0)

    inside = [weights[ring <= k] for k in range(rings)]
    grown = [entropy(rows) if len(rows) else None for rows in inside]
    changes = [0.0 if grown[k - 1] is None else grown[k] - grown[k - 1] for k in range(1, rings)]  # type: ignore[operator]
    own = [weights[ring == k] for k in range(rings)]
    within = sum(len(rows) / len(weights) * entropy(rows) for rows in own if len(rows))
    return [*changes, entropy(weights) - within]


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 5), RADII, CENTRE, st.integers(0, 10**6))
def test_gains_by_a_loop(nodes: int, concepts: int, rings: int, radii: str, centre: str, seed: int) -> None:
    weights, density, places = drawn(nodes, concepts, seed)
    settings = Labels.model_validate({"rings": rings, "ring_radii": radii, "ring_centre": centre})
    found = ring_gains(weights, density, places, settings)
    assert found.shape == (2, rings)
    ring = ring_numbers((places - ring_centre(density, places, settings)[:, None]).norm(dim=2), settings)
    for image in range(2):
        assert found[image].tolist() == pytest.approx(by_loop(weights[image], ring[image], rings), abs=1e-5)
    assert (found[:, -1] >= 0).all()
    # The changes telescope: all of them are what the outer rings add to the innermost that has a node.
    inner = torch.stack([weights[i][ring[i] == ring[i].min()].mean(dim=0) for i in range(2)])
    total = torch.special.entr(weights.mean(dim=1)).sum(dim=1) - torch.special.entr(inner).sum(dim=1)
    torch.testing.assert_close(found[:, :-1].sum(dim=1), total, atol=1e-5, rtol=0)


def test_one_distribution_everywhere_says_nothing() -> None:
    _, density, places = drawn(12, 4, 0)
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0]).expand(2, 12, 4)
    torch.testing.assert_close(ring_gains(weights, density, places, Labels()), torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_rings_of_disjoint_concepts_tell_all() -> None:
    angle = torch.arange(3) * 2 * math.pi / 3
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    places = 0.5 + torch.cat([radius * circle for radius in (0.1, 0.2, 0.3, 0.4)])[None]
    weights = torch.eye(4).repeat_interleave(3, dim=0)[None]
    gains = ring_gains(weights, torch.ones(1, 12), places, Labels())
    expected = [math.log(2), math.log(3 / 2), math.log(4 / 3), math.log(4)]
    assert gains[0].tolist() == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans(), RADII, CENTRE)
def test_turning_and_mirroring_change_nothing(
    seed: int, quarters: int, mirrored: bool, radii: str, centre: str
) -> None:
    weights, density, places = drawn(9, 5, seed)
    settings = Labels.model_validate({"ring_radii": radii, "ring_centre": centre})
    mu = ring_centre(density, places, settings)[:, None]
    angle = quarters * math.pi / 2
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = (places - mu) @ turn.T
    if mirrored:
        turned = turned * torch.tensor([-1.0, 1.0])
    found = ring_gains(weights, density, turned + mu, settings)
    torch.testing.assert_close(found, ring_gains(weights, density, places, settings), atol=1e-4, rtol=0)


def test_the_centre_moves_with_the_nodes() -> None:
    _, density, places = drawn(9, 2, 3)
    for settings in (Labels(), Labels(ring_centre="peak")):
        shift = torch.tensor([0.2, -0.1])
        torch.testing.assert_close(
            ring_centre(density, places + shift, settings), ring_centre(density, places, settings) + shift
        )


def test_the_centre_is_where_density_is() -> None:
    places = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]])
    density = torch.tensor([[0.1, 0.5, 0.1]])
    powers = [0.1**4, 0.5**4, 0.1**4]
    expected = [(powers[1] + powers[2]) / sum(powers), powers[1] / sum(powers)]
    assert ring_centre(density, places, Labels())[0].tolist() == pytest.approx(expected)
    assert ring_centre(density, places, Labels(ring_centre="peak"))[0].tolist() == [1, 1]
    nowhere = ring_centre(torch.zeros(1, 3), places, Labels())
    assert nowhere[0].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_equal_counts() -> None:
    radii = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4]])
    assert ring_numbers(radii, Labels(rings=4)).tolist() == [[3, 0, 2, 1, 3, 0, 2, 1]]


def test_nodes_equally_far_share_a_ring() -> None:
    # 3 x 3 cells have three radii about the middle: three rings of four, one is empty.
    radii = (grid(3) - 0.5).norm(dim=2)
    ring = ring_numbers(radii, Labels(rings=4))[0]
    assert ring.tolist() == [3, 1, 3, 1, 0, 1, 3, 1, 3]
    assert ring_numbers(torch.full((1, 5), 0.3), Labels()).unique().numel() == 1


def test_equal_widths() -> None:
    radii = torch.tensor([[0.0, 0.1, 0.11, 0.2, 0.39, 0.4]])
    settings = Labels(rings=4, ring_radii="equal_width")
    assert ring_numbers(radii, settings).tolist() == [[0, 0, 1, 1, 3, 3]]
    assert ring_numbers(torch.zeros(1, 3), settings).tolist() == [[0, 0, 0]]


def test_a_node_without_concepts_counts_as_undecided() -> None:
    weights, density, places = drawn(6, 4, 1)
    empty, even = weights.clone(), weights.clone()
    empty[:, 2], even[:, 2] = 0, 0.25
    torch.testing.assert_close(
        ring_gains(empty, density, places, Labels()), ring_gains(even, density, places, Labels())
    )


def rotated(places: Tensor, degrees: float) -> Tensor:
    """Places about the origin, turned from the x axis towards the y axis."""
    angle = math.radians(degrees)
    return places @ torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def on_a_circle(degrees: list[float]) -> Tensor:
    """(1, n, 2)"""
    return torch.stack([rotated(torch.tensor([0.3, 0.0]), each) for each in degrees])[None]


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
    found = sector_members(rotated(places, 360 / count), count)
    assert torch.equal(found, sector_members(places, count).roll(1, dims=1))


def test_gains_of_sectors_by_a_loop() -> None:
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
        moved = rotated(places - mu, degrees) + mu
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
