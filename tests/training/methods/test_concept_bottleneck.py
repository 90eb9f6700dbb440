from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Cache
from training.data.bank import Bank
from training.layers.blocks import Standardise
from training.layers.logistic import fit_logistic
from training.loop import predict
from training.methods import concept_bottleneck
from training.methods.concept_bottleneck import Settings


@pytest.mark.parametrize("concepts", [3, 20])
def test_the_short_fit_equals_the_fit_on_all_scores(planted: Callable[[Plan], Cache], concepts: int) -> None:
    cache = planted(Plan(noise=3.0, concepts=concepts))  # 14 concepts and 82, of 32 dimensions
    train, val, test = (cache.images(split) for split in ("train", "val", "test"))
    K = cache.part(Bank).K[cache.part(Bank).kept]
    assert len(K) == 4 * concepts + 2
    standardise = Standardise(cache.globals(train))
    scores = [standardise(cache.globals(images)) @ K.T for images in (train, val, test)]
    direct = fit_logistic(scores[0], cache.y[train], scores[1], cache.y[val], 4, [0.1]).linear
    fitted = concept_bottleneck.fit(cache, Settings(l2=[0.1]), 0)
    assert fitted.model.linear.weight.shape == (4, len(K))
    torch.testing.assert_close(fitted.model.linear.weight, direct.weight, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(predict(fitted.model, cache, test), direct(scores[2]), atol=1e-2, rtol=1e-2)


def test_nothing_of_the_bank_is_read_but_vectors(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(noise=3.0))
    bank = cache.part(Bank)
    bank = replace(bank, owners=bank.own.flip(1), kind=tuple("visual" for _ in bank.kind))
    test = cache.images("test")
    ours, permuted = (
        predict(concept_bottleneck.fit(one, Settings(l2=[0.1]), 0).model, one, test)
        for one in (cache, cache.with_part(bank))
    )
    assert torch.equal(ours, permuted)


def test_a_bank_without_kept_concepts_is_named(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan())
    empty = cache.change(Bank, kept=torch.zeros_like(cache.part(Bank).kept))
    with pytest.raises(UserError, match=r"tiny\.parquet: holds no kept concept"):
        concept_bottleneck.fit(empty, Settings(), 0)


def test_a_sparse_layer_keeps_so_many_concepts_a_class_and_decides_by_them_alone(
    planted: Callable[[Plan], Cache],
) -> None:
    cache = planted(Plan(noise=3.0, concepts=20))
    dense = concept_bottleneck.fit(cache, Settings(l2=[0.1]), 0).model.linear
    fitted = concept_bottleneck.fit(cache, Settings(l2=[0.1], nec=5.0), 0)
    kept = fitted.model.linear.weight != 0
    assert dense.weight.all()
    assert 4 < kept.sum().item() / 4 <= 5
    assert fitted.history[0]["nec"] == kept.sum().item() / 4
    test, bank = cache.images("test"), cache.part(Bank)
    pairs = torch.tensor([[0, 1]]).expand(len(test), 2)
    adds = concept_bottleneck.texts_add(fitted.model, Settings(), cache, test, pairs)
    bias = fitted.model.linear.bias
    logits = predict(fitted.model, cache, test)
    torch.testing.assert_close(adds.sum(1) + bias[0] - bias[1], logits[:, 0] - logits[:, 1], atol=1e-4, rtol=1e-4)
    read = concept_bottleneck.is_concept(bank)
    assert not adds[:, ~read].any()
    assert not adds[:, read][:, ~kept[:2].any(0)].any()


def test_a_sparse_layer_is_the_logistic_regression_on_the_scores_it_keeps(planted: Callable[[Plan], Cache]) -> None:
    """Of two classes, whose kept columns are the same, by a fit that knows no mask."""
    cache = planted(Plan(classes=2, noise=3.0, concepts=10))
    train, val = cache.images("train"), cache.images("val")
    fitted = concept_bottleneck.fit(cache, Settings(l2=[0.01], nec=4.0), 0)
    linear, K = fitted.model.linear, fitted.model.K
    kept = (linear.weight != 0).any(0)
    assert torch.equal(linear.weight[0] != 0, linear.weight[1] != 0)  # as two classes share what tells them apart
    scores = fitted.model.standardise(cache.globals(train)) @ K[kept].T
    scale = scores.std(0, correction=0)
    direct = fit_logistic(scores / scale, cache.y[train], scores[: len(val)], cache.y[val], 2, [0.01]).linear
    torch.testing.assert_close(linear.weight[:, kept] * scale, direct.weight, atol=2e-3, rtol=1e-2)
