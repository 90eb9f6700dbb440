"""LaBo: class-concept weights that begin at who owns what, and are learned (Yang et al., CVPR 2023 [code]).

    S(k, c) = mean of g . K_k over the training images of class c
    D_k     = ln C - H(p(. | k)),   p(c | k) = softmax_c(scale S(k, c))                 discriminability, in nats
    per class  choose `per_class` of its concepts, greedily by  sum D_k + coverage * facility location of cosines
    W_n     = softmax over concepts of W (C, M'),   W begins at 1 where a class owns a concept, else at 0
    logits  = scale (g K^T) W_n^T

over the M' concepts that any class chose. So a logit is a weighted mean of cosines: concepts can speak for a class, and
none against it. Beside the code: D stands in the place of its mutual information, which is no number where a cosine is
under 0, is not 0 for a concept that all classes show alike nor ln C for one of a single class, and needs a weight of
1e7 [design]; chosen among what the bank keeps, `select.per_class` of params.yaml at most, so raise that for the paper's
50. Trained by training/loop.py: AdamW without decay, at higher rates and for fewer epochs than Adam at 5e-5 for 5,000;
val keeps the epoch. Its regularisers (variance of weights, L1) are off in the code, and not here. The backbone is
frozen there too, and scores are computed once.

A text that names its class makes a bottleneck of class names: clean_concepts takes those out.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.concepts.coverage import choose_greedily
from fieldmark.concepts.selection import discriminability
from fieldmark.params import Count
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.logistic import as_probabilities, training_globals
from training.layers.states import State
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, NotPossible, Output
from training.methods.concept_bottleneck import is_concept
from training.methods.prototypes import means_of

SEEDED = True
READS = frozenset({"globals", "concepts", "owners"})


class Settings(Schedule):
    per_class: Count = 50  # concepts that a class chooses of its own, at most
    coverage: NotNegative = 0.1  # weight of covering what is said of a class, beside telling classes apart
    scale: Positive = 100.0  # turns cosines into logits
    epochs: Annotated[int, Field(ge=0)] = 60  # val chooses one of some; 0 leaves the weights at who owns what
    lr: list[Positive] = Field(default=[0.03, 0.1], min_length=1)  # learning rates that val chooses from
    weight_decay: list[NotNegative] = Field(default=[0.0], min_length=1)  # the paper's code has none
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # bf16 is too coarse for cosines under a large scale


class LaBo(nn.Module):
    K: Tensor
    row: Tensor

    def __init__(self, K: Tensor, row: Tensor, owned: Tensor, scale: float) -> None:
        """K (M', D), unit length, and their rows (M',) int64 in the bank; owned (C, M'), 1 where a class owns one."""
        super().__init__()
        self.register_buffer("K", K)
        self.register_buffer("row", row)
        self.weight = nn.Parameter(owned.clone())
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        return Output(self.scale * (batch.g.float() @ self.K.T) @ self.shares().T, {}, None)

    def shares(self) -> Tensor:
        """(C, M'): how much of a class's logit each concept is; rows sum to 1."""
        return self.weight.float().softmax(1)


def select(bank: Bank, means: Tensor, settings: Settings) -> Tensor:
    """(M,) bool: the concepts that any class chooses, by the mean global vectors (C', D) of the classes with images."""
    allowed = bank.own & is_concept(bank)[:, None]
    vectors = bank.K.cpu().numpy()
    worth = discriminability(vectors @ means.cpu().numpy().T, settings.scale).astype(np.float64)
    chosen = np.zeros(len(vectors), dtype=bool)
    for owns in allowed.T.cpu().numpy():
        members = owns.nonzero()[0]
        if len(members):
            places = choose_greedily(settings.per_class, worth[members], vectors[members], settings.coverage)
            chosen[members[places]] = True
    if not chosen.any():
        raise NotPossible(
            f"{bank.path}: holds no kept concept that a class owns; write texts (concepts.import) or have a model asked"
            " (llm.mode live)"
        )
    return torch.from_numpy(chosen).to(bank.K.device)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    bank, (vectors, told) = cache.part(Bank), training_globals(cache)
    means, known = means_of(vectors, as_probabilities(told, len(cache.classes)))
    row = select(bank, means[known], settings).nonzero()[:, 0]
    return fit_epochs(partial(LaBo, bank.K[row], row, bank.own[row].T.float(), settings.scale), cache, settings, seed)


def texts_add(model: LaBo, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor:
    """scale (share of a - share of b) g . K_k, exactly: they sum to logit a - logit b."""
    bank = cache.part(Bank)
    a, b = model.shares()[classes].unbind(1)  # (B, M') each
    found = bank.K.new_zeros(len(images), len(bank.K))
    found[:, model.row] = model.scale * (a - b) * (cache.globals(images) @ model.K.T)
    return found


def build(state: State, settings: Settings, classes: int) -> LaBo:
    return LaBo(state["K"], state["row"], state["weight"], settings.scale)
