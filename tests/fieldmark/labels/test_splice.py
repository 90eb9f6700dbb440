import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import Tensor

from fieldmark.labels import splice
from fieldmark.labels.splice import TOLERANCE, centre, decompose, gradient, objective, violation


def units(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(2, 12), st.sampled_from([0.01, 0.1, 0.25, 1.0]), st.integers(0, 10**6))
def test_every_vector_is_at_the_optimum(concepts: int, dimension: int, sparsity: float, seed: int) -> None:
    targets, dictionary = units(7, dimension, seed=seed), units(concepts, dimension, seed=seed + 1)
    weights = decompose(targets, dictionary, sparsity)
    slope = gradient(weights, targets, dictionary, sparsity)
    assert weights.min() >= 0
    assert slope[weights > 0].abs().max() <= TOLERANCE if (weights > 0).any() else True
    assert slope.min() >= -TOLERANCE
    # Nothing near is better.
    best = objective(weights, targets, dictionary, sparsity)
    step = 0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
    assert (objective((weights + step).clamp(min=0), targets, dictionary, sparsity) >= best - 1e-5).all()


def test_scikit_learn_agrees() -> None:
    dimension, sparsity = 24, 0.2
    dictionary = centre(units(90, dimension) + 0.7 * units(dimension, seed=1), torch.zeros(dimension))
    dictionary = centre(dictionary, dictionary.mean(dim=0))
    targets = units(12, dimension, seed=2)
    lasso = Lasso(alpha=sparsity / (2 * dimension), positive=True, fit_intercept=False, tol=1e-10, max_iter=100_000)
    columns = dictionary.double().numpy().T
    theirs = torch.from_numpy(np.stack([lasso.fit(columns, target).coef_ for target in targets.double().numpy()]))
    ours = decompose(targets, dictionary, sparsity).double()
    # More concepts than dimensions: weights need not be unique, objective and reconstruction are.
    exact = (targets.double(), dictionary.double(), sparsity)
    torch.testing.assert_close(objective(ours, *exact), objective(theirs, *exact), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours @ exact[1], theirs @ exact[1], atol=1e-3, rtol=0)


def test_few_planted_concepts_are_found() -> None:
    dictionary = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q[:20]
    planted = torch.zeros(5, 20)
    for row in range(5):
        planted[row, [row, row + 5, row + 11]] = torch.tensor([0.3, 0.5, 0.8])
    found = decompose(planted @ dictionary, dictionary, 0.01)
    assert torch.equal(found > 0, planted > 0)
    torch.testing.assert_close(found, planted, atol=1e-2, rtol=0)


def test_too_much_sparsity_leaves_nothing() -> None:
    targets, dictionary = units(6, 8), units(30, 8, seed=1)
    most = 2 * float((targets @ dictionary.T).max())
    assert decompose(targets, dictionary, most).max() == 0
    assert decompose(targets, dictionary, 0.9 * most).max() > 0


@pytest.mark.slow
def test_support_shrinks_with_sparsity() -> None:
    targets, dictionary = units(20, 16), units(40, 16, seed=1)
    support = [float((decompose(targets, dictionary, each) > 0).sum()) for each in (0.05, 0.1, 0.4, 1.0)]
    assert support == sorted(support, reverse=True)
    assert support[0] > support[-1]


def test_reconstruction_returns_what_was_centred() -> None:
    dictionary, mean = units(10, 16), 0.7 * units(16, seed=1)
    target = centre(torch.rand(4, 10, generator=torch.Generator().manual_seed(2)) @ dictionary, torch.zeros(16))
    # A vector of which `target` is the centred one, of unit length: x = mean + length * target.
    product = target @ mean
    length = -product + (product.square() - mean @ mean + 1).sqrt()
    x = mean + length[:, None] * target
    torch.testing.assert_close(centre(x, mean), target, atol=1e-5, rtol=0)
    found = decompose(target, dictionary, 1e-3) @ dictionary
    rebuilt = length[:, None] * torch.nn.functional.normalize(found, dim=1) + mean
    assert torch.cosine_similarity(rebuilt, x).min() > 0.9999


@pytest.mark.slow
def test_large_dictionaries_and_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, dictionary = units(5, 12), units(40, 12, seed=1)
    expected = decompose(targets, dictionary, 0.05) @ dictionary
    assert torch.equal(decompose(targets, dictionary, 0.05) @ dictionary, expected)
    monkeypatch.setattr(splice, "GRAM_CONCEPTS", 1)
    torch.testing.assert_close(decompose(targets, dictionary, 0.05) @ dictionary, expected, atol=1e-3, rtol=0)
    monkeypatch.setattr(splice, "BLOCK", 1)
    monkeypatch.setattr(splice, "WORKING_SET", 2)
    torch.testing.assert_close(decompose(targets, dictionary, 0.05) @ dictionary, expected, atol=1e-3, rtol=0)


def test_twins_and_empty_concepts() -> None:
    dictionary = torch.cat([units(5, 8), units(5, 8), torch.zeros(1, 8)])
    targets = torch.cat([units(3, 8, seed=1), torch.zeros(1, 8)])
    weights = decompose(targets, dictionary, 0.1)
    assert violation(weights, gradient(weights, targets, dictionary, 0.1)).max() <= TOLERANCE
    assert weights[3].max() == 0
    assert weights[:, 10].max() == 0


def test_numbers_that_are_not_finite_do_not_pass_for_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "MAX_ROUNDS", 3)
    monkeypatch.setattr(splice, "MAX_SWEEPS", 3)
    with pytest.raises(RuntimeError, match="1 vectors are not solved"):
        decompose(torch.stack([torch.full((4,), torch.nan), *units(2, 4)]), units(3, 4, seed=1), 0.1)
