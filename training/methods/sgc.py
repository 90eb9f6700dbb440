"""Simple graph convolution: vectors are smoothed over links, and logistic regression tells them (Wu et al., ICML 2019).

    x^(k+1) = S x^(k),   S = D^-1/2 (W + I) D^-1/2        logits = W x^(K) + b

x is what the probe reads (layers/features.py). Val chooses K and the strength of the regression; K = 0 would be the
probe. [mem] for the paper; that D counts the links into a node, and its own loop, is PyG's rule for links with
directions. Who may send is `sources` (training/links.py): under `train` what a training image holds after k steps
depends on training images alone, and a judged image hears them. No label is passed on.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.params import Count
from training.data import Batch, Cache, feature_words
from training.data.links import WORD
from training.layers.blocks import Span, linear_from_state, linear_layer
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads, view_of
from training.layers.hops import Hop
from training.layers.logistic import Chosen, Positive, fit_logistic, require_val
from training.layers.states import State, within
from training.links import Heard, LinkSettings, Memory, links_word, senders
from training.methods import Fitted, Output

SEEDED = False
READS = feature_words() | {WORD}
ALSO = feature_words()
also_reads = feature_also_reads


class Settings(LinkSettings, FeatureSettings):
    steps: list[Count] = Field(default=[1, 2, 3], min_length=1)  # K: times to smooth, that val chooses from
    l2: list[Positive] = Field(
        default=[1.0, 0.1, 0.01, 0.001, 0.0001], min_length=1
    )  # strengths of the regression that val chooses from
    max_iterations: Count = 300  # of L-BFGS, for each strength


def reads(settings: Settings) -> frozenset[str]:
    return feature_reads(settings) | {links_word(settings)}


class Smoothing(nn.Module):
    """From a batch to x^(K) (B, F)."""

    vectors: Tensor

    def __init__(self, features: Features, memory: Memory, vectors: Tensor, steps: int) -> None:
        """vectors (M, F): of the images that send."""
        super().__init__()
        self.features, self.memory, self.steps = features, memory, steps
        self.register_buffer("vectors", vectors)
        held, whole = vectors, memory.whole()
        for step in range(steps):  # what those that send hold before each step
            self.register_buffer(f"held_{step}", held, persistent=False)
            held = smooth(held, whole) if step + 1 < steps else held

    def forward(self, batch: Batch) -> Tensor:
        x, heard = self.features(batch), Heard(self.memory, batch)
        for step in range(self.steps):
            x = smooth(heard.beside(x, self.get_buffer(f"held_{step}")), heard.hop)
        return x

    def of(self, cache: Cache, images: Tensor, view: int) -> Tensor:
        """x^(K) (len(images), F) of these images in one view."""
        return torch.cat([self(view_of(cache, chunk, view)) for chunk in images.split(self.features.chunk)])


def smooth(x: Tensor, hop: Hop) -> Tensor:
    """S x (count, F) of x (n, F)."""
    weight, own = hop.symmetric()
    return hop.sum(x, weight) + own[:, None] * x[: hop.count]


class SGC(nn.Module):
    def __init__(self, smoothing: Smoothing, layer: nn.Linear) -> None:
        super().__init__()
        self.smoothing, self.layer = smoothing, layer

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(self.smoothing(batch)), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises UserError for several points of the grid and no val."""
    features, memory = Features.measure(cache, settings), Memory.of(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    train, val = cache.images("train"), cache.images("val")
    require_val(len(val), len(settings.steps) * len(settings.l2), "steps, l2")
    best: tuple[tuple[float, float], SGC, Chosen, int] | None = None
    history: list[dict[str, float]] = []
    for steps in settings.steps:
        smoothing = Smoothing(features, memory, vectors, steps)
        x = torch.cat([smoothing.of(cache, train, view) for view in range(cache.views)])
        span = Span(x)
        chosen = fit_logistic(
            span.into(x),
            torch.cat([cache.target[train]] * cache.views),
            span.into(smoothing.of(cache, val, 0)) if len(val) else span.into(x[:0]),
            cache.y[val],
            len(cache.classes),
            settings.l2,
            settings.max_iterations,
        )
        history += [{**row, "epoch": len(history) + n, "steps": steps} for n, row in enumerate(chosen.history, start=1)]
        [kept] = [row for row in chosen.history if row["l2"] == chosen.l2]
        score = kept["val_accuracy"], -kept["val_loss"]
        if best is None or score > best[0]:
            layer = linear_layer(span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach())
            best = score, SGC(smoothing, layer), chosen, steps
    assert best is not None
    _, model, chosen, steps = best
    return Fitted(model, history, {"steps": steps, "l2": chosen.l2}, chosen.pass_seconds)


def build(state: State, settings: Settings, classes: int) -> SGC:
    own = within(state, "smoothing")
    memory = Memory.from_state(within(own, "memory"), settings)
    smoothing = Smoothing(
        Features.from_state(within(own, "features"), settings), memory, own["vectors"], settings.steps[0]
    )
    return SGC(smoothing, linear_from_state(within(state, "layer")))
