"""PLL-FG: attributes of candidates against explicit products, attention against a loop, candidates told apart."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.params import read_block
from tests.training.cache import Plan
from tests.training.methods.test_proden import SEPARABLE, three_candidates, truth_of_train
from training.data import Cache
from training.data.attributes import Attributes
from training.data.bank import Bank
from training.layers.logistic import as_probabilities
from training.layers.partial_labels import plausible
from training.loop import predict, total_loss
from training.methods import NotPossible, pll_fg
from training.methods.pll_fg import AttributeAttention, Settings, attribute_loss, compare_candidates, easy_loss
from training.regimes import hide_test

Planted = Callable[[Plan], Cache]
QUICK: dict[str, Any] = {"lr": [0.01], "weight_decay": [0.3], "batch_size": 16, "precision": "fp32"}
TABLE = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 1, 0]]).bool()  # 3 classes, 5 attributes


def made(cache: Cache, **knobs: Any) -> AttributeAttention:
    """One whose every part speaks."""
    model: Any = pll_fg.fit(cache, Settings(**QUICK, epochs=0, **knobs), 0).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_shared_and_lacked_are_the_products_over_candidates() -> None:
    q = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.4, 0.0, 0.6]])
    told = compare_candidates(q, q > 0, TABLE)
    assert told.shared[0].equal(TABLE[0] & TABLE[1])  # of two, the logical and
    assert told.lacked[3].equal(~TABLE[0] & ~TABLE[2])
    for image in range(len(q)):
        mine = TABLE[q[image] > 0].float()
        shared, lacked = mine.prod(0), (1 - mine).prod(0)
        weight = (1 - shared - lacked) * (q[image] @ TABLE.float())
        assert told.shared[image].float().equal(shared)
        assert told.lacked[image].float().equal(lacked)
        torch.testing.assert_close(told.weight[image], weight / weight.sum().clamp(min=1e-12))


def test_many_candidates_are_counted_exactly_in_half_precision_too() -> None:
    table = torch.ones(700, 2, dtype=torch.bool)
    table[-1, 1] = False
    with torch.autocast("cpu", torch.bfloat16):
        told = compare_candidates(torch.full((1, 700), 1 / 700), torch.ones(1, 700, dtype=torch.bool), table)
    assert told.shared.tolist() == [[True, False]]  # 699 of 700 have it, which bfloat16 cannot tell from all


def by_hand(model: AttributeAttention, x: Tensor, mask: Tensor, q: Tensor) -> Tensor:
    """E (T,) of one image's standardised nodes x (T, d), by all of F."""
    candidates = plausible(q[None], model.theta)[0]
    told = compare_candidates(q[None], candidates[None], model.table)
    scores = []
    for node in x:
        shown = [F.cosine_similarity(node, prototype, dim=0) / model.temperature for prototype in model.prototypes]
        scores.append(sum(w * f for w, f in zip(told.weight[0], shown, strict=True)))
    return torch.stack([torch.as_tensor(score) for score in scores]).masked_fill(~mask, -math.inf).softmax(0)


@pytest.mark.slow
def test_distinct_attributes_steer_the_attention_of_training(planted: Planted) -> None:
    cache = planted(Plan(classes=6, noise=0.2))
    model, told = made(cache).train(), three_candidates(cache)
    images = told.images("train")[:5]
    batch = told.batch(images)
    output = model(batch)
    assert output.node_scores is not None
    torch.testing.assert_close(output.node_scores.sum(1), torch.ones(5))
    x = model.local(batch.l)
    for image in range(5):
        attention = by_hand(model, x[image], batch.lm[image], batch.target[image])
        torch.testing.assert_close(output.node_scores[image, 1:], attention, atol=1e-5, rtol=1e-4)
        f = model.whole(batch.g[image]) + attention @ model.value(x[image])
        torch.testing.assert_close(output.logits[image], model.classify(f), atol=1e-4, rtol=1e-4)
    assert output.node_scores[:, 1:].amax(1).min() > 0.2  # not even


def test_at_evaluation_what_the_first_look_leaves_open_is_looked_at_again(planted: Planted) -> None:
    cache = planted(Plan(classes=6, noise=0.2))
    model, batch = made(cache).eval(), cache.batch(cache.images("test")[:6])
    output = model(batch)
    x, seen = model.local(batch.l), []
    for image in range(6):
        mask = batch.lm[image]
        even = (mask / mask.sum()) @ model.value(x[image])
        p = model.classify(model.whole(batch.g[image]) + even).softmax(0)
        attention = by_hand(model, x[image], mask, p)
        seen.append(model.classify(model.whole(batch.g[image]) + attention @ model.value(x[image])))
    torch.testing.assert_close(output.logits, torch.stack(seen), atol=1e-4, rtol=1e-4)


def test_where_all_candidates_have_the_same_attributes_the_look_is_even(planted: Planted) -> None:
    cache = planted(Plan(classes=6, noise=0.2))
    model = made(cache)
    model.table = torch.ones_like(model.table)
    batch = three_candidates(cache).batch(cache.images("train")[:5])
    for mode in (True, False):
        scores = model.train(mode)(batch).node_scores
        assert scores is not None
        torch.testing.assert_close(scores[:, 1:], batch.lm / batch.lm.sum(1, keepdim=True))


