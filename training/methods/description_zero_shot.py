"""Zero-shot classification by description (Menon and Vondrick, ICLR 2023), and by averaged sentences.

z_c = scale * the mean of g . K_k over the concepts k that class c owns: kept texts that are not its name. Nothing is
trained. With one text a class this is zero-shot classification by that text.

The paper embeds "{name}, which has {descriptor}". `class_names: true` puts norm(K_k + t_c) in the place of K_k, with
t_c the class's name vector (class_text): both vectors are there already, and no text is embedded anew. It is
the middle of two texts and not the vector of the combined sentence [design].

`average: embeddings` takes the direction of the mean text: of texts that are sentences about the class that is CuPL
(Pratt et al., ICCV 2023 [mem]). The mean of logits is a product with the mean text as it is, and so ranks lower a class
whose texts differ much among themselves. Texts of random words in the place of these, under the control
random_descriptors, are WaffleCLIP (Roth et al., ICCV 2023 [mem]).

`keep: n` judges a class by the n of its texts that tell it best from its visual neighbours:

    u_c = norm(m_c - mean of m)     m_c the mean of c's training images; for classes without any their names, apart
    N_c = the `neighbours` other classes of the greatest u_c . u_c'
    keep the texts of the greatest K_k . (u_c - mean of u_c' over N_c)

After the idea of choosing descriptions within a class's neighbourhood (arXiv 2412.11917 [web]; its abstract was read,
the rule is ours [design]). Of few classes all others are neighbours.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count
from training.class_texts import concept_mean, own_texts
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.logistic import as_probabilities, training_globals
from training.layers.states import State
from training.layers.texts import class_text
from training.loop import Positive, untrained
from training.methods import Fitted, Output

SEEDED = False
READS = frozenset({"globals", "names", "concepts", "owners"})


class Settings(Block):
    class_names: bool = False  # whether each text stands beside its class's name
    average: Literal["logits", "embeddings"] = "logits"  # over a class's texts; embeddings: of unit length again
    keep: Count | None = None  # texts by which a class is judged, those that tell it from its neighbours; null: all
    neighbours: Count = 5  # classes that a text has to tell a class from, where some are kept
    scale: Positive = 100.0  # turns cosines into logits; the prediction does not depend on it


def reads(settings: Settings) -> frozenset[str]:
    return READS if settings.class_names or settings.keep is not None else READS - {"names"}


class DescriptionZeroShot(nn.Module):
    class_mean: Tensor
    judging: Tensor

    def __init__(self, class_mean: Tensor, judging: Tensor, scale: float) -> None:
        """class_mean (C, D): the mean text of each class; judging (C, M) bool: of which texts of the bank."""
        super().__init__()
        self.register_buffer("class_mean", class_mean)
        self.register_buffer("judging", judging)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        return Output(self.scale * batch.g.float() @ self.class_mean.T, {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    owned = own_texts(cache.part(Bank))
    if settings.keep is not None:
        owned = tell_from_neighbours(owned, cache.part(Bank).K, looks(cache), settings.keep, settings.neighbours)
    mean = concept_mean(cache, owned, class_text(cache) if settings.class_names else None)
    mean = F.normalize(mean, dim=-1) if settings.average == "embeddings" else mean
    return untrained(DescriptionZeroShot(mean, owned, settings.scale), cache)


def looks(cache: Cache) -> Tensor:
    """u (C, D): where a class's training images lie, or its name where it has none, as directions from their mean."""
    (vectors, target), names = training_globals(cache), class_text(cache)
    told = as_probabilities(target, len(cache.classes))
    seen = told.sum(0) > 0
    found = torch.zeros_like(names)
    for some, where in ((told.T @ vectors / told.sum(0).clamp(min=1e-12)[:, None], seen), (names, ~seen)):
        if where.any():
            found[where] = F.normalize(some[where] - some[where].mean(0), dim=-1)
    return found


def tell_from_neighbours(owned: Tensor, K: Tensor, looks: Tensor, keep: int, neighbours: int) -> Tensor:
    """(C, M) bool: the `keep` texts of each class in owned (C, M) that tell it best from its neighbours.

    K (M, D); looks (C, D), unit length. Of texts that tell as much the first; copies of one text take one place each.
    """
    near = (looks @ looks.T).fill_diagonal_(-2.0)
    places = near.topk(min(neighbours, len(looks) - 1), dim=1).indices
    worth = (looks - looks[places].mean(1)) @ K.T
    order = worth.masked_fill(~owned, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(owned).scatter(1, order[:, :keep], True) & owned


def texts_add(
    model: DescriptionZeroShot, settings: Settings, cache: Cache, images: Tensor, classes: Tensor
) -> Tensor:
    """By the texts of a and of b, exactly; a text that the bank holds twice shares its term.

    From each cosine the middle of the two classes' means is taken off, which the sum does not notice: a text counts by
    how much better it fits than these texts do in the mean.
    """
    bank, g = cache.part(Bank), cache.globals(images)
    found, middle = g.new_zeros(len(images), len(bank.K)), (g @ model.class_mean.T).gather(1, classes).mean(1)
    for label in classes.unique().tolist():
        rows = model.judging[label].nonzero()[:, 0]
        _, same, count = torch.unique(bank.K[rows], dim=0, return_inverse=True, return_counts=True)
        vectors = bank.K[rows]
        if settings.class_names:
            vectors = F.normalize(vectors + class_text(cache)[label], dim=-1)
        share = 1 / (count[same] * len(count))
        if settings.average == "embeddings":
            vectors = vectors / (share @ vectors).norm()
        sign = (classes == label).float() @ torch.tensor([1.0, -1.0], device=g.device)  # (B,)
        found[:, rows] += sign[:, None] * model.scale * share * (g @ vectors.T - middle[:, None])
    return found


def build(state: State, settings: Settings, classes: int) -> DescriptionZeroShot:
    return DescriptionZeroShot(state["class_mean"], state["judging"], settings.scale)
