from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.data.bank import Bank
from training.data.nodes import Globals, Nodes
from training.loop import predict
from training.methods import NotPossible, prior_lda, transfer_lda
from training.methods.prior_lda import Settings, learn
from training.regimes import Shots, Unseen, hide_test, restrict_classes

Planted = Callable[[Plan], Cache]
CLASSES = [f"class-{n:02d}" for n in range(24)]
OWN, LENT = CLASSES[:6], CLASSES[6:]
FIXED: dict[str, Any] = {"penalty": [1.0], "shrinkage": [0.2], "strength": [1.0]}
READS = {"globals", "names", "concepts", "owners"}


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return described(planted)


def described(planted: Planted) -> Cache:
    """Classes that texts describe: where images of a class lie is a turn of where its texts lie."""
    plan = Plan(classes=24, train=8, val=4, test=8, nodes=1, ragged=False, cue="global", noise=1.6, dimension=16)
    made = planted(plan)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    g = F.normalize(made.part(Nodes).nodes[:, 0].float() @ turn, dim=1)
    return made.only(READS | {"nodes"}).with_part(Globals(g.half())).only(READS)


def few(cache: Cache, shots: int, others: list[str] = LENT) -> Cache:
    """What a few-shot fit is given: six classes, others lent."""
    return Shots.model_validate({"shots": shots}).apply(restrict_classes(cache, OWN, others), 0)


def unseen(cache: Cache) -> Cache:
    return Unseen(seen=0.75).apply(cache, 0)


def fitted(cache: Cache, **knobs: Any) -> Any:
    return prior_lda.fit(hide_test(cache), Settings.model_validate(FIXED | knobs), 0)


def said(cache: Cache, **knobs: Any) -> torch.Tensor:
    return predict(fitted(cache, **knobs).model, cache, cache.images("test"))


def accuracy(logits: torch.Tensor, cache: Cache) -> float:
    return (logits.argmax(1) == cache.y[cache.images("test")]).float().mean().item()


def centred(logits: np.ndarray) -> np.ndarray:
    """Less what is the same for all classes of an image."""
    return logits - logits.mean(1, keepdims=True)


def test_equals_explicit_gaussian_posteriors(cache: Cache) -> None:
    """Prior times likelihood by precision matrices, the map by refits of a ridge, densities by SciPy."""
    told = few(cache, 2)
    lent = told.others
    assert lent is not None
    x_lent, x, test = (
        one.globals(one.images(split)).double().numpy()
        for one, split in ((lent, "train"), (told, "train"), (told, "test"))
    )
    mean, scale = x_lent.mean(0), x_lent.var(0).mean() ** 0.5
    x_lent, x, test = ((values - mean) / scale for values in (x_lent, x, test))
    y_lent, y = lent.y[lent.images("train")].numpy(), told.y[told.images("train")].numpy()
    p = np.array([x_lent[y_lent == label].mean(0) for label in range(18)])
    within = np.cov((x_lent - p[y_lent]).T, bias=True)
    e_lent, e = (texts_of(one) for one in (lent, told))
    unit = np.sqrt(np.square(e_lent - e_lent.mean(0)).sum(1).mean())

    def ridge(rows: np.ndarray, new: np.ndarray) -> np.ndarray:
        design = np.hstack([e_lent[rows] / unit, np.ones((len(rows), 1))])
        cost = np.diag([1.0] * e_lent.shape[1] + [0.0])
        return np.append(new / unit, 1) @ np.linalg.solve(design.T @ design + cost, design.T @ p[rows])

    every = np.arange(18)
    missed = np.mean([np.square(p[c] - ridge(every[every != c], e_lent[c])).sum() for c in every])
    tau = np.trace(within) / missed
    shrunk = 0.8 * within + 0.2 * np.trace(within) / 16 * np.eye(16)
    expected = []
    for label in range(6):
        q, images = ridge(every, e[label]), x[y == label]
        precision = tau * np.linalg.inv(within) + len(images) * np.linalg.inv(within)
        mu = np.linalg.solve(precision, np.linalg.inv(within) @ (tau * q + images.sum(0)))
        expected.append(multivariate_normal(mu, shrunk).logpdf(test))
    found = centred(said(told).double().numpy())
    wanted = centred(np.array(expected).T)
    factor = (found * wanted).sum() / np.square(wanted).sum()  # 1 / s: sharper, and the same to all
    np.testing.assert_allclose(found, factor * wanted, atol=2e-3 * np.abs(found).max())
    share = 2 / (2 + tau)
    v = learn(hide_test(told), ("global",), "none", "both", (1.0,)).explained
    assert factor == pytest.approx(1 / (share + (1 - share) * v), rel=1e-3)


