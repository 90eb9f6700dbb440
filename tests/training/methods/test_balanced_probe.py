"""Logistic regression of unequal classes, against scikit-learn and the other form of the same thing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.training.cache import Plan
from training.data import Cache
from training.layers.features import Features
from training.loop import predict
from training.methods import balanced_probe, linear_probe
from training.metrics import macro_accuracy
from training.regimes import LongTail

Planted = Callable[[Plan], Cache]
PLAN = Plan(classes=6, train=40, val=10, test=40, cue="global", noise=2.0, dimension=16)


@pytest.fixture(scope="module")
def tailed(planted: Planted) -> Cache:
    return LongTail(imbalance=20).apply(planted(PLAN), 0)


def test_the_prior_in_the_loss_is_the_prior_taken_off_the_logits(tailed: Cache) -> None:
    """The two forms of logit adjustment have one minimum where the intercept is free."""
    images, l2 = tailed.images("test"), [0.01]
    plain = predict(linear_probe.fit(tailed, linear_probe.Settings(l2=l2), 0).model, tailed, images)
    count = torch.bincount(tailed.y[tailed.images("train")], minlength=6)
    for tau in (0.0, 1.0, 2.0):
        ours = predict(balanced_probe.fit(tailed, balanced_probe.Settings(l2=l2, tau=tau), 0).model, tailed, images)
        wanted = plain - tau * (count / count.sum()).log()
        torch.testing.assert_close(ours.softmax(1), wanted.softmax(1), atol=2e-3, rtol=1e-2)


def test_weights_are_those_of_scikit_learn(tailed: Cache) -> None:
    settings = balanced_probe.Settings(balance="weights", l2=[0.05])
    features, train, test = Features.measure(tailed, settings), tailed.images("train"), tailed.images("test")
    x, y = features.of(tailed, train).numpy(), tailed.y[train].numpy()
    other = LogisticRegression(C=1 / (len(y) * 0.05), class_weight="balanced", max_iter=2000, tol=1e-8).fit(x, y)
    ours = predict(balanced_probe.fit(tailed, settings, 0).model, tailed, test).softmax(1)
    wanted = other.predict_proba(features.of(tailed, test).numpy())
    torch.testing.assert_close(ours.double(), torch.from_numpy(wanted).double(), atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("balance", ["prior", "weights"])
def test_it_does_not_forget_the_tail(tailed: Cache, balance: str) -> None:
    test, y = tailed.images("test"), tailed.y[tailed.images("test")].numpy()
    plain, ours = (
        macro_accuracy(predict(module.fit(tailed, settings, 0).model, tailed, test).numpy(), y)
        for module, settings in (
            (linear_probe, linear_probe.Settings(l2=[0.1])),
            (balanced_probe, balanced_probe.Settings(l2=[0.1], balance=balance)),
        )
    )
    assert ours > plain + 0.05


def test_a_class_without_images_has_the_prior_of_one_and_no_weight() -> None:
    told = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(balanced_probe.log_prior(told).exp(), [2.5 / 4, 1.5 / 4, 1 / 4])
    weighed = balanced_probe.weighed(told)
    np.testing.assert_allclose(weighed.sum(0), [2, 2, 0], rtol=1e-6)
