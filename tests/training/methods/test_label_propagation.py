"""Against dense matrices and plain loops: what spreads, what a judged image hears, and what it never does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_sgc import dense
from training.data import Cache
from training.links import LinkSettings, senders
from training.loop import predict
from training.methods import label_propagation
from training.methods.label_propagation import FLOOR, Settings

Planted = Callable[[Plan], Cache]


@pytest.fixture
def cache(planted: Planted) -> Cache:
    return planted(Plan(classes=3, train=6, val=4, test=3))


def mean_of_heard(cache: Cache, settings: LinkSettings) -> Tensor:
    """P (n, n) float64: rows that sum to 1, or to 0 where an image hears nobody."""
    s = dense(cache, settings)
    diagonal = s.diagonal()
    heard = s / diagonal.sqrt()[:, None] / diagonal.sqrt()  # the scaling taken back
    heard = heard - torch.diag(heard.diagonal())
    return heard / heard.sum(1, keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize("sources", ["train", "all"])
@pytest.mark.parametrize(("alpha", "steps"), [(0.5, 1), (0.8, 2), (0.95, 7)])
def test_it_is_the_iteration_on_the_whole_graph(cache: Cache, sources: str, alpha: float, steps: int) -> None:
    settings = Settings(sources=sources, alpha=[alpha], steps=[steps])
    p, n = mean_of_heard(cache, settings), len(cache.paths)
    y = torch.zeros(n, 3, dtype=torch.float64)
    train, judged = cache.images("train"), cache.images("test")
    y[train] = F.one_hot(cache.y[train], 3).double()
    f = y
    for _ in range(steps):
        last, f = f, alpha * p @ f + (1 - alpha) * y
    share = (p @ last)[judged]
    torch.testing.assert_close(f[judged], alpha * share)  # as Zhou's: a judged image has no label of its own
    count = y.sum(0) + 1
    expected = (share / share.sum(1, keepdim=True).clamp(min=1e-12) + FLOOR * count / count.sum()).log()
    found = predict(label_propagation.fit(cache, settings, 0).model, cache, judged)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert set(senders(cache, settings).tolist()) >= set(train.tolist())


def test_one_step_is_a_vote_in_which_an_image_has_none(cache: Cache) -> None:
    settings, image = Settings(alpha=[0.5], steps=[1]), int(cache.images("train")[4])
    said = predict(label_propagation.fit(cache, settings, 0).model, cache, torch.tensor([image]))
    y = cache.y.clone()
    y[image] = (y[image] + 1) % 3
    model = label_propagation.fit(replace(cache, target=y), settings, 0).model
    again = predict(model, cache, torch.arange(len(cache.paths)))
    # But for what the prior says, which is of all of them.
    torch.testing.assert_close(again[image][None].exp(), said.exp(), atol=2 * FLOOR, rtol=0)
    assert not torch.allclose(again.exp(), predict(
        label_propagation.fit(cache, settings, 0).model, cache, torch.arange(len(cache.paths))
    ).exp(), atol=0.01)  # fmt: skip


def test_who_hears_nobody_is_told_how_frequent_classes_are(planted: Planted) -> None:
    cache = planted(Plan(classes=3, train=6, val=4, test=3, links=0))
    fewer = cache.split.copy()
    fewer[cache.images("train")[:5]] = "unused"
    lacking = replace(cache, split=fewer)
    model = label_propagation.fit(lacking, Settings(alpha=[0.5], steps=[3]), 0).model
    said = predict(model, lacking, lacking.images("test"))
    count = torch.bincount(cache.y[lacking.images("train")], minlength=3) + 1
    torch.testing.assert_close(said.softmax(1), (count / count.sum()).expand_as(said))


def test_probabilities_are_spread_as_they_are_told(cache: Cache) -> None:
    target = torch.full((len(cache.paths), 3), 1 / 3)
    told = replace(cache, target=target)
    model = label_propagation.fit(told, Settings(alpha=[0.8], steps=[3]), 0).model
    images = cache.images("test")
    said = predict(model, told, images).softmax(1)
    torch.testing.assert_close(said, torch.full_like(said, 1 / 3), atol=1e-4, rtol=0)
