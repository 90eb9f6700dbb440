"""Sparse attention and the saliency sampler, against loops, PyTorch's convolution and its grid_sample."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.pictures.sampler import FWHM
from training.layers.sampler import (
    complementary,
    discriminative,
    sampling_grid,
    sampling_weights,
    sparse_attention,
)

SIDE = 31
SIGMA = FWHM / (2 * math.sqrt(2 * math.log(2)))  # cells


def uneven(batch: int = 2) -> Tensor:
    """Attention with a narrow peak each: (batch, SIDE, SIDE)."""
    generator = torch.Generator().manual_seed(0)
    scores, taken = torch.zeros(batch, SIDE, SIDE), torch.zeros(batch, SIDE, SIDE, dtype=torch.bool)
    for image in range(batch):
        y, x = torch.randint(8, 23, (2,), generator=generator)
        scores[image, y, x], taken[image, y, x] = 1, True
    return 0.09 + discriminative(scores, taken, torch.tensor(0.09))


def by_convolution(q: Tensor) -> Tensor:
    """The grid (side, side, 2) before it is clamped, of one map: padded, and convolved in two dimensions."""
    side, pad = len(q), len(q) - 1
    reach = torch.arange(-pad, pad + 1, dtype=torch.float64)
    kernel = torch.exp(-4 * math.log(2) * (reach[:, None] ** 2 + reach**2) / FWHM**2)[None, None]
    padded = F.pad(q.double()[None, None], [pad] * 4, mode="replicate")
    basis = (torch.arange(side + 2 * pad, dtype=torch.float64) - pad) / (side - 1)
    mass = F.conv2d(padded, kernel)
    x, y = F.conv2d(padded * basis, kernel) / mass, F.conv2d(padded * basis[:, None], kernel) / mass
    return torch.stack([2 * x[0, 0] - 1, 2 * y[0, 0] - 1], -1)


def test_an_even_attention_leaves_the_picture_as_it_is_up_to_its_border() -> None:
    for value in (0.09, 1.0, 30.0):
        x, y = sampling_grid(torch.full((SIDE, SIDE), value), (SIDE, SIDE)).unbind(-1)
        line = torch.linspace(-1, 1, SIDE)
        torch.testing.assert_close(x, line.expand(SIDE, -1), atol=1e-5, rtol=0)
        torch.testing.assert_close(y, line[:, None].expand(-1, SIDE), atol=1e-5, rtol=0)
    tokens = torch.randn(3 * 4, 5)
    weights = sampling_weights(sampling_grid(torch.ones(SIDE, SIDE), (3, 4)), (3, 4))
    torch.testing.assert_close(weights @ tokens, tokens, atol=1e-5, rtol=1e-5)


def test_two_matrices_are_the_padded_convolution() -> None:
    q = uneven()
    grid = sampling_grid(q, (SIDE, SIDE))
    for one, found in zip(q, grid, strict=True):
        torch.testing.assert_close(found, by_convolution(one).clamp(-1, 1).float(), atol=1e-5, rtol=1e-5)


def test_the_grid_of_another_size_is_interpolated_with_its_corners_aligned() -> None:
    q = uneven()
    fine = sampling_grid(q, (SIDE, SIDE)).movedim(-1, 1)
    for size in ((3, 4), (9, 9), (1, 5), (40, 64)):
        expected = F.interpolate(fine, size=size, mode="bilinear", align_corners=True).movedim(1, -1)
        torch.testing.assert_close(sampling_grid(q, size), expected, atol=1e-5, rtol=1e-5)


def test_it_magnifies_by_the_variance_of_what_is_looked_at() -> None:
    """df/dv = Var(u) / (sigma / (side - 1))^2: below 1 at a narrow peak, 1 where Q is even, above 1 beside a peak."""
    pad = SIDE - 1
    cells = torch.arange(-pad, SIDE + pad, dtype=torch.float64)

    def moments(line: Tensor, v: float) -> tuple[float, float]:
        """Mean and variance of u around v, in cells."""
        mass = line[cells.clamp(0, SIDE - 1).long()] * torch.exp(-((cells - v) ** 2) / (2 * SIGMA**2))
        share, u = mass / mass.sum(), cells / (SIDE - 1)
        mean = (share * u).sum()
        return mean.item(), (share * (u - mean) ** 2).sum().item()

    even, peaked = torch.ones(SIDE, dtype=torch.float64), torch.full((SIDE,), 0.01, dtype=torch.float64)
    peaked[15] = 5
    for line in (even, peaked):
        grid = (sampling_grid(line.expand(SIDE, -1), (SIDE, SIDE))[0, :, 0] + 1) / 2
        for v in (8, 12, 15, 20):
            torch.testing.assert_close(grid[v].item(), moments(line, v)[0], atol=1e-9, rtol=1e-6)
            slope = (moments(line, v + 1e-4)[0] - moments(line, v - 1e-4)[0]) / (2e-4 / (SIDE - 1))
            assert math.isclose(slope, moments(line, v)[1] / (SIGMA / (SIDE - 1)) ** 2, rel_tol=1e-4)
        steps = grid.diff() * (SIDE - 1)
        if line is even:
            torch.testing.assert_close(steps, torch.ones_like(steps), atol=1e-5, rtol=0)
        else:
            assert steps[14] < 0.2
            assert steps.max() > 1.5


def test_no_two_points_change_places() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(8, SIDE, SIDE, generator=generator).pow(8) + 0.001
    for one in q:
        x, y = by_convolution(one).unbind(-1)
        assert x.diff(dim=1).min() > 0
        assert y.diff(dim=0).min() > 0
    x, y = sampling_grid(q, (SIDE, SIDE)).unbind(-1)
    assert x.diff(dim=2).min() >= 0  # 0 where both are beyond the picture's edge
    assert y.diff(dim=1).min() >= 0


def test_sampling_is_what_grid_sample_does() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3 * 4, 5, generator=generator)
    grid = (2 * torch.rand(2, 6, 7, 2, generator=generator) - 1).requires_grad_()
    expected = F.grid_sample(tokens.mT.unflatten(2, (3, 4)), grid, align_corners=True).flatten(2).mT
    weights = sampling_weights(grid, (3, 4))
    torch.testing.assert_close(weights @ tokens, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 42))
    told = torch.randn(2, 42, 5, generator=generator)
    gradients = [torch.autograd.grad(read, grid, told)[0] for read in (weights @ tokens, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_attention_is_a_sum_of_gaussians_over_peaks() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 11, 11, generator=generator)
    taken = torch.zeros(3, 11, 11, dtype=torch.bool)
    taken[0, ::2, ::2] = True  # as many as there can be
    taken[1, [0, 5, 10], [10, 2, 0]] = True
    radius = torch.tensor(0.2)
    for attention, amplitude in ((discriminative, lambda s: s), (complementary, lambda s: 1 / s)):
        expected = torch.zeros(3, 11, 11)
        for image, y, x in taken.nonzero().tolist():
            s = scores[image, y, x].item()
            for row in range(11):
                for column in range(11):
                    squared = (row - y) ** 2 + (column - x) ** 2
                    expected[image, row, column] += amplitude(s) * math.exp(-squared / (2 * 0.04 * s * 121))
        torch.testing.assert_close(attention(scores, taken, radius), expected, atol=1e-5, rtol=1e-5)
    assert not discriminative(scores, taken, radius)[2].any()
    few = discriminative(scores[1:2], taken[1:2], radius, most=3)
    torch.testing.assert_close(few[0], discriminative(scores, taken, radius)[1])


def test_at_score_1_both_attentions_are_one_gaussian_of_height_1() -> None:
    scores, taken, radius = torch.zeros(1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, dtype=torch.bool), torch.tensor(0.1)
    scores[0, 4, 20], taken[0, 4, 20] = 1, True
    drawn = discriminative(scores, taken, radius)
    assert torch.equal(drawn, complementary(scores, taken, radius))
    assert drawn[0, 4, 20] == drawn.max() == 1


def test_a_peak_of_score_0_adds_nothing_and_has_a_gradient() -> None:
    radius = torch.tensor(0.1, requires_grad=True)
    scores, taken = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5, dtype=torch.bool)
    taken[0, 0, 0] = True
    for attention in (discriminative, complementary):
        drawn = attention(scores, taken, radius)
        assert not drawn.any()
        assert torch.isfinite(torch.autograd.grad(drawn.sum(), radius)[0])


def test_more_attention_to_a_peak_widens_its_neighbourhood_in_what_is_read() -> None:
    scores, taken = torch.zeros(1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    scores[0, 15, 15], taken[0, 15, 15] = 1, True
    near = []
    for amplitude in (0.0, 1.0, 10.0):
        q = 0.09 + sparse_attention(scores, taken, torch.full_like(scores, amplitude), torch.tensor(0.09))
        x = sampling_grid(q, (SIDE, SIDE))[0, 15, :, 0]
        near.append(int((x.abs() < 0.2).sum()))
    assert near == sorted(set(near))
