"""Contrast between what was said and other words for it, and what a linear layer finds in it afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import change, quick, quick_settings
from training.data import Cache
from training.data.asked import Asked
from training.data.descriptions import Descriptions
from training.data.links import Links
from training.layers.features import Features
from training.layers.states import state_of
from training.links import Around, Memory, senders
from training.loop import assess_split
from training.methods import NotPossible, latex_gcl, reads_of
from training.methods.latex_gcl import Encoder, Settings, Sides, last_input, may_be_alike, steps, thin

Planted = Callable[[Plan], Cache]
OTHER = {"augment": "words", "features": ["global", "descriptions"], "words": ["asked/guess/reasons"]}


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return planted(Plan(sentences=2, described="all"))


def of(cache: Cache, **knobs: Any) -> tuple[Sides, Encoder, Settings]:
    """The sides of a step and an encoder that has learned nothing."""
    settings: Any = quick_settings("latex_gcl", **knobs)
    features = Features.measure(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    torch.manual_seed(0)
    encoder = Encoder(Memory.of(cache, settings), vectors, settings)
    return Sides(cache, features, vectors, settings), encoder, settings


@torch.no_grad()
def test_other_words_stand_in_the_place_of_descriptions(cache: Cache) -> None:
    """As if the descriptions of all who were answered had been these: of the batch, and of those that send."""
    sides, encoder, settings = of(cache, **OTHER)
    batch = cache.batch(cache.images("train"))
    f, other, places = sides.of(batch, encoder, 0)
    d, dm = cache.part(Asked).said["guess/reasons"]
    answered = dm.any(1)
    own = cache.part(Descriptions)
    size = max(d.shape[1], own.d.shape[1])
    said, mask = (
        torch.where(
            answered.view(-1, *[1] * (new.ndim - 1)),
            torch.cat([new, new.new_zeros(len(new), size - new.shape[1], *new.shape[2:])], dim=1),
            torch.cat([old, old.new_zeros(len(old), size - old.shape[1], *old.shape[2:])], dim=1),
        )
        for new, old in ((d, own.d), (dm, own.dm))
    )
    swapped = cache.change(Descriptions, d=said, dm=mask)
    features = sides.features
    anew = Encoder(encoder.over_links.memory, features.of(swapped, senders(swapped, settings)), settings)
    anew.load_state_dict(encoder.state_dict() | {"over_links.vectors": anew.over_links.vectors})
    changed = swapped.batch(cache.images("train"))
    assert places.tolist() == torch.nonzero(answered[cache.images("train")])[:, 0].tolist()
    assert 0 < len(places) < len(batch.y)
    torch.testing.assert_close(other, anew(changed, features(changed))[places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f, encoder(batch, features(batch))[places], atol=1e-5, rtol=1e-5)


def test_a_question_that_says_nothing_of_who_sends_is_not_possible(cache: Cache) -> None:
    d, dm = cache.part(Asked).said["guess/reasons"]
    silent = cache.with_part(Asked({"guess/reasons": (d, torch.zeros_like(dm))}, {}, {}))
    with pytest.raises(NotPossible, match=r"asked/guess/reasons: says nothing of an image that may send; .*splits"):
        of(silent, **OTHER)


@torch.no_grad()
def test_the_trivial_baseline_contrasts_an_image_with_itself(cache: Cache) -> None:
    sides, encoder, _ = of(cache, augment="none")
    one, two, places = sides.of(cache.batch(cache.images("train")), encoder, 0)
    assert one is two
    assert len(places) == len(cache.images("train"))


@torch.no_grad()
def test_views_of_features_differ_and_nothing_taken_away_leaves_them_as_they_are(cache: Cache) -> None:
    batch = cache.batch(cache.images("train"))
    sides, encoder, _ = of(cache)
    one, two, _ = sides.of(batch, encoder, 0)
    assert not torch.allclose(one, two)
    sides, encoder, _ = of(cache, mask=0.0, drop=0.0)
    one, two, _ = sides.of(batch, encoder, 0)
    whole = encoder(batch, sides.features(batch))
    torch.testing.assert_close(one, whole)
    torch.testing.assert_close(two, whole)


def test_links_are_left_out_and_the_others_weigh_more(cache: Cache) -> None:
    settings: Any = quick_settings("latex_gcl", sources="all")
    around = Memory.of(cache, settings).around(cache.batch(torch.arange(20)), 2)
    torch.manual_seed(0)
    less = thin(around, 0.4)
    before, after = around.edges_in.T.tolist(), less.edges_in.T.tolist()
    kept = [before.index(edge) for edge in after]  # no two images are linked twice
    assert kept == sorted(kept)
    assert 0.4 < len(kept) / len(before) < 0.8
    assert less.edges == [sum(place < count for place in kept) for count in around.edges]
    torch.testing.assert_close(less.weight, around.weight[kept] / 0.6)
    assert (less.nodes, less.degree) == (around.nodes, around.degree)
    torch.manual_seed(0)
    assert torch.equal(thin(around, 0.4, grow=False).weight, around.weight[kept])
    none = thin(around, 1.0)
    assert none.edges == [0, 0]


@torch.no_grad()
def test_attention_reads_the_weights_that_links_have(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, Tensor]] = []
    batch, seen = cache.batch(cache.images("train")), Encoder.along

    def along(encoder: Encoder, x: Tensor, around: Around) -> Tensor:
        given.append((conv, around.weight))
        return seen(encoder, x, around)

    monkeypatch.setattr(Encoder, "along", along)
    for conv in ("gat", "sage"):
        sides, encoder, _ = of(cache, conv=conv, drop=0.5)
        sides.of(batch, encoder, 0)
    most = cache.part(Links).incoming["near"].weight.max()
    assert all((bool(weight.max() <= most)) == (conv == "gat") for conv, weight in given)


def test_images_of_one_class_are_alike_and_those_without_a_label_are_not() -> None:
    told = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]])
    alike = may_be_alike(told)
    expected = [[bool(set(a) & set(b)) for b in ({0}, {1}, {0}, set(), {1, 2})] for a in ({0}, {1}, {0}, set(), {1, 2})]
    assert alike.tolist() == expected


def weights(cache: Cache, **knobs: Any) -> dict[str, Tensor]:
    """What was learned by contrast."""
    model = quick("latex_gcl", cache, **knobs).model
    return {name: value for name, value in state_of(model.encoder).items() if "memory" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_labels_reach_the_encoder_by_who_is_no_negative_alone(cache: Cache) -> None:
    train = cache.images("train")
    target = cache.target.clone()
    target[train] = target[train.flip(0)].roll(3)
    lied = replace(cache, target=target)
    assert same(weights(cache, same_class=False), weights(lied, same_class=False))
    assert not same(weights(cache), weights(lied))


@pytest.mark.slow
def test_who_is_judged_sends_nothing_and_is_not_learned_from_unless_all_do(cache: Cache) -> None:
    judged = torch.from_numpy(cache.split != "train")
    part = cache.part(Descriptions)
    other = cache.change(Descriptions, d=torch.where(judged[:, None, None], part.d.flip(0), part.d))
    knobs = {"features": ["descriptions"]}
    assert same(weights(cache, **knobs), weights(other, **knobs))
    assert not same(weights(cache, sources="all", **knobs), weights(other, sources="all", **knobs))


def test_no_label_of_who_is_judged_is_looked_at_where_all_send(cache: Cache) -> None:
    target = cache.target.clone()
    for split in ("val", "test"):
        target[cache.images(split)] = 0
    lied = replace(cache, target=target, y=torch.where(torch.from_numpy(cache.split == "test"), 0, cache.y))
    assert same(weights(cache, sources="all"), weights(lied, sources="all"))


def test_an_epoch_sees_every_sender_once(cache: Cache) -> None:
    for sources in ("train", "all"):
        settings: Any = quick_settings("latex_gcl", sources=sources)
        seen = torch.cat([images for images, _, _ in steps(cache, settings, torch.Generator().manual_seed(0))])
        assert seen.sort().values.equal(senders(cache, settings).sort().values)


def test_the_last_layer_reads_both_with_equal_weight() -> None:
    torch.manual_seed(0)
    f, x = torch.randn(4000, 10), torch.randn(4000, 40)
    both = last_input(f, x, beside=True)
    assert both.shape == (4000, 50)
    torch.testing.assert_close(float(both[:, :10].var(0).sum()), 25.0, atol=0.5, rtol=0)
    torch.testing.assert_close(float(both[:, 10:].var(0).sum()), 25.0, atol=0.5, rtol=0)
    assert last_input(f, x, beside=False) is f


@pytest.fixture(scope="module")
def few(planted: Planted) -> Cache:
    """Four images of a class are labelled; what is said of any shows its class, under noise, and links show nothing."""
    plan = Plan(cue="none", linked=0.25, train=60, val=15, test=40, dimension=64, sentences=1, described="all")
    cache = planted(plan)
    split = cache.split.copy()
    for label in range(4):
        split[np.flatnonzero((split == "train") & (cache.y.numpy() == label))[4:]] = "unused"
    cache = replace(cache, split=split)
    return cache.change(Descriptions, **dict(zip(("d", "dm"), about_classes(cache, 1), strict=True)))


def about_classes(cache: Cache, seed: int, noise: float = 2.5) -> tuple[Tensor, Tensor]:
    """A sentence about each image, near its class: (n, 1, 64), and that each has one."""
    centres = F.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), dim=1)[cache.y]
    drawn = torch.randn(centres.shape, generator=torch.Generator().manual_seed(seed)) / 8
    said = F.normalize(centres + noise * drawn, dim=1)
    return said[:, None].half(), torch.ones(len(said), 1, dtype=torch.bool)


def accuracy(method: str, cache: Cache, **knobs: Any) -> float:
    return assess_split(quick(method, cache, features=["descriptions"], l2=[0.01], **knobs).model, cache, "test")[0]


@pytest.mark.slow
def test_other_words_for_the_same_help_where_few_are_labelled_and_unrelated_ones_do_not(few: Cache) -> None:
    knobs: Any = {
        **{"augment": "words", "words": ["asked/reworded/text"], "sources": "all"},
        **{"epochs": 30, "batch_size": 512, "hidden": 64, "lr": [3e-3]},
    }
    reworded = few.with_part(Asked({"reworded/text": about_classes(few, 2)}, {}, {}))
    unrelated = few.with_part(Asked({"reworded/text": about_classes(few, 2, noise=1e3)}, {}, {}))
    probe = accuracy("linear_probe", few)
    assert accuracy("latex_gcl", reworded, **knobs) > probe + 0.1
    assert accuracy("latex_gcl", unrelated, **knobs) < probe + 0.05
    assert accuracy("latex_gcl", reworded, **{**knobs, "augment": "none"}) < probe + 0.05


def test_what_it_reads_follows_from_what_it_augments() -> None:
    assert reads_of("latex_gcl", Settings()) == {"globals", "links/near"}
    words = Settings(augment="words", features=["descriptions"])
    asked = {"asked/shorten", "asked/rewrite", "asked/expand"}
    assert reads_of("latex_gcl", words) == {"descriptions", "links/near"} | asked


@pytest.mark.parametrize("given", [{"augment": "words"}, {"words": ["shorten"]}, {"conv": "gat", "hidden": 30}])
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"add these to features|asked/NAME/FIELD|do not divide"):
        Settings(**given)


def test_links_are_read_and_a_model_comes_back_from_its_state(cache: Cache) -> None:
    assert not same(weights(cache), weights(change(cache, {"links"})))
    fitted = quick("latex_gcl", cache, beside=True)
    settings: Any = quick_settings("latex_gcl", beside=True)
    again = latex_gcl.build(state_of(fitted.model), settings, len(cache.classes))
    again.load_state_dict(fitted.model.state_dict())
    batch = cache.batch(cache.images("test"))
    assert torch.equal(again.eval()(batch).logits, fitted.model.eval()(batch).logits)
