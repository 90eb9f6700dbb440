"""Logistic regression where what training images are told may be wrong: told anew, fitted, and chosen by val.

The methods that share this differ in what they tell alone. Each has one knob beside l2 with a value that changes
nothing, at which the objective is that of linear_probe, on fewer strengths. Val chooses among all points of both; where
its labels are wrong too (`val: noisy` of a regime, or data as the web gives them), so is what chooses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.params import Count
from training.data import Cache
from training.layers.blocks import Span, linear_layer
from training.layers.features import Features, FeatureSettings
from training.layers.logistic import MAX_ITERATIONS, Positive, as_probabilities, fit_logistic
from training.methods import Fitted, search


class ToldSettings(FeatureSettings):
    l2: list[Positive] = Field(default=[1.0, 0.1, 0.01, 0.001], min_length=1)  # strengths that val chooses from
    max_iterations: Count = MAX_ITERATIONS  # of L-BFGS, for each fit


class ToldRows(NamedTuple):
    """The training images of a cache as rows."""

    x: Tensor  # (V n, F): all of view 0 first
    told: Tensor  # (n, C): what training is told of each image, as probabilities
    groups: list[str]  # (n,): what stays whole

    def of_view(self, view: int) -> Tensor:
        """x (n, F) of one view."""
        return self.x[view * len(self.told) : (view + 1) * len(self.told)]

    def fit(self, told: Tensor, l2: float, max_iterations: int) -> nn.Linear:
        """Logistic regression of all views on `told` (n, C); an image whose row is zero is left out."""
        kept = told.sum(1) > 0
        views = len(self.x) // len(told)
        x, y = self.x[kept.repeat(views)], told[kept].repeat(views, 1)
        return fit_logistic(x, y, x[:0], y[:0].argmax(1), told.shape[1], [l2], max_iterations).linear


def fit_told(
    cache: Cache,
    settings: ToldSettings,
    probe: Callable[[Features, nn.Module], nn.Module],
    retell: Callable[..., Tensor],
) -> Fitted:
    """The fit that val prefers among all points of the settings' grid.

    `retell(rows, **point)` says what is told of the training images, (n, C); a row of zeros leaves the image out.
    `probe` puts vector and layer together. Raises UserError for several points and no val.
    """
    features, train, val = Features.measure(cache, settings), cache.images("train"), cache.images("val")
    x = features.of_training(cache)
    span = Span(x)
    told = as_probabilities(cache.target[train], len(cache.classes))
    rows = ToldRows(span.into(x), told, [cache.groups[image] for image in train.tolist()])
    x_val = span.into(features.of(cache, val))
    layers: dict[tuple[float, ...], nn.Linear] = {}

    def logits(**point: float) -> Tensor:
        layer = rows.fit(retell(rows, **point), point["l2"], settings.max_iterations)
        layers[tuple(point.values())] = layer
        with torch.no_grad():
            return layer(x_val)

    point, history = search(cache, settings, logits)
    layer = layers[tuple(point.values())]
    linear = linear_layer(span.back(layer.weight.detach()), layer.bias.detach())
    return Fitted(probe(features, linear), history, dict(point))


def spare_classes(kept: Tensor, told: Tensor) -> Tensor:
    """kept (n,) bool, but for classes of which it would leave no image: they keep all. told (n,): their classes."""
    left = torch.zeros(int(told.max()) + 1, dtype=torch.bool, device=kept.device)
    left[told[kept]] = True
    return kept | ~left[told]
