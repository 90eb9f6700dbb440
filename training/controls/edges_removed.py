"""No image has an edge, and no message passes between its nodes.

concept_graph links the whole image to every node only where an image has edges. Its graph of a description links
sentences by their own vectors: that is no part of this control.
"""

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
