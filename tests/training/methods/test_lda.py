from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tests.training.cache import Plan
from training.data import Cache
from training.layers.blocks import Span
from training.layers.gaussian import Spread, discriminant
from training.loop import predict
from training.methods import lda
from training.methods.prototypes import class_means
from training.regimes import Shots

Planted = Callable[[Plan], Cache]


def drawn(sizes: list[int], dimension: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (m, F) and y (m,) of classes of these sizes, which spread unlike in each dimension; 20 more rows to judge."""
    rng = np.random.default_rng(dimension)
    y = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.standard_normal((len(sizes), dimension))
    x = centres[y] + rng.uniform(0.2, 2.0, dimension) * rng.standard_normal((len(y), dimension))
    return x, y, rng.standard_normal((20, dimension))


def ours(x: np.ndarray, y: np.ndarray, test: np.ndarray, shrinkage: float) -> np.ndarray:
    span = Span(torch.from_numpy(x))
    told = torch.from_numpy(np.eye(y.max() + 1)[y])
    means, covariance, known = class_means(span.into(torch.from_numpy(x)), told)
    weight, bias = discriminant(means, Spread(covariance, x.shape[1]), shrinkage, known)
    return (torch.from_numpy(test) @ span.back(weight).T + bias).numpy()


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dimension", [6, 90])
def test_equals_scikit_learn_s_with_equal_priors(dimension: int, shrinkage: float) -> None:
    """Solver lsqr, a fixed shrinkage; 90 dimensions are more than there are rows."""
    x, y, test = drawn([12] * 4, dimension)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.25] * 4).fit(x, y)
    expected = theirs.decision_function(test) - np.log(0.25)
    np.testing.assert_allclose(ours(x, y, test, shrinkage), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
def test_equals_scikit_learn_s_less_its_log_priors_where_classes_differ_in_size(shrinkage: float) -> None:
    x, y, test = drawn([4, 9, 20, 11], 6)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    expected = theirs.decision_function(test) - np.log(theirs.priors_)
    np.testing.assert_allclose(ours(x, y, test, shrinkage), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dimension", [32, 400])
def test_the_method_is_scikit_learn_s_on_standardised_vectors(planted: Planted, dimension: int) -> None:
    cache = planted(Plan(noise=3.0, views=2, dimension=dimension))
    fitted = lda.fit(cache, lda.Settings(shrinkage=[0.2]), 0)
    train, test = cache.images("train"), cache.images("test")
    x = torch.cat([cache.globals(train, view) for view in range(2)]).double().numpy()
    y = np.concatenate([cache.y[train].numpy()] * 2)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit((x - x.mean(0)) / x.var(0).mean() ** 0.5, y)
    of_test = (cache.globals(test).double().numpy() - x.mean(0)) / x.var(0).mean() ** 0.5
    expected = theirs.decision_function(of_test) - np.log(0.25)
    np.testing.assert_allclose(predict(fitted.model, cache, test), expected, atol=1e-3, rtol=1e-3)


def test_one_image_a_class_leaves_the_nearest_mean(planted: Planted) -> None:
    cache = Shots(shots=1).apply(planted(Plan(noise=3.0)), 0)
    train, test = cache.images("train"), cache.images("test")
    fitted = lda.fit(cache, lda.Settings(shrinkage=[0.1]), 0)
    nearest = cache.y[train][torch.cdist(cache.globals(test), cache.globals(train)).argmin(1)]
    assert torch.equal(predict(fitted.model, cache, test).argmax(1), nearest)


def test_a_class_without_images_is_never_said(planted: Planted) -> None:
    cache = planted(Plan(noise=3.0))
    split = cache.split.copy()
    split[(cache.y == 0).numpy() & (split == "train")] = "none"
    fitted = lda.fit(replace(cache, split=split), lda.Settings(shrinkage=[0.01]), 0)
    said = predict(fitted.model, cache, torch.arange(len(cache.paths)))
    assert torch.isfinite(said).all()
    assert (said.argmax(1) != 0).all()
