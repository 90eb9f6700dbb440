from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Cache
from training.data.bank import Bank
from training.loop import predict
from training.methods import description_zero_shot, zero_shot


@pytest.fixture
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(noise=3.0))


def with_bank(cache: Cache, texts: list[tuple[int, str, torch.Tensor]]) -> Cache:
    """The cache with a bank of (class, kind, vector)."""
    own = F.one_hot(torch.tensor([owner for owner, _, _ in texts]), len(cache.classes)).bool()
    kinds = tuple(kind for _, kind, _ in texts)
    vectors = torch.stack([vector for _, _, vector in texts])
    kept = torch.tensor([kind != "name" for kind in kinds])
    return cache.with_part(Bank("data/bank/tiny.parquet", vectors, kinds, kept, own))


def described(cache: Cache, class_names: bool = False) -> torch.Tensor:
    settings = description_zero_shot.Settings(class_names=class_names)
    return predict(description_zero_shot.fit(cache, settings, 0).model, cache, cache.images("test"))


def named(cache: Cache) -> torch.Tensor:
    return predict(zero_shot.fit(cache, zero_shot.Settings(), 0).model, cache, cache.images("test"))


def test_name_ensemble_equals_a_loop(cache: Cache) -> None:
    g, bank, logits = cache.globals(cache.images("test")), cache.part(Bank), named(cache)
    for label in range(len(cache.classes)):
        texts = [
            bank.K[row] / bank.K[row].norm()
            for row, kind in enumerate(bank.kind)
            if kind == "name" and bank.own[row, label]
        ]
        assert len(texts) == 2
        ensemble = sum(texts, torch.zeros(g.shape[1])) / 2
        torch.testing.assert_close(logits[:, label], 100 * g @ (ensemble / ensemble.norm()), atol=1e-3, rtol=1e-4)


def test_descriptions_equal_a_loop_over_kept_texts(cache: Cache) -> None:
    g, bank, logits = cache.globals(cache.images("test")), cache.part(Bank), described(cache)
    for label in range(len(cache.classes)):
        rows = [
            row for row, kind in enumerate(bank.kind) if kind == "visual" and bank.own[row, label] and bank.kept[row]
        ]
        assert len(rows) == 3  # the class of the dropped text has one more
        expected = sum((100 * g @ bank.K[row] for row in rows), torch.zeros(len(g))) / len(rows)
        torch.testing.assert_close(logits[:, label], expected, atol=1e-3, rtol=1e-4)


def test_descriptions_beside_class_names_equal_a_loop(cache: Cache) -> None:
    g, bank, logits = cache.globals(cache.images("test")), cache.part(Bank), described(cache, class_names=True)
    for label in range(len(cache.classes)):
        name = zero_shot.class_text(cache)[label]
        pairs = [
            bank.K[row] + name
            for row, kind in enumerate(bank.kind)
            if kind == "visual" and bank.own[row, label] and bank.kept[row]
        ]
        expected = sum((100 * g @ (pair / pair.norm()) for pair in pairs), torch.zeros(len(g))) / len(pairs)
        torch.testing.assert_close(logits[:, label], expected, atol=1e-3, rtol=1e-4)


