"""Pictures for a stage that trains: one view of each a pass, decoded ahead by threads, in an order drawn by hash.

The view of epoch e is that of number e + 1 (views.py): a random crop, flipped at random, the same for an image and
epoch every time. Pictures are decoded anew each time; at most two batches of them are held.
"""

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from fieldmark.params import Embed
from fieldmark.pictures import regions
from fieldmark.pictures.boxes import scale_region
from fieldmark.pictures.decode import map_ahead
from fieldmark.pictures.views import Preprocessor, Source, cut, needed_side, open_indexed, view_region
from fieldmark.store import sha256

ONE_VIEW = Embed(views=1)  # of which a view is a part of the picture, so that it needs more of its pixels


def shuffled(sources: list[Source], seed: int, epoch: int) -> list[Source]:
    """The order of an epoch: by hash, so that classes are mixed and one image more moves no other past another."""
    return sorted(sources, key=lambda source: sha256(f"order {seed} {epoch} {source.image_id}"))


def load_view(encoder: Preprocessor, number: int, source: Source) -> Tensor:
    """One view of an image as bytes (3, H, W). Raises UserError as views.open_indexed does."""
    image, size = open_indexed(source, needed_side(encoder, ONE_VIEW))
    region, flip = view_region(source.image_id, number, *size)
    return cut(image.crop(scale_region(region, size, image.size)), [regions.WHOLE], encoder, flip=flip)[0]


def iterate_batches(
    sources: list[Source], encoder: Preprocessor, number: int, batch_size: int
) -> Iterator[tuple[list[Source], Tensor]]:
    """Batches in order: images, and bytes (n, 3, H, W) of their view `number`."""
    workers = os.cpu_count() or 1
    alone = partial(torch.set_num_threads, 1)  # in each thread that decodes
    views = map_ahead(partial(load_view, encoder, number), sources, workers, 2 * batch_size, alone)
    for start in range(0, len(sources), batch_size):
        batch = sources[start : start + batch_size]
        yield batch, torch.stack(list(islice(views, len(batch))))