def test_candidates_of_an_image_change_nothing_at_evaluation(planted: Planted) -> None:
    """A known way to cheat: attention by the candidates of the image that is judged."""
    cache = planted(Plan(classes=6, noise=0.2))
    model, images = made(cache).eval(), cache.images("train")
    plain, told = (model(one.batch(images)).logits for one in (cache, three_candidates(cache)))
    assert torch.equal(plain, told)


def test_one_class_for_each_image_is_cross_entropy_and_attributes(planted: Planted) -> None:
    cache = planted(Plan())
    model, batch = made(cache).train(), cache.batch(cache.images("train")[:8])
    output = model(batch)
    plain = F.cross_entropy(output.logits, batch.target)
    torch.testing.assert_close(output.losses["easy"], plain)  # all are easy
    torch.testing.assert_close(total_loss(output, batch.target, {"attributes": 0.0, "easy": 0.0}), plain)
    sure = batch.changed(target=as_probabilities(batch.target, 4))
    torch.testing.assert_close(total_loss(model(sure), sure.target, {"attributes": 0.0, "easy": 0.0}), plain)


def test_losses_are_over_what_is_certain() -> None:
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.05, 0.95], [0.3, 0.3, 0.4]])
    told = compare_candidates(q, plausible(q, 0.9), TABLE)
    shown = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    terms = []
    for image, candidates in enumerate(([0, 1], [2], [0, 1, 2])):
        for attribute in range(5):
            had = {bool(TABLE[c, attribute]) for c in candidates}
            if len(had) == 1:
                p = shown[image, attribute].sigmoid()
                terms.append(-(p if had == {True} else 1 - p).log())
    torch.testing.assert_close(attribute_loss(shown, told), torch.stack(terms).mean())
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(easy_loss(logits, q, 0.9), -logits[1].log_softmax(0)[2])
    assert easy_loss(logits, q, 0.96) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("attributes", "vote"), [("concepts", False), ("table", False), ("table", True)])
def test_it_tells_three_candidates_apart(planted: Planted, attributes: str, vote: bool) -> None:
    cache = planted(SEPARABLE)
    told = hide_test(three_candidates(cache))
    told = replace(told, split=np.where(told.split == "val", "unused", told.split))  # so that the last epoch is kept
    settings = Settings(**QUICK | {"lr": [0.02], "weight_decay": [3.0]}, epochs=20, attributes=attributes, vote=vote)
    model = pll_fg.fit(told, settings, 0).model
    assert truth_of_train(cache, told, predict(model, cache, torch.arange(len(cache.paths)))) >= 0.99


def test_attributes_are_of_the_bank_or_of_the_data_set(planted: Planted) -> None:
    cache = planted(Plan())
    bank, known = cache.part(Bank), pll_fg.Known.of(cache, Settings())
    rows = bank.kept & bank.own.any(1)
    assert known.table.equal(bank.own[rows].T)
    assert known.vectors is not None
    assert known.vectors.equal(bank.K[rows])
    told = pll_fg.Known.of(cache, Settings(attributes="table"))
    assert told.vectors is None
    assert told.table.equal(cache.part(Attributes).table)


def test_attributes_that_tell_nothing_apart_are_not_possible(planted: Planted) -> None:
    cache = planted(Plan())
    alike = cache.change(Attributes, table=torch.ones_like(cache.part(Attributes).table))
    with pytest.raises(NotPossible, match=r"attributes\.parquet names no attribute that some classes have and others"):
        pll_fg.fit(alike, Settings(attributes="table"), 0)
    none = cache.change(Bank, owners=torch.zeros_like(cache.part(Bank).own))
    with pytest.raises(NotPossible, match=r"the bank has no attribute"):
        pll_fg.fit(none, Settings(), 0)


def test_attributes_of_the_picture_vote_for_their_owners(planted: Planted) -> None:
    cache = planted(Plan(classes=6, noise=0.2))
    model = made(cache, vote=True, attributes="table").eval()
    batch = cache.batch(cache.images("test")[:4])
    g, prototypes = model.whole(batch.g), model.prototypes
    votes = torch.zeros(4, 6)
    for label in range(6):
        more = model.table[label].float() - model.table.float().mean(0)
        for image in range(4):
            shown = torch.stack([F.cosine_similarity(g[image], each, dim=0) for each in prototypes]) / 0.1
            votes[image, label] = (more / more.norm()) @ shown
    cosines = F.normalize(g, dim=-1) @ F.normalize(prototypes, dim=-1).T
    torch.testing.assert_close(model.votes(cosines), votes, atol=1e-5, rtol=1e-4)
    by_strength = []
    for strength in (0.0, 50.0):
        with torch.no_grad():
            assert model.strength is not None
            model.strength.fill_(strength)
        by_strength.append(model(batch).logits)
    assert by_strength[1].argmax(1).equal(votes.argmax(1))
    assert not torch.allclose(*by_strength)


def test_the_share_that_q_keeps_is_written_as_a_list() -> None:
    assert read_block("params.yaml", "x", {"rho": [0.5, 0]}, Settings).rho == (0.5, 0.0)


@pytest.mark.slow
def test_the_order_of_training_labels_tells_nothing(planted: Planted) -> None:
    """q is made of candidates alone: with other truths among the same candidates, the same fit."""
    cache = planted(Plan(classes=6))
    told = three_candidates(cache)
    y = cache.y.clone()
    y[cache.images("train")] = 0
    images = cache.images("test")
    fits = [pll_fg.fit(one, Settings(**QUICK, epochs=2), 0) for one in (told, replace(told, y=y))]
    assert torch.equal(*(predict(fit.model, cache, images) for fit in fits))
