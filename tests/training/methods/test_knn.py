from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import knn


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("block", [3, 7, 100])
def test_the_nearest_are_found_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(knn, "BLOCK", block)
    g, keys = unit(5, 8), unit(20, 8, seed=1)
    near, place = knn.nearest(g, keys, 4)
    for image in range(5):
        cosines = [float(g[image] @ key) for key in keys]
        order = sorted(range(20), key=lambda row, cosines=cosines: -cosines[row])[:4]
        assert place[image].tolist() == order
        torch.testing.assert_close(near[image], torch.tensor([cosines[row] for row in order]))


def test_more_neighbours_than_images_are_all_of_them() -> None:
    assert knn.nearest(unit(5, 8), unit(3, 8), 10)[0].shape == (5, 3)


def test_votes_equal_a_loop() -> None:
    near, values = torch.tensor([[0.9, 0.8, 0.5]]), torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]])
    weight = [torch.tensor(cosine / 0.1).exp() for cosine in (0.9, 0.8, 0.5)]
    share = [(weight[0] + 0.5 * weight[2]) / sum(weight), (weight[1] + 0.5 * weight[2]) / sum(weight), 0.0]
    expected = torch.tensor([share]).add(knn.FLOOR).log()
    torch.testing.assert_close(knn.vote(near, values, 0.1), expected)


def test_one_neighbour_is_the_nearest_training_image_of_any_view(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(views=3, noise=3.0))
    train, test = cache.images("train"), cache.images("test")
    model = knn.fit(cache, knn.Settings(k=[1], temperature=[0.1]), 0).model
    cosines = torch.stack([cache.globals(test) @ cache.globals(train, view).T for view in range(3)])
    nearest = cosines.amax(0).argmax(1)
    assert torch.equal(predict(model, cache, test).argmax(1), cache.y[train][nearest])
