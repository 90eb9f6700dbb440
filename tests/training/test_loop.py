"""How epochs are chosen: when val is looked at, and that what chooses says nothing of how good the choice is."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.halves import halve
from tests.training.cache import Plan
from training.data import Batch, Cache, Parts
from training.data.nodes import Nodes
from training.layers.logistic import fit_logistic
from training.loop import Schedule, epochs_to_look, fit_epochs, predict, told_loss
from training.methods import BUDGET, Output, attention_pool, linear_probe
from training.regimes import hide_test

CLASSES, TRAIN, VAL, NODES, DIMENSION = 4, 10, 20, 2, 8


@pytest.mark.parametrize(
    ("epochs", "looks", "expected"),
    [
        (30, 8, [0, 4, 9, 13, 17, 21, 26, 30]),
        (20, 4, [0, 7, 13, 20]),
        (3, 16, [0, 1, 2, 3]),
        (15, 16, list(range(16))),
        (30, 2, [0, 30]),
        (30, 1, [30]),  # nothing to choose between: the last one
        (0, 8, [0]),
    ],
)
def test_looks_are_spread_over_the_epochs(epochs: int, looks: int, expected: list[int]) -> None:
    assert sorted(epochs_to_look(epochs, looks)) == expected


def test_looks_are_no_more_than_asked_and_hold_both_ends() -> None:
    for epochs in range(60):
        for looks in range(2, BUDGET + 1):
            found = epochs_to_look(epochs, looks)
            assert len(found) == min(looks, epochs + 1)
            assert {0, epochs} <= found <= set(range(epochs + 1))


def noise(seed: int) -> Cache:
    """A cache in which nothing shows the class."""
    generator = torch.Generator().manual_seed(seed)
    split = np.repeat(["train", "val"], [CLASSES * TRAIN, CLASSES * VAL])
    y = torch.arange(len(split)) % CLASSES
    paths = [f"{seed}/{number:04d}" for number in range(len(split))]
    vectors = F.normalize(torch.randn(len(split), 1 + NODES, DIMENSION, generator=generator), dim=-1).half()
    return Cache(
        classes=[f"class-{number}" for number in range(CLASSES)],
        paths=paths,
        image_ids=paths,
        groups=paths,
        split=halve(split, split == "val", paths, y.numpy()),
        y=y,
        target=y,
        views=1,
        parts=Parts([Nodes(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))]),
        fingerprints={},
    )


class Probe(nn.Module):
    """A linear layer on the global vector."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(batch.g), {}, None)


def best_epoch(told: Cache) -> tuple[nn.Module, nn.Module]:
    """A probe, and the epoch that val prefers of gradient steps that start from it."""
    train = told.images("train")
    start = Probe(fit_logistic(told.globals(train), told.target[train], *of_val(told), CLASSES, (1e-3,)).linear)
    schedule = Schedule(epochs=8, lr=[0.1], batch_size=20, precision="fp32")
    return start, fit_epochs(lambda: copy.deepcopy(start), told, schedule, 0).model


def of_val(told: Cache) -> tuple[Tensor, Tensor]:
    val = told.images("val")
    return told.globals(val), told.y[val]


def attention(told: Cache) -> tuple[nn.Module, nn.Module]:
    """The tuned probe, and attention over patches, which starts from it."""
    settings = attention_pool.Settings(epochs=8, hidden=8, lr=[1e-2], batch_size=20, precision="fp32")
    probe = linear_probe.fit(told, linear_probe.Settings(), 0).model
    return probe, attention_pool.fit(told, settings, 0).model


def gains(fit: Callable[[Cache], tuple[nn.Module, nn.Module]], caches: int) -> dict[str, list[np.ndarray]]:
    """By half of val and cache, (images,): 1 where the method is right and the probe wrong, -1 the other way round."""
    found: dict[str, list[np.ndarray]] = {"choose": [], "val": []}
    for seed in range(caches):
        cache = noise(seed)
        models = fit(hide_test(cache))
        for half, of_half in found.items():
            images = cache.images(half)
            probe, ours = (predict(model, cache, images).argmax(1) == cache.y[images] for model in models)
            of_half.append((ours.int() - probe.int()).numpy())
    return found


def beats(gain: np.ndarray) -> bool:
    """By the exact test of McNemar, 5 % to either side together."""
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    return better > worse and binomtest(better, better + worse).pvalue < 0.05


@pytest.mark.parametrize(
    ("fit", "caches"),
    [(best_epoch, 45), pytest.param(best_epoch, 200, marks=pytest.mark.slow),
     pytest.param(attention, 200, marks=pytest.mark.slow)],
)  # fmt: skip
def test_in_pure_noise_the_best_epoch_gains_nothing_where_it_is_reported(
    fit: Callable[[Cache], tuple[nn.Module, nn.Module]], caches: int
) -> None:
    found = gains(fit, caches)
    chosen_on, reported = (np.array([gain.mean() for gain in found[half]]) for half in ("choose", "val"))
    error = reported.std(ddof=1) / caches**0.5
    # Epoch 0 is the probe and the best is kept: where val chooses, no cache loses, and noise gains.
    assert chosen_on.min() >= 0
    assert chosen_on.mean() > 4 * chosen_on.std(ddof=1) / caches**0.5
    assert abs(reported.mean()) < 2 * error
    assert sum(beats(gain) for gain in found["val"]) <= 0.05 * caches


def test_what_training_is_told_moves_in_a_copy_for_each_model() -> None:
    cache = noise(0)
    train = cache.images("train")
    target = torch.full((len(cache.paths), CLASSES), 1 / CLASSES)
    told = replace(cache, target=target.clone())
    seen: list[tuple[Tensor, float]] = []

    def retell(q: Tensor, logits: Tensor, past: float) -> Tensor:
        assert not logits.requires_grad
        seen.append((q, past))
        return q / 2

    dimension = told.globals(train[:1]).shape[1]
    schedule = Schedule(epochs=3, lr=[0.1, 0.01], weight_decay=[0.0], batch_size=len(train), precision="fp32")
    fit_epochs(lambda: Probe(nn.Linear(dimension, CLASSES)), told, schedule, 0, retell=retell)
    assert [past for _, past in seen] == [0.0, 0.5, 1.0] * 2
    for step, (q, _) in enumerate(seen):
        torch.testing.assert_close(q, target[train] / 2 ** (step % 3))
    assert torch.equal(told.target, target)
    seen.clear()
    fit_epochs(lambda: Probe(nn.Linear(dimension, CLASSES)), cache, schedule, 0, retell=retell)
    assert seen == []  # classes are what they are


def test_the_loss_before_training_is_of_what_is_told(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(classes=3, train=4, val=2, test=2))
    train, model = cache.images("train"), linear_probe.fit(cache, linear_probe.Settings(l2=[1.0]), 0).model
    wrong, uniform = (cache.y + 1) % 3, torch.full((len(cache.y), 3), 1 / 3)
    for target in (cache.y, wrong, uniform):
        expected = F.cross_entropy(predict(model, cache, train), target[train]).item()
        assert told_loss(model, replace(cache, target=target)) == pytest.approx(expected, rel=1e-6)