def texts_of(cache: Cache) -> np.ndarray:
    """A class's mean name and mean kept concept, each of unit length, one after the other, in a loop."""
    bank, rows = cache.part(Bank), []
    for label in range(len(cache.classes)):
        blocks = []
        for kind in ("name", "visual"):
            owned = [
                bank.K[row].double() for row, of in enumerate(bank.kind)
                if of == kind and bank.own[row, label] and (of == "name" or bank.kept[row])
            ]  # fmt: skip
            blocks.append(F.normalize(torch.stack(owned).mean(0), dim=0))
        rows.append(torch.cat(blocks).numpy())
    return np.array(rows)


def test_a_map_that_says_nothing_leaves_transfer_lda(cache: Cache) -> None:
    told = few(cache, 1)
    # A class left out is predicted by the mean of the others, so that misses are larger than the spread about the mean.
    plain = transfer_lda.Settings.model_validate({"shrinkage": [0.2], "strength": [2.0]})
    expected = predict(transfer_lda.fit(hide_test(told), plain, 0).model, told, told.images("test"))
    found = said(told, penalty=[1e9], strength=[2.0 * (18 / 17) ** 2])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_it_tells_classes_without_images_apart_by_their_texts(cache: Cache) -> None:
    told = unseen(cache)
    images = told.images("test")
    absent = ~torch.isin(torch.arange(24), told.y[told.images("train")])
    of_absent = absent[told.y[images]]
    for texts in ("names", "concepts", "both"):
        logits = said(told, texts=texts).masked_fill(~absent, float("-inf"))
        assert (logits.argmax(1) == told.y[images])[of_absent].float().mean() > 0.4  # chance: 1 in 6
    bank = told.part(Bank)
    shuffled = told.change(Bank, owners=bank.own.roll(5, dims=1))
    logits = said(shuffled).masked_fill(~absent, float("-inf"))
    assert (logits.argmax(1) == told.y[images])[of_absent].float().mean() < 0.3


def test_with_images_their_texts_matter_less(cache: Cache) -> None:
    """What other texts change falls with the images that a class has."""
    moved = []
    for shots in (1, 4, 8):
        told = few(cache, shots)
        other = told.change(Bank, owners=told.part(Bank).own.roll(1, dims=1))
        before, after = said(told), said(other)
        moved.append(((before - after).std() / before.std()).item())
    assert moved[0] > moved[1] > moved[2] > 0


def test_texts_help_where_there_is_one_image(cache: Cache) -> None:
    told = few(cache, 1)
    plain = transfer_lda.Settings.model_validate({"shrinkage": [0.2], "strength": [1.0]})
    alone = predict(transfer_lda.fit(hide_test(told), plain, 0).model, told, told.images("test"))
    assert accuracy(said(told), told) > accuracy(alone, told) + 0.05


def test_no_label_of_a_class_without_images_is_ever_seen(cache: Cache) -> None:
    """Labels, and the images themselves, of classes that are not seen: whatever they are, the model is the same."""
    told = unseen(cache)
    seen = told.y[told.images("train")].unique()
    others = ~torch.isin(told.y, seen)
    y = torch.where(others, told.y.roll(7), told.y)
    g = told.part(Globals).g.clone()
    g[others] = g[others].roll(3, dims=0)
    lied = replace(told, y=y, target=y).with_part(Globals(g))
    one, two = (fitted(each).model.state_dict() for each in (told, lied))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_penalty_is_chosen_by_classes_left_out_alone(cache: Cache) -> None:
    told = unseen(cache)
    chosen = fitted(told, penalty=[0.01, 1.0, 1e6]).chosen
    assert chosen["penalty"] in (0.01, 1.0)
    without_val = replace(told, split=np.where(told.split == "choose", "unused", told.split))
    assert fitted(without_val, penalty=[0.01, 1.0, 1e6]).chosen["penalty"] == chosen["penalty"]


def test_what_it_cannot_do_without(cache: Cache) -> None:
    with pytest.raises(NotPossible, match="fewer than 3 classes have images to learn from"):
        fitted(few(cache, 1, LENT[:2]))
    bank = cache.part(Bank)
    kept = bank.kept & ~bank.own[:, 2]
    silent = cache.with_part(replace(bank, kept=kept))
    with pytest.raises(NotPossible, match="class class-02 has no kept concept"):
        fitted(unseen(silent))
    fitted(unseen(silent), texts="names")
