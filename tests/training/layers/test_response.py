"""Class response maps and their peaks, against explicit loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.layers.response import entropy, interpolation, min_max, peaks, response_maps, salient_map

SIDE = 31


def made(classes: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (4, 12, 6) on a grid of 3 x 4, and a classifier."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, 6, generator=generator)
    return x, scale * torch.randn(classes, 6, generator=generator), torch.randn(classes, generator=generator)


def as_published(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The map of each image, with the maps of all classes made and interpolated first; of few classes, half count."""
    top = min(5, max(len(weight) // 2, 1))
    everything = response_maps(x, weight, bias).unflatten(2, (3, 4))
    everything = F.interpolate(everything, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    chosen = []
    for maps in everything:
        p, order = maps.mean((1, 2)).softmax(0).sort(descending=True)
        h = -(p[:top] * p[:top].log()).sum()
        chosen.append(maps[order[0]] if h < 0.2 else maps[order[:top]].mean(0))
        chosen[-1] = (chosen[-1] - chosen[-1].min()) / (chosen[-1].max() - chosen[-1].min())
    return torch.stack(chosen)


def test_the_mean_of_a_map_is_what_the_classifier_says_of_the_mean_token() -> None:
    x, weight, bias = made(7)
    maps = response_maps(x, weight, bias)
    assert maps.shape == (4, 7, 12)
    torch.testing.assert_close(maps.mean(2), F.linear(x.mean(1), weight, bias))
    for c in range(7):
        torch.testing.assert_close(maps[1, c, 5], weight[c] @ x[1, 5] + bias[c])


@pytest.mark.parametrize(("cells", "points"), [(9, 31), (14, 31), (31, 9), (5, 5), (4, 1), (1, 6)])
def test_interpolation_is_that_with_aligned_corners(cells: int, points: int) -> None:
    values = torch.randn(1, 1, cells, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, size=points, mode="linear", align_corners=True)[0, 0]
    torch.testing.assert_close(interpolation(cells, points, values) @ values[0, 0], expected)


@pytest.mark.parametrize("classes", [1, 3, 5, 40])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_map_is_that_of_the_likeliest_class_or_the_mean_of_five(classes: int, scale: float) -> None:
    x, weight, bias = made(classes, scale)
    expected = as_published(x, weight, bias)
    torch.testing.assert_close(salient_map(x, (3, 4), weight, bias, SIDE), expected, atol=1e-4, rtol=1e-4)
    by_image = bias + torch.zeros(4, 1)
    torch.testing.assert_close(salient_map(x, (3, 4), weight, by_image, SIDE), expected, atol=1e-4, rtol=1e-4)


def test_of_few_classes_not_all_are_taken_whose_maps_cancel_out() -> None:
    x, weight, bias = made(4, 0.01)
    weight -= weight.mean(0)  # as softmax leaves them
    assert not min_max(response_maps(x, weight, bias).mean(1).unflatten(1, (3, 4))).any()
    assert (salient_map(x, (3, 4), weight, bias, SIDE).amax((1, 2)) == 1).all()


def test_what_is_added_to_an_image_has_a_part_in_its_likeliest_class_alone() -> None:
    x, weight, bias = made(7)
    told = bias + 100 * F.one_hot(torch.tensor([0, 3, 6, 3]), 7)
    alone = torch.stack([response_maps(x, weight, bias)[image, c] for image, c in enumerate((0, 3, 6, 3))])
    rows, columns = interpolation(3, SIDE, x), interpolation(4, SIDE, x)
    expected = min_max(rows @ alone.unflatten(1, (3, 4)) @ columns.T)
    torch.testing.assert_close(salient_map(x, (3, 4), weight, told, SIDE), expected, atol=1e-4, rtol=1e-4)


def test_entropy_is_0_of_one_class_and_log_5_of_five_alike() -> None:
    p = torch.tensor([[1.0, 0, 0, 0, 0], [0.2] * 5])
    torch.testing.assert_close(entropy(p), torch.tensor([0, math.log(5)]))
    # The five highest of many are not renormalised: what spreads over 200 classes has a low entropy.
    assert entropy(torch.full((1, 5), 1 / 200)) < 0.2


def test_a_constant_map_is_zero_and_no_noise_is_blown_up() -> None:
    x, weight, bias = made(7)
    alike = x[:, :1].expand(-1, 12, -1).contiguous()
    assert not salient_map(alike, (3, 4), weight, bias, SIDE).any()
    assert not salient_map(x, (3, 4), torch.zeros_like(weight), bias, SIDE).any()
    assert not salient_map(x[:, :1], (1, 1), weight, bias, SIDE).any()
    assert not min_max(torch.zeros(1, 3, 3)).any()
    scaled = min_max(torch.tensor([[[-1.0, 3.0], [1.0, 0.0]]]))
    torch.testing.assert_close(scaled, torch.tensor([[[0.0, 1.0], [0.5, 0.25]]]))


def by_loop(values: Tensor) -> Tensor:
    """The peaks of one map, cell by cell: the first of the highest in its 3 x 3, row by row."""
    height, width = values.shape
    found = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            window = [
                (row, column)
                for row in range(max(y - 1, 0), min(y + 2, height))
                for column in range(max(x - 1, 0), min(x + 2, width))
            ]
            first = max(window, key=lambda cell: values[cell].item())  # max keeps the first
            found[y, x] = first == (y, x) and values[y, x] >= values.mean()
    return found


def test_peaks_are_the_highest_of_their_neighbours_and_no_lower_than_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(5, 9, 7, generator=generator)
    maps[3:] = maps[3:].mul(3).round()  # many plateaus
    found = peaks(maps)
    assert torch.equal(found, torch.stack([by_loop(values) for values in maps]))
    assert torch.equal(torch.cat([peaks(one[None]) for one in maps]), found)


def test_an_interpolated_map_has_no_more_peaks_than_cells() -> None:
    cells = torch.rand(50, 3, 5, generator=torch.Generator().manual_seed(0))
    rows, columns = (interpolation(count, SIDE, cells) for count in (3, 5))
    assert peaks(rows @ cells @ columns.T).sum((1, 2)).max() <= 3 * 5


def test_of_a_plateau_the_first_cell_is_the_peak() -> None:
    plateau = torch.zeros(1, 6, 6)
    plateau[0, 2:4, 2:5] = 1
    assert peaks(plateau).nonzero().tolist() == [[0, 2, 2]]
    assert peaks(torch.full((1, 4, 4), 2.0)).nonzero().tolist() == [[0, 0, 0]]


def test_a_low_local_maximum_is_no_peak() -> None:
    maps = torch.zeros(1, 7, 7)
    maps[0, 1:3, 1:3], maps[0, 5, 5] = 10.0, 0.5  # the mean is 0.8
    assert peaks(maps).nonzero().tolist() == [[0, 1, 1]]
