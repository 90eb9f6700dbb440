from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import KernelCenterer

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import rbf_ridge, ridge
from training.regimes import Shots

Planted = Callable[[Plan], Cache]
HARD = Plan(classes=6, train=20, val=10, test=20, cue="global", noise=3.0, views=2)


def vectors(cache: Cache, split: str, views: int = 1) -> np.ndarray:
    """Standardised by hand (V n, D)."""
    train = torch.cat([cache.globals(cache.images("train"), view) for view in range(cache.views)]).double()
    x = torch.cat([cache.globals(cache.images(split), view) for view in range(views)]).double()
    return ((x - train.mean(0)) / train.var(0, correction=0).mean().sqrt()).numpy()


def targets(cache: Cache) -> np.ndarray:
    return np.concatenate([np.eye(len(cache.classes))[cache.y[cache.images("train")].numpy()]] * cache.views)


def without_scale(logits: torch.Tensor) -> np.ndarray:
    """Scores sum to 1 over the classes, so the sum of the logits is their scale."""
    z = logits.double().numpy()
    return z / z.sum(1, keepdims=True)


@pytest.mark.parametrize("penalty", [30.0, 0.3, 0.01])
def test_ridge_equals_scikit_learn(planted: Planted, penalty: float) -> None:
    cache = planted(HARD)
    fitted = ridge.fit(cache, ridge.Settings(penalty=[penalty]), 0)
    x, y = vectors(cache, "train", 2) / np.sqrt(32), targets(cache)
    theirs = Ridge(alpha=penalty).fit(x, y).predict(vectors(cache, "test") / np.sqrt(32))
    ours = without_scale(predict(fitted.model, cache, cache.images("test")))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("penalty", [3.0, 0.1, 0.003])
@pytest.mark.parametrize("width", [0.5, 2.0])
def test_rbf_ridge_equals_scikit_learn_on_centred_targets(planted: Planted, penalty: float, width: float) -> None:
    cache = planted(HARD)
    fitted = rbf_ridge.fit(cache, rbf_ridge.Settings(penalty=[penalty], width=[width]), 0)
    x, y, test = vectors(cache, "train", 2), targets(cache), vectors(cache, "test")
    mean_distance = np.mean([((row - x) ** 2).sum(1).mean() for row in x])
    kernel, of_test = (rbf_kernel(rows, x, gamma=1 / (width * mean_distance)) for rows in (x, test))
    centre = KernelCenterer().fit(kernel)
    model = KernelRidge(kernel="precomputed", alpha=penalty).fit(centre.transform(kernel), y - y.mean(0))
    theirs = model.predict(centre.transform(of_test)) + y.mean(0)
    ours = without_scale(predict(fitted.model, cache, cache.images("test")))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("method", [ridge, rbf_ridge])
def test_leaving_out_chooses_and_val_does_not(planted: Planted, method) -> None:  # type: ignore[no-untyped-def]
    cache = planted(HARD)
    y = cache.y.clone()
    y[cache.images("val")] = 0
    lied = replace(cache, y=y, target=torch.where(torch.from_numpy(cache.split == "val"), 0, cache.target))
    (fitted, other), test = (method.fit(one, method.Settings(), 0) for one in (cache, lied)), cache.images("test")
    assert torch.equal(predict(fitted.model, cache, test), predict(other.model, cache, test))
    best = max(fitted.history, key=lambda row: (row["left_out_accuracy"], -row["left_out_loss"]))
    assert fitted.chosen == {name: best[name] for name in fitted.chosen}
    assert fitted.history != other.history  # val is read out all the same


@pytest.mark.parametrize("method", [ridge, rbf_ridge])
def test_one_image_a_class_leaves_nothing_to_choose_by(planted: Planted, method) -> None:  # type: ignore[no-untyped-def]
    cache = Shots(shots=1).apply(planted(HARD), 0)
    with pytest.raises(UserError, match=r"no class has two training images, .* settings of .*penalty; give each"):
        method.fit(cache, method.Settings(), 0)
    single = {name: values[:1] for name, values in method.Settings() if name in ("penalty", "width")}
    two = Shots(shots=2).apply(planted(HARD), 0)
    for few, settings in ((cache, method.Settings(**single)), (two, method.Settings())):
        assert np.isfinite(predict(method.fit(few, settings, 0).model, few, few.images("test"))).all()


@pytest.mark.slow
def test_a_kernel_bends_where_a_line_cannot(planted: Planted) -> None:
    """A class that lies on both sides of the other."""
    cache = planted(Plan(classes=2, train=40, val=20, test=20, cue="none"))
    first = cache.globals(torch.arange(len(cache.paths)))[:, 0].abs()
    y = (first < first.median()).long()
    cache, train = replace(cache, y=y, target=y), cache.images("train")

    def learned(model: torch.nn.Module) -> float:
        return (predict(model, cache, train).argmax(1) == y[train]).float().mean().item()

    straight = learned(ridge.fit(cache, ridge.Settings(penalty=[0.01]), 0).model)
    assert straight < 0.95 < learned(rbf_ridge.fit(cache, rbf_ridge.Settings(penalty=[0.01], width=[0.5]), 0).model)
