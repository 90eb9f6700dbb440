"""Nearest-neighbour cleaning: what the neighbours of a training image are told is held against what it is told itself.

    v_i = sum over the k nearest training images j of other groups of t_j        by the cosine of x, view 0
    an image stays as it is where the class that it is told has the most of v_i, ties included; else it is
    dropped (`clean: drop`), or told the class that has the most (`clean: relabel`; of equals the first by class_id)

and logistic regression is fitted to what is left. Dropping by k = 3 is Wilson's edited nearest neighbour (1972 [mem]),
by a larger k deep k-NN (Bahri et al., ICML 2020 [mem]), whose vectors come from a network that was fitted to the wrong
labels; those here were made without. A class that would lose every image keeps them all. Images of one group (a
track, a plant) mostly share a label, right or wrong, so that none votes on another. k = 0 cleans nothing: it is the
objective of linear_probe. Val chooses k and l2. x is the probe's vector (layers/features.py).
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from training.data import Cache, feature_words
from training.layers.features import feature_also_reads, feature_reads
from training.layers.told_labels import ToldRows, ToldSettings, fit_told, spare_classes
from training.methods import Fitted, linear_probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build
BLOCK = 2048  # images whose neighbours are looked for at a time


class Settings(ToldSettings):
    k: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 5, 10, 20], min_length=1
    )  # numbers of neighbours that val chooses from; 0: nothing is cleaned
    clean: Literal["drop", "relabel"] = "drop"  # an image whose neighbours are told another class


def neighbours(x: Tensor, groups: Sequence[str], k: int) -> tuple[Tensor, Tensor]:
    """(n, k) each: the k nearest of x (n, F) in other groups, and which of these there are; groups (n,)."""
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of = torch.tensor([number[group] for group in groups], device=x.device)
    x, found = F.normalize(x, dim=1), []
    for start in range(0, len(x), BLOCK):
        cosine = x[start : start + BLOCK] @ x.T
        cosine[of[start : start + BLOCK, None] == of] = -torch.inf
        found.append(cosine.topk(min(k, len(x)), 1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]).isfinite()


def votes(x: Tensor, told: Tensor, groups: Sequence[str], k: int) -> Tensor:
    """(n, C): what the k nearest of x (n, F) in other groups are told in sum; fewer where there are fewer. told (n, C).

    One neighbour of each image at a time, so that nothing larger is held.
    """
    near, there = neighbours(x, groups, k)
    total = torch.zeros_like(told)
    for own, counts in zip(near.T, there.T, strict=True):
        total += told[own] * counts[:, None]
    return total


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    judged: dict[float, tuple[Tensor, Tensor]] = {}  # by k: who stays, and the class that has the most

    def judge(rows: ToldRows, k: int) -> tuple[Tensor, Tensor]:
        said, own = votes(rows.of_view(0), rows.told, rows.groups, k), rows.told.argmax(1)
        most = said.max(1)
        return spare_classes(said.gather(1, own[:, None])[:, 0] >= most.values, own), most.indices

    def cleaned(rows: ToldRows, k: float, l2: float) -> Tensor:
        if k == 0:
            return rows.told
        if k not in judged:
            judged[k] = judge(rows, int(k))
        stays, most = judged[k]
        if settings.clean == "drop":
            return rows.told * stays[:, None]
        return torch.where(stays[:, None], rows.told, F.one_hot(most, rows.told.shape[1]).float())

    return fit_told(cache, settings, linear_probe.Probe, cleaned)
