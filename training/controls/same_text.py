"""A prior without content: every class has one and the same text, the mean of all names and that of all concepts.

A method that adds what texts say to what images teach (lpp, tip_adapter) keeps its form and its grid of strengths, and
its prior tells no class from another. What it reaches so is due to the prior's form and to the search, not to texts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from training import relabelling as AFTER
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank

__all__ = ["AFTER"]
CHANGES = frozenset({"names", "concepts", "labels"})
NEEDS = frozenset({"names", "concepts"})
DRAWS = False
SUBJECT = "what tells one text from another does"


def apply(cache: Cache, request: Request) -> Cache:
    bank = cache.part(Bank)
    is_name = bank.of_kind("name")
    names, concepts = mean_direction(bank.K[is_name]), mean_direction(bank.K[bank.kept & ~is_name])
    return cache.change(Bank, K=torch.where(is_name[:, None], names, concepts))


def mean_direction(vectors: Tensor) -> Tensor:
    """(D,): the mean of vectors (m, D), of unit length; 0 where there is none."""
    return F.normalize(vectors.sum(0), dim=0)
