"""What is made up for classes with few images, against brute force."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.data.asked import texts_said
from training.layers.features import Features, FeatureSettings
from training.methods import NotPossible
from training.regimes import LongTail, hide_test
from training.synthesis import (
    SynthesisSettings,
    draw,
    interpolate,
    neighbours,
    spread_within,
    synthesis_reads,
    synthesise,
)

Planted = Callable[[Plan], Cache]
SIZES = [9, 4, 2, 1, 0, 6]
SETTINGS = SynthesisSettings()


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, list[str]]:
    """Vectors of six classes, of which one has one image and one has none."""
    label = torch.repeat_interleave(torch.arange(6), torch.tensor(SIZES))
    vectors = torch.randn(len(label), 5, generator=torch.Generator().manual_seed(0))
    return vectors, label, [f"{number:03d}.png" for number in range(len(label))]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_neighbours_are_the_nearest_of_the_same_class(rows: tuple[Tensor, Tensor, list[str]], k: int) -> None:
    vectors, label, _ = rows
    near, there = neighbours(vectors, label, k)
    for row in range(len(label)):
        others = [other for other in range(len(label)) if other != row and label[other] == label[row]]
        others.sort(key=lambda other: float((vectors[row] - vectors[other]).norm()))
        assert near[row][there[row]].tolist() == others[:k]


@pytest.mark.parametrize(("balance", "wanted"), [(1.0, 9), (0.5, 4), (2.0, 18)])
def test_classes_are_raised_to_one_size_and_larger_ones_stay(
    rows: tuple[Tensor, Tensor, list[str]], balance: float, wanted: int
) -> None:
    vectors, label, paths = rows
    made = draw(vectors, label, paths, SynthesisSettings(balance=balance), seed=0)
    count = torch.bincount(label[made.base], minlength=6).tolist()
    assert count == [max(wanted - size, 0) if size else 0 for size in SIZES]
    # Images take turns: none is used twice before all are.
    for base in made.base.unique().tolist():
        assert made.turn[made.base == base].tolist() == list(range(int((made.base == base).sum())))
    used = torch.bincount(made.base, minlength=len(label))
    for number in range(6):
        of_class = used[label == number]
        assert not len(of_class) or int(of_class.max() - of_class.min()) <= 1


def test_each_lies_between_an_image_and_one_of_its_nearest_of_the_class(
    rows: tuple[Tensor, Tensor, list[str]],
) -> None:
    vectors, label, paths = rows
    made = draw(vectors, label, paths, SETTINGS, seed=0)
    x = interpolate(vectors, label, made, jitter=0.3)
    near, there = neighbours(vectors, label, SETTINGS.k)
    assert torch.equal(label[made.base], label[made.other])
    shares = set()
    for place, (i, j) in enumerate(zip(made.base.tolist(), made.other.tolist(), strict=True)):
        if label[i] == 3:  # the class of one image
            assert i == j
            continue
        assert j in near[i][there[i]].tolist()
        step, along = vectors[j] - vectors[i], x[place] - vectors[i]
        share = float(along @ step / step.square().sum())
        assert 0 <= share < 1
        torch.testing.assert_close(along, share * step, atol=1e-5, rtol=1e-5)
        shares.add(round(share, 6))
    assert len(shares) > 10


def test_a_class_of_one_is_copied_with_jitter(rows: tuple[Tensor, Tensor, list[str]]) -> None:
    vectors, label, paths = rows
    made = draw(vectors, label, paths, SETTINGS, seed=0)
    copies = interpolate(vectors, label, made, jitter=0.3)[label[made.base] == 3]
    away = copies - vectors[label == 3]
    assert len(copies) == 8
    assert len(torch.unique(copies, dim=0)) == 8
    within = torch.cat([vectors[label == c] - vectors[label == c].mean(0) for c in range(6) if SIZES[c]])
    spread = (within.square().sum() / (5 * sum(max(size - 1, 0) for size in SIZES))).sqrt()
    torch.testing.assert_close(spread_within(vectors, label), spread)
    assert 0.1 * spread < away.std() < 0.6 * spread
    bare = interpolate(vectors, label, made, jitter=1e-9)[label[made.base] == 3]
    torch.testing.assert_close(bare, vectors[label == 3].expand(8, -1))


def test_nothing_depends_on_where_a_row_stands(rows: tuple[Tensor, Tensor, list[str]]) -> None:
    vectors, label, paths = rows
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(1))
    moved = draw(vectors[order], label[order], [paths[row] for row in order.tolist()], SETTINGS, seed=0)
    made = draw(vectors, label, paths, SETTINGS, seed=0)
    assert torch.equal(order[moved.base], made.base)
    assert torch.equal(order[moved.other], made.other)
    assert torch.equal(moved.u, made.u)
    other = draw(vectors, label, paths, SETTINGS, seed=1)
    assert not torch.equal(other.u, made.u)


def test_no_image_that_does_not_train_has_a_part_in_it(planted: Planted) -> None:
    cache = LongTail(imbalance=8).apply(planted(Plan(classes=4, train=16, val=6, test=5, views=2)), 0)
    settings = FeatureSettings(features=["global", "pooled"])

    def made(cache: Cache) -> tuple[Tensor, Tensor]:
        features = Features.measure(cache, settings)
        found = synthesise(cache, features, features.of_training(cache), SETTINGS, 0)
        return found.x, found.told

    x, told = made(hide_test(cache))
    sizes = np.bincount(cache.y[cache.images("train")], minlength=4)
    assert told.sum(0).tolist() == [2 * (sizes.max() - size) for size in sizes]  # in two views
    assert x.shape == (len(told), 32 + 36)
    rest = np.array([split != "train" for split in cache.split])
    gone = replace(cache, split=np.where(rest, "unused", cache.split), y=torch.where(torch.tensor(rest), 0, cache.y))
    for one, other in zip(made(gone), (x, told), strict=True):
        assert torch.equal(one, other)


def test_what_was_written_of_an_image_stands_for_the_description_of_what_begins_with_it(planted: Planted) -> None:
    whole = planted(Plan(classes=4, train=16, val=6, test=5, views=2, sentences=2, described="all"))
    cache = LongTail(imbalance=8).apply(whole, 0)
    settings = SynthesisSettings(features=["pooled", "descriptions", "global"], texts="asked/guess/reasons")
    features = Features.measure(cache, settings)
    x = features.of_training(cache)
    found = synthesise(cache, features, x, settings, 0)
    plain = synthesise(cache, features, x, settings.model_copy(update={"texts": None}), 0)
    train = cache.images("train")
    there = texts_said(cache.batch(train), "guess", "reasons")[1].sum(1)
    assert not there.all()  # of some images nothing was written: they begin nothing
    assert there[found.made.base].all()
    standardise = features.standardise[1]
    half = len(found.x) // 2
    for place, (base, turn) in enumerate(zip(found.made.base.tolist(), found.made.turn.tolist(), strict=True)):
        text = texts_said(cache.batch(train[[base]]), "guess", "reasons")[0][0, turn % int(there[base])]
        wanted = features.weights[1] * standardise(F.normalize(text, dim=0))
        for view in (0, half):
            torch.testing.assert_close(found.x[view + place, 36:68], wanted)
    # What the image shows is interpolated as without texts, where both begin with the same image.
    of = {name: place for place, name in enumerate(plain.made.noise)}
    both = [(place, of[name]) for place, name in enumerate(found.made.noise) if name in of]
    assert both
    for a, b in both:
        rest = torch.ones(len(found.x[a]), dtype=torch.bool)
        rest[36:68] = False
        torch.testing.assert_close(found.x[a][rest], plain.x[b][rest])


def test_a_class_of_which_nothing_was_written_is_named(rows: tuple[Tensor, Tensor, list[str]]) -> None:
    vectors, label, paths = rows
    said = r"^of class c no training image has a text .*; ask with prompts/oversample\.md"
    with pytest.raises(NotPossible, match=said):
        draw(vectors, label, paths, SETTINGS, 0, label != 2, ["a", "b", "c", "d", "e", "f"])


@pytest.mark.parametrize("knobs", [{"texts": "asked/guess/reasons"}, {"features": ["descriptions"], "texts": "guess"}])
def test_texts_stand_for_descriptions(knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"asked/NAME/FIELD|asked/NAME"):
        SynthesisSettings(**knobs)
    assert synthesis_reads(SynthesisSettings(features=["descriptions"], texts="asked/mix/text")) == {
        "descriptions", "asked/mix",
    }  # fmt: skip
