"""Zero-shot classification by description (Menon and Vondrick, ICLR 2023; M16 of the method catalogue).

z_c = scale * the mean of g . K_k over the concepts k that class c owns: kept texts that are not its name. Nothing is
trained. With one text a class this is zero-shot classification by that text.
"""

import torch
from torch import Tensor, nn

from stages.command import UserError
from stages.params import Block
from training.data import Batch, Cache
from training.loop import Positive, untrained
from training.methods import Fitted, Output

SEEDED = False


class Settings(Block):
    scale: Positive = 100.0  # turns cosines into logits; the prediction does not depend on it


class DescriptionZeroShot(nn.Module):
    class_mean: Tensor

    def __init__(self, class_mean: Tensor, scale: float) -> None:
        """class_mean (C, D): the mean of each class's concept vectors, not of unit length."""
        super().__init__()
        self.register_buffer("class_mean", class_mean)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        return Output(self.scale * batch.g.float() @ self.class_mean.T, {}, None)


def class_mean(cache: Cache) -> Tensor:
    """(C, D): a mean over cosines is a product with this mean. Raises UserError for a class without concepts.

    A text that the bank holds twice counts once.
    """
    bank = cache.bank
    texts = bank.kept & ~bank.of_kind("name", "proto")
    owned = bank.own.T & texts  # (C, M)
    means = []
    for class_id, rows in zip(cache.classes, owned, strict=True):
        if not rows.any():
            raise UserError(
                f"{bank.path}: class {class_id} has no kept concept; run generate_concepts, or raise select.per_class"
            )
        means.append(torch.unique(bank.K[rows], dim=0).mean(0))
    return torch.stack(means)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    return untrained(DescriptionZeroShot(class_mean(cache), settings.scale), cache)
