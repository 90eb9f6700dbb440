"""Class c's texts and names belong to the class after c in a random cycle over all classes: no class keeps its own."""

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
    return cache.change(Bank, owners=cache.part(Bank).own[:, cycle(len(cache.classes), request.generator)])


def cycle(count: int, generator: torch.Generator) -> Tensor:
    """A permutation (count,) that is one random cycle: nothing stays where it was, if there are two or more."""
    order = torch.randperm(count, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation
