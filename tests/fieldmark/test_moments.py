"""Moments against recursions on eigenvalues and explicit loops; the basis against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fieldmark import moments
from fieldmark.moments import CHUNK, POOLS, Basis, TokenSums, length_of, pool

WIDTH, DIRECTIONS = 12, 5
# More tokens than directions, and fewer: then A has no full rank.
COUNTS = (30, 3)


def draw_tokens(images: int = 3, count: int = 30, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, WIDTH, generator=chance) @ torch.randn(WIDTH, WIDTH, generator=chance)


def draw_basis() -> Basis:
    sums = TokenSums(WIDTH)
    sums.add(draw_tokens(20, seed=1))
    return sums.basis(DIRECTIONS)


BASIS = draw_basis()
BASES = {"isqrt": BASIS, "bilinear": None, "mean": None, "max": None}
IN_DOUBLE = Basis(BASIS.mean.double(), BASIS.directions.double())


def matrix_of(vector: Tensor) -> Tensor:
    """The symmetric matrix that an upper triangle stands for."""
    side = (math.isqrt(8 * len(vector) + 1) - 1) // 2
    matrix = torch.zeros(side, side, dtype=vector.dtype)
    place = 0
    for row in range(side):
        for column in range(row, side):
            value = vector[place] / (1 if row == column else math.sqrt(2))
            matrix[row, column] = matrix[column, row] = value
            place += 1
    return matrix


@pytest.mark.parametrize("count", COUNTS)
def test_isqrt_is_the_recursion_on_eigenvalues(count: int) -> None:
    tokens = draw_tokens(count=count).double()
    for image, found in zip(tokens, moments.isqrt(tokens, IN_DOUBLE), strict=True):
        z = (image - IN_DOUBLE.mean) @ IN_DOUBLE.directions
        centred = z - z.mean(dim=0)
        covariance = torch.stack([torch.outer(each, each) for each in centred]).mean(dim=0)
        trace = covariance.trace() + 1e-12
        values, vectors = torch.linalg.eigh(covariance / trace)
        y, inverse = values, torch.ones_like(values)
        for _ in range(5):
            step = (3 - inverse * y) / 2
            y, inverse = y * step, step * inverse
        expected = vectors @ y.diag() @ vectors.T * trace.sqrt()
        torch.testing.assert_close(matrix_of(found), expected, atol=1e-6, rtol=0)


def test_five_steps_come_near_the_root_where_its_rank_is_full() -> None:
    tokens = draw_tokens(count=400).double()
    root = matrix_of(moments.isqrt(tokens, IN_DOUBLE)[0])
    z = (tokens[0] - IN_DOUBLE.mean) @ IN_DOUBLE.directions
    covariance = (z - z.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(z)
    assert float((root @ root - covariance).norm() / covariance.norm()) < 0.05


def test_products_of_vectors_are_those_of_matrices() -> None:
    one, other, _ = pool("isqrt", draw_tokens(), BASIS).double()
    torch.testing.assert_close(one @ other, (matrix_of(one) * matrix_of(other)).sum())
    torch.testing.assert_close(one.norm(), matrix_of(one).norm())


def test_copies_of_one_token_have_no_covariance() -> None:
    copies = draw_tokens(count=1).expand(-1, 81, -1)
    assert float(pool("isqrt", copies, BASIS).norm(dim=1).max()) < 1e-5


@pytest.mark.parametrize("basis", [None, BASIS], ids=["as they are", "along directions"])
def test_bilinear_is_the_mean_of_outer_products(basis: Basis | None) -> None:
    tokens = draw_tokens()
    used = tokens.half().float()
    z = used if basis is None else (used - basis.mean) @ basis.directions
    for image, found in zip(z, pool("bilinear", tokens, basis), strict=True):
        products = torch.stack([torch.outer(each, each) for each in image]).mean(dim=0)
        expected = products.sign() * products.abs().sqrt()
        torch.testing.assert_close(matrix_of(found), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.norm(), expected.norm())
    twice = pool("bilinear", torch.cat([tokens, tokens], dim=1), basis)
    torch.testing.assert_close(twice, pool("bilinear", tokens, basis), atol=1e-4, rtol=1e-4)


def test_the_signed_root_comes_before_the_weight_of_a_pair() -> None:
    # Their mean product is 4 and 9 on the diagonal, -6 beside it.
    tokens = torch.tensor([[[2.0, -3.0], [-2.0, 3.0]]])
    expected = torch.tensor([[2, -math.sqrt(6) * math.sqrt(2), 3]])
    torch.testing.assert_close(pool("bilinear", tokens, None), expected)


def test_mean_and_largest() -> None:
    tokens = draw_tokens()
    used = tokens.half().float().numpy()
    np.testing.assert_allclose(pool("mean", tokens, None), used.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(pool("max", tokens, None), used.max(axis=1))


@pytest.mark.parametrize("kind", POOLS)
def test_the_order_of_tokens_does_not_count(kind: str) -> None:
    tokens = draw_tokens()
    mixed = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(pool(kind, mixed, BASES[kind]), pool(kind, tokens, BASES[kind]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", POOLS)
def test_an_image_has_the_same_bits_in_any_company(kind: str) -> None:
    tokens, basis = draw_tokens(images=2 * CHUNK + 3), BASES[kind]
    together = pool(kind, tokens, basis)
    assert together.shape == (len(tokens), length_of(kind, WIDTH, DIRECTIONS if basis else None))
    assert torch.equal(torch.cat([pool(kind, image[None], basis) for image in tokens]), together)
    assert torch.equal(pool(kind, tokens[5:23].flip(0), basis).flip(0), together[5:23])
    # As embed_tokens stores them.
    assert torch.equal(pool(kind, tokens.half(), basis), together)


def test_a_basis_is_the_mean_and_the_leading_directions_of_tokens() -> None:
    tokens = draw_tokens(40, seed=2)
    sums = TokenSums(WIDTH)
    for some in tokens.split(7):
        sums.add(some)
    basis = sums.basis(DIRECTIONS)
    rows = tokens.half().double().flatten(0, 1).numpy()
    np.testing.assert_allclose(basis.mean, rows.mean(axis=0), atol=1e-6)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    expected = vectors[:, ::-1][:, :DIRECTIONS]
    np.testing.assert_allclose(np.abs(expected.T @ basis.directions.numpy()), np.eye(DIRECTIONS), atol=1e-5)
    largest = basis.directions.gather(0, basis.directions.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    # Along them training tokens vary most, and not together.
    z = (rows - basis.mean.numpy()) @ basis.directions.numpy()
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.diag(values[::-1][:DIRECTIONS]), atol=1e-3)


def test_a_basis_is_known_by_its_numbers() -> None:
    again = draw_basis()
    assert again.sha256 == BASIS.sha256
    again.directions[0, 0] += 1e-6
    assert again.sha256 != BASIS.sha256
