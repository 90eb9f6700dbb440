from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from tests.training.cache import Plan
from training.data import Cache
from training.data.nodes import Globals, Nodes
from training.loop import predict
from training.methods import NotPossible, lda, transfer_lda
from training.methods.transfer_lda import Settings, trust
from training.regimes import Shots, hide_test, restrict_classes

Planted = Callable[[Plan], Cache]
OWN, LENT = [f"class-{n:02d}" for n in range(4)], [f"class-{n:02d}" for n in range(4, 10)]
FIXED = {"shrinkage": [0.2], "strength": [1.0]}


def spread(planted: Planted, views: int = 1, dimension: int = 32) -> Cache:
    """Ten classes that all vary along the same few directions, more than they differ."""
    plan = Plan(
        classes=10, train=30, val=5, test=15, nodes=1, ragged=False, cue="global", noise=1.0, views=views,
        dimension=dimension,
    )  # fmt: skip
    cache, rng = planted(plan), torch.Generator().manual_seed(0)
    g = cache.part(Nodes).nodes[:, 0].float()
    noise = torch.randn(len(g), 6, generator=rng) @ torch.randn(6, dimension, generator=rng)
    return cache.only({"globals"}).with_part(Globals((g + 0.5 * noise).half()))


def few(cache: Cache, shots: int, others: list[str] = LENT) -> Cache:
    """What a few-shot fit is given: four classes, others lent."""
    return Shots.model_validate({"shots": shots}).apply(restrict_classes(cache, OWN, others), 0)


def accuracy(model: torch.nn.Module, cache: Cache) -> float:
    test = cache.images("test")
    return (predict(model, cache, test).argmax(1) == cache.y[test]).float().mean().item()


def test_the_posterior_mean_by_the_rule_of_bayes() -> None:
    """On a line: the mode of prior times likelihood, found by looking."""
    within, tau, centre, images = 0.7, 2.5, -1.0, np.array([2.0, 2.6, 3.1])
    grid = np.linspace(-3, 5, 80_001)
    log = multivariate_normal(centre, within / tau).logpdf(grid)
    log += sum(multivariate_normal(0, within).logpdf(image - grid) for image in images)
    found = centre + trust(torch.tensor([3.0]), tau).item() * (images.mean() - centre)
    assert found == pytest.approx(grid[log.argmax()], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [32, 500])
def test_equals_a_loop_over_classes(planted: Planted, dimension: int) -> None:
    """500 dimensions are more than there are rows, its own and those lent: the inverse is that of the whole space."""
    cache = few(spread(planted, views=2, dimension=dimension), 2)
    fitted = transfer_lda.fit(hide_test(cache), Settings.model_validate(FIXED), 0)
    lent = cache.others
    assert lent is not None
    raw = [torch.cat([lent.globals(lent.images("train"), view) for view in range(2)]).double().numpy()]
    raw.append(torch.cat([cache.globals(cache.images("train"), view) for view in range(2)]).double().numpy())
    raw.append(cache.globals(cache.images("test")).double().numpy())
    mean, scale = raw[0].mean(0), raw[0].var(0).mean() ** 0.5
    x_lent, x, test = ((values - mean) / scale for values in raw)
    y_lent, y = (np.concatenate([one.y[one.images("train")].numpy()] * 2) for one in (lent, cache))

    centres = np.array([x_lent[y_lent == label].mean(0) for label in range(6)])
    residual = x_lent - centres[y_lent]
    within = sum(np.outer(row, row) for row in residual) / len(residual)
    tau = np.trace(within) / np.trace(np.cov(centres.T, bias=True))
    inverse = np.linalg.inv(0.8 * within + 0.2 * np.trace(within) / dimension * np.eye(dimension))
    share, m_0, expected = 2 / (2 + tau), centres.mean(0), []  # two images, each in two views
    for label in range(4):
        mu = share * x[y == label].mean(0) + (1 - share) * m_0
        expected.append((test @ inverse @ mu - mu @ inverse @ mu / 2) / share)  # the logarithm of a Gaussian, in part
    found = predict(fitted.model, cache, cache.images("test")).numpy()
    np.testing.assert_allclose(centred(found), centred(np.array(expected).T), atol=2e-3, rtol=2e-3)


def centred(logits: np.ndarray) -> np.ndarray:
    """Less what is the same for all classes of an image."""
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.slow
def test_a_stronger_prior_is_no_less_sure_of_itself(planted: Planted) -> None:
    """Else a search by log loss would take the prior for a temperature."""
    cache = few(spread(planted), 1)
    models = [transfer_lda.fit(cache, Settings(shrinkage=[0.3], strength=[s]), 0).model for s in (30.0, 3000.0)]
    weak, strong = (predict(model, cache, cache.images("test")) for model in models)
    assert strong.std(1).mean() > 0.8 * weak.std(1).mean()


def test_other_classes_teach_what_one_image_cannot(planted: Planted) -> None:
    cache = few(spread(planted), 1)
    alone = max(accuracy(lda.fit(cache, lda.Settings(shrinkage=[a]), 0).model, cache) for a in lda.Settings().shrinkage)
    helped = accuracy(transfer_lda.fit(cache, Settings.model_validate(FIXED), 0).model, cache)
    assert helped > alone + 0.1


def test_the_few_images_say_where_their_classes_lie_and_the_others_how_they_spread(planted: Planted) -> None:
    whole = spread(planted)
    cache = few(whole, 2)
    fitted = transfer_lda.fit(cache, Settings.model_validate(FIXED), 0)
    before = predict(fitted.model, cache, cache.images("test"))
    for changed in (few(whole, 2, LENT[:4]), few(whole, 4)):
        model = transfer_lda.fit(changed, Settings.model_validate(FIXED), 0).model
        assert not torch.equal(predict(model, cache, cache.images("test")), before)


def test_no_image_of_another_class_beyond_training_is_looked_at(planted: Planted) -> None:
    cache = few(spread(planted), 2)
    lent = cache.others
    assert lent is not None
    y = lent.y.clone()
    y[torch.from_numpy(lent.split != "train")] = 0
    changed = replace(cache, others=replace(lent, y=y, target=y))
    said = [
        predict(transfer_lda.fit(told, Settings.model_validate(FIXED), 0).model, cache, cache.images("test"))
        for told in (cache, changed, hide_test(cache))
    ]
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


def test_without_other_classes_it_is_not_possible(planted: Planted) -> None:
    whole = spread(planted)
    for cache in (whole, few(whole, 2, LENT[:1]), few(whole, 2, [])):
        with pytest.raises(NotPossible, match=r"no images of two other classes are lent to it, .*; take lda"):
            transfer_lda.fit(cache, Settings.model_validate(FIXED), 0)


def test_a_class_is_told_apart_or_lent_and_not_both(planted: Planted) -> None:
    with pytest.raises(ValueError, match="class-04"):
        restrict_classes(spread(planted), [*OWN, "class-04"], LENT)


def test_what_is_lent_is_seen_as_the_method_declares_and_hides_its_test_labels(planted: Planted) -> None:
    cache = planted(Plan(classes=10, train=4, val=2, test=2))
    lent = hide_test(restrict_classes(cache, OWN, LENT)).only({"nodes"}).others
    assert lent is not None
    assert lent.classes == LENT
    assert len(lent.parts.by_kind) == 1
    assert (lent.y[torch.from_numpy(lent.split == "hidden")] == -1).all()
    assert sorted(set(lent.split.tolist())) == ["hidden", "train", "val"]
