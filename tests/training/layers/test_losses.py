import math

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn import functional as F

from training.layers.losses import (
    ALPHA,
    DELETION,
    DELTA,
    MARGIN,
    assignment_logits,
    capped_chamfer,
    chamfer,
    contrast_views,
    hausdorff,
    kl_from_normal,
    likeliest_class,
    margin_contrast,
    proxy_anchor,
    rank_hinge,
    reverse_cross_entropy,
)

GENERATOR = torch.Generator().manual_seed(0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=GENERATOR), dim=-1)


def test_kl_is_zero_for_the_normal_and_has_its_closed_form() -> None:
    mask = torch.tensor([[True, True, False]])
    zero = torch.zeros(1, 3, 4)
    assert kl_from_normal(zero, zero, mask) == 0
    mean, log_variance = torch.randn(1, 3, 4, generator=GENERATOR), torch.randn(1, 3, 4, generator=GENERATOR)
    ours = torch.distributions.Normal(mean[0, :2], (0.5 * log_variance[0, :2]).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_from_normal(mean, log_variance, mask), expected)
    assert expected > 0


def test_contrast_of_views_equals_a_loop() -> None:
    """Both directions; images 0, 2 and 3 are alike, so that they are no negatives of each other."""
    a, b, t = 3 * torch.randn(5, 4, generator=GENERATOR), torch.randn(5, 4, generator=GENERATOR), 0.3
    alike = torch.zeros(5, 5, dtype=torch.bool)
    alike[torch.tensor([[0], [2], [3]]), torch.tensor([0, 2, 3])] = True
    for mask in (None, alike):
        terms = []
        for one, other in ((a, b), (b, a)):
            for i in range(5):
                cosine = [float(F.cosine_similarity(one[i], other[j], dim=0)) / t for j in range(5)]
                kept = [value for j, value in enumerate(cosine) if j == i or mask is None or not mask[i, j]]
                terms.append(math.log(sum(math.exp(value) for value in kept)) - cosine[i])
        torch.testing.assert_close(float(contrast_views(a, b, t, mask)), sum(terms) / 10, atol=1e-5, rtol=1e-5)


def test_contrast_is_small_where_views_agree_and_log_n_where_all_are_equal() -> None:
    apart = torch.eye(6)
    assert contrast_views(apart, apart, 0.05) < 1e-6
    assert contrast_views(apart, apart.roll(1, dims=0), 0.05) > 10
    equal = torch.ones(6, 3)
    torch.testing.assert_close(float(contrast_views(equal, equal, 0.5)), math.log(6))
    assert contrast_views(equal[:1], equal[:1], 0.5) == 0


def test_contrast_does_not_mind_sides_or_order() -> None:
    a, b = torch.randn(7, 4, generator=GENERATOR), torch.randn(7, 4, generator=GENERATOR)
    alike = torch.tensor([0, 1, 0, 2, 1, 2, 3])[:, None] == torch.tensor([0, 1, 0, 2, 1, 2, 3])
    said, order = contrast_views(a, b, 0.5, alike), torch.randperm(7, generator=GENERATOR)
    torch.testing.assert_close(contrast_views(b, a, 0.5, alike), said)
    torch.testing.assert_close(contrast_views(a[order], b[order], 0.5, alike[order][:, order]), said)


def test_a_pair_that_is_alike_has_no_gradient() -> None:
    a = torch.randn(3, 4, generator=GENERATOR)
    b = torch.randn(3, 4, generator=GENERATOR).requires_grad_()
    alike = torch.zeros(3, 3, dtype=torch.bool)
    alike[0, 1] = alike[1, 0] = True
    # What image 0 alone says to b: of its own view and of image 2's, but of image 1's nothing.
    [gradient] = torch.autograd.grad(row_of(a, b, alike), b)
    assert gradient[1].abs().sum() == 0
    assert gradient[0].abs().sum() > 0
    assert gradient[2].abs().sum() > 0


def row_of(a: Tensor, b: Tensor, alike: Tensor) -> Tensor:
    """The part of the loss in which image 0 looks at the other side: what is left when the other rows hold still."""
    moving = torch.cat([a[:1].requires_grad_(), a[1:]])
    [seen] = torch.autograd.grad(contrast_views(moving, b, 0.5, alike), moving, create_graph=True)
    return (seen[0] * torch.arange(1.0, 5)).sum()


def test_contrast_is_of_full_precision_under_autocast() -> None:
    a, b = torch.randn(9, 16, generator=GENERATOR), torch.randn(9, 16, generator=GENERATOR)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = contrast_views(a, b, 0.01)
    assert torch.equal(narrow, contrast_views(a, b, 0.01))


def test_chamfer_equals_scipy_and_is_zero_for_the_same_graph() -> None:
    h, proxies = torch.randn(2, 5, 3, generator=GENERATOR), torch.randn(2, 4, 3, generator=GENERATOR)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for image, size in enumerate((5, 3)):
        distance = cdist(h[image, :size], proxies[image], "sqeuclidean")
        expected = (distance.min(1).mean() + distance.min(0).mean()) / 2
        torch.testing.assert_close(float(chamfer(h, mask, proxies)[image]), float(expected), atol=1e-5, rtol=1e-5)
    order = torch.randperm(5, generator=GENERATOR)
    every = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(chamfer(h, every, h[:, order]), torch.zeros(2), atol=1e-5, rtol=0)


