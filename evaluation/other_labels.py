"""A cache with other labels than those on disk: what a study's variant with `labels` asks for.

Loaded by its name (evaluation/plan.py): what it imports is code of such runs alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldmark.labels.pixels import pixel_density
from fieldmark.store import read_buckets, read_table
from training import relabelling
from training.controls import Request, apply_control
from training.data import Cache
from training.data.boxes import Boxes
from training.data.labels import Labels

NEEDS = relabelling.NEEDS


def files(encoder: str, labels: Mapping[str, Any]) -> dict[str, str]:
    """What is read beside the parts of NEEDS under these settings: paths under data/, and the schema of each."""
    return relabelling.files(encoder) | ({"thumbs": "thumbs/1"} if labels.get("density") == "pixel" else {})


def apply(cache: Cache, request: Request) -> Cache:
    """The cache under the request's control, its nodes labelled with the request's settings."""
    if request.labels.get("density") == "pixel":
        cache = cache.change(Labels, density=read_pixels(request.data, request.buckets, cache))
    controlled = apply_control(cache, request)
    # A control that replaces texts has labelled anew already.
    return controlled if request.control.afterwards(relabelling.MAKES) else relabelling.apply(controlled, request)


def read_pixels(data: Path, buckets: int, cache: Cache) -> Tensor:
    """Density (n V, N+1) by entropy of pixels of a cache's nodes, from data/thumbs."""
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "image_id"])
    of_path = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    image_ids = [of_path[path] for path in cache.paths for _ in range(cache.views)]
    thumbs = read_buckets(data / "thumbs", "thumbs/1", buckets)
    return torch.from_numpy(pixel_density(thumbs, image_ids, cache.part(Boxes).box.numpy()))
