"""LaBo: selection against brute force and its bounds, weights that are shares, and where they begin."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.concepts.selection import discriminability
from tests.training.cache import Plan
from training.data import Cache
from training.data.bank import Bank
from training.loop import predict
from training.methods import description_zero_shot, labo
from training.methods.concept_bottleneck import is_concept
from training.methods.labo import Settings

Planted = Callable[[Plan], Cache]


def bank_of(cache: Cache, vectors: np.ndarray, owners: np.ndarray) -> Bank:
    """A bank of these concepts alone: vectors (M, D), owners (M, C) bool."""
    bank, count = cache.part(Bank), len(vectors)
    return replace(
        bank,
        K=F.normalize(torch.from_numpy(vectors).float(), dim=1),
        kind=("visual",) * count,
        kept=torch.ones(count, dtype=torch.bool),
        owners=torch.from_numpy(owners),
    )


@pytest.mark.parametrize("seed", range(5))
def test_three_of_eight_are_nearly_as_good_as_the_best_three(planted: Planted, seed: int) -> None:
    rng, cache = np.random.default_rng(seed), planted(Plan())
    owners = np.zeros((8, 4), dtype=bool)
    owners[:, 1] = True
    bank = bank_of(cache, rng.standard_normal((8, 4)), owners)
    means = torch.from_numpy(rng.standard_normal((4, 4))).float() / 2
    settings = Settings(per_class=3, coverage=0.5, scale=5.0)
    chosen = labo.select(bank, means, settings).nonzero()[:, 0].tolist()
    K = bank.K.double().numpy()
    worth = []
    for row in 5.0 * K @ means.double().numpy().T:
        p = np.exp(row) / np.exp(row).sum()
        worth.append(math.log(4) + sum(share * math.log(share) for share in p))

    def value(of: tuple[int, ...]) -> float:
        covered = sum(max(max(0.0, float(K[i] @ K[k])) for k in of) for i in range(8))
        return sum(worth[k] for k in of) + 0.5 * covered

    best = max(value(three) for three in itertools.combinations(range(8), 3))
    assert len(chosen) == 3
    assert value(tuple(chosen)) >= (1 - 1 / math.e) * best
    assert value(tuple(chosen)) >= np.mean([value(three) for three in itertools.combinations(range(8), 3)])


def test_a_class_chooses_of_its_own_and_no_more_than_it_may(planted: Planted) -> None:
    cache = planted(Plan(concepts=6))
    bank = cache.part(Bank)
    means = torch.stack([cache.globals(cache.images("train")[cache.y[cache.images("train")] == c]).mean(0)
                         for c in range(4)])  # fmt: skip
    chosen = labo.select(bank, means, Settings(per_class=2))
    assert not (chosen & (bank.of_kind("name") | ~bank.kept | ~bank.own.any(1))).any()
    assert (bank.own & chosen[:, None]).sum(0).tolist() == [2] * 4
    assert torch.equal(labo.select(bank, means, Settings(per_class=6)), bank.kept & bank.own.any(1))


def test_how_well_a_concept_tells_classes_apart() -> None:
    """0 where all classes show it alike, ln C where one does; the published measure is .021 for [[1, 1], [1, 3]]."""
    similarity = np.array([[0.3, 0.3, 0.3], [1.0, -1.0, -1.0], [-0.2, -0.2, -0.2], [0.5, 0.1, 0.1]])
    found = discriminability(similarity, 100.0)
    assert found == pytest.approx([0, math.log(3), 0, math.log(3)], abs=1e-9)
    assert 0 < discriminability(similarity[3:], 1.0)[0] < math.log(3)
    assert np.isfinite(discriminability(-np.abs(similarity), 100.0)).all()  # where the published one is no number
    published = np.array([[1.0, 1.0], [1.0, 3.0]])
    share = published / (published.sum(0) * 2)  # S / (sum over k of S, times C)
    assert (share * np.log(share / (share.sum(1, keepdims=True) / 2))).sum(1)[0] == pytest.approx(0.021, abs=5e-4)
    assert discriminability(published, 1.0)[0] == pytest.approx(0, abs=1e-12)


def test_a_logit_is_a_weighted_mean_of_cosines(planted: Planted) -> None:
    cache = planted(Plan(concepts=5))
    fitted = labo.fit(cache, Settings(lr=[0.3], epochs=5), 0)
    shares, test = fitted.model.shares().detach(), cache.images("test")
    assert (fitted.model.weight != cache.part(Bank).own[fitted.model.row].T.float()).any()  # it has learned
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert (shares >= 0).all()
    cosines, logits = 100 * cache.globals(test) @ fitted.model.K.T, predict(fitted.model, cache, test)
    assert (logits <= cosines.max(1, keepdim=True).values + 1e-3).all()
    assert (logits >= cosines.min(1, keepdim=True).values - 1e-3).all()
    for image, c in itertools.product(range(3), range(4)):
        said = sum(float(shares[c, k] * cosines[image, k]) for k in range(len(fitted.model.K)))
        assert float(logits[image, c]) == pytest.approx(said, abs=1e-3)


def test_it_begins_where_classification_by_description_stands_if_all_own_as_many(planted: Planted) -> None:
    cache = planted(Plan(concepts=5, noise=2.0))
    test, start = cache.images("test"), Settings(epochs=0, lr=[0.1])
    described = predict(
        description_zero_shot.fit(cache, description_zero_shot.Settings(), 0).model, cache, test
    ).argmax(1)
    assert torch.equal(predict(labo.fit(cache, start, 0).model, cache, test).argmax(1), described)
    bank = cache.part(Bank)
    own = bank.own.clone()
    of_first = (bank.own[:, 0] & is_concept(bank)).nonzero()[:, 0]
    own[of_first[1:], 0] = False
    fewer = cache.with_part(replace(bank, owners=own))
    less, plain = (
        predict(fit.model, fewer, test).softmax(1)
        for fit in (
            labo.fit(fewer, start, 0),
            description_zero_shot.fit(fewer, description_zero_shot.Settings(), 0),
        )
    )
    assert not torch.equal(less.argsort(1), plain.argsort(1))


def test_what_texts_add_is_the_decision(planted: Planted) -> None:
    cache = planted(Plan(concepts=5))
    fitted, test = labo.fit(cache, Settings(lr=[0.3], epochs=3, per_class=2), 0), cache.images("test")
    pairs = torch.tensor([[2, 1]]).expand(len(test), 2)
    adds, logits = labo.texts_add(fitted.model, Settings(), cache, test, pairs), predict(fitted.model, cache, test)
    torch.testing.assert_close(adds.sum(1), logits[:, 2] - logits[:, 1], atol=1e-3, rtol=1e-4)
    chosen = torch.zeros(len(cache.part(Bank).K), dtype=torch.bool)
    chosen[fitted.model.row] = True
    assert not adds[:, ~chosen].any()


def test_a_bank_whose_concepts_no_class_owns_is_named(planted: Planted) -> None:
    cache = planted(Plan())
    bank = cache.part(Bank)
    with pytest.raises(UserError, match=r"tiny\.parquet: holds no kept concept that a class owns"):
        labo.fit(cache.with_part(replace(bank, owners=torch.zeros_like(bank.own))), Settings(), 0)
