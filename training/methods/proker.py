"""ProKeR: kernel ridge regression of what zero-shot classification leaves over (Bendou et al., CVPR 2025 [web]).

    f(x) = f_0(x) + k(x, S) (K + penalty I)^-1 (Y - f_0(S))        logits = sharpness * f
    k(x, x') = exp(-|x - x'|^2 / (width d))                        f_0 = softmax(scale * g . t)

It is the function that minimises |Y - f(S)|^2 + penalty |f - f_0|^2 in the norm of the kernel's space: where images say
nothing it stays with the texts. S are the training images in every view, Y what training is told of them, K = k(S, S),
d their mean squared distance, t_c the text of class c (training/class_texts.py), and x any vector of the probe's
(layers/features.py). Only the equation was read [web]: that f_0 is a softmax, so that it is of the size of Y, is ours
[design]. Val, or development classes, choose width, penalty and scale. `sharpness` changes no prediction.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from training.class_texts import READS, TextSettings, class_texts, reads
from training.data import Batch, Cache, feature_words
from training.layers.features import Features, feature_also_reads
from training.layers.kernels import KernelLayer, gauss
from training.layers.logistic import Positive, training_globals
from training.layers.ridge import training_targets
from training.layers.states import State, within
from training.methods import Fitted, Output, search

__all__ = ["READS", "reads"]
SEEDED = False
ALSO = feature_words()
also_reads = feature_also_reads


class Settings(TextSettings):
    sharpness: Positive = 10.0  # turns scores, which are about 0 and 1, into logits
    width: list[Positive] = Field(default=[0.3, 1.0], min_length=1)  # of the kernel, that val chooses from
    penalty: list[Positive] = Field(default=[1.0, 0.3, 0.1, 0.01], min_length=1)  # strengths that val chooses from
    scale: list[Positive] = Field(default=[20.0, 100.0], min_length=1)  # of cosines with texts, that val chooses from


class ProKeR(nn.Module):
    class_text: Tensor
    scale: Tensor

    def __init__(
        self, features: Features, layer: KernelLayer, class_text: Tensor, scale: float, sharpness: float
    ) -> None:
        """class_text (C, D), unit length."""
        super().__init__()
        self.features, self.layer = features, layer
        self.register_buffer("class_text", class_text)
        self.register_buffer("scale", torch.tensor(scale))
        self.sharpness = sharpness

    def forward(self, batch: Batch) -> Output:
        said = (self.scale * batch.g.float() @ self.class_text.T).softmax(-1)
        return Output(self.sharpness * (said + self.layer(self.features(batch))), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    text, features = class_texts(cache, settings.texts), Features.measure(cache, settings)
    val, (g, _), told = cache.images("val"), training_globals(cache), training_targets(cache)
    held, x_val, g_val = features.of_training(cache), features.of(cache, val), cache.globals(val)
    rows = held.double()
    mean_distance = max(2 * rows.var(0, correction=0).sum().item(), 1e-12)  # twice the sum of the variances
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)

    def layer(width: float, penalty: float, scale: float) -> KernelLayer:
        distance = width * mean_distance
        left = told - (scale * g.double() @ text.double().T).softmax(-1)
        coefficients = torch.linalg.solve(gauss(rows, rows, distance) + penalty * identity, left)
        return KernelLayer(held, coefficients.contiguous(), left.new_zeros(left.shape[1]), distance)

    def logits(width: float, penalty: float, scale: float) -> Tensor:
        said = (scale * g_val @ text.T).softmax(-1)
        return settings.sharpness * (said + layer(width, penalty, scale)(x_val))

    point, history = search(cache, settings, logits)
    return Fitted(
        ProKeR(features, layer(**point), text, point["scale"], settings.sharpness), history, dict(point)
    )


def build(state: State, settings: Settings, classes: int) -> ProKeR:
    return ProKeR(
        Features.from_state(within(state, "features"), settings),
        KernelLayer.from_state(within(state, "layer")),
        *(state["class_text"], float(state["scale"]), settings.sharpness),
    )
