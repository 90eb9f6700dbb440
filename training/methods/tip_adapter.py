"""Tip-Adapter-F: a cache of training images that corrects zero-shot classification (Zhang et al., ECCV 2022 [mem]).

    logits = scale * g W^T + alpha * exp(-beta (1 - g F^T)) L

W (C, D) is the text of each class (class_text), F (n, D) the keys, training vectors, and L (n, C) what
training is told of them. AdamW moves the keys (training/loop.py); `epochs: 0` leaves Tip-Adapter, which trains nothing.
A reconstruction: the paper trains at one alpha and beta and searches both behind the training; here every point of the
grid is trained, and val chooses it and the epoch. Theirs is the text's own scale, 100; a lower one lets the cache
correct texts that are sure and wrong, and did no worse on the val images of cub100 and reef [design].

A key is the mean of an image's views, of unit length. A class with more than `cache_images` images is dealt at random
into so many groups, and a key is a group's mean, its row of L their mean, as the paper has it for caches smaller than
the training set [mem]; images told by probabilities are dealt by their most probable class.
"""

import functools
import itertools
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.logistic import as_probabilities, require_val
from training.layers.states import State
from training.layers.texts import class_text, name_terms
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output, search_points

SEEDED = True
READS = frozenset({"globals", "names", "owners"})


class Settings(Schedule):
    epochs: Annotated[int, Field(ge=0)] = 20  # 0: Tip-Adapter, without training
    weight_decay: list[NotNegative] = Field(default=[0.01], min_length=1)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # bf16 is too coarse for cosines under a large scale
    cache_images: Count = 16  # keys a class at most
    alpha: list[Positive] = Field(default=[3.0, 10.0], min_length=1)  # weight of the cache
    beta: list[Positive] = Field(default=[3.0, 10.0], min_length=1)  # how fast it fades with distance
    scale: Positive = 20.0  # turns cosines with the texts into logits


class TipAdapter(nn.Module):
    class_text: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, class_text: Tensor, keys: Tensor, values: Tensor, scale: float, alpha: float, beta: float
    ) -> None:
        """class_text (C, D) and keys (n, D), unit length; values (n, C), rows that sum to 1."""
        super().__init__()
        self.keys = nn.Parameter(keys.clone())
        self.register_buffer("class_text", class_text)
        self.register_buffer("values", values)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        g = batch.g.float()
        near = (-self.beta * (1 - g @ self.keys.T)).exp()
        return Output(self.scale * g @ self.class_text.T + self.alpha * near @ self.values, {}, None)


def fill_cache(cache: Cache, cache_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys (n, D), unit length, and values (n, C), at most `cache_images` a class."""
    train, generator = cache.images("train"), torch.Generator().manual_seed(seed)
    vectors = torch.stack([cache.globals(train, view) for view in range(cache.views)]).mean(0)
    values = as_probabilities(cache.target[train], len(cache.classes))
    keys, told = [], []
    for label in range(len(cache.classes)):
        members = torch.nonzero(values.argmax(1) == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        for group in range(min(cache_images, len(members))):
            dealt = members[group::cache_images]
            keys.append(F.normalize(vectors[dealt], dim=-1).mean(0))
            told.append(values[dealt].mean(0))
    return F.normalize(torch.stack(keys), dim=-1), torch.stack(told)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    require_val(len(cache.images("val")), search_points(settings), "alpha, beta, lr and weight_decay")
    text, (keys, values) = class_text(cache), fill_cache(cache, settings.cache_images, seed)
    best: tuple[tuple[float, float], Fitted] | None = None
    for alpha, beta in itertools.product(settings.alpha, settings.beta):
        model = functools.partial(TipAdapter, text, keys, values, settings.scale, alpha, beta)
        fitted = fit_epochs(model, cache, settings, seed)
        score = max((row["val_accuracy"], -row["val_loss"]) for row in fitted.history)
        if best is None or score > best[0]:
            best = score, replace(fitted, chosen={**fitted.chosen, "alpha": alpha, "beta": beta})
    assert best is not None
    return best[1]


def texts_add(model: TipAdapter, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor:
    """By the texts that name a or b, exactly; the rest of logit a - logit b is what the keys say."""
    return model.scale * name_terms(cache.part(Bank), cache.globals(images), classes)


def build(state: State, settings: Settings, classes: int) -> TipAdapter:
    text, keys, values = state["class_text"], state["keys"], state["values"]
    return TipAdapter(text, keys, values, settings.scale, float(state["alpha"]), float(state["beta"]))
