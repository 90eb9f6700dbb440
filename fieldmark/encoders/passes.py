"""Forward passes: images through an encoder into buckets of rows, for all stages that show images to one.

A stage says in a `Product` what it makes of a view, or in several of them what goes into several folders from one pass.
Images are decoded ahead of the encoder, a batch may hold views of several images, and one bucket is written after the
other, in all folders side by side. Rows that are there already, made by the same encoder and parameters, are kept, and
so are the buckets that a killed run had finished. Memory does not grow with the images.

Several threads decode, and cut what a view shows further; the main thread makes rows of the outputs of the encoder
and writes them. On a GPU one more thread runs the encoder, so that it waits for nothing but pictures, and copies to and
from the GPU run beside the passes. On a CPU the main thread runs the encoder, and it shares the processors with the
threads that decode (`CpuSlots`). With several devices there is one process for each, which takes the buckets with
`bucket % world == rank`.
"""

import io
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import Semaphore
from time import perf_counter
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError, encoder_parser
from fieldmark.encoders.base import ImageEncoder
from fieldmark.params import Embed
from fieldmark.pictures.decode import map_ahead, processors
from fieldmark.pictures.views import Chosen, Outputs, Source, View, count_passes, image_ids_of, prepare

# How many batches --dry-run embeds to measure the rate.
SAMPLE_BATCHES = 4
# How many batches wait for the encoder while it works on another.
QUEUED_BATCHES = 2
# --find-batch-size doubles the batch as long as this makes the encoder faster by this factor; it times each size for so
# many seconds.
MIN_SPEEDUP, TIMED_SECONDS = 1.02, 2.0
Item = TypeVar("Item")
# Views, and of each the outputs of its passes.
Passed = tuple[list[View], list[list[Outputs]]]
# Rank and world: this process takes the buckets with bucket % world == rank.
Shard = tuple[int, int]
ALL_BUCKETS: Shard = (0, 1)


@dataclass(frozen=True)
class ForwardPass:
    """What is shown to an encoder, and what is asked of it."""

    embed: Embed  # which views and windows are shown
    encoder: ImageEncoder
    forward: Callable[[Tensor], Outputs]  # normalised pixels (n, 3, H, W) to outputs, each (n, ...)


@dataclass(frozen=True)
class Product(ForwardPass):
    """What a stage makes of its images, and where it goes."""

    folder: Path  # of buckets
    schema: str
    columns: pa.Schema
    made_by: dict[str, Any]  # all that changes what the rows hold
    # The rows of views, equally many of each, from the outputs of their passes: first the whole view, then its windows.
    rows: Callable[[list[View], list[list[Outputs]]], pa.Table]
    # Which of some images a bucket holds rows of that are not those of the image now, where that can be.
    outdated: Callable[[Path, list[Source]], set[str]] | None = None

    @property
    def fingerprint(self) -> str:
        return store.fingerprint(self.schema, self.made_by)


# Makes the rows of images, in order: of each a table for every product. Only `encoder`, `embed`, and `forward` of the
# first product count, which the others share.
Maker = Callable[[Sequence[Source], Sequence[Product], "Clock"], Iterator[tuple[pa.Table, ...]]]


class Work(NamedTuple):
    """What is to be done in a folder: the buckets that change, and the images that they lack, bucket by bucket."""

    todo: list[tuple[Path, store.Kept]]
    missing: Sequence[Source]


