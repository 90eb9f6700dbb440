"""Images through an encoder into buckets: decoded ahead, batched across images, written one bucket after the other.

A stage says in a `Product` what it makes of a view; here is what all of them share. Rows that are there already, made
alike, are kept; what a run that was killed had finished, bucket by bucket, is kept too; memory does not grow with the
images.

Threads decode, and the main thread makes rows of what came out of the encoder and writes them. On a GPU a thread runs
the encoder, which waits for nothing but pictures, and the copies there and back run beside the passes; on a CPU the
main thread does, and takes turns with those that decode (`Turns`). With several devices there is a process each, which
takes the buckets with `bucket % world == rank`.
"""

import heapq
import io
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import Semaphore
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError, encoder_parser
from fieldmark.params import Embed
from fieldmark.pictures.decode import map_ahead
from fieldmark.pictures.views import Eyes, Source, View, count_passes, prepare

# Batches that --dry-run embeds to tell the rate.
SAMPLE_BATCHES = 4
# Batches that wait for the encoder while one is in it.
AHEAD = 2
# --find-batch-size goes on while twice the batch is this much faster, and times each for so many seconds.
GAIN, TIMED = 1.02, 2.0
Item = TypeVar("Item")
# What one forward pass gave, by output.
Pass = tuple[Tensor, ...]
# Rank and world: this process takes the buckets with bucket % world == rank.
Shard = tuple[int, int]
ALL: Shard = (0, 1)


class Model(Eyes, Protocol):
    """What of an encoder decides how passes are batched and told of. Out of memory halves its `batch_size`."""

    batch_size: int

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def normalise(self) -> Callable[[Tensor], Tensor]: ...


@dataclass(frozen=True)
class Product:
    """What a stage makes of its images, and where it goes."""

    folder: Path  # of buckets
    schema: str
    columns: pa.Schema
    made_by: dict[str, Any]  # all that changes content
    cuts: Embed  # which views and windows are shown
    model: Model
    forward: Callable[[Tensor], tuple[Tensor, ...]]  # normalised pixels (n, 3, H, W) to outputs, each (n, ...)
    # The rows of views, equally many of each, from their passes, that of the whole view first.
    rows: Callable[[list[View], list[list[Pass]]], pa.Table]

    @property
    def mark(self) -> str:
        """The fingerprint of what is made."""
        return store.fingerprint(self.schema, self.made_by)


class Work(NamedTuple):
    """What is to do in a folder: the buckets that change, and which of their images are missing, bucket by bucket."""

    todo: list[tuple[Path, store.Kept]]
    missing: list[Source]


