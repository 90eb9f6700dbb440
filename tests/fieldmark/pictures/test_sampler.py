"""Where a saliency sampler looks, against its definition written out."""

import math

import numpy as np
import pytest
import torch

from fieldmark.pictures.sampler import FWHM, over_picture, sampled_points

SIDE = 31
SIGMA = FWHM / math.sqrt(8 * math.log(2))


def written_out(q: np.ndarray) -> np.ndarray:
    """The definition: Q continued beyond each border, a square Gaussian about each node, sums by loops."""
    side = len(q)
    wide = np.pad(q, side - 1, mode="edge")
    found = np.zeros((side, side, 2))
    for row in range(side):
        for column in range(side):
            total = np.zeros(3)
            for y in range(row, row + 2 * side - 1):
                for x in range(column, column + 2 * side - 1):
                    away = (y - row - side + 1) ** 2 + (x - column - side + 1) ** 2
                    weight = wide[y, x] * math.exp(-away / (2 * SIGMA**2))
                    total += weight * np.array([1, (x - side + 1) / (side - 1), (y - side + 1) / (side - 1)])
            found[row, column] = total[1:] / total[0]
    return found


def peak(row: int, column: int, width: float = 0.09) -> torch.Tensor:
    nodes = torch.arange(SIDE, dtype=torch.float64)
    away = (nodes[:, None] - row) ** 2 + (nodes - column) ** 2
    return 0.09 + torch.exp(-away / (2 * (width * SIDE) ** 2))


def test_points_are_those_of_the_definition() -> None:
    q = np.random.default_rng(0).uniform(0.05, 1, (9, 9))
    torch.testing.assert_close(sampled_points(torch.from_numpy(q)), torch.from_numpy(written_out(q)))


def test_an_even_map_samples_evenly_up_to_the_border() -> None:
    nodes = torch.linspace(0, 1, SIDE)
    points = sampled_points(torch.full((2, SIDE, SIDE), 0.3))
    assert (points[..., 0] - nodes).abs().max() < 1e-5
    assert (points[..., 1] - nodes[:, None]).abs().max() < 1e-5


def test_points_lie_close_at_a_peak_never_fold_and_do_not_depend_on_the_scale() -> None:
    q = peak(12, 18)
    points = sampled_points(q)
    across, down = points[..., 0].diff(dim=1) * (SIDE - 1), points[..., 1].diff(dim=0) * (SIDE - 1)
    assert across.min() > 0
    assert down.min() > 0
    assert across[12, 18] < 0.6
    assert across.max() > 1
    torch.testing.assert_close(sampled_points(q * 0.01), points)


@pytest.mark.parametrize("cells", [(5, 7), (1, 4), (31, 31)])
def test_a_cell_of_a_map_lies_where_the_cell_of_the_picture_does(cells: tuple[int, int]) -> None:
    """A map that says of each place where it lies among centres says so of the picture, up to the outer centres."""
    h, w = cells
    rows, columns = (torch.linspace(0.5 / count, 1 - 0.5 / count, SIDE, dtype=torch.float64) for count in cells)
    places, maps = torch.linspace(0, 1, SIDE, dtype=torch.float64), torch.ones(SIDE, SIDE, dtype=torch.float64)
    expected = places.clamp(0.5 / h, 1 - 0.5 / h)[:, None] * maps
    torch.testing.assert_close(over_picture(rows[:, None] * maps, cells), expected)
    torch.testing.assert_close(over_picture(columns * maps, cells), places.clamp(0.5 / w, 1 - 0.5 / w) * maps)
    torch.testing.assert_close(over_picture(maps, cells), maps)
