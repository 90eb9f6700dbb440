"""Zero-shot classification by description (Menon and Vondrick, ICLR 2023).

z_c = scale * the mean of g . K_k over the concepts k that class c owns: kept texts that are not its name. Nothing is
trained. With one text a class this is zero-shot classification by that text.

The paper embeds "{name}, which has {descriptor}". `class_names: true` puts norm(K_k + t_c) in the place of K_k, with
t_c the class's name vector (class_text): both vectors are there already, and no text is embedded anew. It is
the middle of two texts and not the vector of the combined sentence [design].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.states import State
from training.layers.texts import class_text
from training.loop import Positive, untrained
from training.methods import Fitted, NotPossible, Output

SEEDED = False
READS = frozenset({"globals", "names", "concepts", "owners"})


class Settings(Block):
    class_names: bool = False  # whether each text stands beside its class's name
    scale: Positive = 100.0  # turns cosines into logits; the prediction does not depend on it


def reads(settings: Settings) -> frozenset[str]:
    return READS if settings.class_names else READS - {"names"}


class DescriptionZeroShot(nn.Module):
    class_mean: Tensor

    def __init__(self, class_mean: Tensor, scale: float) -> None:
        """class_mean (C, D): the mean of each class's concept vectors, not of unit length."""
        super().__init__()
        self.register_buffer("class_mean", class_mean)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        return Output(self.scale * batch.g.float() @ self.class_mean.T, {}, None)


def own_texts(bank: Bank) -> Tensor:
    """(C, M) bool: the texts that each class owns and is judged by."""
    return bank.own.T & bank.kept & ~bank.of_kind("name", "proto")


def class_mean(cache: Cache, class_names: bool = False) -> Tensor:
    """(C, D): a mean over cosines is a product with this mean. Raises NotPossible for a class without concepts.

    A text that the bank holds twice counts once.
    """
    bank, owned = cache.part(Bank), own_texts(cache.part(Bank))
    names = class_text(cache) if class_names else bank.K.new_zeros(len(cache.classes), bank.K.shape[1])
    means = []
    for class_id, rows, name in zip(cache.classes, owned, names, strict=True):
        if not rows.any():
            raise NotPossible(
                f"{bank.path}: class {class_id} has no kept concept; write texts of it (concepts.import or"
                " concepts.edits) or have a model asked (llm.mode live); where it has texts, drop_reason in"
                " data/concepts/concepts.parquet says why none was kept"
            )
        texts_of_class = torch.unique(bank.K[rows], dim=0)
        means.append((F.normalize(texts_of_class + name, dim=-1) if class_names else texts_of_class).mean(0))
    return torch.stack(means)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    return untrained(DescriptionZeroShot(class_mean(cache, settings.class_names), settings.scale), cache)


def texts_add(
    model: DescriptionZeroShot, settings: Settings, cache: Cache, images: Tensor, classes: Tensor
) -> Tensor:
    """By the texts of a and of b, exactly; a text that the bank holds twice shares its term.

    From each cosine the middle of the two classes' means is taken off, which the sum does not notice: a text counts by
    how much better it fits than these texts do in the mean.
    """
    bank, owned, g = cache.part(Bank), own_texts(cache.part(Bank)), cache.globals(images)
    found, middle = g.new_zeros(len(images), len(bank.K)), (g @ model.class_mean.T).gather(1, classes).mean(1)
    for label in classes.unique().tolist():
        rows = owned[label].nonzero()[:, 0]
        _, same, count = torch.unique(bank.K[rows], dim=0, return_inverse=True, return_counts=True)
        vectors = bank.K[rows]
        if settings.class_names:
            vectors = F.normalize(vectors + class_text(cache)[label], dim=-1)
        sign = (classes == label).float() @ torch.tensor([1.0, -1.0], device=g.device)  # (B,)
        found[:, rows] += sign[:, None] * model.scale * (g @ vectors.T - middle[:, None]) / (count[same] * len(count))
    return found


def build(state: State, settings: Settings, classes: int) -> DescriptionZeroShot:
    return DescriptionZeroShot(state["class_mean"], settings.scale)