def test_hausdorff_and_the_capped_distance_equal_a_loop() -> None:
    h, proxies = torch.randn(2, 5, 3, generator=GENERATOR), 2 * torch.randn(2, 4, 3, generator=GENERATOR)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for image, size in enumerate((5, 3)):
        distance = cdist(h[image, :size], proxies[image], "sqeuclidean")
        by_node, by_proxy = distance.min(1), distance.min(0)
        expected = max(by_node.max(), by_proxy.max())
        torch.testing.assert_close(float(hausdorff(h, mask, proxies)[image]), float(expected), atol=1e-5, rtol=1e-5)
        deleted = [DELETION + np.linalg.norm(x[image], axis=-1) for x in (h[:, :size], proxies)]
        cheaper = [np.minimum(*costs) for costs in zip((by_node, by_proxy), deleted, strict=True)]
        expected = np.mean([costs.mean() for costs in cheaper])
        found = capped_chamfer(h, mask, proxies)[image]
        torch.testing.assert_close(float(found), float(expected), atol=1e-5, rtol=1e-5)
        assert found < chamfer(h, mask, proxies)[image]  # something was deleted


def test_a_graph_is_at_no_distance_from_itself_whatever_the_order_of_its_nodes() -> None:
    h, order = torch.randn(2, 5, 3, generator=GENERATOR), torch.randperm(5, generator=GENERATOR)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    proxies = torch.randn(2, 4, 3, generator=GENERATOR)
    for distance in (chamfer, hausdorff, capped_chamfer):
        for image, size in ((0, 5), (1, 3)):
            itself = distance(h[:, :size], mask[:, :size], h[:, :size])[image]
            torch.testing.assert_close(itself, torch.tensor(0.0), atol=1e-5, rtol=0)
        moved = distance(h[:, order], mask[:, order], proxies.flip(1))
        torch.testing.assert_close(moved, distance(h, mask, proxies))


def test_assignment_is_the_highest_product_and_its_gradient_that_of_the_maximum() -> None:
    h = torch.randn(3, 5, 6, generator=GENERATOR, requires_grad=True)
    proxies = torch.randn(7, 6, generator=GENERATOR, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] + [False] * 4])
    weight = torch.randn(3, 7, generator=GENERATOR)
    ours = assignment_logits(h, mask, proxies)
    plain = torch.einsum("bnr,cr->bcn", h, proxies).masked_fill(~mask[:, None], -torch.inf).amax(2)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (h, proxies)),
        torch.autograd.grad((plain * weight).sum(), (h, proxies)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_likeliest_class_is_the_candidate_that_the_logits_favour() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    target = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])
    assert likeliest_class(target, logits).tolist() == [2, 1]
    assert likeliest_class(torch.tensor([1, 0]), logits).tolist() == [1, 0]


