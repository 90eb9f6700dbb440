"""Each image's local nodes change places in its graph: the same edges, weights and degrees, between other nodes.

The global node stays, and so do nodes without an edge: which kinds of nodes a graph links is no part of the control.
"""

import torch
from torch import Tensor

from training.controls import Request
from training.data import Cache
from training.data.edges import Edges

CHANGES = frozenset({"edges"})
NEEDS = frozenset({"edges"})
DRAWS = True
SUBJECT = "which nodes an edge links does"


def apply(cache: Cache, request: Request) -> Cache:
    return cache.change(Edges, ends=rewire(cache.part(Edges), request.generator))


def rewire(edges: Edges, generator: torch.Generator) -> Tensor:
    """(edges, 2) int16: each row's edges between permuted local nodes; symmetric as they were."""
    rows, nodes = len(edges.count), edges.nodes
    row, edge = edges.of_rows(torch.arange(rows))
    ends = edges.ends[edge].long()
    linked = torch.zeros(rows, nodes, dtype=torch.bool)
    linked[row[:, None], ends] = True
    linked[:, 0] = False
    # Sorted by either key, a row's linked nodes come first: in their own order, and in a drawn one.
    place = torch.arange(nodes).expand(rows, nodes)
    drawn = torch.rand(rows, nodes, generator=generator)
    before = place.masked_fill(linked, -1).argsort(dim=1, stable=True)
    after = torch.where(linked, drawn - 1, place.float()).argsort(dim=1, stable=True)
    moved = torch.empty_like(before).scatter_(1, before, after)
    changed = edges.ends.clone()
    changed[edge] = moved[row[:, None], ends].to(changed.dtype)
    return changed
