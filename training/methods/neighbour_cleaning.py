"""Nearest-neighbour cleaning: what the neighbours of a training image are told is held against what it is told itself.

    v_i = sum over the k nearest other training images j of t_j        by the cosine of x, view 0
    an image stays as it is where the class that it is told has the most of v_i, ties included; else it is
    dropped (`clean: drop`), or told the class that has the most (`clean: relabel`; of equals the first by class_id)

and logistic regression is fitted to what is left. Dropping by k = 3 is Wilson's edited nearest neighbour (1972 [mem]),
by a larger k deep k-NN (Bahri et al., ICML 2020 [mem]), whose vectors come from a network that was fitted to the wrong
labels; those here were made without. A class that would lose every image keeps them all. k = 0 cleans nothing: it is
linear_probe on these strengths. Val chooses k and l2. x is the probe's vector (layers/features.py).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from training.data import Cache, feature_words
from training.layers.features import feature_also_reads, feature_reads
from training.layers.told_labels import Rows, ToldSettings, fit_told, spare_classes
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


def votes(x: Tensor, told: Tensor, k: int) -> Tensor:
    """(n, C): what the k nearest others of x (n, F) are told in sum; fewer where there are fewer. told (n, C)."""
    x, found = F.normalize(x, dim=1), []
    for start in range(0, len(x), BLOCK):
        cosine = x[start : start + BLOCK] @ x.T
        here = torch.arange(len(cosine), device=x.device)
        cosine[here, start + here] = -2.0
        near = cosine.topk(min(k, len(x) - 1), 1).indices
        found.append(told[near].sum(1))
    return torch.cat(found)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    def cleaned(rows: Rows, k: float, l2: float) -> Tensor:
        if k == 0:
            return rows.told
        said, own = votes(rows.of_view(0), rows.told, int(k)), rows.told.argmax(1)
        most = said.max(1)
        stays = spare_classes(said.gather(1, own[:, None])[:, 0] >= most.values, own)
        if settings.clean == "drop":
            return rows.told * stays[:, None]
        return torch.where(stays[:, None], rows.told, F.one_hot(most.indices, rows.told.shape[1]).float())

    return fit_told(cache, settings, linear_probe.Probe, cleaned)
