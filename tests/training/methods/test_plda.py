from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.cache import Plan
from tests.training.methods.test_prior_lda import LENT, READS, centred, described, few, texts_of, unseen
from training.data import Cache
from training.data.bank import Bank
from training.data.nodes import Globals, Nodes
from training.loop import predict
from training.methods import NotPossible, plda, transfer_lda
from training.methods.plda import Settings
from training.regimes import hide_test

Planted = Callable[[Plan], Cache]
FIXED: dict[str, Any] = {"penalty": [1.0], "shrinkage": [0.2], "prior_shrinkage": [0.4]}


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return described(planted)


def fitted(cache: Cache, **knobs: Any) -> Any:
    return plda.fit(hide_test(cache), Settings.model_validate(FIXED | knobs), 0)


def said(cache: Cache, **knobs: Any) -> torch.Tensor:
    return predict(fitted(cache, **knobs).model, cache, cache.images("test"))


def explicit(told: Cache, texts: bool) -> np.ndarray:
    """Logits (n, C) less their mean, by whole matrices: every product, inverse and map written out."""
    lent = told if told.others is None else told.others
    x_lent, x, test = (
        one.globals(one.images(split)).double().numpy()
        for one, split in ((lent, "train"), (told, "train"), (told, "test"))
    )
    mean, scale = x_lent.mean(0), x_lent.var(0).mean() ** 0.5
    x_lent, x, test = ((values - mean) / scale for values in (x_lent, x, test))
    y_lent, y = lent.y[lent.images("train")].numpy(), told.y[told.images("train")].numpy()
    teach, size = np.unique(y_lent), x.shape[1]
    p = np.array([x_lent[y_lent == label].mean(0) for label in teach])
    within = np.mean([np.outer(d, d) for d in x_lent - p[np.searchsorted(teach, y_lent)]], axis=0)
    shrunk = 0.8 * within + 0.2 * np.trace(within) / size * np.eye(size)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    e_lent, e = texts_of(lent)[teach], texts_of(told)
    unit = np.sqrt(np.square(e_lent - e_lent.mean(0)).sum(1).mean())

    def expect(rows: np.ndarray, new: np.ndarray) -> np.ndarray:
        if not texts:
            return p[rows].mean(0)
        design = np.hstack([e_lent[rows] / unit, np.ones((len(rows), 1))])
        cost = np.diag([1.0] * e_lent.shape[1] + [0.0])
        return np.append(new / unit, 1) @ np.linalg.solve(design.T @ design + cost, design.T @ p[rows])

    every = np.arange(len(teach))
    r = np.array([(p[c] - expect(every[every != c], e_lent[c])) @ root for c in every])
    noise = np.mean([1 / (y_lent == label).sum() for label in teach])
    lengths, axes = np.linalg.eigh(r.T @ r / len(r))
    b = np.clip(lengths - noise, 0, None)
    between = 0.6 * axes @ np.diag(b) @ axes.T + 0.4 * b.sum() / size * np.eye(size)
    m_0, itself = p.mean(0), np.eye(size)
    few = len(x) / len(told.classes)
    about = itself + between - between @ np.linalg.inv(between + itself / few) @ between
    logits = []
    for label in range(len(told.classes)):
        at = np.searchsorted(teach, label)
        left = every[every != at] if lent is told and label in teach else every
        q, images = (expect(left, e[label]) - m_0) @ root, (x[y == label] - m_0) @ root
        k, mu = len(images), q
        if k:
            mu = q + between @ np.linalg.inv(between + itself / k) @ (images.mean(0) - q)
        w = np.linalg.solve(about, mu)
        logits.append((test - m_0) @ root @ w - w @ mu / 2)
    return centred(np.array(logits).T)


@pytest.mark.parametrize("texts", ["none", "both"])
def test_equals_posteriors_by_whole_matrices(cache: Cache, texts: str) -> None:
    for told in (few(cache, 2), unseen(cache)):
        found = centred(said(told, texts=texts).double().numpy())
        np.testing.assert_allclose(found, explicit(told, texts == "both"), atol=2e-3 * np.abs(found).max())


