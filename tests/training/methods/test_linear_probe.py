from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.layers import logistic
from training.layers.blocks import Standardise
from training.layers.logistic import fit_logistic, training_globals
from training.loop import assess_split, predict
from training.methods import linear_probe

STRENGTHS = [30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001]


def test_within_half_a_point_of_scikit_learn(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(classes=6, train=30, val=20, test=40, nodes=1, ragged=False, cue="global", noise=3.5))
    ours = linear_probe.fit(cache, linear_probe.Settings(l2=STRENGTHS), 0)

    x = {split: cache.globals(cache.images(split)).double().numpy() for split in ("train", "val", "test")}
    y = {split: cache.y[cache.images(split)].numpy() for split in x}
    mean, scale = x["train"].mean(0), np.sqrt(x["train"].var(0).mean())
    x = {split: (values - mean) / scale for split, values in x.items()}
    fits = []
    for strength in STRENGTHS:
        fitted = LogisticRegression(C=1 / (len(y["train"]) * strength), max_iter=5000).fit(x["train"], y["train"])
        fits.append((fitted.score(x["val"], y["val"]), -log_loss(y["val"], fitted.predict_proba(x["val"])), fitted))
    theirs = max(fits, key=lambda fit: fit[:2])[2].score(x["test"], y["test"])
    assert 0.4 < theirs < 0.95  # hard enough that the strength matters
    assert abs(assess_split(ours.model, cache, "test")[0] - theirs) <= 0.005


def test_separable_classes_are_learned_whole(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(cue="global", noise=0.3))
    assert assess_split(linear_probe.fit(cache, linear_probe.Settings(), 0).model, cache, "test")[0] == 1


@pytest.mark.slow
def test_every_view_is_fitted(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(views=3))
    mean = torch.cat([cache.globals(cache.images("train"), view) for view in range(3)]).mean(0)
    [standardise] = linear_probe.fit(cache, linear_probe.Settings(l2=[1.0]), 0).model.features.standardise
    torch.testing.assert_close(standardise.mean, mean)


@pytest.mark.parametrize(("views", "strengths"), [(1, logistic.STRENGTHS), (2, STRENGTHS[:6])])
def test_its_numbers_are_those_of_a_fit_written_out(
    planted: Callable[[Plan], Cache], views: int, strengths: Sequence[float]
) -> None:
    """Bit by bit: what other methods are held against moves no digit when the family grows."""
    cache = planted(Plan(noise=3.0, views=views))
    train, val, test = (cache.images(split) for split in ("train", "val", "test"))
    vectors, target = training_globals(cache)
    standardise = Standardise(vectors)
    x = torch.cat([standardise(cache.globals(train, view)) for view in range(views)])
    linear = fit_logistic(x, target, standardise(cache.globals(val)), cache.y[val], 4, strengths).linear
    with torch.no_grad():
        expected = linear(standardise(cache.globals(test)))
    settings = linear_probe.Settings(l2=list(strengths)) if views > 1 else linear_probe.Settings()
    assert torch.equal(predict(linear_probe.fit(cache, settings, 0).model, cache, test), expected)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_more_dimensions_than_rows_are_fitted_as_they_are(
    planted: Callable[[Plan], Cache], l2: float, views: int
) -> None:
    """What is found within the span of the rows is the minimum over all 500 dimensions."""
    cache = planted(Plan(train=10, dimension=500, nodes=1, ragged=False, cue="global", noise=3.0, views=views))
    vectors, target = training_globals(cache)
    x = Standardise(vectors)(vectors)
    direct = fit_logistic(x, target, torch.zeros(0, 500), target[:0], 4, [l2]).linear
    fitted = linear_probe.fit(cache, linear_probe.Settings(l2=[l2]), 0)
    found = cast(nn.Linear, cast(linear_probe.Probe, fitted.model).layer)
    objectives = []
    for layer in (found, direct):
        weight, bias = (one.detach().double().requires_grad_() for one in (layer.weight, layer.bias))
        loss = F.cross_entropy(x.double() @ weight.T + bias, target)
        objective = loss + l2 / 2 * weight.square().sum()
        for gradient in torch.autograd.grad(objective, (weight, bias)):
            assert gradient.abs().max() < 1e-4  # about where L-BFGS stops
        objectives.append(objective.item())
    assert objectives[0] == pytest.approx(objectives[1], abs=1e-6)
    assert fitted.history[0]["train_loss"] == pytest.approx(loss.item(), abs=1e-3)
    torch.testing.assert_close(found.weight, direct.weight, atol=2e-3, rtol=0)
