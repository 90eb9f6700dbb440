from collections.abc import Callable

import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.loop import predict
from training.methods import mlp


def test_logits_equal_the_formula(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan())
    images = cache.images("test")
    model = mlp.fit(cache, mlp.Settings(epochs=1, hidden=16, weight_decay=[0.01]), 0).model
    _, into, _, _, out = model.layers
    x = F.layer_norm(model.standardise(cache.globals(images)), (32,), model.layers[0].weight, model.layers[0].bias)
    expected = F.gelu(x @ into.weight.T + into.bias) @ out.weight.T + out.bias
    torch.testing.assert_close(predict(model, cache, images), expected, atol=1e-5, rtol=1e-5)


def test_separable_classes_are_learned_whole(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(cue="global", noise=0.3))
    model = mlp.fit(cache, mlp.Settings(epochs=30, batch_size=32, weight_decay=[0.01]), 0).model
    images = cache.images("test")
    assert torch.equal(predict(model, cache, images).argmax(1), cache.y[images])
