from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.class_texts import Texts, class_mix, class_texts, text_blocks, text_reads
from training.data import Cache
from training.data.bank import Bank
from training.layers.text_map import PENALTIES
from training.layers.texts import class_text
from training.methods import NotPossible


@pytest.fixture
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan())


def concepts_by_a_loop(cache: Cache) -> torch.Tensor:
    bank, means = cache.part(Bank), []
    for label in range(len(cache.classes)):
        owned = [bank.K[row] for row in range(len(bank.K)) if bank.own[row, label] and bank.kept[row]]
        means.append(F.normalize(torch.stack(owned).mean(0), dim=0))
    return torch.stack(means)


def test_names_concepts_or_both(cache: Cache) -> None:
    names, concepts = class_text(cache), concepts_by_a_loop(cache)
    blocks: dict[Texts, list[torch.Tensor]] = {"names": [names], "concepts": [concepts], "both": [names, concepts]}
    for texts, expected in blocks.items():
        found = text_blocks(cache, texts)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(class_texts(cache, texts), F.normalize(sum(expected, torch.zeros(1)), dim=1))


@pytest.mark.parametrize("texts", ["names", "concepts", "both"])
def test_it_needs_what_it_says_that_it_reads(cache: Cache, texts: Texts) -> None:
    torch.testing.assert_close(class_texts(cache.only(text_reads(texts)), texts), class_texts(cache, texts))
    with pytest.raises(UserError, match="READS"):
        class_texts(cache.only(text_reads(texts) - {"owners"}), texts)


def test_a_class_without_a_text_is_named(cache: Cache) -> None:
    bank = cache.part(Bank)
    own = bank.own.clone()
    own[:, 1] = False
    bare = cache.with_part(replace(bank, owners=own))
    with pytest.raises(UserError, match="class class-01 has no text of kind name"):
        class_texts(bare, "names")
    with pytest.raises(NotPossible, match="class class-01 has no kept concept"):
        class_texts(bare, "concepts")


def refit(texts: np.ndarray, means: np.ndarray, new: np.ndarray, penalty: float, unit: float) -> np.ndarray:
    """Ridge with an intercept that costs nothing, by its normal equations."""
    design = np.hstack([texts / unit, np.ones((len(texts), 1))])
    cost = penalty * np.diag([1.0] * texts.shape[1] + [0.0])
    return np.append(new / unit, 1) @ np.linalg.solve(design.T @ design + cost, design.T @ means)


@pytest.mark.slow
def test_the_mix_predicts_what_a_ridge_from_texts_to_class_means_does(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(classes=8, train=6, views=2, noise=1.0))
    split = cache.split.copy()
    split[(cache.split == "train") & np.isin(cache.y.numpy(), (1, 5))] = "unused"
    cache = replace(cache, split=split)
    mix = class_mix(cache, "both")
    assert mix is not None
    taught = [0, 2, 3, 4, 6, 7]
    assert torch.equal(mix[taught], torch.eye(8)[taught])
    assert torch.equal(mix[:, [1, 5]], torch.zeros(8, 2))
    torch.testing.assert_close(mix.sum(1), torch.ones(8))

    every = torch.cat(text_blocks(cache, "both"), dim=1).double().numpy()
    train, views = cache.images("train"), [cache.globals(cache.images("train"), view).double() for view in (0, 1)]
    p = np.array([torch.cat([g[cache.y[train] == label] for g in views]).mean(0).numpy() for label in taught])
    e = every[taught]
    unit = np.sqrt(np.square(e - e.mean(0)).sum(1).mean())
    rest = [np.delete(np.arange(6), label) for label in range(6)]
    missed = [
        sum(np.square(p[c] - refit(e[rest[c]], p[rest[c]], e[c], penalty, unit)).sum() for c in range(6))
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[int(np.argmin(missed))]
    for label in (1, 5):
        expected = refit(e, p, every[label], penalty, unit)
        np.testing.assert_allclose(mix[label, taught].double().numpy() @ p, expected, atol=1e-5)


def test_there_is_no_mix_where_every_class_has_images(cache: Cache) -> None:
    assert class_mix(cache, "names") is None
