"""Where a saliency sampler looks: from a map of attention to points that lie close where the map is high.

Learning to Zoom (Recasens et al., ECCV 2018) as S3N has it (Ding et al., ICCV 2019 [code]). A map Q (S, S) has its
nodes at 0, 1/(S-1), ..., 1 of each side. The point of node v is the mean of all places u, weighed by Q and by a
Gaussian k about v:

    f(v) = sum_u Q(u) k(u - v) u / sum_u Q(u) k(u - v)

u runs over Q continued by S - 1 nodes beyond each border with what stands at the border, and k is as wide. So a map
that is the same everywhere gives f(v) = v, at the border too; and the derivative of f_x by v_x is the variance of u_x
under Q k over that of k: f never folds, and magnifies where Q stands out.

k is a product of one by rows and one by columns, and continuing is linear: each sum is two products of (S, S) matrices.
"""

import functools

import torch
from torch import Tensor

SIDE = 31  # S
FWHM = 13.0  # of k, in nodes [code]: full width at half maximum


@functools.cache
def kernels(side: int) -> tuple[Tensor, Tensor]:
    """(S, S) float64: what sums k over a continued row of Q, and what sums k u; u in sides of the map."""
    sigma = FWHM / (8 * torch.tensor(2.0, dtype=torch.float64).log()).sqrt()
    nodes, places = torch.arange(side), torch.arange(1 - side, 2 * side - 1, dtype=torch.float64)
    away = places - nodes[:, None]  # (S, 3 S - 2)
    k = torch.exp(-(away**2) / (2 * sigma**2)) * (away.abs() < side)
    continued = (places.clamp(0, side - 1)[:, None] == nodes).double()  # (3 S - 2, S)
    return k @ continued, (k * (places / (side - 1))) @ continued


def sampled_points(maps: Tensor) -> Tensor:
    """The points (..., S, S, 2), x and y in [0, 1], of maps Q (..., S, S), which are positive."""
    k, ku = (each.to(maps) for each in kernels(maps.shape[-1]))
    total = k @ maps @ k.T
    return torch.stack([k @ maps @ ku.T / total, ku @ maps @ k.T / total], dim=-1).clamp(0, 1)


def over_picture(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (..., S, S) whose nodes reach from the centre of the first to that of the last of `grid` (h, w) cells, as
    maps whose nodes reach from border to border. What stands at the outermost centres goes on to the border.
    """
    rows, columns = (reach(maps.shape[-1], cells).to(maps) for cells in grid)
    return rows @ maps @ columns.T


def reach(side: int, cells: int) -> Tensor:
    """(S, S) float64: linear weights of the nodes between centres for each node between borders, along one axis."""
    places = torch.linspace(0, 1, side, dtype=torch.float64) * cells - 0.5  # in cells
    places = places.clamp(0, cells - 1) * (side - 1) / max(cells - 1, 1)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)