def test_margin_contrast_equals_a_loop_and_does_not_see_length() -> None:
    x, y = torch.randn(9, 5, generator=GENERATOR), torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1])
    x[3:5] = x[:2] + 0.1  # near ones of different classes and of one
    expected = 0.0
    for i in range(9):
        for j in range(9):
            cosine = float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
            expected += 1 - cosine if y[i] == y[j] else max(cosine - MARGIN, 0)
    found = margin_contrast(x, y)
    torch.testing.assert_close(float(found), expected / 81, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(margin_contrast(x * torch.rand(9, 1, generator=GENERATOR) * 100, y), found)


def test_margin_contrast_is_zero_where_classes_are_apart_and_one_half_for_two_at_right_angles() -> None:
    other = MARGIN * torch.tensor([1.0, 0.0]) + math.sqrt(1 - MARGIN**2) * torch.tensor([0.0, 1.0])
    apart = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]), other])
    torch.testing.assert_close(margin_contrast(apart, torch.tensor([0, 0, 1])), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert margin_contrast(torch.eye(2), torch.tensor([1, 1])) == 0.5
    assert margin_contrast(torch.eye(2), torch.tensor([0, 1])) == 0
    assert margin_contrast(torch.eye(1), torch.tensor([0])) == 0


def test_margin_contrast_weighs_by_how_likely_two_are_of_one_class() -> None:
    x, y = torch.randn(6, 5, generator=GENERATOR), torch.tensor([0, 1, 0, 2, 1, 0])
    torch.testing.assert_close(margin_contrast(x, F.one_hot(y, 3).float()), margin_contrast(x, y))
    half = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    pair = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    # Each image is surely of its own class; the two of one with probability 1/2.
    expected = 2 * (0.5 * (1 - 0.8) + 0.5 * (0.8 - MARGIN)) / 4
    torch.testing.assert_close(float(margin_contrast(pair, half)), expected)


def test_margin_contrast_is_of_full_precision_under_autocast() -> None:
    x, y = torch.randn(8, 64, generator=GENERATOR), torch.arange(8) % 2
    with torch.autocast("cpu", torch.bfloat16):
        inside = margin_contrast(x, y)
    assert torch.equal(inside, margin_contrast(x, y))


def proxy_anchor_by_loop(x: Tensor, proxies: Tensor, y: Tensor) -> float:
    cosine = [[float(F.cosine_similarity(one, proxy, dim=0)) for proxy in proxies] for one in x]
    drawn, pushed = [], []
    for c in range(len(proxies)):
        mine = [cosine[i][c] for i in range(len(x)) if y[i] == c]
        others = [cosine[i][c] for i in range(len(x)) if y[i] != c]
        if mine:
            drawn.append(math.log(1 + sum(math.exp(-ALPHA * (each - DELTA)) for each in mine)))
        pushed.append(math.log(1 + sum(math.exp(ALPHA * (each + DELTA)) for each in others)))
    return sum(drawn) / len(drawn) + sum(pushed) / len(pushed)


def test_proxy_anchor_is_its_double_sum_over_images_and_classes() -> None:
    """The last two of five classes have no image here."""
    x, proxies = (torch.randn(rows, 4, generator=GENERATOR) for rows in (6, 5))
    y = torch.tensor([0, 1, 1, 2, 0, 0])
    expected = torch.tensor(proxy_anchor_by_loop(x, proxies, y))
    torch.testing.assert_close(proxy_anchor(x, proxies, y), expected)
    torch.testing.assert_close(proxy_anchor(3 * x, 0.5 * proxies, y), expected)
    torch.testing.assert_close(proxy_anchor(x, proxies, F.one_hot(y, 5).float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(proxy_anchor(x, proxies, y), expected)
    assert (ALPHA, DELTA) == (32, 0.1)


def test_proxy_anchor_shares_an_image_out_among_its_candidates() -> None:
    x, proxies = (torch.randn(rows, 4, generator=GENERATOR) for rows in (2, 3))
    share = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    cosine = F.normalize(x, dim=1) @ F.normalize(proxies, dim=1).T
    drawn, pushed = (-ALPHA * (cosine - DELTA)).exp() * share, (ALPHA * (cosine + DELTA)).exp() * (1 - share)
    expected = (1 + drawn.sum(0)).log().mean() + (1 + pushed.sum(0)).log().mean()
    torch.testing.assert_close(proxy_anchor(x, proxies, share), expected)


def test_a_proxy_of_length_zero_is_drawn_to_its_images() -> None:
    y = torch.tensor([0, 0, 1, 1, 1])
    x = torch.eye(4)[y] + 0.3 * torch.randn(5, 4, generator=GENERATOR)
    proxies = torch.zeros(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(proxy_anchor(x, proxies, y), proxies)
    assert torch.isfinite(gradient).all()
    assert torch.equal((-gradient @ x.T).argmax(0), y)


def test_ranks_are_hinges_over_pairs_of_unequal_worth() -> None:
    scores, worth = (torch.randn(3, 5, generator=GENERATOR) for _ in range(2))
    worth[0, 3] = worth[0, 1]  # neither is told to be higher
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2] = False
    expected = 0.0
    for image in range(3):
        nodes = [node for node in range(5) if mask[image, node]]
        expected += sum(
            max(0.0, 1 - float(scores[image, j] - scores[image, i]))
            for i in nodes
            for j in nodes
            if worth[image, i] < worth[image, j]
        )
    torch.testing.assert_close(rank_hinge(scores, worth, mask), torch.tensor(expected / 3))
    in_order = torch.arange(5.0)[None]
    assert rank_hinge(2 * in_order, in_order, mask[:1]) == 0
    scores.requires_grad_()
    worth.requires_grad_()
    rank_hinge(scores, worth, mask).backward()
    assert worth.grad is None
    assert scores.grad is not None
    assert scores.grad[0].any()


def test_the_reverse_cross_entropy_draws_the_true_logit_up_and_ends_at_log_of_the_others() -> None:
    classes = 5
    z, y = torch.randn(6, classes, generator=GENERATOR, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
    turned = (-z.detach()).softmax(1)
    by_image = [
        -sum(float(turned[i, c].log()) / (classes - 1) for c in range(classes) if c != y[i]) for i in range(len(y))
    ]
    loss = reverse_cross_entropy(z, y)
    torch.testing.assert_close(loss, torch.tensor(float(np.mean(by_image))))
    torch.testing.assert_close(reverse_cross_entropy(z, F.one_hot(y, classes).float()), loss)
    (gradient,) = torch.autograd.grad(len(y) * loss, z)
    mine = F.one_hot(y, classes).bool()
    torch.testing.assert_close(gradient[mine], -turned[mine])
    sure = 60.0 * F.one_hot(y, classes).float()
    torch.testing.assert_close(reverse_cross_entropy(sure, y), torch.tensor(math.log(classes - 1)))
    assert loss > math.log(classes - 1)
    assert torch.equal(sure.argmax(1), y)
