"""Where a linear classifier over an image's tokens finds its classes: class response maps, and their peaks.

    R_c(t) = w_c . x_t + b_c               class activation maps (Zhou et al., CVPR 2016 [mem]); their mean over tokens
                                           is what the classifier says of the mean token
    P      = softmax over c of the mean of R_c, brought to `side` x `side`
    H      = -sum of p log p over the five highest of P
    R      = R_c of the likeliest class if H < 0.2, else the mean over the five; min-max to [0, 1]
    peaks  = cells that are the highest of their 3 x 3 and no lower than the map's mean

The choice and the peaks are those of S3N's public code [code]. It takes the mean of five maps, where the paper sums
them: min-max makes these one. It does not renormalise the five probabilities: a flat P over very many classes has a
low H, too (0.13 for 200 classes that are all alike), and then the likeliest class alone is taken. Of fewer than ten
classes at most half are taken, and not five [design]: softmax makes the weights of all classes sum to about zero, and
with them the mean of their maps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 5  # classes that an unsure image is looked at for, of ten or more
SURE = 0.2  # nats: below this entropy the likeliest class alone
CONSTANT = 1e-5  # a map that spreads less, as a share of its largest value, is constant up to rounding


def response_maps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tokens x (B, T, d) -> (B, K, T), of a classifier's weight (K, d), bias (K,), or with those of each image first.

    Their mean over T is the classifier of the mean token: exactly, since both are linear.
    """
    return (x @ weight.mT + bias[..., None, :]).mT


def interpolation(cells: int, points: int, like: Tensor) -> Tensor:
    """(points, cells): what takes values at cells to `points`, linearly, the first and the last cell at the ends.

    As align_corners of PyTorch has it; on the device and in the precision of `like`.
    """
    places = torch.linspace(0, cells - 1, points, device=like.device, dtype=torch.float64)
    return hat(places, cells).to(like.dtype)


def hat(places: Tensor, cells: int) -> Tensor:
    """max(0, 1 - |place - cell|): places (..., n), in cells -> (..., n, cells), the weights of linear interpolation."""
    return F.relu(1 - (places[..., None] - torch.arange(cells, device=places.device)).abs())


def salient_map(x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor, side: int) -> Tensor:
    """R of the docstring above (B, side, side) in [0, 1], of tokens x (B, T, d) on a grid (h, w), T = h w.

    weight (C, d); bias (C,), or (B, C) where an image adds to it. A constant map is zero throughout. No map but those
    of the chosen classes is made: P is the classifier of a weighted mean of tokens, since interpolation is linear too.
    """
    rows, columns = (interpolation(cells, side, x) for cells in grid)
    share = torch.outer(rows.mean(0), columns.mean(0)).flatten()  # of each token in the mean of a map of `side`
    bias = bias.expand(len(x), -1)
    mean = (share.expand(len(x), 1, -1) @ x).squeeze(1)  # in a product that copies no tokens
    p = (mean @ weight.T + bias).softmax(1)
    p, likeliest = p.topk(min(TOP, max(len(weight) // 2, 1)))
    taken = torch.ones_like(p, dtype=torch.bool)
    taken[:, 1:] = (entropy(p) >= SURE)[:, None]
    maps = response_maps(x, weight[likeliest], bias.gather(1, likeliest))
    chosen = (maps * taken[..., None]).sum(1) / taken.sum(1, keepdim=True)
    return min_max(rows @ chosen.unflatten(1, grid) @ columns.T)


def entropy(p: Tensor) -> Tensor:
    """-sum p log p in nats of p (B, K), which need not sum to 1: (B,)."""
    return torch.special.entr(p).sum(1)


def min_max(maps: Tensor) -> Tensor:
    """Maps (B, h, w) brought to [0, 1]; a constant one becomes 0, and so does one that is constant up to rounding."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = high - low
    constant = spread <= CONSTANT * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0, (maps - low) / torch.where(constant, 1, spread))


def peaks(maps: Tensor) -> Tensor:
    """(B, h, w) bool of maps (B, h, w): the highest of its 3 x 3, of equal ones the first, and at least the mean.

    So of two peaks none lies beside the other, and a map that was interpolated from fewer cells has no more peaks than
    cells: it is linear along each axis between two of them, so that one lies within a step of each peak.
    """
    cells = torch.arange(maps[0].numel(), device=maps.device).view_as(maps[0])
    highest = F.max_pool2d(maps[:, None], 3, stride=1, padding=1, return_indices=True)[1][:, 0]
    return (highest == cells) & (maps >= maps.mean((1, 2), keepdim=True))
