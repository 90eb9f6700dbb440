"""No image has an edge."""

import torch

from training.controls import Request
from training.data import Cache
from training.data.edges import Edges

CHANGES = frozenset({"edges"})
NEEDS = frozenset({"edges"})
DRAWS = False
SUBJECT = "the edges do"


def apply(cache: Cache, request: Request) -> Cache:
    return cache.change(Edges, count=torch.zeros_like(cache.part(Edges).count))
