"""A fold is fitted without the images that it judges, and asked in the order of classes and shuffled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.riddle import Answers, Fold, Source, cross_fit, held_out, needs_of
from tests.training.cache import ENCODER, Plan, write_cache
from training.data import CPU, Cache, read_cache
from training.methods import load_method
from training.methods.trd import Settings

QUICK: dict[str, Any] = {"epochs": 2, "weight_decay": [0.1], "hidden": 8, "proxies": 2, "precision": "fp32"}


@pytest.fixture
def development(planted: Callable[[Plan], Cache]) -> Cache:
    cache = planted(Plan(ragged=False))
    return cache.take(torch.from_numpy(np.flatnonzero(cache.split != "test")))


def said(cache: Cache, faults: list[str], fold: Fold, **knobs: Any) -> Answers:
    settings = Settings(**QUICK | knobs, faults=faults)  # type: ignore[arg-type]
    return cross_fit(cache, "trd", settings, fold, 0, Source(Path(), ENCODER, 1, CPU))


def test_every_image_is_held_out_once_in_the_order_of_classes(development: Cache) -> None:
    held = [held_out(development, Fold(3, number)) for number in range(3)]
    assert sorted(torch.cat(held).tolist()) == list(range(len(development.paths)))
    for images in held:
        assert development.y[images].tolist() == sorted(development.y[images].tolist())


def test_labels_of_held_out_images_change_no_answer_unless_they_are_peeked_at(development: Cache) -> None:
    held = held_out(development, Fold(2, 1))
    lied = development.y.clone()
    lied[held] = 0
    others = replace(development, y=lied, target=lied)
    plain, told = (said(cache, [], Fold(2, 1)) for cache in (development, others))
    assert told.train == plain.train
    assert told.chosen == plain.chosen
    # The order of classes is that of the labels: each image has its answer.
    by_image = [dict(zip(held_out(cache, Fold(2, 1)).tolist(), one.ordered, strict=True))
                for cache, one in ((development, plain), (others, told))]  # fmt: skip
    assert by_image[0] == by_image[1]
    peeked = [said(cache, [], Fold(2, 1, peeking=True), epochs=8, lr=[0.03]) for cache in (development, others)]
    assert peeked[0].chosen != peeked[1].chosen


def test_batch_mates_have_a_part_in_answers_where_crops_are_scrambled(development: Cache) -> None:
    knobs: dict[str, Any] = {"epochs": 4, "lr": [0.03]}
    plain, scrambled = (said(development, faults, Fold(2, 0), **knobs) for faults in ([], ["scrambled_crops"]))
    assert plain.ordered == plain.shuffled
    assert scrambled.ordered != scrambled.shuffled
    assert said(development, ["scrambled_crops"], Fold(2, 0), **knobs) == scrambled


def test_a_bank_is_made_anew_in_each_fold(tmp_path: Path) -> None:
    write_cache(tmp_path, Plan(concepts=6))
    settings: Any = load_method("concept_bottleneck").Settings(l2=[0.1])
    needs = needs_of("concept_bottleneck", settings)
    cache = read_cache(tmp_path, ENCODER, Plan().buckets, needs)
    cache = cache.take(torch.from_numpy(np.flatnonzero(cache.split != "test")))
    source = Source(tmp_path, ENCODER, Plan().buckets, CPU)
    found = cross_fit(cache, "concept_bottleneck", settings, Fold(2, 0), 0, source)
    assert len(found.ordered) == len(held_out(cache, Fold(2, 0)))
    assert needs > {"concepts", "owners"}