def test_with_more_dimensions_than_images_it_says_the_same(planted: Planted) -> None:
    """What lies beside the span of the images that teach counts as whole matrices have it."""
    plan = Plan(classes=24, train=2, val=2, test=4, nodes=1, ragged=False, cue="global", noise=1.0, dimension=64)
    made = planted(plan)
    wide = made.only(READS | {"nodes"}).with_part(Globals(made.part(Nodes).nodes[:, 0])).only(READS)
    told = few(wide, 1)
    found = centred(said(told).double().numpy())
    np.testing.assert_allclose(found, explicit(told, False), atol=2e-3 * np.abs(found).max())


def test_one_share_for_all_axes_is_transfer_lda(cache: Cache) -> None:
    """A prior that is shrunk to a round one: in proportion, transfer_lda of some strength."""
    told = few(cache, 2)
    found = said(told, prior_shrinkage=[1.0])
    seen = hide_test(told)
    learned = plda.learn(seen, ("global",), "none", "none", (1.0,))
    spread = learned.teachers.spread
    within = 0.8 * spread.values + 0.2 * spread.mean
    whitened = learned.missed / within.sqrt()
    b = (torch.linalg.svdvals(whitened).square() / len(whitened) - learned.noise).clamp(min=0).sum() / 16
    ratio = transfer_lda.learn(seen, ("global",), "none").ratio
    settings = transfer_lda.Settings.model_validate({"shrinkage": [0.2], "strength": [1 / (b.item() * ratio)]})
    expected = predict(transfer_lda.fit(seen, settings, 0).model, told, told.images("test"))
    found, expected = (torch.from_numpy(centred(one.double().numpy())) for one in (found, expected))
    factor = (found * expected).sum() / expected.square().sum()
    assert factor > 0
    torch.testing.assert_close(found, factor * expected, atol=1e-3 * found.abs().max().item(), rtol=0)


def test_a_map_that_says_nothing_is_no_text(cache: Cache) -> None:
    for told in (few(cache, 1), unseen(cache)):
        torch.testing.assert_close(said(told, texts="both", penalty=[1e9]), said(told), atol=1e-3, rtol=1e-3)


def test_it_tells_classes_without_images_apart_by_their_texts(cache: Cache) -> None:
    told = unseen(cache)
    images = told.images("test")
    absent = ~torch.isin(torch.arange(24), told.y[told.images("train")])
    of_absent = absent[told.y[images]]
    for texts in ("names", "concepts", "both"):
        logits = said(told, texts=texts).masked_fill(~absent, float("-inf"))
        assert (logits.argmax(1) == told.y[images])[of_absent].float().mean() > 0.4  # chance: 1 in 6
    bank = told.part(Bank)
    shuffled = said(told.change(Bank, owners=bank.own.roll(5, dims=1)), texts="both").masked_fill(~absent, -torch.inf)
    assert (shuffled.argmax(1) == told.y[images])[of_absent].float().mean() < 0.3


def test_without_texts_none_are_read(cache: Cache) -> None:
    settings = Settings.model_validate(FIXED)
    assert plda.reads(settings) == {"globals"}
    assert plda.reads(settings.model_copy(update={"texts": "names"})) == {"globals", "names", "owners"}
    told = few(cache, 2)
    torch.testing.assert_close(said(told.only({"globals"})), said(told), atol=0, rtol=0)


def test_axes_where_other_classes_differ_count_for_more(cache: Cache) -> None:
    """Classes that differ in three directions of 40 alone: what others teach of these beats one share for all axes."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(24, 3, generator=generator) * 3
    g = torch.randn(len(cache.y), 40, generator=generator)
    g[:, :3] += places[cache.y]
    told = few(cache.with_part(Globals(g)), 1)
    right = {
        share: (said(told, prior_shrinkage=[share]).argmax(1) == told.y[told.images("test")]).float().mean().item()
        for share in (0.02, 1.0)
    }
    assert right[0.02] > right[1.0] + 0.1


def test_two_classes_that_teach_are_too_few(cache: Cache) -> None:
    told = few(cache, 1, LENT[:2])
    with pytest.raises(NotPossible, match="fewer than 3 classes have images"):
        fitted(told)
    alone = replace(told, others=None)
    assert fitted(alone).model is not None  # six classes with an image each teach themselves
