"""Every image hears as many images as before, drawn at random: the nearest by vectors that say nothing.

Each image that the cache holds is as likely as the others; links from images that it does not hold stay. The weights
are those of an image's own links. How often an image is heard is left to chance, where links_rewired keeps it.
"""

import torch

from training.controls import Request
from training.data import Cache
from training.data.links import Incoming, Links

CHANGES = frozenset({"links"})
NEEDS = frozenset({"links"})
DRAWS = True
SUBJECT = "which vectors link images does"


def apply(cache: Cache, request: Request) -> Cache:
    drawn = {name: draw(cache, edges, request.generator) for name, edges in sorted(cache.part(Links).incoming.items())}
    return cache.change(Links, incoming=drawn)


def draw(cache: Cache, edges: Incoming, generator: torch.Generator) -> Incoming:
    key, images = cache.part(Links).key, torch.randint(len(cache.paths), edges.source.shape, generator=generator)
    return edges._replace(source=torch.where(torch.isin(edges.source, key), key[images], edges.source))
