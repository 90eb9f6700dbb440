"""Sampling an image more densely where it matters: sparse attention around peaks, and the saliency sampler.

    Q(x, y) = base + sum over peaks i of a_i exp(-|xy - xy_i|^2 / (2 (radius sqrt(s_i) side)^2))     s_i in (0, 1]
              a_i = s_i discriminative; a_i = 1 / s_i complementary     (S3N, Ding et al., ICCV 2019 [code])
    f_x(v)  = sum_j Q_j k(j - v) u_x(j) / sum_j Q_j k(j - v)                         f_y alike, with u_y
              (Learning to Zoom, Recasens et al., ECCV 2018 [mem])

k is a Gaussian of FWHM cells at half its height, u_j = j / (side - 1) says where cell j lies, and Q goes on beyond its
edge as it is there, for side - 1 cells: where Q is constant the grid is the picture as it was, its border too. The
picture is then read at 2 f - 1, within [-1, 1]. No two points of a row change places: the derivative of f_x is the
variance of u_x under Q k over that of k, and positive.

Padding, basis and Gaussian act on rows and on columns apart: f is a quotient of products of Q with two fixed matrices
(side, side), and no padded map is made. Tokens are read by a matrix of bilinear weights (T', T). It takes T products
for each number that is read, where PyTorch's grid_sample takes four; but they are matrix products, small beside a
linear layer over the tokens (T against its width), and their gradient is the same each time on a GPU too, as
grid_sample's is not. Nothing here or in response.py needs more than PyTorch.
"""

import math

import torch
from torch import Tensor

from training.layers.response import hat, interpolation

FWHM = 13.0  # cells


def sparse_attention(
    scores: Tensor, taken: Tensor, amplitude: Tensor, radius: Tensor, most: int | None = None
) -> Tensor:
    """The sum of a Gaussian around each peak: (B, side, side).

    scores (B, side, side), s in [0, 1]; taken (B, side, side) bool: peaks of theirs, none beside another (`peaks`);
    amplitude (B, side, side): of the Gaussian at its middle; radius: a share of the side, at s = 1. A peak of score 0
    has no width and adds nothing. `most`: how many peaks a map can have, where that is known; only so many are drawn.
    """
    side = scores.shape[-1]
    # One in 2 x 2 cells at most is a peak, and the rest need no Gaussian.
    most = min(most or side**2, ((side + 1) // 2) ** 2)
    s, place = (scores * taken).flatten(1).topk(most, sorted=False)
    real = s > 0
    height = torch.where(real, amplitude.flatten(1).gather(1, place), 0)
    steepness = -0.5 / ((radius * side).square() * torch.where(real, s, 1))
    axis = torch.arange(side, device=scores.device, dtype=scores.dtype)
    squared = (axis - axis[:, None]).square()

    def along(middle: Tensor) -> Tensor:
        """(B, P, side): the Gaussians along one axis."""
        return (steepness[..., None] * squared[middle]).exp()

    return (height[..., None] * along(place // side)).mT @ along(place % side)


def discriminative(scores: Tensor, taken: Tensor, radius: Tensor, most: int | None = None) -> Tensor:
    """The attention that grows with the score; see sparse_attention."""
    return sparse_attention(scores, taken, scores, radius, most)


def complementary(scores: Tensor, taken: Tensor, radius: Tensor, most: int | None = None) -> Tensor:
    """The attention that falls with the score, for what a classifier had not needed yet; see sparse_attention."""
    return sparse_attention(scores, taken, 1 / torch.where(scores > 0, scores, 1), radius, most)


def sampling_grid(q: Tensor, size: tuple[int, int]) -> Tensor:
    """Where to read a picture for each point of one of `size` (h, w): (..., h, w, 2), (x, y) in [-1, 1].

    q (..., side, side) > 0, rows first. As grid_sample with align_corners=True takes it.
    """
    side = q.shape[-1]
    smooth, placed = smoothing(side, q)
    mass = smooth @ q @ smooth.T
    x, y = smooth @ q @ placed.T / mass, placed @ q @ smooth.T / mass
    rows, columns = (interpolation(side, points, q) for points in size)
    return torch.stack([rows @ (2 * f - 1).clamp(-1, 1) @ columns.T for f in (x, y)], dim=-1)


def smoothing(side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over j of k(j - v) and of k(j - v) u_j, as matrices (side, side) from cells to v, the padding folded in."""
    reach = torch.arange(1 - side, side, device=like.device)
    kernel = (-4 * math.log(2) * (reach.double() / FWHM).square()).exp()
    cells = torch.arange(side, device=like.device)
    j = cells[:, None] + reach  # (v, j), of the padded map
    cell = (j.clamp(0, side - 1)[..., None] == cells).double()
    smooth = torch.einsum("j,vjc->vc", kernel, cell)
    placed = torch.einsum("j,vj,vjc->vc", kernel, j / max(side - 1, 1), cell)
    return smooth.to(like.dtype), placed.to(like.dtype)


def sampling_weights(grid: Tensor, cells: tuple[int, int]) -> Tensor:
    """Bilinear weights (..., h w, T) of T = cells[0] cells[1] cells at the points of a grid (..., h, w, 2).

    Weights @ tokens (..., T, d) is what grid_sample reads with align_corners=True; each row sums to 1.
    """
    places = (grid.flatten(-3, -2) + 1) / 2
    x, y = (hat(places[..., axis] * (count - 1), count) for axis, count in enumerate(reversed(cells)))
    return (y[..., :, None] * x[..., None, :]).flatten(-2)
