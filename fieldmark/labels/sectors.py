"""Sectors of equal angle about the densest place, in the place of rings: what circles are held against.

The values are those of rings.py, dH_2 .. dH_K and JS, over K sectors about the same centre mu [design]:

  a_n = the angle of p_n - mu, from the x axis to the y axis, in [0, 2 pi); sector floor(K a_n / 2 pi)

A node at mu has no angle, and lies in every sector by the same share. Turning the picture about mu by the width of a
sector moves each sector to the next, which leaves JS as it was; any other turn changes all values, and mirroring the
order of the sectors. No stage stores them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.labels.rings import SAME_RADIUS, region_gains, ring_centre
from fieldmark.params import Labels


def sector_members(places: Tensor, count: int) -> Tensor:
    """(B, count, N) float32: how much of each node lies in each sector; places (B, N, 2) are told from the centre."""
    angle = torch.atan2(places[..., 1], places[..., 0]) / (2 * math.pi) % 1
    member = F.one_hot((angle * count).floor().long().clamp(max=count - 1), count).transpose(1, 2).float()
    return torch.where((places.norm(dim=2) <= SAME_RADIUS)[:, None], 1 / count, member)


def sector_gains(weights: Tensor, density: Tensor, places: Tensor, settings: Labels) -> Tensor:
    """(B, K) in nats, as ring_gains; K = settings.rings."""
    centred = places - ring_centre(density, places, settings)[:, None]
    return region_gains(weights, sector_members(centred, settings.rings).to(weights))
