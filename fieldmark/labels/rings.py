"""How the concepts an image shows change from its densest place outwards: information over rings.

A design of this project [design]. Of an image's local nodes n with concept distributions P_n, density rho_n and box
centres p_n:

  mu   = sum_n rho_n^gamma p_n / sum_n rho_n^gamma, or the place of the densest node;
  r_n  = |p_n - mu|; K rings of equal count (by mid-rank of r_n, so that nodes equally far share a ring) or of equal
         width; a ring without a node changes nothing;
  dH_k = H(mean P over rings 1..k) - H(mean P over rings 1..k-1), k = 2..K: an entropy change, of either sign;
  JS   = H(mean P over all) - sum_k n_k / N H(mean P over ring k) >= 0: what the ring tells about the concept.

The K values dH_2 .. dH_K, JS, in nats, do not change when the picture is turned or mirrored about mu.

Sectors of equal angle about mu are what circles are held against (evaluation/invariance.py); no stage stores them. With
a_n the angle of p_n - mu, from the x axis to the y axis, node n lies in sector floor(K a_n / 2 pi); one at mu has no
angle, and lies in every sector by the same share. Turning the picture about mu by the width of a sector moves each
sector to the next, which leaves JS as it was; other turns change all values, and mirroring the order of the sectors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.params import Labels

# Radii closer than this, in sides of the picture, are one radius.
SAME_RADIUS = 1e-4


def ring_centre(density: Tensor, places: Tensor, settings: Labels) -> Tensor:
    """mu (B, 2) of density (B, N) and places (B, N, 2); the plain mean where no node has any density."""
    if settings.ring_centre == "peak":
        return places[torch.arange(len(places)), density.argmax(dim=1)]
    share = density / density.amax(dim=1, keepdim=True).clamp(min=torch.finfo(density.dtype).tiny)
    share = torch.where(share.sum(dim=1, keepdim=True) > 0, share**settings.ring_gamma, 1.0)
    return (share[:, :, None] * places).sum(dim=1) / share.sum(dim=1, keepdim=True)


def group_radii(radii: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For radii (B, N), sorted: their order, and the first and last position of those of the same radius."""
    ordered, order = radii.sort(dim=1, stable=True)
    position = torch.arange(radii.shape[1]).expand_as(order)
    is_new = torch.ones_like(order, dtype=torch.bool)
    is_new[:, 1:] = ordered.diff(dim=1) > SAME_RADIUS
    is_last = is_new.roll(-1, dims=1)
    first = torch.where(is_new, position, 0).cummax(dim=1).values
    last = torch.where(is_last, position, radii.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return order, first, last


def ring_numbers(radii: Tensor, settings: Labels) -> Tensor:
    """(B, N) int64: the ring 0..K-1 of each node by its radius (B, N)."""
    if settings.ring_radii == "equal_width":
        widest = radii.amax(dim=1, keepdim=True).clamp(min=SAME_RADIUS)
        # Slightly inwards: a node on a ring's outer edge belongs to it.
        return ((radii - SAME_RADIUS) / widest * settings.rings).floor().clamp(0, settings.rings - 1).long()
    order, first, last = group_radii(radii)
    ring = (first + last + 1) * settings.rings // (2 * radii.shape[1])
    return torch.empty_like(ring).scatter_(1, order, ring)


def ring_gains(weights: Tensor, density: Tensor, places: Tensor, settings: Labels) -> Tensor:
    """(B, K) in nats, dH_2 .. dH_K, JS, of P (B, N, M), density (B, N) and places (B, N, 2) of local nodes; K = rings.

    A node that shows no concept (a row of zeros) counts as one that shows all alike.
    """
    radii = (places - ring_centre(density, places, settings)[:, None]).norm(dim=2)
    member = F.one_hot(ring_numbers(radii, settings), settings.rings).transpose(1, 2).to(weights)
    return region_gains(weights, member)


def region_gains(weights: Tensor, member: Tensor) -> Tensor:
    """(B, K), dH_2 .. dH_K, JS, of P (B, N, M), where member (B, K, N) says how much of each node lies in each region.

    It has a sum of 1 over regions.
    """
    _, nodes, concepts = weights.shape
    shown = weights.sum(dim=2).clamp(max=1)
    total = member @ weights + (member @ (1 - shown)[:, :, None]) / concepts  # (B, K, M)
    count = member.sum(dim=2)
    inside, count_inside = total.cumsum(dim=1), count.cumsum(dim=1)
    grown = torch.special.entr(inside / count_inside.clamp(min=1)[:, :, None]).sum(dim=2)
    # Before the first ring that has a node there is nothing to change from.
    first = grown.gather(1, (count_inside == 0).sum(dim=1, keepdim=True))
    grown = torch.where(count_inside > 0, grown, first)
    within = torch.special.entr(total / count.clamp(min=1)[:, :, None]).sum(dim=2)
    divergence = (grown[:, -1] - (count / nodes * within).sum(dim=1)).clamp(min=0)
    return torch.cat([grown.diff(dim=1), divergence[:, None]], dim=1)


def sector_members(places: Tensor, count: int) -> Tensor:
    """(B, count, N) float32: how much of each node lies in each sector; places (B, N, 2) are told from the centre."""
    angle = torch.atan2(places[..., 1], places[..., 0]) / (2 * math.pi) % 1
    member = F.one_hot((angle * count).floor().long().clamp(max=count - 1), count).transpose(1, 2).float()
    return torch.where((places.norm(dim=2) <= SAME_RADIUS)[:, None], 1 / count, member)


def sector_gains(weights: Tensor, density: Tensor, places: Tensor, settings: Labels) -> Tensor:
    """(B, K) in nats, as ring_gains, over sectors in the place of rings."""
    centred = places - ring_centre(density, places, settings)[:, None]
    return region_gains(weights, sector_members(centred, settings.rings).to(weights))
