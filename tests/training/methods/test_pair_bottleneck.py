"""Pairs of concepts at the same place: against a loop, a planted pair that is found, and the kinds of directions."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.data.bank import Bank
from training.data.projection import Projection
from training.data.tokens import Tokens
from training.layers.logistic import fit_logistic
from training.layers.nodes import training_sample
from training.loop import assess_split, predict
from training.methods import NotPossible, concept_bottleneck, pair_bottleneck
from training.methods.concept_bottleneck import farthest_first, is_concept
from training.methods.pair_bottleneck import PairBottleneck, Settings

Planted = Callable[[Plan], Cache]


def orthogonal(cache: Cache) -> Cache:
    """Concepts along axes of their own, and a projection that keeps the first D numbers of a token."""
    bank, projection = cache.part(Bank), cache.part(Projection)
    return cache.change(Bank, K=torch.eye(*bank.K.shape)).change(
        Projection, weight=torch.eye(*projection.weight.shape)
    )


def with_pair(cache: Cache, first: int, second: int) -> Cache:
    """Class 0 shows two axes in one cell, class 1 in two; both show each of them as often and as strongly."""
    tokens, draw = cache.part(Tokens), torch.Generator().manual_seed(0)
    cells = 0.3 * torch.randn(tokens.layers["tokens"].vectors.shape, generator=draw)
    for image, label in enumerate(cache.y.tolist()):
        here, there = torch.randperm(cells.shape[1], generator=draw)[:2].tolist()
        cells[image, here, first] += 3
        cells[image, here if label == 0 else there, second] += 3
    return cache.with_part(tokens.changed({**tokens.tensors(), "tokens": cells.half()}))


def fit(cache: Cache, **knobs: object) -> PairBottleneck:
    return cast(PairBottleneck, pair_bottleneck.fit(cache, Settings(l2=[0.01], **knobs), 0).model)


def test_an_entry_is_what_a_loop_over_places_says(planted: Planted) -> None:
    cache = planted(Plan())
    model, tokens = fit(cache, directions=5), cache.batch(cache.images("test")[:3]).tokens
    found = model.pairs(tokens)
    mean, directions = model.mean.double(), model.directions.double()
    for image in range(3):
        entries = []
        for j in range(5):
            for k in range(j, 5):
                total = 0.0
                for cell in tokens[image].double():
                    total += float((cell - mean) @ directions[:, j]) * float((cell - mean) @ directions[:, k])
                total /= tokens.shape[1]
                entries.append(math.copysign(math.sqrt(abs(total)), total) * (1 if j == k else math.sqrt(2)))
        assert found[image].tolist() == pytest.approx(entries, abs=1e-3)


@pytest.mark.slow
def test_a_planted_pair_is_found_that_no_concept_alone_tells(planted: Planted) -> None:
    plain = orthogonal(planted(Plan(classes=2, train=60, test=40, cue="none")))
    concept = is_concept(plain.part(Bank)).nonzero()[:, 0]
    first, second = concept[1].item(), concept[4].item()  # each along the axis of its row
    cache = with_pair(plain, int(first), int(second))
    model = fit(cache, directions=50, nec=1)
    assert assess_split(model, cache, "test")[0] > 0.95
    train, test = cache.images("train"), cache.images("test")
    first_order = [cache.batch(images).tokens.mean(1) for images in (train, test)]
    blind = fit_logistic(first_order[0], cache.y[train], first_order[1], cache.y[test], 2, [0.01])
    assert blind.history[0]["val_accuracy"] < 0.7
    pairs = torch.tensor([[0, 1]]).expand(len(test), 2)
    found = pair_bottleneck.pairs_add(model, Settings(), cache, test, pairs)
    assert found is not None
    adds, texts, more = found
    best = adds.abs().argmax(1, keepdim=True)
    assert {tuple(sorted(texts[k].tolist())) for k in adds.abs().argmax(1).tolist()} == {(first, second)}
    of_first = cache.y[test] == 0
    assert (adds.abs().max(1).values > 0).all()
    # Class 0 has more of the planted pair, class 1 less: that decides for it as much.
    assert more.gather(1, best)[of_first].float().mean() > 0.9
    assert more.gather(1, best)[~of_first].float().mean() < 0.1
    assert adds.sum(1)[of_first].mean() > 0
    assert adds.sum(1)[~of_first].mean() < 0


def test_what_pairs_add_is_the_decision_less_the_biases(planted: Planted) -> None:
    cache = planted(Plan())
    model, test = fit(cache, directions=6, nec=None), cache.images("test")
    found = pair_bottleneck.pairs_add(model, Settings(), cache, test, torch.tensor([[3, 1]]).expand(len(test), 2))
    assert found is not None
    logits, bias = predict(model, cache, test), model.linear.bias
    torch.testing.assert_close(
        found[0].sum(1) + bias[3] - bias[1], logits[:, 3] - logits[:, 1], atol=1e-3, rtol=1e-3
    )
    assert found[1].shape == (21, 2)
    entries = model.pairs(cache.batch(test).tokens)
    assert torch.equal(found[2], entries > model.standardise.mean)
    assert found[2].any()
    assert not found[2].all()
    bank = cache.part(Bank)
    assert is_concept(bank)[found[1]].all()
    other = fit(cache, directions=6, basis="pca")
    assert pair_bottleneck.pairs_add(other, Settings(), cache, test, torch.zeros(len(test), 2).long()) is None


def test_where_directions_lie(planted: Planted) -> None:
    cache = planted(Plan())
    tokens, weight = training_sample(cache).tokens.flatten(0, 1), cache.part(Projection).weight
    width = tokens.shape[1]
    models = {basis: fit(cache, directions=6, basis=basis) for basis in ("concepts", "pca", "span", "random")}
    for model in models.values():
        spread = ((tokens - model.mean) @ model.directions).std(0, correction=0)
        torch.testing.assert_close(spread, torch.ones(6), atol=1e-3, rtol=1e-3)

    def unit(directions: Tensor) -> Tensor:
        return F.normalize(directions, dim=0)

    model = models["concepts"]
    lifted = weight.T @ cache.part(Bank).K[model.row].T
    torch.testing.assert_close(unit(model.directions), unit(lifted), atol=1e-4, rtol=1e-4)
    onto = torch.linalg.pinv(weight) @ weight  # projects on what the projection sees: D of d dimensions

    def unseen(directions: Tensor) -> float:
        return float((unit(directions) - onto @ unit(directions)).norm(dim=0).max())

    assert weight.shape[0] < width
    assert unseen(models["span"].directions) < 1e-3
    assert unseen(models["random"].directions) > 0.1
    axes = np.linalg.eigh(np.cov(tokens.double().numpy().T))[1]
    leading = torch.from_numpy(axes[:, ::-1][:, :6].copy()).float()
    overlap = (unit(models["pca"].directions) * leading).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(6), atol=1e-2, rtol=0)


def test_concepts_that_differ_most_are_taken_first() -> None:
    K = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = farthest_first(K, 10).tolist()
    assert len(set(chosen)) == 10
    assert chosen[0] == min(range(30), key=lambda k: float(K[k] @ K.mean(0)))
    for place in range(1, 10):
        rest = set(range(30)) - set(chosen[:place])
        assert chosen[place] == min(rest, key=lambda k: max(float(K[k] @ K[other]) for other in chosen[:place]))
    assert sorted(farthest_first(K, 99).tolist()) == list(range(30))


def test_a_bottleneck_of_some_concepts_reads_those_that_differ_most(planted: Planted) -> None:
    cache = planted(Plan(concepts=10))
    settings = concept_bottleneck.Settings(l2=[0.1], concepts=5)
    model = concept_bottleneck.fit(cache, settings, 0).model
    bank = cache.part(Bank)
    assert torch.equal(model.row, is_concept(bank).nonzero()[:, 0][farthest_first(bank.K[is_concept(bank)], 5)])
    assert torch.equal(model.K, bank.K[model.row])
    test = cache.images("test")
    adds = concept_bottleneck.texts_add(
        cast(concept_bottleneck.ConceptBottleneck, model), settings, cache, test, torch.tensor([[0, 1]] * len(test))
    )
    assert adds.any(0).nonzero()[:, 0].tolist() == sorted(model.row.tolist())


def test_tokens_that_the_projection_does_not_take_are_named(planted: Planted) -> None:
    cache = planted(Plan())
    narrow = replace(cache.part(Projection), weight=torch.ones(32, 7))
    with pytest.raises(NotPossible, match=r"takes 7 numbers, and the deepest stored tokens have 36: add `head`"):
        pair_bottleneck.fit(cache.with_part(narrow), Settings(), 0)
    pair_bottleneck.fit(cache.with_part(narrow), Settings(basis="pca", l2=[0.1]), 0)  # which needs none
