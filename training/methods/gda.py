"""Gaussian discriminant analysis beside texts (Wang et al., ICLR 2024 [web]).

    logits = scale * g . t_c + weight * (w_c x + b_c)        w_c = S_a^-1 m_c,   b_c = -m_c S_a^-1 m_c / 2

t_c is the text of class c (training/class_texts.py), m_c the mean of its training images and S_a their covariance
within classes, shrunk towards a round one: the second term is lda. The paper shrinks by a formula and takes CLIP's
vectors for x; here val, or development classes, choose the shrinkage and the weight, and x is any vector of the probe's
(layers/features.py). A class without images is never said. Nothing is trained by gradients.
"""

from pydantic import Field
from torch import Tensor, nn

from training.class_texts import READS, TextSettings, class_texts, reads
from training.data import Batch, Cache, feature_words
from training.layers.blocks import Span, linear_from_state, linear_layer
from training.layers.features import Features, feature_also_reads
from training.layers.gaussian import Share, Spread, discriminant
from training.layers.logistic import Positive
from training.layers.ridge import training_targets
from training.layers.states import State, within
from training.methods import Fitted, Output, search
from training.methods.prototypes import class_means

__all__ = ["READS", "reads"]
SEEDED = False
ALSO = feature_words()
also_reads = feature_also_reads


class Settings(TextSettings):
    scale: Positive = 100.0  # turns cosines with the texts into logits
    shrinkage: list[Share] = Field(
        default=[0.1, 0.3, 0.6], min_length=1
    )  # of the covariance towards a round one, that val chooses from
    weight: list[Positive] = Field(
        default=[0.01, 0.03, 0.1, 0.3, 1.0], min_length=1
    )  # of what the images say, that val chooses from


class GDA(nn.Module):
    class_text: Tensor

    def __init__(self, features: Features, layer: nn.Linear, class_text: Tensor, scale: float) -> None:
        """layer: from x (B, F) to what images say (B, C), weighed; class_text (C, D), unit length."""
        super().__init__()
        self.features, self.layer = features, layer
        self.register_buffer("class_text", class_text)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        said = self.scale * batch.g.float() @ self.class_text.T
        return Output(said + self.layer(self.features(batch)), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    text, features = class_texts(cache, settings.texts), Features.measure(cache, settings)
    x, val = features.of_training(cache).double(), cache.images("val")
    x_val, said = features.of(cache, val), settings.scale * cache.globals(val) @ text.T
    span = Span(x)
    means, covariance, known = class_means(span.into(x), training_targets(cache))
    spread = Spread(covariance, features.size)

    def layer(shrinkage: float, weight: float) -> nn.Linear:
        w, b = discriminant(means, spread, shrinkage, known)
        return linear_layer(weight * span.back(w), weight * b)

    point, history = search(
        cache, settings, lambda shrinkage, weight: said + layer(shrinkage, weight)(x_val)
    )
    return Fitted(GDA(features, layer(**point), text, settings.scale), history, dict(point))


def build(state: State, settings: Settings, classes: int) -> GDA:
    features = Features.from_state(within(state, "features"), settings)
    return GDA(features, linear_from_state(within(state, "layer")), state["class_text"], settings.scale)
