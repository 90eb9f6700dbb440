"""PRODEN on planted data: q follows the model, one candidate is cross entropy, and candidates are told apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.layers.partial_labels import among_candidates
from training.loop import fit_epochs, predict
from training.methods import linear_probe, proden
from training.regimes import Partial, hide_test

Planted = Callable[[Plan], Cache]
QUICK = {"lr": [0.02], "weight_decay": [0.1], "batch_size": 16, "precision": "fp32"}
SEPARABLE = Plan(classes=6, train=20, cue="both", noise=0.2)


def three_candidates(cache: Cache) -> Cache:
    """Each training image has its class and two others, drawn, with a third each."""
    train = cache.images("train")
    others = torch.rand(len(train), len(cache.classes), generator=torch.Generator().manual_seed(3))
    chosen = others.scatter(1, cache.y[train][:, None], 2.0).topk(3, dim=1).indices
    target = F.one_hot(cache.y, len(cache.classes)).float()
    target[train] = torch.zeros_like(others).scatter(1, chosen, 1 / 3)
    return replace(cache, target=target)


def truth_of_train(cache: Cache, told: Cache, logits: Tensor) -> float:
    train = cache.images("train")
    return (among_candidates(told.target[train], logits[train]).argmax(1) == cache.y[train]).float().mean().item()


@pytest.mark.slow
def test_it_tells_three_candidates_apart(planted: Planted) -> None:
    cache = planted(SEPARABLE)
    told = hide_test(three_candidates(cache))
    assert set((told.target[cache.images("train")] > 0).sum(1).tolist()) == {3}
    before = told.target.clone()
    model = proden.fit(told, proden.Settings(**QUICK, epochs=12), 0).model
    assert truth_of_train(cache, told, predict(model, cache, torch.arange(len(cache.paths)))) >= 0.99
    assert torch.equal(told.target, before)  # what is found stays within the fit


def test_with_one_candidate_it_is_cross_entropy(planted: Planted) -> None:
    """Under classes, sure probabilities, and a regime that adds no candidate."""
    cache, settings = planted(SEPARABLE), proden.Settings(**QUICK, epochs=3)
    images = torch.arange(len(cache.paths))
    features = proden.Features.measure(cache, settings)

    def build() -> torch.nn.Module:
        return linear_probe.Probe(features, proden.layer_of(features.size, len(cache.classes), 0))

    plain = predict(fit_epochs(build, cache, settings, 0).model, cache, images)
    alone = Partial(wrong="random", q=0.0).apply(cache, 0)
    assert torch.equal(predict(proden.fit(cache, settings, 0).model, cache, images), plain)
    torch.testing.assert_close(predict(proden.fit(alone, settings, 0).model, cache, images), plain)


@pytest.mark.parametrize("hidden", [0, 24])
def test_q_moves_to_what_the_step_said(planted: Planted, hidden: int) -> None:
    """Two epochs of one step each, by hand. Without val the last one is kept."""
    cache = planted(Plan(train=4))
    split = np.where(np.isin(cache.split, ("choose", "val")), "unused", cache.split)
    told = replace(Partial(wrong="random", q=0.5).apply(cache, 1), split=split)
    settings = proden.Settings(
        lr=[0.1], weight_decay=[0.0], batch_size=99, precision="fp32", epochs=2, clip_norm=1e9, hidden=hidden
    )
    fitted: Any = proden.fit(told, settings, 0)
    torch.manual_seed(0)
    features = proden.Features.measure(told, settings)
    layer = proden.layer_of(features.size, len(cache.classes), hidden)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    x, q = features.of(told, told.images("train")), told.target[told.images("train")]
    for rate in (0.1, 0.05):  # half a cosine
        optimiser.param_groups[0]["lr"] = rate
        logits = layer(x)
        loss = -(q * logits.log_softmax(1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        q = among_candidates(q, logits.detach())
    assert fitted.history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    # Adam's steps are as long where a gradient is next to nothing, and there rounding says where they go.
    torch.testing.assert_close(fitted.model.layer(x), layer(x), atol=1e-2, rtol=1e-2)
