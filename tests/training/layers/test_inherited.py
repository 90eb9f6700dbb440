"""What an image without a description inherits by its links, against a plain loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan, write_cache, write_moments, write_other
from training.data import Cache, read_cache
from training.data.descriptions import Descriptions
from training.data.links import Links
from training.layers.features import Features, FeatureSettings, parts_of
from training.layers.inherited import NEIGHBOURS, Inherited
from training.layers.states import state_of
from training.links import check_links
from training.methods import also_reads_of, linear_probe, load_method, reads_of, ridge
from training.regimes import hide_test

Planted = Callable[[Plan], Cache]
NEAR = "inherited/near"


def described_only(cache: Cache, images: Tensor) -> Cache:
    """The cache where these images alone have sentences."""
    dm = torch.zeros_like(cache.part(Descriptions).dm)
    dm[images] = cache.part(Descriptions).dm[images]
    return cache.change(Descriptions, dm=dm)


@pytest.fixture
def cache(planted: Planted) -> Cache:
    """A few training images are described, and one test image."""
    whole = planted(Plan(classes=3, train=10, val=4, test=4, sentences=2, described="all", links=4))
    return described_only(whole, torch.cat([whole.images("train")[::6], whole.images("test")[:1]]))


def senders_to(cache: Cache, image: int, text: dict[int, Tensor]) -> list[tuple[int, float]]:
    """The nearest training images with a text that are linked to an image, and the weights."""
    part, position = cache.part(Links), {key: place for place, key in enumerate(cache.part(Links).key.tolist())}
    start, source, weight = part.incoming["near"]
    edges = range(int(start[image]), int(start[image + 1]))
    heard = [(position[int(source[edge])], float(weight[edge])) for edge in edges]
    return [(sender, value) for sender, value in heard if sender in text and sender != image][:NEIGHBOURS]


def mean_of(heard: list[tuple[int, float]], text: dict[int, Tensor]) -> Tensor:
    return F.normalize(torch.stack([weight * text[sender] for sender, weight in heard]).sum(0), dim=0)


def by_loop(cache: Cache) -> list[Tensor]:
    part = cache.part(Descriptions)
    own = {
        image: F.normalize(part.d[image].float()[part.dm[image]].mean(0), dim=0)
        for image in range(len(cache.paths))
        if part.dm[image].any()
    }
    train = cache.images("train").tolist()
    text = {image: vector for image, vector in own.items() if image in train}
    new = dict(text)
    while new:
        left = [image for image in train if image not in text]
        new = {image: mean_of(heard, text) for image in left if (heard := senders_to(cache, image, text))}
        text |= new
    nothing = torch.zeros(part.d.shape[2])
    return [
        own[image] if image in own else mean_of(heard, text) if (heard := senders_to(cache, image, text)) else nothing
        for image in range(len(cache.paths))
    ]


def test_it_is_the_own_sentence_or_the_mean_of_the_nearest_that_have_one(cache: Cache) -> None:
    inherited = Inherited.of(cache, NEAR)
    found = inherited(cache.batch(torch.arange(len(cache.paths))))
    torch.testing.assert_close(found, torch.stack(by_loop(cache)))
    assert len(inherited.text) > int(cache.part(Descriptions).dm[cache.images("train")].any(1).sum())


def test_what_no_link_reaches_is_nothing(cache: Cache) -> None:
    part = cache.part(Links)
    none = {"near": part.incoming["near"]._replace(start=torch.zeros_like(part.incoming["near"].start))}
    alone = cache.change(Links, incoming=none)
    found = Inherited.of(alone, NEAR)(alone.batch(torch.arange(len(cache.paths))))
    assert torch.equal(found.any(1), cache.part(Descriptions).dm.any(1))


def test_only_training_images_are_heard_and_no_label(cache: Cache) -> None:
    images = torch.arange(len(cache.paths))
    before = Inherited.of(cache, NEAR)(cache.batch(images))
    test = cache.images("test")
    others = described_only(cache, cache.images("train")).change(Links)
    others = replace(others, y=others.y.flip(0), target=others.target.flip(0))
    after = Inherited.of(others, NEAR)(others.batch(images))
    same = ~torch.isin(images, test[:1])
    assert torch.equal(before[same], after[same])  # the test image that is described taught nobody
    assert not torch.equal(before[test[:1]], after[test[:1]])
    hidden = Inherited.of(hide_test(cache), NEAR)
    assert torch.equal(hidden(cache.batch(images)), before)


def test_without_a_described_training_image_there_is_nothing_to_inherit(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"no training image has a description, which inherited/near hands on; set"):
        Inherited.of(described_only(cache, cache.images("test")), NEAR)


def test_a_probe_reads_links_and_descriptions_and_comes_back_from_its_state(cache: Cache) -> None:
    settings = ridge.Settings(features=["pooled", NEAR, "descriptions"])
    assert reads_of("ridge", settings) == {"pooled", "descriptions", "links/near"}
    assert parts_of([NEAR]) == {"descriptions", "links/near"}
    told = cache.only(reads_of("ridge", settings))
    fitted, batch = ridge.fit(told, settings, 0), told.batch(told.images("test"))
    again = linear_probe.build(state_of(fitted.model), settings, len(cache.classes))
    again.load_state_dict(state_of(fitted.model))
    assert torch.equal(again(batch).logits, fitted.model(batch).logits)


def test_other_encoders_inherit_in_their_own_space(tmp_path: Path) -> None:
    plan = Plan(views=2, sentences=2, described="all")
    write_cache(tmp_path, plan)
    write_other(tmp_path, "other", 20)
    write_moments(tmp_path, "other", "pooled", 24)
    text = (tmp_path / "embed/tiny/text.parquet").read_bytes()
    (tmp_path / "embed/other/text.parquet").write_bytes(text)
    settings = ridge.Settings(features=[NEAR, "pooled"])
    cache = read_cache(
        tmp_path, "tiny", 3, reads_of("ridge", settings), ["other"], also_reads_of("ridge", settings)
    )
    half = cache.images("train")[::2]
    cache = described_only(cache, half)
    features = Features.measure(cache, settings)
    assert features.size == 32 + 36 + 32 + 24
    own, other = features.inherited
    assert len(own.text) > len(half)
    assert len(other.text) == len(cache.images("train"))  # of that encoder all stay described
    again = Features.from_state(state_of(features), settings)
    batch = cache.batch(cache.images("test"))
    assert torch.equal(again(batch), features(batch))


def test_a_name_of_links_has_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"or inherited/NAME with a key under links"):
        FeatureSettings(features=["inherited/"])


@pytest.mark.slow
def test_a_planted_description_is_worth_as_much_by_links_that_carry_the_class(planted: Planted) -> None:
    """Sentences say the class, pictures nothing: one description in six is enough where links join a class."""
    accuracy = {}
    for linked in (1.0, 0.33):
        plan = Plan(classes=3, train=30, val=10, test=20, cue="none", sentences=1, described="all", linked=linked)
        whole = planted(plan)
        part = whole.part(Descriptions)
        rng = torch.Generator().manual_seed(0)
        d = F.one_hot(whole.y, part.d.shape[2])[:, None] + 0.3 * torch.randn(part.d.shape, generator=rng)
        cache = described_only(whole.change(Descriptions, d=d.half()), whole.images("train")[::6])
        model = ridge.fit(cache, ridge.Settings(features=[NEAR]), 0).model
        test = cache.images("test")
        said = model(cache.batch(test)).logits.argmax(1)
        accuracy[linked] = float((said == cache.y[test]).float().mean())
    assert accuracy[1.0] > 0.95
    assert accuracy[0.33] < 0.6
    assert np.isfinite(list(accuracy.values())).all()


def test_links_that_params_do_not_make_are_named() -> None:
    beside = {"method": "ridge", "settings": {"features": ["global", NEAR]}}
    knobs: dict[str, dict[str, Any]] = {
        "ridge": {"features": ["global", NEAR]},
        "correct_smooth": {"links": "far", "with_probe": beside},
        "tape": {"features": None, "explanation": [NEAR], "conv": None},
        "label_propagation": {},
    }
    for method, given in knobs.items():
        reads = reads_of(method, load_method(method).Settings(**given))
        check_links("params.yaml", "train.runs.a", ["near", "far"], reads)
        with pytest.raises(UserError, match=r"^params\.yaml: train\.runs\.a\.settings: reads links/near, and"):
            check_links("params.yaml", "train.runs.a", ["far"], reads)


def test_a_network_that_reads_no_link_needs_none() -> None:
    settings: Any = load_method("tape").Settings(features=None, conv=None)
    check_links("params.yaml", "train.runs.a", [], reads_of("tape", settings))
