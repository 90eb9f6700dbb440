"""Zero-shot classification by class names (CLIP, Radford et al., ICML 2021 [mem]).

w_c is the mean of the unit vectors of class c's name texts (one for every template of `clean.name_templates`), of unit
length again; logits = scale * g . w_c. Nothing is trained.
"""

from torch import Tensor, nn

from fieldmark.params import Block
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.states import State
from training.layers.texts import class_text, name_terms
from training.loop import Positive, untrained
from training.methods import Fitted, Output

SEEDED = False
READS = frozenset({"globals", "names", "owners"})


class Settings(Block):
    scale: Positive = 100.0  # turns cosines into logits; the prediction does not depend on it


class ZeroShot(nn.Module):
    class_text: Tensor

    def __init__(self, class_text: Tensor, scale: float) -> None:
        """class_text (C, D), unit length."""
        super().__init__()
        self.register_buffer("class_text", class_text)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        return Output(self.scale * batch.g.float() @ self.class_text.T, {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    return untrained(ZeroShot(class_text(cache), settings.scale), cache)


def texts_add(model: ZeroShot, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor:
    """By the texts that name a or b, exactly."""
    return model.scale * name_terms(cache.part(Bank), cache.globals(images), classes)


def build(state: State, settings: Settings, classes: int) -> ZeroShot:
    return ZeroShot(state["class_text"], settings.scale)
