"""A cache with another bank or other labels than those on disk.

Bank and labels from the images that a regime or a fold shows, or what a study's variant with `labels` asks for.

Loaded by its name (evaluation/plan.py): what it imports is code of such runs alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldmark.labels.pixels import pixel_density
from fieldmark.store import read_buckets
from training import relabelling, reselection
from training.controls import Request, apply_control
from training.data import Cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.labels import Labels
from training.regimes import with_globals


def needs(reads: Collection[str], anew: bool) -> frozenset[str]:
    """The parts to read for a method that reads `reads`; `anew` says whether its bank is selected in memory."""
    found = with_globals(reselection.NEEDS.union(reads)) if anew else frozenset(reads)
    return found | relabelling.NEEDS if "labels" in reads else found


def files(encoder: str, reads: Collection[str], labels: Mapping[str, Any], anew: bool) -> dict[str, str]:
    """What is read beside these parts under these settings: paths under data/, and the schema of each."""
    found = reselection.files(encoder) if anew else {}
    found |= relabelling.files(encoder) if "labels" in reads else {}
    return found | ({"thumbs": "thumbs/1"} if labels.get("density") == "pixel" else {})


def apply(cache: Cache, request: Request, anew: bool, inner: Cache | None = None) -> Cache:
    """The cache under the request's control, its nodes labelled with the request's settings.

    `anew`: its bank is the one that its training images select, and not the one on disk; `inner` as in reselection.
    Classes that are lent have the bank that theirs select.
    """
    if request.labels.get("density") == "pixel":
        cache = cache.change(Labels, density=read_pixels(request.data, request.buckets, cache))
    if anew and cache.has(Bank):
        cache = reselection.apply(cache, request, inner)
        if cache.others is not None:
            # The bank on disk chose among their texts by images of all classes, those that are told apart among them.
            cache = replace(cache, others=reselection.apply(cache.others, request))
    controlled = apply_control(cache, request)
    # A control that replaces texts has labelled anew already.
    made = not cache.has(Labels) or request.control.afterwards(relabelling.MAKES)
    return controlled if made else relabelling.apply(controlled, request)


def read_pixels(data: Path, buckets: int, cache: Cache) -> Tensor:
    """Density (n V, N+1) by entropy of pixels of a cache's nodes, from data/thumbs."""
    image_ids = [image_id for image_id in cache.image_ids for _ in range(cache.views)]
    thumbs = read_buckets(data / "thumbs", "thumbs/1", buckets)
    return torch.from_numpy(pixel_density(thumbs, image_ids, cache.part(Boxes).box.numpy()))
