"""The same vectors, shuffled between classes: each text belongs to the classes that another, drawn one was written for.

Unlike owners_permuted, which gives a class all texts of one other class, this leaves of a class's texts neither their
subject nor what they have in common: what is left is that there are so many, of the same vectors. Names are shuffled
among names. Texts of no class keep none, and vectors and labels stay. One draw says little: a claim about texts takes
20 (`seeds: 20` in the study).
"""

import torch
from torch import Tensor

from training.controls import Request
from training.data import Cache
from training.data.bank import Bank

CHANGES = frozenset({"owners"})
NEEDS = frozenset({"owners"})
DRAWS = True
SUBJECT = "which class owns a text does"


def apply(cache: Cache, request: Request) -> Cache:
    bank = cache.part(Bank)
    own, is_name = bank.own.clone(), bank.of_kind("name")
    for among in (is_name, bank.kept & ~is_name):
        rows = (among & bank.own.any(1)).nonzero().flatten()
        own[rows] = own[shuffled(rows, request.generator)]
    return cache.change(Bank, owners=own)


def shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]