def test_one_description_that_is_the_name_is_zero_shot_with_or_without_it(cache: Cache) -> None:
    vectors = F.normalize(torch.randn(len(cache.classes), 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = [(label, kind, vector) for label, vector in enumerate(vectors) for kind in ("name", "visual")]
    for class_names in (False, True):
        said = described(with_bank(cache, texts), class_names)
        torch.testing.assert_close(said, named(with_bank(cache, texts)), atol=1e-3, rtol=1e-4)


def test_several_templates_are_averaged(cache: Cache) -> None:
    a, b = F.normalize(torch.randn(2, len(cache.classes), 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    both = with_bank(cache, [(label, "name", v) for vectors in (a, b) for label, v in enumerate(vectors)])
    middle = with_bank(cache, [(label, "name", F.normalize(v, dim=0)) for label, v in enumerate((a + b) / 2)])
    torch.testing.assert_close(named(both), named(middle), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(named(both), named(with_bank(cache, [(i, "name", v) for i, v in enumerate(a)])))


def test_one_description_a_class_is_zero_shot_on_that_sentence(cache: Cache) -> None:
    vectors = F.normalize(torch.randn(len(cache.classes), 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    as_text = with_bank(cache, [(label, "visual", vector) for label, vector in enumerate(vectors)])
    as_name = with_bank(cache, [(label, "name", vector) for label, vector in enumerate(vectors)])
    torch.testing.assert_close(described(as_text), named(as_name), atol=1e-3, rtol=1e-4)


def test_a_description_said_twice_counts_once(cache: Cache) -> None:
    vectors = F.normalize(torch.randn(2 * len(cache.classes), 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = [(row // 2, "visual", vector) for row, vector in enumerate(vectors)]
    assert torch.equal(described(with_bank(cache, [*texts, texts[0]])), described(with_bank(cache, texts)))
    names = [(label, "name", vector) for label, vector in enumerate(vectors[:4])]
    twice, once = with_bank(cache, [*texts, texts[0], *names]), with_bank(cache, [*texts, *names])
    assert torch.equal(described(twice, class_names=True), described(once, class_names=True))


def test_a_class_without_texts_is_named(cache: Cache) -> None:
    vector = cache.part(Bank).K[0]
    short = with_bank(cache, [(label, kind, vector) for label in range(3) for kind in ("name", "visual")])
    with pytest.raises(UserError, match=r"tiny\.parquet: class class-03 has no text of kind name"):
        named(short)
    with pytest.raises(UserError, match=r"tiny\.parquet: class class-03 has no kept concept"):
        described(short)


def test_the_mean_of_embeddings_is_that_of_logits_for_texts_as_different(cache: Cache) -> None:
    """Of unit length it differs from the mean of logits by a factor a class: how long the mean text is."""
    settings = description_zero_shot.Settings(average="embeddings")
    found = predict(description_zero_shot.fit(cache, settings, 0).model, cache, cache.images("test"))
    bank = cache.part(Bank)
    for label in range(len(cache.classes)):
        rows = [
            row for row, kind in enumerate(bank.kind) if kind == "visual" and bank.own[row, label] and bank.kept[row]
        ]
        length = (sum((bank.K[row] for row in rows), torch.zeros(bank.K.shape[1])) / len(rows)).norm()
        torch.testing.assert_close(found[:, label] * length, described(cache)[:, label], atol=1e-3, rtol=1e-4)


def test_the_texts_that_tell_a_class_from_its_neighbours_by_a_loop(cache: Cache) -> None:
    generator = torch.Generator().manual_seed(0)
    looks, K = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (7, 40))
    owned = torch.rand(7, 40, generator=generator) < 0.3
    owned[3] = False
    owned[3, :2] = True  # fewer than are kept
    found = description_zero_shot.tell_from_neighbours(owned, K, looks, keep=3, neighbours=2)
    for label in range(7):
        others = [other for other in range(7) if other != label]
        others.sort(key=lambda other: -float(looks[label] @ looks[other]))
        a, b = others[:2]
        worth = {
            row: float(K[row] @ looks[label] - (K[row] @ looks[a] + K[row] @ looks[b]) / 2)
            for row in owned[label].nonzero().flatten().tolist()
        }
        best = sorted(worth, key=lambda row: -worth[row])[:3]
        assert sorted(best) == found[label].nonzero().flatten().tolist()


def test_a_text_that_fits_the_neighbours_as_well_is_not_kept(cache: Cache) -> None:
    """Each class owns one text of its own and one that its images share with all others."""
    train = cache.images("train")
    means = torch.stack([cache.globals(train)[cache.y[train] == label].mean(0) for label in range(4)])
    common = F.normalize(means.mean(0), dim=0)
    telling = F.normalize(means - means.mean(0), dim=1)
    texts = [(label, "visual", vector) for label in range(4) for vector in (common, telling[label])]
    texts += [(label, "name", common) for label in range(4)]
    settings = description_zero_shot.Settings(keep=1, neighbours=2)
    told = with_bank(cache, texts)
    model = description_zero_shot.fit(told, settings, 0).model
    torch.testing.assert_close(model.class_mean, telling)
    alone = with_bank(cache, [text for text in texts if text[1] == "name" or text[2] is not common])
    torch.testing.assert_close(predict(model, told, told.images("test")), described(alone))


def test_the_texts_of_a_class_without_images_are_chosen_by_its_name(cache: Cache) -> None:
    """And by no label of its images, which a regime hides."""
    split = cache.split.copy()
    split[(split == "train") & (cache.y < 2).numpy()] = "unused"
    told, settings = replace(cache, split=split), description_zero_shot.Settings(keep=1)
    y = torch.where(cache.y < 2, 1 - cache.y, cache.y)
    one, two = (
        description_zero_shot.fit(each, settings, 0).model.state_dict() for each in (told, replace(told, y=y, target=y))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = told.change(Bank, K=torch.where(told.part(Bank).of_kind("name")[:, None], told.part(Bank).K.flip(1), 0))
    assert not torch.equal(description_zero_shot.looks(told)[:2], description_zero_shot.looks(changed)[:2])
    assert torch.equal(description_zero_shot.looks(told)[2:], description_zero_shot.looks(changed)[2:])
