"""Zero-shot classification by class names (CLIP, Radford et al., ICML 2021 [mem]; M15 of the method catalogue).

w_c is the mean of the unit vectors of class c's name texts (one for every template of `clean.name_templates`), of unit
length again; logits = scale * g . w_c. Nothing is trained.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from stages.command import UserError
from stages.params import Block
from training.data import Batch, Cache
from training.loop import Positive, untrained
from training.methods import Fitted, Output

SEEDED = False


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


def class_text(cache: Cache) -> Tensor:
    """(C, D): each class's mean name vector. Raises UserError for a class without one."""
    owned = cache.bank.own.T & cache.bank.of_kind("name")  # (C, M)
    for class_id, found in zip(cache.classes, owned.any(1).tolist(), strict=True):
        if not found:
            raise UserError(
                f"{cache.bank.path}: class {class_id} has no text of kind name; run clean_concepts again (dvc repro)"
            )
    return F.normalize(owned.float() @ F.normalize(cache.bank.K, dim=-1), dim=-1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    return untrained(ZeroShot(class_text(cache), settings.scale), cache)
