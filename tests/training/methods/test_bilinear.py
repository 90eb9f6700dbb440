"""Bilinear pooling, against an explicit sum of outer products."""

import math

import pytest
import torch
from torch import Tensor

from tests.training.cache import GRID
from training.data import Batch
from training.data.tokens import as_shape
from training.layers.blocks import Standardise
from training.methods.bilinear import (
    Bilinear,
    Settings,
    products,
    signed_sqrt,
    vector_of,
    vector_of_symmetric,
)
from training.token_heads import Beside

WIDTH, CLASSES = 10, 3


def batch_of(tokens: Tensor) -> Batch:
    y = torch.zeros(len(tokens), dtype=torch.long)
    return Batch(y, y, {"tokens": tokens, "token_grid": as_shape(GRID)})


def made(symmetric: bool) -> tuple[Bilinear, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randn(4, 12, WIDTH)
    settings = Settings(hidden=5, symmetric=symmetric)
    head = Bilinear(Standardise(tokens.flatten(0, 1)), Beside(None), CLASSES, settings)
    torch.nn.init.normal_(head.classify.weight)
    return head.eval(), tokens


def test_it_sums_outer_products_takes_signed_roots_and_unit_length() -> None:
    head, tokens = made(symmetric=False)
    for image, x in enumerate(head.scale(tokens)):
        X = sum(torch.outer(head.where(token), head.what(token)) for token in x) / len(x)
        roots = torch.tensor([math.copysign(math.sqrt(abs(value) + 1e-10), value) for value in X.flatten().tolist()])
        expected = head.classify(roots / roots.square().sum().sqrt())
        torch.testing.assert_close(head(batch_of(tokens)).logits[image], expected)


def test_a_symmetric_one_has_the_lengths_and_products_of_the_whole_matrix() -> None:
    head, tokens = made(symmetric=True)
    a = head.where(head.scale(tokens))
    X = products(a, a)
    half, whole = vector_of_symmetric(X), vector_of(X)
    assert half.shape == (4, 15)
    torch.testing.assert_close(half @ half.T, whole @ whole.T)
    rooted = signed_sqrt(X[0])
    expected = torch.stack([rooted[i, j] * (1 if i == j else math.sqrt(2)) for i in range(5) for j in range(i, 5)])
    torch.testing.assert_close(half[0], expected / rooted.norm())
    torch.testing.assert_close(head.pool(head.scale(tokens)), half)


@pytest.mark.parametrize("symmetric", [False, True])
def test_neither_the_order_of_tokens_nor_how_often_they_come_matters(symmetric: bool) -> None:
    head, tokens = made(symmetric)
    expected = head(batch_of(tokens)).logits
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(batch_of(tokens[:, order])).logits, expected)
    torch.testing.assert_close(head(batch_of(tokens.repeat(1, 2, 1))).logits, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_image_has_unit_length_by_itself(symmetric: bool) -> None:
    head, tokens = made(symmetric)
    x = head.scale(tokens * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None, None])
    torch.testing.assert_close(head.pool(x).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(head.pool(x[:1]), head.pool(x)[:1])


def test_the_signed_root() -> None:
    torch.testing.assert_close(signed_sqrt(torch.tensor([4.0, -9.0, 0.0])), torch.tensor([2.0, -3.0, 0.0]))


@pytest.mark.parametrize("vector", [vector_of, vector_of_symmetric])
def test_the_gradient_is_finite_where_nothing_is_there(vector: object) -> None:
    for X in (torch.zeros(2, 3, 3), torch.diag_embed(torch.ones(2, 3))):  # nothing at all, and nothing off the diagonal
        X.requires_grad_()
        vector(X).sum().backward()  # type: ignore[operator]
        assert torch.isfinite(X.grad).all()
