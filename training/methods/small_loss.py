"""Small-loss selection: of what training is told, what a probe that did not see it finds least surprising is kept.

Co-teaching (Han et al., NeurIPS 2018 [mem]) trains two networks, each on the images of a batch that have the smallest
loss under the other one, and drops a share that grows to the rate of wrong labels. A network must not judge what it has
learned by heart; that is what the second one is for. Logistic regression has one minimum, so that two of them on the
same images would be one, and the second one is here the probe of other images [design]:

    1. images fall into `folds` parts by the hash of their group; a probe of the kept images of all other parts says
       loss_i = -sum_c t_ic log p_ic of each image i of a part, the mean over its views; t is what training is told
    2. of the images told each class, the share rate r / rounds with the largest losses is dropped, in round r
    3. after the last round a probe is fitted to what is kept

The share is dropped class by class, at least one image of each stays: over all images, a hard class would lose most.
A rate with one value is given; of several val chooses, together with l2, which is the same in every fit. With rate 0 it
is the objective of linear_probe. x is the probe's vector (layers/features.py).
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fieldmark.params import Count
from fieldmark.store import sha256
from training.data import Cache, feature_words
from training.layers.features import feature_also_reads, feature_reads
from training.layers.told_labels import ToldRows, ToldSettings, fit_told
from training.methods import Fitted, linear_probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads, build = feature_reads, feature_also_reads, linear_probe.build


class Settings(ToldSettings):
    rate: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.0, 0.1, 0.2, 0.4], min_length=1
    )  # shares of the images that are dropped, that val chooses from
    rounds: Count = 2  # times that losses are looked at
    folds: Annotated[int, Field(ge=2)] = 5  # parts, each of which the others judge


def losses(rows: ToldRows, kept: Tensor, folds: int, l2: float, max_iterations: int) -> Tensor:
    """(n,): the loss of each image under a probe of the images `kept` (n,) of the other parts."""
    part = torch.tensor([int(sha256(group)[:8], 16) % folds for group in rows.groups], device=rows.x.device)
    found, views = torch.zeros(len(part), device=rows.x.device), len(rows.x) // len(part)
    for held in range(folds):
        inside = part == held
        others = kept & ~inside
        if inside.any() and others.any():
            probe = rows.fit(rows.told * others[:, None], l2, max_iterations)
            with torch.no_grad():
                log_p = torch.stack([F.log_softmax(probe(rows.of_view(v)[inside]), 1) for v in range(views)]).mean(0)
            found[inside] = -(rows.told[inside] * log_p).sum(1)
    return found


def smallest(loss: Tensor, told: Tensor, rate: float) -> Tensor:
    """(n,) bool: of the images told each class, told (n,), all but the share `rate` with the largest losses."""
    kept = torch.zeros(len(loss), dtype=torch.bool, device=loss.device)
    for label in told.unique():
        of_class = (told == label).nonzero().flatten()
        stay = len(of_class) - math.floor(rate * len(of_class))
        kept[of_class[loss[of_class].argsort(stable=True)[:stay]]] = True
    return kept


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    first: dict[float, Tensor] = {}  # the losses of the first round, by l2: it knows no rate

    def selected(rows: ToldRows, rate: float, l2: float) -> Tensor:
        if rate == 0:
            return rows.told
        told, kept = rows.told.argmax(1), rows.told.sum(1) > 0
        if l2 not in first:
            first[l2] = losses(rows, kept, settings.folds, l2, settings.max_iterations)
        loss = first[l2]
        for turn in range(1, settings.rounds + 1):
            kept = smallest(loss, told, rate * turn / settings.rounds)
            if turn < settings.rounds:
                loss = losses(rows, kept, settings.folds, l2, settings.max_iterations)
        return rows.told * kept[:, None]

    return fit_told(cache, settings, linear_probe.Probe, selected)
