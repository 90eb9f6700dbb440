"""Images through an encoder into buckets: decoded ahead, batched across images, written one bucket after the other.

A stage says in a `Product` what it makes of a view; here is what all of them share. Rows that are there already, made
alike, are kept; what a run that was killed had finished, bucket by bucket, is kept too; memory does not grow with the
images.
"""

import heapq
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from stages import store
from stages.images import map_ahead
from stages.params import Embed
from stages.views import Eyes, Source, View, count_passes, prepare

# Batches that --dry-run embeds to tell the rate.
SAMPLE_BATCHES = 4
# What one forward pass gave, by output.
Pass = tuple[Tensor, ...]


class Model(Eyes, Protocol):
    """What of an encoder decides how passes are batched and told of."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def batch_size(self) -> int: ...


@dataclass(frozen=True)
class Product:
    """What a stage makes of its images, and where it goes."""

    folder: Path  # of buckets
    schema: str
    columns: pa.Schema
    made_by: dict[str, Any]  # all that changes content
    cuts: Embed  # which views and windows are shown
    model: Model
    forward: Callable[[Tensor], tuple[Tensor, ...]]  # pixels (n, 3, H, W) to outputs, each (n, ...) on the CPU
    rows: Callable[[View, list[Pass]], pa.Table]  # one view's rows from its passes, that of the whole view first

    @property
    def mark(self) -> str:
        """The fingerprint of what is made."""
        return store.fingerprint(self.schema, self.made_by)


class Work(NamedTuple):
    """What is to do in a folder: the buckets that change, and which of their images are missing, bucket by bucket."""

    todo: list[tuple[Path, store.Kept]]
    missing: list[Source]


def find_work(product: Product, sources: list[Source], buckets: int) -> Work:
    """Compare a folder of buckets with what it should hold of `sources`."""
    by_id = {source.image_id: source for source in sources}
    todo: list[tuple[Path, store.Kept]] = []
    for bucket, wanted in enumerate(store.split_buckets(list(by_id), buckets)):
        path = store.bucket_path(product.folder, bucket)
        kept = store.find_kept(path, product.schema, product.mark, wanted)
        if kept.changes:
            todo.append((path, kept))
    return Work(todo, [by_id[image_id] for _, kept in todo for image_id in kept.missing])


def forward_views(views: Iterable[View], product: Product) -> Iterator[pa.Table]:
    """Yield the rows of each view in order, its passes batched with those of the views around it."""
    waiting: list[View] = []
    pixels: list[Tensor] = []
    done: list[Pass] = []

    def forward(count: int) -> None:
        batch = torch.stack(pixels[:count])
        del pixels[:count]
        done.extend(zip(*product.forward(batch), strict=True))

    def finished() -> Iterator[pa.Table]:
        while waiting and len(done) >= len(waiting[0].pixels):
            view = waiting.pop(0)
            passes = done[: len(view.pixels)]
            del done[: len(view.pixels)]
            yield product.rows(view, passes)

    for view in views:
        waiting.append(view)
        pixels.extend(view.pixels)
        while len(pixels) >= product.model.batch_size:
            forward(product.model.batch_size)
            yield from finished()
    if pixels:
        forward(len(pixels))
    yield from finished()


def forward_sources(sources: list[Source], product: Product) -> Iterator[pa.Table]:
    """Yield the rows of each image in order; threads decode the images ahead."""
    workers = os.cpu_count() or 1
    prepared = map_ahead(
        lambda source: prepare(source, product.model, product.cuts), sources,
        workers=workers, ahead=max(workers, 2 * product.model.batch_size // count_passes(product.cuts)),
    )
    rows = forward_views((view for views in prepared for view in views), product)
    for _ in sources:
        yield pa.concat_tables(islice(rows, product.cuts.views + 1)).cast(product.columns)


def update(product: Product, sources: list[Source], buckets: int) -> int:
    """Bring a folder of buckets up to date with `sources`; return how many images went through the encoder."""
    store.remove_strays(product.folder, buckets)
    work = find_work(product, sources, buckets)
    with tqdm(total=len(work.missing), desc=f"embed {product.model.name}", unit="img") as progress:

        def count(images: Iterable[pa.Table]) -> Iterator[pa.Table]:
            for image in images:
                progress.update()
                yield image

        rows = count(forward_sources(work.missing, product))
        for path, kept in work.todo:
            old = store.iterate_images(path, product.schema, kept.present) if kept.present else iter(())
            images = heapq.merge(old, islice(rows, len(kept.missing)), key=store.image_of)
            store.write_sorted(images, path, product.schema, product.columns, product.made_by, product.mark)
    return len(work.missing)


def preview(product: Product, sources: list[Source], buckets: int) -> str:
    """What a run would do, for --dry-run: the rate and the bytes are those of a few images embedded now."""
    work = find_work(product, sources, buckets)
    total = len(work.missing)
    lines = [f"{total} images to embed, {len(sources) - total} kept; {len(work.todo)} buckets to write"]
    if total:
        sample = work.missing[: max(1, SAMPLE_BATCHES * product.model.batch_size // count_passes(product.cuts))]
        # A first pass is slower than those that follow.
        list(forward_sources(sample[:1], product))
        started = perf_counter()
        images = list(forward_sources(sample, product))
        rate = len(sample) / (perf_counter() - started)
        file = io.BytesIO()
        store.write_parquet(images, file, images[0].schema)
        size = file.tell() / len(sample) * total / 1e6
        measured = f"{rate:.1f} images/s on {product.model.device}, measured with {len(sample)} of them"
        lines += [f"time: about {timedelta(seconds=round(total / rate))} ({measured})", f"on disk: about {size:.2f} MB"]
    return "\n".join(lines)
