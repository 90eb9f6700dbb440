"""Seconds an epoch of the heads over raw tokens and regions, over that of a bare linear layer on the tokens.

The cache is synthetic, in memory: 3,000 images of 200 classes, with tokens of 9 x 9 x 352 (the last block of a small
EfficientNet at 260 pixels) or of 14 x 14 x 768 (a ViT-B/16 at 224), in float16, and rollout of 12 heads and CLS beside
them; with an object and 8 crops of 512 numbers, and 1,000 concepts. "Bare" is forward and backward of Linear(d, 200) on
every token of the same batches, cut from the same cache, then the mean over tokens: what a class response map costs.
Settings are the methods' defaults. An epoch is one pass over the training images with its updates; of several the
fastest counts, since the machine may have other work. Memory is the most that the process has held, less what it held
before the fit; each row has a process of its own, since memory that one fit has left serves the next.

    GOMP_SPINCOUNT=3000 python -m bench.heads [--images N] [--epochs E] [--device cpu|cuda]
"""

import argparse
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench.train import wait_for
from fieldmark.devices import has_bf16, set_up_torch
from training.data import Cache, Parts
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.kinds import KINDS, Kinds
from training.data.nodes import Nodes
from training.data.tokens import Cells, Cls, Rollout, Tokens
from training.methods import load_method, method_names, reads_of
from training.token_heads import BesideSettings

SIZES = {"9 x 9 x 352": ((9, 9), 352), "14 x 14 x 768": ((14, 14), 768)}
CLASSES, CONCEPTS, BATCH, HEADS, DIMENSION = 200, 1000, 128, 12, 512
NODES = ("global", "object", *["crop"] * 8)


def synthetic_cache(images: int, grid: tuple[int, int], width: int) -> Cache:
    """Random tokens of two layers that are one in memory; nodes, boxes and a bank."""
    torch.manual_seed(0)
    cells, names = grid[0] * grid[1], [f"{image}" for image in range(images)]
    tokens = torch.cat([torch.randn(min(500, images - start), cells, width).half() for start in range(0, images, 500)])
    cls, y = torch.randn(images, width).half(), torch.arange(images) % CLASSES
    nodes = F.normalize(torch.randn(images, len(NODES), DIMENSION), dim=-1).half()
    corner = torch.rand(images, len(NODES), 2) * 0.6
    kinds = torch.tensor([KINDS.index(kind) for kind in NODES], dtype=torch.int16)
    owners = (torch.arange(CONCEPTS)[:, None] % CLASSES) == torch.arange(CLASSES)
    parts = [
        Tokens.of({word: Cells(tokens, grid) for word in ("tokens", "tokens/rollout")}),
        Cls(dict.fromkeys(("cls", "cls/rollout"), cls)),
        Rollout(torch.rand(images, HEADS, cells).half()),
        Nodes(nodes=nodes, mask=torch.ones(images, len(NODES), dtype=torch.bool)),
        Boxes(torch.cat([corner, corner + 0.4], dim=-1)),
        Kinds(kinds.expand(images, -1).contiguous()),
        Bank(
            path="synthetic",
            K=F.normalize(torch.randn(CONCEPTS, DIMENSION), dim=-1),
            kind=("visual",) * CONCEPTS,
            kept=torch.ones(CONCEPTS, dtype=torch.bool),
            owners=owners,
        ),
    ]
    split = np.array(["train"] * images)
    return Cache([f"{label}" for label in range(CLASSES)], names, names, names, split, y, y, 1, Parts(parts), {})


def bare_epoch(cache: Cache, width: int, device: torch.device) -> float:
    """Seconds of a linear layer on every token, forward and backward, over all images."""
    torch.manual_seed(0)
    linear = nn.Linear(width, CLASSES).to(device)
    started = perf_counter()
    for images in torch.randperm(len(cache.paths)).split(BATCH):
        batch = cache.batch(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            logits = linear(batch.tokens).mean(1)
        F.cross_entropy(logits.float(), batch.target).backward()
    wait_for(device)
    return perf_counter() - started


class Peak:
    """The most memory that was held beyond what was held at first, in MB."""

    def __init__(self) -> None:
        self.first = self.most = held()

    @property
    def megabytes(self) -> float:
        return (self.most - self.first) / 2**20


def held() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@contextmanager
def watched() -> Iterator[Peak]:
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.most = max(peak.most, held())
            sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(
    name: str, images: int, grid: tuple[int, int], width: int, epochs: int, device: str
) -> tuple[float, float]:
    """Seconds of a head's fastest epoch, and the memory in MB that its fits took."""
    set_up_torch()
    module = load_method(name)
    settings = module.Settings.model_validate({"epochs": 1, "weight_decay": [0.01]})
    seen = synthetic_cache(images, grid, width).on(torch.device(device)).only(reads_of(name, settings))
    with watched() as peak:
        seconds = min(module.fit(seen, settings, 0).epoch_seconds for _ in range(epochs))
    return seconds, peak.megabytes


def is_head(name: str) -> bool:
    """Whether a method may stand beside a probe and reads one image at a time (bench.link_epochs has others)."""
    settings = load_method(name).Settings
    return issubclass(settings, BesideSettings) and not any(
        part.startswith("links") for part in reads_of(name, settings())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="training images (default: 3000)")
    parser.add_argument("--epochs", type=int, default=3, help="of which the fastest counts (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    set_up_torch()
    precision = "bf16" if has_bf16(device) else "fp32"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    heads = [name for name in method_names() if is_head(name)]
    for title, (grid, width) in SIZES.items():
        cache = synthetic_cache(arguments.images, grid, width).on(device)
        print(f"{arguments.images} images x {title}, {CLASSES} classes")
        bare = min(bare_epoch(cache, width, device) for _ in range(arguments.epochs + 1))
        print(f"{'bare linear layer on tokens':28s} {bare:7.3f} s an epoch")
        del cache
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            for name in heads:
                row = processes.submit(measure, name, arguments.images, grid, width, arguments.epochs, arguments.device)
                seconds, megabytes = row.result()
                print(f"{name:28s} {seconds:7.3f} s an epoch, {seconds / bare:5.1f} x bare, {megabytes:6,.0f} MB")


if __name__ == "__main__":
    main()