class Clock:
    """How long a run waited for pictures (`decode`) and for the encoder (`forward`); the rest made and wrote rows."""

    def __init__(self) -> None:
        self.started = perf_counter()
        self.waited = {"decode": 0.0, "forward": 0.0}

    def timed(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """The items; the time that the run waited for each is counted under a name."""
        arriving = iter(items)
        while True:
            asked = perf_counter()
            try:
                item = next(arriving)
            except StopIteration:
                return
            finally:
                self.waited[name] += perf_counter() - asked
            yield item

    def seconds(self) -> float:
        return perf_counter() - self.started

    def shares(self) -> str:
        """The shares of the time so far, as text."""
        # The wait for pictures is a part of the wait for the encoder, which asks for them.
        decode, forward = self.waited["decode"], self.waited["forward"] - self.waited["decode"]
        write = self.seconds() - decode - forward
        shares = {"decode": decode, "forward": forward, "write": write}
        return ", ".join(f"{name} {spent / self.seconds():.0%}" for name, spent in shares.items())


def compute_alone() -> None:
    """Of the thread that calls it: what it computes with PyTorch is not divided among as many threads again.

    Threads that decode or cut are as many as there are processors, and would wait for each other.
    """
    torch.set_num_threads(1)


class CpuSlots:
    """Keeps decoding and forward passes from using the processors at the same time, where the encoder runs on a CPU.

    PyTorch divides a pass evenly between its threads and waits for the slowest of them, so that decoding a picture
    costs more time beside a pass than before it. So decoding a picture takes one slot, and a pass takes all of them.
    Where the encoder runs on a GPU there are no slots, and nothing waits for one.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count if device.type == "cpu" else 0
        self.free = Semaphore(self.count)

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        for _ in range(count):
            self.free.acquire()
        try:
            yield
        finally:
            for _ in range(count):
                self.free.release()

    def one(self) -> AbstractContextManager[None]:
        return self.take(min(1, self.count))

    def all(self) -> AbstractContextManager[None]:
        return self.take(self.count)


class BatchRunner:
    """Runs batches through `forward`, in the order they come; on a GPU the copies run beside the passes."""

    def __init__(self, asked: ForwardPass, slots: CpuSlots) -> None:
        self.asked, self.slots = asked, slots
        device = asked.encoder.device
        # One stream for copies to the GPU and one for copies back. All passes run on a third one: on two, cuBLAS does
        # not promise the same bits.
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def start(self, pixels: Tensor) -> Callable[[], Outputs]:
        """Begin the pass of bytes (n, 3, H, W). The function that is returned waits for its outputs, on the CPU."""
        if not self.streams:
            with self.slots.all():
                outputs = self.forward(pixels)
            return lambda: outputs
        there, back = self.streams
        device = self.asked.encoder.device
        here = torch.cuda.current_stream(device)
        with torch.cuda.stream(there):
            moved = pixels.pin_memory().to(device, non_blocking=True)
        here.wait_stream(there)
        moved.record_stream(here)
        made = self.forward(moved)
        back.wait_stream(here)
        with torch.cuda.stream(back):
            # PyTorch copies to pinned memory where a copy does not block.
            outputs = tuple(each.to("cpu", non_blocking=True) for each in made)
            arrived = back.record_event()
        for each in made:
            if each.is_cuda:
                each.record_stream(back)

        def wait() -> Outputs:
            arrived.synchronize()
            return outputs

        return wait

    def forward(self, pixels: Tensor) -> Outputs:
        """The outputs of a batch. Where memory is not enough, this batch and all later ones run in halves."""
        encoder = self.asked.encoder
        while True:
            try:
                parts = [self.asked.forward(encoder.normalise(part)) for part in pixels.split(encoder.batch_size)]
                return tuple(torch.cat(each) for each in zip(*parts, strict=True))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if encoder.batch_size == 1:
                where = f"{encoder.device} has not the memory for one picture at a time"
                raise UserError(f"params.yaml: {encoder.name}: {where}; use a smaller encoder, or --device cpu")
            encoder.batch_size //= 2
            size = encoder.batch_size
            remedy = f"set its batch_size in params.yaml to {size}, since another one changes the last bits"
            tqdm.write(f"warning: {encoder.name}: out of memory, going on with half the batch; {remedy}", sys.stderr)
            if self.streams:
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had not enough memory. For the CPU, PyTorch has no exception of its own, only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile compile every block of a tower by itself, when it first runs.

    A block is an entry of a list of modules. Blocks of the same structure share their compiled code.
    """
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for block in child:
                block.compile()
        else:
            compile_blocks(child)


def find_work(product: Product, sources: Sequence[Source], buckets: int, shard: Shard = ALL_BUCKETS) -> Work:
    """Compare a folder of buckets, or a shard of it, with what it should hold: the rows of all `sources`."""
    rank, world = shard
    image_ids = image_ids_of(sources)
    numbers = store.buckets_of(image_ids, buckets)
    # The places of each bucket's images.
    ends = np.cumsum(np.bincount(numbers, minlength=buckets))
    members = np.split(np.argsort(numbers), ends[:-1])
    todo: list[tuple[Path, store.Kept]] = []
    for bucket in range(rank, buckets, world):
        path, own = store.bucket_path(product.folder, bucket), image_ids.take(pa.array(members[bucket]))
        order = pc.sort_indices(own)
        own, places = own.take(order), members[bucket][order.to_numpy()]
        kept = store.find_kept(path, product.schema, product.fingerprint, own.to_pylist())
        if product.outdated is not None and kept.present:
            present = Chosen(sources, places[places_of(kept.present, own)])
            kept = kept.without(product.outdated(path, list(present)))
        if kept.changes:
            todo.append((path, kept))
    return Work(todo, choose(sources, image_ids, [image_id for _, kept in todo for image_id in kept.missing]))


def choose(sources: Sequence[Source], image_ids: pa.Array, wanted: Sequence[str]) -> Sequence[Source]:
    """The sources of some images, in their order; `image_ids` are those of all."""
    return Chosen(sources, places_of(wanted, image_ids))


def places_of(wanted: Sequence[str], image_ids: pa.Array) -> np.ndarray:
    """Where some images stand among others, which are all hashed for it."""
    found: np.ndarray = pc.index_in(pa.array(wanted, image_ids.type), value_set=image_ids).to_numpy()
    return found


def stack_pictures(pixels: list[Tensor]) -> Tensor:
    """Pictures (3, H, W) as one batch (n, 3, H, W), channels last in memory, as decoders give and kernels want them."""
    return torch.stack([each.permute(1, 2, 0) for each in pixels]).permute(0, 3, 1, 2)


class Course:
    """A view on its way through the encoder."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.found: list[Outputs] = []  # of its passes so far
        self.wanted = len(view.pixels)  # passes until it is done, or says what it shows next

    @property
    def waits(self) -> bool:
        """Whether passes are missing of what it shows now."""
        return len(self.found) < self.wanted

    @property
    def done(self) -> bool:
        return not self.waits and self.view.further is None

    def go_on(self) -> Self:
        """The same, with what it shows next."""
        assert self.view.further is not None
        self.view = self.view.further(self.found)
        self.wanted += len(self.view.pixels)
        return self


def forward_views(views: Iterable[View], asked: ForwardPass, slots: CpuSlots, clock: Clock) -> Iterator[Passed]:
    """Run views in order, each one's passes batched with those of the views around it.

    What a view shows further, once the encoder has looked at it, goes before views that have not begun, so that few are
    on their way at a time.
    """
    return clock.timed(run_views(views, asked, slots, clock), "forward")


def run_views(views: Iterable[View], asked: ForwardPass, slots: CpuSlots, clock: Clock) -> Iterator[Passed]:
    """forward_views, not timed."""
    start = BatchRunner(asked, slots).start
    # On a CPU in the thread that calls this: in a thread of its own a pass takes a sixth longer.
    ahead = 0 if slots.count else QUEUED_BATCHES
    fresh = iter(views)
    courses: deque[Course] = deque()  # those that are not done, in the order of the views
    cutting: deque[Future[Course]] = deque()  # those of which more is cut
    waiting: deque[tuple[Course, Tensor]] = deque()  # pictures for the next batches, and whose they are
    running: deque[tuple[list[Course], Callable[[], Outputs]]] = deque()  # batches, and what waits for their outputs

    def come() -> Course | None:
        """The next view that is shown, or shown further."""
        if cutting:
            return cutting.popleft().result()
        view = next(fresh, None)
        if view is None:
            return None
        courses.append(Course(view))
        return courses[-1]

    def cut(course: Course) -> Course:
        with slots.one():
            return course.go_on()

    def begin(batch: Tensor) -> Callable[[], Outputs]:
        if not ahead:
            return start(batch)
        begun = runner.submit(start, batch)
        return lambda: begun.result()()

    coming = clock.timed(iter(come, ...), "decode")
    cutters = ThreadPoolExecutor(processors(), initializer=compute_alone)
    runner = ThreadPoolExecutor(1)
    try:
        while True:
            while len(running) <= ahead:
                size = asked.encoder.batch_size
                while len(waiting) < size and (course := next(coming)) is not None:
                    waiting.extend((course, pixels) for pixels in course.view.pixels)
                # Of what runs more may come, to fill a batch.
                if not waiting or (running and len(waiting) < size):
                    break
                shown = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                batch = stack_pictures([pixels for _, pixels in shown])
                running.append(([course for course, _ in shown], begin(batch)))
            if not running:
                return
            owners, wait = running.popleft()
            for course, outputs in zip(owners, zip(*wait(), strict=True), strict=True):
                course.found.append(outputs)
                if not course.waits and course.view.further is not None:
                    cutting.append(cutters.submit(cut, course))
            ready = []
            while courses and courses[0].done:
                ready.append(courses.popleft())
            if ready:
                yield [course.view for course in ready], [course.found for course in ready]
    finally:
        for pool in (cutters, runner):
            pool.shutdown(cancel_futures=True)


def run_sources(
    sources: Sequence[Source], asked: ForwardPass, clock: Clock, cut: Callable[[Source], list[View]] | None = None
) -> Iterator[Passed]:
    """Decode images and run their views, in order; `cut` makes those of an image (default: `prepare`)."""
    workers = processors()
    slots = CpuSlots(asked.encoder.device, workers)

    def prepare_one(source: Source) -> list[View]:
        with slots.one():
            return prepare(source, asked.encoder, asked.embed) if cut is None else cut(source)

    ahead = max(workers, 2 * asked.encoder.batch_size // count_passes(asked.embed))
    # Closed at once where a pass fails: its threads cannot be ended from one of their own.
    with closing(map_ahead(prepare_one, sources, workers, ahead, compute_alone)) as prepared:
        yield from forward_views((view for views in prepared for view in views), asked, slots, clock)


def rows_of_images(passed: Iterable[Passed], products: Sequence[Product], count: int) -> Iterator[tuple[pa.Table, ...]]:
    """The rows of `count` images whose views were run, in order, a table for every product."""
    views = (rows for each in passed for rows in rows_of_views(products, *each))
    for _ in range(count):
        found = zip(*islice(views, products[0].embed.views + 1), strict=True)
        pairs = zip(products, found, strict=True)
        yield tuple(pa.concat_tables(rows).cast(product.columns) for product, rows in pairs)


def rows_of_views(
    products: Sequence[Product], views: list[View], passes: list[list[Outputs]]
) -> Iterator[tuple[pa.Table, ...]]:
    """The rows of each view, a table for every product, from the outputs of their passes."""
    made = [product.rows(views, passes) for product in products]
    sizes = [len(rows) // len(views) for rows in made]
    for number in range(len(views)):
        yield tuple(rows.slice(number * size, size) for rows, size in zip(made, sizes, strict=True))


def forward_sources(
    sources: Sequence[Source], products: Sequence[Product], clock: Clock | None = None
) -> Iterator[tuple[pa.Table, ...]]:
    """Yield the rows of each image in order, a table for every product; they share encoder, views and `forward`."""
    yield from rows_of_images(run_sources(sources, products[0], clock or Clock()), products, len(sources))


class SharedBucket(NamedTuple):
    """A bucket of several folders, those of them in which it changes."""

    changed: dict[int, store.Kept]  # what each keeps, by the place of its product
    missing: list[str]  # image_ids that one of them lacks, sorted


def share_work(works: Sequence[Work]) -> dict[str, SharedBucket]:
    """What is to be done in several folders, bucket by bucket, by the name of the file."""
    found: dict[str, dict[int, store.Kept]] = {}
    for place, work in enumerate(works):
        for path, kept in work.todo:
            found.setdefault(path.name, {})[place] = kept
    return {
        name: SharedBucket(changed, sorted({each for kept in changed.values() for each in kept.missing}))
        for name, changed in sorted(found.items())
    }


def merge_rows(
    products: Sequence[Product], name: str, bucket: SharedBucket, made: Iterator[dict[int, pa.Table]]
) -> Iterator[list[pa.Table]]:
    """The rows of each image of a bucket, in order, a table for every folder that changes: kept ones and made ones.

    `made` gives the rows of each image that is missing, by the place of the product.
    """
    present = {place: set(kept.present) for place, kept in bucket.changed.items()}
    old = {
        place: store.iterate_images(products[place].folder / name, products[place].schema, kept.present)
        for place, kept in bucket.changed.items()
        if kept.present
    }
    missing = set(bucket.missing)
    for image_id in sorted(missing.union(*present.values())):
        new = next(made) if image_id in missing else {}
        yield [next(old[place]) if image_id in present[place] else new[place] for place in bucket.changed]


def update(
    products: Sequence[Product],
    sources: Sequence[Source],
    buckets: int,
    shard: Shard | None = None,
    make: Maker = forward_sources,
) -> int:
    """Bring folders of buckets up to date with `sources`; return for how many images rows were made.

    The products share encoder, views and `forward`, and `make` makes the rows. With a shard only its buckets are
    updated; what else lies in the folders is left to the process that runs the shards.
    """
    if shard is None:
        for product in products:
            store.remove_strays(product.folder, buckets)
    works = [find_work(product, sources, buckets, shard or ALL_BUCKETS) for product in products]
    shared = share_work(works)
    image_ids = image_ids_of(sources)
    missing = choose(sources, image_ids, [image_id for bucket in shared.values() for image_id in bucket.missing])
    lacking = [place for place, work in enumerate(works) if work.missing]
    clock = Clock()
    encoder = products[0].encoder.name
    name = encoder if shard is None else f"{encoder} {shard[0]}/{shard[1]}"
    with tqdm(total=len(missing), desc=f"embed {name}", unit="img") as progress:

        def count(images: Iterable[tuple[pa.Table, ...]]) -> Iterator[dict[int, pa.Table]]:
            for image in images:
                progress.set_postfix_str(clock.shares(), refresh=False)
                progress.update()
                yield dict(zip(lacking, image, strict=True))

        # Where images are only taken away, there is nothing to make.
        made = count(make(missing, [products[place] for place in lacking], clock) if missing else ())
        for file, bucket in shared.items():
            targets = [
                store.Target(each.folder / file, each.schema, each.columns, each.made_by, each.fingerprint)
                for each in map(products.__getitem__, bucket.changed)
            ]
            store.write_side_by_side(merge_rows(products, file, bucket, made), targets)
    if missing:
        seconds = clock.seconds()
        rate = f"{len(missing)} images in {seconds:.2f} s, {len(missing) / seconds:.1f} images/s"
        print(f"embed {name}: {rate}; {clock.shares()}", file=sys.stderr)
    rank, world = shard or ALL_BUCKETS
    ours = int((store.buckets_of(image_ids, buckets) % world == rank).sum())
    for product, work in zip(products, works, strict=True):
        print(f"{product.folder}: {len(work.missing)} images embedded, {ours - len(work.missing)} kept")
    return len(missing)


class Size(NamedTuple):
    """What a folder of buckets takes on disk."""

    image: float  # bytes an image
    bucket: float  # bytes a bucket beside its images: what Parquet says of its columns

    def of(self, images: int, buckets: int) -> float:
        return images * self.image + buckets * self.bucket


def size_of(tables: Sequence[pa.Table], images: int) -> Size:
    """The size of a folder, from rows of some of its images, equally many of each, written as its files are."""
    table = pa.concat_tables(tables)
    few = images // 2

    def written(count: int) -> int:
        file = io.BytesIO()
        store.write_parquet([table.slice(0, len(table) // images * count)], file, table.schema)
        return file.tell()

    image = (written(images) - written(few)) / (images - few)
    return Size(image, written(images) - images * image)


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


class Measured(NamedTuple):
    """What a few images took."""

    rate: float  # images a second
    images: int
    tables: list[tuple[pa.Table, ...]]  # of each of them the rows, a table for every product


def measure(products: Sequence[Product], sources: Sequence[Source], make: Maker = forward_sources) -> Measured:
    """Make the rows of the first SAMPLE_BATCHES batches of some images, and write none."""
    product = products[0]
    sample = sources[: max(1, SAMPLE_BATCHES * product.encoder.batch_size // count_passes(product.embed))]
    # A first pass is slower than those that follow.
    list(make(sample[:1], products, Clock()))
    started = perf_counter()
    tables = list(make(sample, products, Clock()))
    return Measured(len(sample) / (perf_counter() - started), len(sample), tables)


def preview(
    products: Sequence[Product],
    sources: Sequence[Source],
    buckets: int,
    workers: int = 1,
    make: Maker = forward_sources,
) -> str:
    """What a run would do, for --dry-run. Rate and bytes are measured on a few images that are embedded now.

    `workers` are devices or machines like this one, which share the buckets.
    """
    works = [find_work(each, sources, buckets) for each in products]
    pairs = [(each, work) for each, work in zip(products, works, strict=True) if work.missing]
    missing = {source.image_id: source for work in works for source in work.missing}
    total, changed = len(missing), sum(len(work.todo) for work in works)
    lines = [f"{total} images to embed, {len(sources) - total} kept; {changed} buckets to write"]
    if total:
        lacking = [product for product, _ in pairs]
        found = measure(lacking, list(missing.values()), make)
        size = 0.0
        for (_, work), rows in zip(pairs, zip(*found.tables, strict=True), strict=True):
            size += size_of(rows, found.images).of(len(work.missing), len(work.todo))
        device, needed = lacking[0].encoder.device, total / found.rate
        measured = f"{found.rate:.1f} images/s on {device}, measured with {found.images} of them"
        if workers > 1:
            measured += f"; {timedelta(seconds=round(needed))} on one, this is on {workers} like it"
        free = free_space(lacking[0].folder)
        lines.append(f"time: about {timedelta(seconds=round(needed / workers))} ({measured})")
        lines.append(f"on disk: about {size / 1e6:.2f} MB, {free / 1e6:.0f} MB are free")
        if size > free:
            lines[-1] += ": too few; `python -m tools.plan` says what takes how much"
    return "\n".join(lines)


def measure_rate(product: Product, batch: Tensor) -> float:
    """Images a second of the forward pass alone, for a batch that already lies on the device."""
    device = product.encoder.device

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # A first pass is slower than those that follow.
    product.forward(batch)
    synchronise()
    count, spent, started = 0, 0.0, perf_counter()
    while spent <= TIMED_SECONDS:
        product.forward(batch)
        synchronise()
        count, spent = count + len(batch), perf_counter() - started
    return count / spent


def find_batch_size(product: Product) -> str:
    """A table of rates, for --find-batch-size. The batch is doubled until it is no faster, or memory is not enough."""
    encoder = product.encoder
    picture = encoder.preprocess(Image.new("RGB", (8, 8)))
    best, best_rate = encoder.batch_size, 0.0
    lines = [f"{'batch_size':>10s} {'images/s':>9s}"]
    while True:
        try:
            pixels = picture.to(encoder.device).expand(encoder.batch_size, *picture.shape)
            rate = measure_rate(product, encoder.normalise(pixels))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            lines.append(f"{encoder.batch_size:10d} out of memory")
            break
        lines.append(f"{encoder.batch_size:10d} {rate:9.1f}")
        if rate < MIN_SPEEDUP * best_rate:
            break
        best, best_rate = encoder.batch_size, rate
        encoder.batch_size *= 2
    if not best_rate:
        problem = f"out of memory at batch_size {encoder.batch_size}"
        raise UserError(f"params.yaml: {encoder.name}: {problem}; make it smaller")
    return "\n".join([*lines, f"params.yaml: {encoder.name}: batch_size: {best} (another one changes the last bits)"])


def passes_parser(doc: str | None) -> ArgumentParser:
    """A parser for the stages that show images to an encoder."""
    return add_passes(encoder_parser(doc))


def add_passes(parser: ArgumentParser) -> ArgumentParser:
    """The options of those stages, in any parser."""
    devices = "auto, cpu, cuda, cuda:N, or several with commas, a process each (default: auto, every GPU or the CPU)"
    parser.add_argument("--device", default="auto", metavar="DEVICES", help=devices)
    share = "only the buckets with bucket %% WORLD == RANK; strays are left (what several devices are given)"
    parser.add_argument("--shard", type=parse_shard, metavar="RANK/WORLD", help=share)
    compiled = "torch.compile: vectors may differ from those without to cosine 0.999; on CPU it needs a C++ compiler"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--dry-run", action="store_true", help="print images, time and bytes to come; write nothing")
    workers = "for --dry-run: the time on so many workers like this one (default: one for each device)"
    parser.add_argument("--workers", type=parse_count, metavar="N", help=workers)
    found = "time the forward pass at batch_size, twice that, ..., print what is fastest; write nothing"
    parser.add_argument("--find-batch-size", action="store_true", help=found)
    return parser


def refuse_compile(arguments: Namespace) -> None:
    """Raises UserError for --compile, in a stage that reads hidden states."""
    if arguments.compile:
        raise UserError("--compile: hidden states are read on the way, where compiled code has none; leave it out")


def parse_shard(text: str) -> Shard:
    """`RANK/WORLD`: 0/2 and 1/2 for two. Raises ValueError, which argparse reports."""
    rank, world = map(int, text.split("/"))
    if not 0 <= rank < world:
        raise ValueError
    return rank, world


def parse_count(text: str) -> int:
    """A whole number above 0. Raises ValueError, which argparse reports."""
    if (count := int(text)) < 1:
        raise ValueError
    return count


def count_workers(arguments: Namespace) -> int:
    """The workers that --dry-run plans with."""
    return int(arguments.workers or len(list_devices(arguments.device)))


def list_devices(names: str) -> list[str]:
    """The devices of --device; `auto` is every GPU, or the CPU where there is none."""
    if names == "auto":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    return names.split(",")


def run_shards(
    stage: str, folders: Sequence[Path], buckets: int, arguments: Namespace, done: str | None = None
) -> bool:
    """Where --device names several, run this command once for each, on its share of the buckets of some folders.

    Returns whether it did so; each process prints its own messages. Where one fails, the others finish, and then this
    process exits with the code of the first that failed. An option that is `done` is not passed on.
    """
    devices = list_devices(arguments.device)
    if len(devices) == 1 or arguments.dry_run or arguments.find_batch_size:
        return False
    for folder in folders:
        store.remove_strays(folder, buckets)
    words = [word for word in sys.argv[1:] if word != done]
    processes = [
        subprocess.Popen([
            sys.executable, "-m", stage, *words, "--device", device, "--shard", f"{rank}/{len(devices)}",
        ])
        for rank, device in enumerate(devices)
    ]  # fmt: skip
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    if failed := [code for code in codes if code]:
        sys.exit(max(failed[0], 1))
    return True
