"""Every vector of the bank, those of names too, is a random unit vector."""

import torch
from torch.nn import functional as F

from training import relabelling as AFTER
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank

__all__ = ["AFTER"]
CHANGES = frozenset({"names", "concepts", "labels"})
NEEDS = frozenset({"names", "concepts"})
DRAWS = True
SUBJECT = "the texts do"


def apply(cache: Cache, request: Request) -> Cache:
    shape = cache.part(Bank).K.shape
    return cache.change(Bank, K=F.normalize(torch.randn(shape, generator=request.generator), dim=1))
