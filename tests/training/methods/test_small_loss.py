"""Small-loss selection, against loops, and on labels that are planted wrong."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fieldmark.store import sha256
from tests.training.cache import Plan, seen_twice
from training.data import Cache
from training.layers.told_labels import ToldRows
from training.loop import assess_split, predict
from training.methods import linear_probe, small_loss
from training.regimes import Noise

Planted = Callable[[Plan], Cache]
PLAN = Plan(classes=6, train=40, val=20, test=50, cue="global", noise=1.5, dimension=32)


def rows_of(n: int = 60, classes: int = 3) -> ToldRows:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    told = F.one_hot(torch.randint(classes, (n,), generator=generator), classes).float()
    return ToldRows(x, told, [f"group-{number // 2}" for number in range(n)])


def test_each_image_is_judged_by_a_probe_of_other_groups() -> None:
    rows, l2 = rows_of(), 0.1
    kept = torch.ones(60, dtype=torch.bool)
    kept[::7] = False
    found = small_loss.losses(rows, kept, 3, l2, 500).numpy()
    part = np.array([int(sha256(group)[:8], 16) % 3 for group in rows.groups])
    x, y = rows.x.numpy(), rows.told.argmax(1).numpy()
    fits = {}
    for number in range(3):
        others = (part != number) & kept.numpy()
        fits[number] = LogisticRegression(C=1 / (others.sum() * l2), max_iter=2000, tol=1e-8).fit(x[others], y[others])
    for image in range(60):
        other = fits[part[image]]
        assert abs(found[image] + np.log(other.predict_proba(x[image : image + 1])[0, y[image]])) < 2e-3


def test_a_share_of_each_class_is_dropped_and_one_image_stays() -> None:
    told = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    loss = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.5, 0.1, 9.0])
    assert small_loss.smallest(loss, told, 0.5).tolist() == [False, True, False, True, False, True, True]
    assert small_loss.smallest(loss, told, 0.99).tolist() == [False, False, False, True, False, True, True]
    assert small_loss.smallest(loss, told, 0.0).all()


def test_what_is_wrong_is_dropped_and_the_probe_gains(planted: Planted) -> None:
    clean = planted(PLAN)
    cache = Noise(wrong="symmetric", share=0.4).apply(clean, 0)
    settings = small_loss.Settings(rate=[0.4], l2=[0.1])
    probe = assess_split(linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model, cache, "test")[0]
    ours = assess_split(small_loss.fit(cache, settings, 0).model, cache, "test")[0]
    assert ours > probe + 0.03
    # With a rate of 0 nothing is dropped: the probe.
    none = small_loss.fit(cache, small_loss.Settings(rate=[0.0], l2=[0.1]), 0)
    plain = linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0)
    images = cache.images("test")
    torch.testing.assert_close(
        predict(none.model, cache, images), predict(plain.model, cache, images), atol=1e-3, rtol=1e-3
    )


def test_a_clean_val_finds_that_much_is_wrong(planted: Planted) -> None:
    clean = planted(PLAN)
    cache = Noise(wrong="symmetric", share=0.5).apply(clean, 1)
    fitted = small_loss.fit(cache, small_loss.Settings(l2=[0.1]), 0)
    assert fitted.chosen["rate"] >= 0.2
    assert len(fitted.history) == 4


def test_a_view_that_is_a_copy_changes_nothing(planted: Planted) -> None:
    cache = Noise(wrong="symmetric", share=0.4).apply(planted(PLAN), 0)
    twice, images, settings = seen_twice(cache), cache.images("test"), small_loss.Settings(rate=[0.4], l2=[0.1])
    once = predict(small_loss.fit(cache, settings, 0).model, cache, images)
    again = predict(small_loss.fit(twice, settings, 0).model, twice, images)
    torch.testing.assert_close(again, once, atol=1e-3, rtol=1e-3)


def test_an_image_is_judged_and_dropped_in_all_its_views() -> None:
    """The loss of an image is the mean over views, and a probe without it has none of them."""
    one = rows_of()
    other = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    rows, kept = ToldRows(torch.cat([one.x, other]), one.told, one.groups), torch.ones(60, dtype=torch.bool)
    part = torch.tensor([int(sha256(group)[:8], 16) % 3 for group in rows.groups])
    others, y = (part != part[0]).numpy(), one.told.argmax(1).numpy()
    x = np.concatenate([one.x.numpy()[others], other.numpy()[others]])
    probe = LogisticRegression(C=1 / (len(x) * 0.1), max_iter=2000, tol=1e-8).fit(x, np.tile(y[others], 2))
    log_p = probe.predict_log_proba(np.stack([one.x[0], other[0]]))[:, y[0]]
    assert abs(small_loss.losses(rows, kept, 3, 0.1, 500)[0].item() + log_p.mean()) < 2e-3
