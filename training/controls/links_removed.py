"""No image hears another one: nobody sends."""

from training.controls import Request
from training.data import Cache
from training.data.links import Links

CHANGES = frozenset({"links"})
NEEDS = frozenset({"links"})
DRAWS = False
SUBJECT = "the links do"


def apply(cache: Cache, request: Request) -> Cache:
    none = {
        name: edges._replace(start=edges.start * 0, source=edges.source[:0], weight=edges.weight[:0])
        for name, edges in cache.part(Links).incoming.items()
    }
    return cache.change(Links, incoming=none)
