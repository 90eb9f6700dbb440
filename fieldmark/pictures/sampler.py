"""Where a saliency sampler looks: from a map of attention to points that lie close where the map is high.

    f_x(v) = sum_j Q_j k(j - v) u_x(j) / sum_j Q_j k(j - v)                          f_y alike, with u_y
             (Learning to Zoom, Recasens et al., ECCV 2018 [mem]; as S3N has it, Ding et al., ICCV 2019 [code])

k is a Gaussian of FWHM nodes at half its height, u_j = j / (side - 1) says where node j lies, from border to border,
and Q goes on beyond its edge as it is there, for side - 1 nodes: where Q is constant, f(v) is v, at the border too. No
two points of a row change places: the derivative of f_x is the variance of u_x under Q k over that of k, and positive.
Below 1 it magnifies.

Padding, basis and Gaussian act on rows and on columns apart: f is a quotient of products of Q with two fixed matrices
(side, side), and no padded map is made. This module needs nothing but PyTorch: heads sample tokens by it
(training/layers/sampler.py), and zoom.py pixels.
"""

import math

import torch
from torch import Tensor

FWHM = 13.0  # nodes


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


def sampled_points(maps: Tensor) -> Tensor:
    """f (..., side, side, 2) of maps Q (..., side, side) > 0, rows first: x and y, [0, 1] from border to border.

    Where Q is high at a border, points lie beyond it: who reads there is to clamp them.
    """
    smooth, placed = smoothing(maps.shape[-1], maps)
    mass = smooth @ maps @ smooth.T
    x, y = smooth @ maps @ placed.T / mass, placed @ maps @ smooth.T / mass
    return torch.stack([x, y], dim=-1)


def over_picture(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (..., side, side) over the centres of `grid` (h, w) cells, the first and the last at the ends, as maps over
    the whole picture, from border to border. What stands at the outermost centres goes on to the border.
    """
    rows, columns = (reach(maps.shape[-1], cells).to(maps) for cells in grid)
    return rows @ maps @ columns.T


def reach(side: int, cells: int) -> Tensor:
    """(side, side) float64: linear weights of the nodes between centres, for each node between borders; of one axis."""
    places = torch.linspace(0, 1, side, dtype=torch.float64) * cells - 0.5  # in cells
    places = places.clamp(0, cells - 1) * (side - 1) / max(cells - 1, 1)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)
