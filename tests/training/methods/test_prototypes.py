from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import prototypes
from training.methods.prototypes import Settings, class_means, whitening

X = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 4.0], [5.0, 6.0]])
VALUES = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def test_means_and_spread_by_hand() -> None:
    means, within, seen = class_means(X, VALUES)
    assert means[:2].tolist() == [[1.0, 0.0], [5.0, 5.0]]
    assert seen.tolist() == [True, True, False]
    torch.testing.assert_close(within, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))


def test_means_of_probabilities_equal_a_loop() -> None:
    x, values = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.eye(3).repeat(3, 1) * 0.4 + 0.2
    means, within, _ = class_means(x, values)
    expected = torch.zeros(4, 4)
    for label in range(3):
        mean = sum((values[i, label] * x[i] for i in range(9)), torch.zeros(4)) / values[:, label].sum()
        torch.testing.assert_close(means[label], mean)
        expected += sum((values[i, label] * torch.outer(x[i] - mean, x[i] - mean) for i in range(9)), torch.zeros(4, 4))
    torch.testing.assert_close(within, expected / 9)


def test_whitening_makes_the_spread_one() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    within = x.T @ x / 50
    whiten = whitening(within, 1e-6)
    torch.testing.assert_close(whiten @ within @ whiten, torch.eye(4), atol=1e-4, rtol=1e-4)


def test_much_shrinkage_is_the_nearest_mean_by_plain_cosine(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(noise=3.0))
    train, test = cache.images("train"), cache.images("test")
    fitted = prototypes.fit(cache, Settings(shrinkage=[1e6], scale=[10.0]), 0)
    mean = cache.globals(train).mean(0)
    means = torch.stack([(cache.globals(train)[cache.y[train] == label] - mean).mean(0) for label in range(4)])
    expected = 10 * F.normalize(cache.globals(test) - mean, dim=-1) @ F.normalize(means, dim=-1).T
    torch.testing.assert_close(predict(fitted.model, cache, test), expected, atol=1e-3, rtol=1e-3)


def test_the_scale_changes_no_prediction(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(noise=3.0))
    low, high = (
        predict(prototypes.fit(cache, Settings(shrinkage=[0.1], scale=[s]), 0).model, cache, cache.images("test"))
        for s in (1.0, 50.0)
    )
    assert torch.equal(low.argmax(1), high.argmax(1))


def test_a_class_without_images_is_never_the_nearest(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan())
    split = cache.split.copy()
    split[(cache.y == 0).numpy() & (split == "train")] = "none"
    fitted = prototypes.fit(replace(cache, split=split), Settings(scale=[10.0]), 0)
    assert (predict(fitted.model, cache, cache.images("test"))[:, 0] == -10).all()
