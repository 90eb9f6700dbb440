"""Synthetic nodes in a graph network: what they hear, and that nothing of them is left."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.data.links import Links
from training.layers.features import Features
from training.layers.states import state_of
from training.links import Memory, senders
from training.loop import predict
from training.methods import Fitted, NotPossible, la_tag
from training.metrics import macro_accuracy
from training.regimes import LongTail

Planted = Callable[[Plan], Cache]
QUICK = {"epochs": 15, "weight_decay": [0.3], "hidden": 32, "precision": "fp32", "batch_size": 64, "lr": [3e-3]}


@pytest.fixture(scope="module")
def tailed(planted: Planted) -> Cache:
    plan = Plan(classes=4, train=40, val=8, test=40, cue="global", noise=2.0, dimension=16, links=8, linked=0.7)
    return LongTail(imbalance=10).apply(planted(plan), 0)


def fit(cache: Cache, **knobs: object) -> Fitted:
    return la_tag.fit(cache, la_tag.Settings(**{**QUICK, **knobs}), 0)


def test_synthetic_nodes_hear_the_likeliest_training_images(planted: Planted) -> None:
    plan = Plan(classes=4, train=60, val=8, test=8, cue="global", noise=0.6, dimension=16, links=8, linked=0.9)
    tailed = LongTail(imbalance=10).apply(planted(plan), 0)
    settings = la_tag.Settings(neighbours=3)
    features, memory = Features.measure(tailed, settings), Memory.of(tailed, settings)
    vectors = features.of(tailed, senders(tailed, settings))
    made, auc = la_tag.make_nodes(tailed, settings, features, memory, vectors, 0)
    assert made is not None
    sizes = torch.bincount(tailed.y[tailed.images("train")], minlength=4)
    assert torch.equal(made.told.sum(0).long(), sizes.max() - sizes)
    assert made.share == pytest.approx(len(made.x) / int(sizes.sum()))
    assert int((made.start[1:] - made.start[:-1]).max()) == 3
    train = set(tailed.part(Links).key[tailed.images("train")].tolist())
    assert set(made.source.tolist()) <= train
    assert made.score.min() > 0.5
    # Links carry the class, and so do those that are made up, more often than by chance.
    label = {key: int(y) for key, y in zip(tailed.part(Links).key.tolist(), tailed.y.tolist(), strict=True)}
    owner = torch.repeat_interleave(made.start[1:] - made.start[:-1])
    same = [label[key] == int(made.told[node].argmax()) for key, node in zip(made.source.tolist(), owner, strict=True)]
    chance = (made.told @ sizes.float()).sum() / len(made.told) / sizes.sum()
    assert np.mean(same) > 2 * chance
    assert auc > 0.7


@pytest.mark.slow
def test_it_does_not_forget_the_tail(tailed: Cache) -> None:
    test = tailed.images("test")
    y = tailed.y[test].numpy()
    plain, ours = (
        macro_accuracy(predict(fit(tailed, weight=weight).model, tailed, test).numpy(), y) for weight in (1e-6, 1.0)
    )
    assert ours > plain + 0.02


def test_nothing_of_synthetic_nodes_is_left_and_no_judged_image_has_a_part(tailed: Cache) -> None:
    fitted = fit(tailed)
    assert fitted.model.made is None
    assert 0.5 < fitted.chosen["link_auc"] <= 1
    settings = la_tag.Settings(**QUICK)
    again = la_tag.build(state_of(fitted.model), settings, 4)
    again.load_state_dict(state_of(fitted.model))
    images = tailed.images("test")
    assert torch.equal(predict(again, tailed, images), predict(fitted.model, tailed, images))
    blind = replace(tailed, split=np.where(tailed.split == "test", "unused", tailed.split))
    assert torch.equal(predict(fit(blind).model, tailed, images), predict(fitted.model, tailed, images))


def test_without_links_between_training_images_it_says_so(tailed: Cache) -> None:
    part = tailed.part(Links)
    none = {"near": part.incoming["near"]._replace(start=torch.zeros_like(part.incoming["near"].start))}
    with pytest.raises(NotPossible, match=r"links/near: links no two training images"):
        fit(tailed.change(Links, incoming=none))


@pytest.mark.parametrize("knobs", [{"sources": "all"}, {"conv": "gat", "heads": 3}])
def test_what_it_cannot_be(knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"train|do not divide"):
        la_tag.Settings(**knobs)