class Clock:
    """What a run waited for: `decode`, the pictures, and `forward`, the encoder; the rest made rows and wrote them."""

    def __init__(self) -> None:
        self.started = perf_counter()
        self.waited = {"decode": 0.0, "forward": 0.0}

    def over(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """The items, with the time that each took to come counted under a name."""
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
        """The shares of the time so far."""
        # Pictures are waited for while the encoder is asked for its next batch.
        decode, forward = self.waited["decode"], self.waited["forward"] - self.waited["decode"]
        write = self.seconds() - decode - forward
        shares = {"decode": decode, "forward": forward, "write": write}
        return ", ".join(f"{name} {spent / self.seconds():.0%}" for name, spent in shares.items())


class Turns:
    """Who may use the processors, where the encoder runs on them too.

    A pass is shared out evenly, and waits for the slowest of its threads: a picture decoded beside it costs more than
    one decoded before it. So a picture takes one place, and a pass all of them. A GPU lets anyone go on.
    """

    def __init__(self, device: torch.device, places: int) -> None:
        self.places = places if device.type == "cpu" else 0
        self.free = Semaphore(self.places)

    @contextmanager
    def take(self, places: int) -> Iterator[None]:
        for _ in range(places):
            self.free.acquire()
        try:
            yield
        finally:
            for _ in range(places):
                self.free.release()

    def one(self) -> AbstractContextManager[None]:
        return self.take(min(1, self.places))

    def all(self) -> AbstractContextManager[None]:
        return self.take(self.places)


class Passes:
    """Batches through a product's model in the order they come, on a GPU with the copies beside the passes."""

    def __init__(self, product: Product, turns: Turns) -> None:
        self.product, self.turns = product, turns
        device = product.model.device
        # One there and one back. Passes themselves keep to one stream: with two, cuBLAS does not promise the same bits.
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def start(self, pixels: Tensor) -> Callable[[], Pass]:
        """Begin with bytes (n, 3, H, W); what is returned waits for their outputs, each (n, ...) on the CPU."""
        if not self.streams:
            with self.turns.all():
                outputs = self.forward(pixels)
            return lambda: outputs
        there, back = self.streams
        device = self.product.model.device
        here = torch.cuda.current_stream(device)
        with torch.cuda.stream(there):
            moved = pixels.pin_memory().to(device, non_blocking=True)
        here.wait_stream(there)
        moved.record_stream(here)
        made = self.forward(moved)
        back.wait_stream(here)
        with torch.cuda.stream(back):
            # To pinned memory, since it does not block.
            outputs = tuple(each.to("cpu", non_blocking=True) for each in made)
            arrived = back.record_event()
        for each in made:
            if each.is_cuda:
                each.record_stream(back)

        def wait() -> Pass:
            arrived.synchronize()
            return outputs

        return wait

    def forward(self, pixels: Tensor) -> Pass:
        """The outputs of a batch; where memory does not suffice, by batches of half the size from here on."""
        model = self.product.model
        while True:
            try:
                parts = [self.product.forward(model.normalise(part)) for part in pixels.split(model.batch_size)]
                return tuple(torch.cat(each) for each in zip(*parts, strict=True))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if model.batch_size == 1:
                where = f"{model.device} has not the memory for one picture at a time"
                raise UserError(f"params.yaml: {model.name}: {where}; use a smaller encoder, or --device cpu")
            model.batch_size //= 2
            remedy = f"set its batch_size in params.yaml to {model.batch_size}, since another one changes the last bits"
            tqdm.write(f"warning: {model.name}: out of memory, going on with half the batch; {remedy}", sys.stderr)
            if self.streams:
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device could not allocate; of the CPU, PyTorch says it in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile make code of every block of a tower when it first runs, each on its own.

    A block is an entry of a list of modules; those that are alike share their code.
    """
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for block in child:
                block.compile()
        else:
            compile_blocks(child)


def find_work(product: Product, sources: list[Source], buckets: int, shard: Shard = ALL) -> Work:
    """Compare a folder of buckets, or a shard of it, with what it should hold of `sources`."""
    rank, world = shard
    by_id = {source.image_id: source for source in sources}
    todo: list[tuple[Path, store.Kept]] = []
    for bucket, wanted in enumerate(store.split_buckets(list(by_id), buckets)):
        if bucket % world == rank:
            path = store.bucket_path(product.folder, bucket)
            kept = store.find_kept(path, product.schema, product.mark, wanted)
            if kept.changes:
                todo.append((path, kept))
    return Work(todo, [by_id[image_id] for _, kept in todo for image_id in kept.missing])


def stack_pictures(pixels: list[Tensor]) -> Tensor:
    """Pictures (3, H, W) as one batch (n, 3, H, W), channels last in memory as decoders and kernels have them."""
    return torch.stack([each.permute(1, 2, 0) for each in pixels]).permute(0, 3, 1, 2)


def forward_views(views: Iterable[View], product: Product, turns: Turns, clock: Clock) -> Iterator[pa.Table]:
    """Yield the rows of each view in order, its passes batched with those of the views around it."""
    waiting: deque[View] = deque()
    done: deque[Pass] = deque()

    def batches() -> Iterator[Tensor]:
        pixels: list[Tensor] = []
        for view in clock.over(views, "decode"):
            waiting.append(view)
            pixels.extend(view.pixels)
            while len(pixels) >= (size := product.model.batch_size):
                yield stack_pictures(pixels[:size])
                del pixels[:size]
        if pixels:
            yield stack_pictures(pixels)

    # On a CPU in this very thread: in one of its own a pass takes a sixth longer.
    start = Passes(product, turns).start
    begun = map(start, batches()) if turns.places else map_ahead(start, batches(), workers=1, ahead=AHEAD)
    for outputs in clock.over((wait() for wait in begun), "forward"):
        done.extend(zip(*outputs, strict=True))
        ready: list[View] = []
        passes: list[list[Pass]] = []
        while waiting and len(done) >= len(waiting[0].pixels):
            ready.append(waiting.popleft())
            passes.append([done.popleft() for _ in ready[-1].pixels])
        if ready:
            rows = product.rows(ready, passes)
            size = len(rows) // len(ready)
            yield from (rows.slice(number * size, size) for number in range(len(ready)))


def forward_sources(sources: list[Source], product: Product, clock: Clock | None = None) -> Iterator[pa.Table]:
    """Yield the rows of each image in order."""
    workers = os.cpu_count() or 1
    turns = Turns(product.model.device, workers)

    def prepare_one(source: Source) -> list[View]:
        with turns.one():
            return prepare(source, product.model, product.cuts)

    ahead = max(workers, 2 * product.model.batch_size // count_passes(product.cuts))
    prepared = map_ahead(prepare_one, sources, workers=workers, ahead=ahead)
    rows = forward_views((view for views in prepared for view in views), product, turns, clock or Clock())
    for _ in sources:
        yield pa.concat_tables(islice(rows, product.cuts.views + 1)).cast(product.columns)


def update(product: Product, sources: list[Source], buckets: int, shard: Shard | None = None) -> int:
    """Bring a folder of buckets up to date with `sources`; return how many images went through the encoder.

    With a shard, its buckets alone: what else lies in the folder is left to whoever started the processes.
    """
    if shard is None:
        store.remove_strays(product.folder, buckets)
    work = find_work(product, sources, buckets, shard or ALL)
    clock = Clock()
    name = product.model.name if shard is None else f"{product.model.name} {shard[0]}/{shard[1]}"
    with tqdm(total=len(work.missing), desc=f"embed {name}", unit="img") as progress:

        def count(images: Iterable[pa.Table]) -> Iterator[pa.Table]:
            for image in images:
                progress.set_postfix_str(clock.shares(), refresh=False)
                progress.update()
                yield image

        rows = count(forward_sources(work.missing, product, clock))
        for path, kept in work.todo:
            old = store.iterate_images(path, product.schema, kept.present) if kept.present else iter(())
            images = heapq.merge(old, islice(rows, len(kept.missing)), key=store.image_of)
            store.write_sorted(images, path, product.schema, product.columns, product.made_by, product.mark)
    if work.missing:
        embedded, seconds = len(work.missing), clock.seconds()
        rate = f"{embedded} images in {seconds:.2f} s, {embedded / seconds:.1f} images/s"
        print(f"embed {name}: {rate}; {clock.shares()}", file=sys.stderr)
    rank, world = shard or ALL
    ours = sum(store.bucket_of(source.image_id, buckets) % world == rank for source in sources)
    print(f"{product.folder}: {len(work.missing)} images embedded, {ours - len(work.missing)} kept")
    return len(work.missing)


def preview(product: Product, sources: list[Source], buckets: int, devices: int = 1) -> str:
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
        if devices > 1:
            measured += f", times {devices} devices"
        seconds = round(total / rate / devices)
        lines += [f"time: about {timedelta(seconds=seconds)} ({measured})", f"on disk: about {size:.2f} MB"]
    return "\n".join(lines)


def measure_rate(product: Product, batch: Tensor) -> float:
    """Images a second of the forward pass alone, over batches that lie on the device."""
    device = product.model.device

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # A first pass is slower than those that follow.
    product.forward(batch)
    synchronise()
    count, spent, started = 0, 0.0, perf_counter()
    while spent <= TIMED:
        product.forward(batch)
        synchronise()
        count, spent = count + len(batch), perf_counter() - started
    return count / spent


def find_batch_size(product: Product) -> str:
    """A table of rates, for --find-batch-size: the batch is doubled until that gains nothing or memory ends."""
    model = product.model
    picture = model.preprocess(Image.new("RGB", (8, 8)))
    best, best_rate = model.batch_size, 0.0
    lines = [f"{'batch_size':>10s} {'images/s':>9s}"]
    while True:
        try:
            pixels = picture.to(model.device).expand(model.batch_size, *picture.shape)
            rate = measure_rate(product, model.normalise(pixels))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            lines.append(f"{model.batch_size:10d} out of memory")
            break
        lines.append(f"{model.batch_size:10d} {rate:9.1f}")
        if rate < GAIN * best_rate:
            break
        best, best_rate = model.batch_size, rate
        model.batch_size *= 2
    if not best_rate:
        raise UserError(f"params.yaml: {model.name}: out of memory at batch_size {model.batch_size}; make it smaller")
    return "\n".join([*lines, f"params.yaml: {model.name}: batch_size: {best} (another one changes the last bits)"])


def passes_parser(doc: str | None) -> ArgumentParser:
    """A parser for the stages that show images to an encoder."""
    parser = encoder_parser(doc)
    devices = "auto, cpu, cuda, cuda:N, or several with commas, a process each (default: auto, every GPU or the CPU)"
    parser.add_argument("--device", default="auto", metavar="DEVICES", help=devices)
    share = "only the buckets with bucket %% WORLD == RANK; strays are left (what several devices are given)"
    parser.add_argument("--shard", type=parse_shard, metavar="RANK/WORLD", help=share)
    compiled = "torch.compile: vectors may differ from those without to cosine 0.999; on CPU it needs a C++ compiler"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--dry-run", action="store_true", help="print images, time and bytes to come; write nothing")
    found = "time the forward pass at batch_size, twice that, ..., print what is fastest; write nothing"
    parser.add_argument("--find-batch-size", action="store_true", help=found)
    return parser


def parse_shard(text: str) -> Shard:
    """`RANK/WORLD`, 0/2 and 1/2 for two. Raises ValueError, which argparse tells."""
    rank, world = map(int, text.split("/"))
    if not 0 <= rank < world:
        raise ValueError
    return rank, world


def list_devices(names: str) -> list[str]:
    """The devices of --device; `auto` is every GPU, or the CPU where there is none."""
    if names == "auto":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    return names.split(",")


def run_shards(stage: str, folder: Path, buckets: int, arguments: Namespace) -> bool:
    """Where --device names several, run this command once a device, each on its share of the buckets of a folder.

    Returns whether it did; what each has to say it says itself. Exits with the code of the first that failed, when the
    others have finished.
    """
    devices = list_devices(arguments.device)
    if len(devices) == 1 or arguments.dry_run or arguments.find_batch_size:
        return False
    store.remove_strays(folder, buckets)
    processes = [
        subprocess.Popen([
            sys.executable, "-m", stage, *sys.argv[1:], "--device", device, "--shard", f"{rank}/{len(devices)}",
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
