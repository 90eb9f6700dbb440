"""Known defects of reference code do what they are known for, and no more."""

import torch
from scipy.spatial.distance import cdist
from torch import nn
from torch.nn import functional as F

from training.layers.faults import BatchNorm, misplaced_edges, single_minimum
from training.layers.graphs import threshold_edges
from training.layers.losses import DELETION


def test_a_threshold_under_zero_links_all_unit_vectors_or_none() -> None:
    x = F.normalize(0.3 + torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).abs(), dim=-1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    every = (1 - torch.eye(6)).expand(3, 6, 6)
    assert torch.equal(misplaced_edges(x, mask, "similar")[..., 0], every)
    assert not misplaced_edges(x, mask, "complementary").any()
    assert not torch.equal(threshold_edges(x, mask, "similar")[..., 0], every)


def test_the_smallest_of_all_numbers_gives_one_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 3, generator=generator).requires_grad_()
    proxies = torch.randn(2, 4, 3, generator=generator)
    proxies[1] += 50  # no node is as near to a proxy as a feature of node 0 is to zero
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = single_minimum(h, mask, proxies)
    for image, size in enumerate((5, 3)):
        x = h.detach()[image]
        numbers = [*cdist(x[:size], proxies[image], "sqeuclidean").min(1), *(DELETION + x[0].abs()).tolist()]
        torch.testing.assert_close(found[image].item(), min(numbers) / (2 * size), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    moved = h.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert moved[0].sum() == 1
    assert moved[1].tolist() == [True, False, False, False, False]


def test_batch_norm_equals_that_of_pytorch_and_takes_one_row() -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    for seed in range(3):
        x = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) + seed
        torch.testing.assert_close(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.isnan(BatchNorm(4)(x[:1])).any()


def test_a_norm_that_nobody_puts_into_evaluation_mode_sees_the_batch() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    always = BatchNorm(4, always=True).eval()
    torch.testing.assert_close(always(x), F.batch_norm(x, None, None, training=True))
    assert torch.equal(always.mean, torch.zeros(4))
