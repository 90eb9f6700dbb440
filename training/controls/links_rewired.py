"""The senders of links change places: every image hears as many as before and is heard as often, by others.

They are shuffled link by link, and weights stay with the image that hears. One permutation of all images would not do:
who heard the same neighbours would still hear the same ones, and that alone can tell a class. How many of those that an
image hears may send (training/links.py) is left to chance. An image that would hear itself, or another one twice, does
so in a few links of many thousand; itself it never hears.
"""

import torch

from training.controls import Request
from training.data import Cache
from training.data.links import Links

CHANGES = frozenset({"links"})
NEEDS = frozenset({"links"})
DRAWS = True
SUBJECT = "who is linked does"


def apply(cache: Cache, request: Request) -> Cache:
    rewired = {
        name: edges._replace(source=edges.source[torch.randperm(len(edges.source), generator=request.generator)])
        for name, edges in sorted(cache.part(Links).incoming.items())
    }
    return cache.change(Links, incoming=rewired)
