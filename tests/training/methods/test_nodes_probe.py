from collections.abc import Callable

import torch

from tests.training.cache import Plan
from training.data import Cache
from training.methods.nodes_probe import pool, pool_images


def test_mean_and_maximum_by_hand() -> None:
    nodes = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]], [[-1.0, 5.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean, highest = pool(nodes, mask)
    assert mean.tolist() == [[2.0, -3.0], [-1.0, 5.0]]
    assert highest.tolist() == [[3.0, -2.0], [-1.0, 5.0]]


def test_what_is_fitted_is_what_a_batch_shows(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(views=2))
    images = cache.images("train")[:7]
    batch = cache.batch(images, torch.ones(7, dtype=torch.long))
    for fitted, shown in zip(pool_images(cache, images, 1), pool(batch.nodes, batch.mask), strict=True):
        torch.testing.assert_close(fitted, shown)
