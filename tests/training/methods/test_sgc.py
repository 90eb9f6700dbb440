"""Against a dense matrix, power by power, and against the probe on what it smooths."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.training.cache import Plan
from training.data import Cache
from training.data.links import Links
from training.layers.features import Features
from training.layers.logistic import fit_logistic
from training.links import LinkSettings, Memory, senders
from training.methods import sgc
from training.methods.sgc import Settings, Smoothing

Planted = Callable[[Plan], Cache]


def dense(cache: Cache, settings: LinkSettings) -> torch.Tensor:
    """S (n, n) float64 over all images, by loops: row i says how much i hears of each; only senders have columns."""
    part, sending = cache.part(Links), set(senders(cache, settings).tolist())
    edges, position = part.incoming[settings.links], {key: place for place, key in enumerate(part.key.tolist())}
    n = len(cache.paths)
    heard = torch.zeros(n, n, dtype=torch.float64)
    for image in range(n):
        count = 0
        for edge in range(int(edges.start[image]), int(edges.start[image + 1])):
            sender = position[int(edges.source[edge])]
            if sender in sending and sender != image and (settings.neighbours is None or count < settings.neighbours):
                heard[image, sender] = edges.weight[edge]
                count += 1
    scale = (heard.sum(1) + 1).rsqrt()
    return scale[:, None] * (heard + torch.eye(n, dtype=torch.float64)) * scale


@pytest.mark.parametrize("sources", ["train", "all"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_is_a_power_of_the_normalised_matrix(planted: Planted, sources: str, steps: int) -> None:
    cache = planted(Plan(classes=3, train=6, val=4, test=3))
    settings = Settings(sources=sources, neighbours=4)
    features, images = Features.measure(cache, settings), torch.arange(len(cache.paths))
    memory, vectors = Memory.of(cache, settings), features.of(cache, senders(cache, settings))
    x = features.of(cache, images).double()
    expected = torch.linalg.matrix_power(dense(cache, settings), steps) @ x
    found = Smoothing(features, memory, vectors, steps).of(cache, images, 0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_logistic_regression_on_what_is_smoothed_and_val_chooses(planted: Planted) -> None:
    cache = planted(Plan(classes=3, train=10, val=8, test=3, noise=3.0))
    settings = Settings(steps=[1, 2], l2=[1.0, 0.01])
    fitted = sgc.fit(cache, settings, 0)
    assert [(row["steps"], row["l2"]) for row in fitted.history] == [(1, 1.0), (1, 0.01), (2, 1.0), (2, 0.01)]
    assert [row["epoch"] for row in fitted.history] == [1, 2, 3, 4]
    best = max(fitted.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert fitted.chosen == {"steps": best["steps"], "l2": best["l2"]}
    assert isinstance(fitted.model, sgc.SGC)
    smoothing = fitted.model.smoothing
    train, val = (smoothing.of(cache, cache.images(split), 0) for split in ("train", "val"))
    y, y_val = (cache.y[cache.images(split)] for split in ("train", "val"))
    again = fit_logistic(train, y, val, y_val, 3, [best["l2"]])
    torch.testing.assert_close(fitted.model.layer(val), again.linear(val), atol=2e-2, rtol=2e-2)


def test_with_links_of_nobody_it_is_the_vectors_themselves(planted: Planted) -> None:
    cache = planted(Plan(classes=3, train=6, val=4, test=3))
    none = replace(cache, split=cache.split)
    edges = cache.part(Links).incoming["near"]
    bare = none.change(Links, incoming={"near": edges._replace(weight=torch.zeros_like(edges.weight))})
    settings, images = Settings(), torch.arange(len(cache.paths))
    features = Features.measure(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    found = Smoothing(features, Memory.of(bare, settings), vectors, 2).of(bare, images, 0)
    torch.testing.assert_close(found, features.of(cache, images))
