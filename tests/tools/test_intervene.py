"""Interventions on a bottleneck: what is taken out is gone, and a text that tells a class apart helps."""

from typing import cast

import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import ALL, ENCODER, Plan, write_cache
from tools.intervene import Effect, describe, find_rows, fit_with, without
from training.data import Cache, read_cache
from training.data.bank import Bank
from training.loop import assess_split, predict
from training.methods import concept_bottleneck
from training.methods.concept_bottleneck import ConceptBottleneck, Settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("data")
    plan = Plan(noise=1.0, concepts=5)
    write_cache(folder, plan)
    return read_cache(folder, ENCODER, plan.buckets, ALL)


def fit(cache: Cache) -> ConceptBottleneck:
    return cast(ConceptBottleneck, concept_bottleneck.fit(cache, Settings(l2=[0.01]), 0).model)


def test_without_a_concept_its_term_is_gone_and_no_other(cache: Cache) -> None:
    model, images = fit(cache), cache.images("val")
    row = int(model.row[3])
    less = predict(without(model, [row]), cache, images)
    scores = model.standardise(cache.globals(images)) @ cache.part(Bank).K[row]
    torch.testing.assert_close(
        predict(model, cache, images) - less, scores[:, None] * model.linear.weight[:, 3].detach(), atol=1e-4, rtol=1e-4
    )
    assert model.linear.weight[:, 3].any()  # the run's own model stays


def test_a_text_that_tells_a_class_apart_helps_it(cache: Cache) -> None:
    """The bank knows nothing of a direction in which class 0 lies; the text points there."""
    images = cache.images("train")
    means = torch.stack([cache.globals(images[cache.y[images] == c]).mean(0) for c in range(4)])
    telling = F.normalize(means[0] - means[1:].mean(0), dim=0)
    bank = cache.part(Bank)
    blind = cache.change(Bank, K=F.normalize(bank.K - (bank.K @ telling)[:, None] * telling, dim=1))
    before, settings = fit(blind), Settings(l2=[0.01])
    after = fit_with(blind, settings, telling[None], [], 0)
    assert after.row.tolist() == [*before.row.tolist(), len(bank.K)]
    assert assess_split(after, blind, "val")[1] < assess_split(before, blind, "val")[1]
    dropped = fit_with(blind, settings, telling[None], [int(before.row[0])], 0)
    assert int(before.row[0]) not in dropped.row.tolist()


def test_texts_are_found_whatever_their_case_and_others_are_named() -> None:
    texts = ["Red", None, "a yellow tail", "a blue tail"]
    assert find_rows(texts, [1, 2, 3], ["A yellow tail"]) == [2]
    with pytest.raises(UserError, match=r"reads no concept 'a yellow tale'; it reads: a yellow tail"):
        find_rows(texts, [1, 2, 3], ["a yellow tale"])
    with pytest.raises(UserError, match=r"reads no concept 'red'"):  # in the bank, and not read
        find_rows(texts, [1, 2, 3], ["red"])


def test_the_table_has_the_class_that_loses_most_on_top() -> None:
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    before = 5 * F.one_hot(y, 4).float()
    after = before.clone()
    after[2, 1], after[2, 0] = 0, 1
    said = describe(Effect(before, after, y), ["ant", "bee", "cat", "none"]).splitlines()
    assert said[0].startswith("6 pictures of val: 100.0 % before, 83.3 % after: -16.7 [")
    rows = [line.split() for line in said if line.startswith(("ant", "bee", "cat", "none"))]
    assert [row[0] for row in rows] == ["bee", "ant", "cat"]  # none has no picture
    assert rows[0][1:4] == ["2", "100.0", "50.0"]
    # Of one picture of two: -5 in its own logit, and (-5 + 1) / 4 in the mean.
    assert float(rows[0][4]) == pytest.approx((-5 + 1) / 2, abs=0.006)
