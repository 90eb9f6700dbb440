"""Sampling an image more densely where it matters: sparse attention around peaks, and the saliency sampler.

    Q(x, y) = base + sum over peaks i of a_i exp(-|xy - xy_i|^2 / (2 (radius sqrt(s_i) side)^2))     s_i in (0, 1]
              a_i = s_i discriminative; a_i = 1 / s_i complementary     (S3N, Ding et al., ICCV 2019 [code])

f(v), where a picture is read for the node v, is that of fieldmark/pictures/sampler.py, which reads pixels by it too.

Tokens are read by a matrix of bilinear weights (T', T). It takes T products for each number that is read, where
PyTorch's grid_sample takes four; but they are matrix products, small beside a linear layer over the tokens (T against
its width), and their gradient is the same each time on a GPU too, as grid_sample's is not.
"""

import torch
from torch import Tensor

from fieldmark.pictures.sampler import sampled_points
from training.layers.response import hat, interpolation


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
    rows, columns = (interpolation(q.shape[-1], points, q) for points in size)
    return torch.stack([rows @ (2 * f - 1).clamp(-1, 1) @ columns.T for f in sampled_points(q).unbind(-1)], dim=-1)


def sampling_weights(grid: Tensor, cells: tuple[int, int]) -> Tensor:
    """Bilinear weights (..., h w, T) of T = cells[0] cells[1] cells at the points of a grid (..., h, w, 2).

    Weights @ tokens (..., T, d) is what grid_sample reads with align_corners=True; each row sums to 1.
    """
    places = (grid.flatten(-3, -2) + 1) / 2
    x, y = (hat(places[..., axis] * (count - 1), count) for axis, count in enumerate(reversed(cells)))
    return (y[..., :, None] * x[..., None, :]).flatten(-2)
