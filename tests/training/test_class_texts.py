from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.class_texts import Texts, class_texts, text_blocks, text_reads
from training.data import Cache
from training.data.bank import Bank
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
