"""Time and memory of the exact k nearest as images grow: 10 of 50,000, 100,000 and 200,000 x 512.

The vectors are random, float16 as they are stored, and searched by fieldmark/nearest.py. "Bare" is what exact search
cannot do without: the matrix products of all vectors with all others in float32, in the same blocks, their results
thrown away; every EVERY-th block of rows is timed and counts EVERY times. On a CPU both are held against each other in
seconds of all its threads, so that a busy machine has no say in it. "One more" is what one image more costs when
the links of the others are there: its products with all, theirs with it, and ranking. Each size has a process of its
own; memory is its largest resident set, less what Python and torch take before there is a vector. Growth is against the
size before: products grow with the square.

No bar is set: approximate search is faster, and links are made once. Nothing else that searches is a dependency of this
project, so nothing else is compared.

    python -m bench.links [--images N N ...] [--neighbours K] [--device cpu|cuda]
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import torch

from fieldmark import nearest as search
from fieldmark import store
from fieldmark.links import table_of, update
from fieldmark.nearest import unit_rows

DIMENSION, EVERY = 512, 8
MB = 1024  # ru_maxrss is in kB


def resident() -> float:
    """MB of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB


def bare_seconds(keys: torch.Tensor, clock: Callable[[], float]) -> float:
    """All products of rows with rows, in the blocks of the search."""
    blocks, nobody = range(0, len(keys), search.ROWS)[::EVERY], np.empty(0, np.int64)
    started = clock()
    for start in blocks:
        for _ in search.cosines(keys[start : start + search.ROWS], keys, nobody):
            pass
    if keys.is_cuda:
        torch.cuda.synchronize()
    rows = sum(min(search.ROWS, len(keys) - start) for start in blocks)
    return (clock() - started) * len(keys) / rows


def measure(images: int, k: int, device: torch.device) -> dict[str, float]:
    """What one size takes, in this process."""
    torch.zeros(1, device=device)
    before = resident()
    rng = np.random.default_rng(0)
    drawn = np.empty((images + 1, DIMENSION), np.float16)
    for start in range(0, images + 1, search.ROWS):
        part = drawn[start : start + search.ROWS]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    ids = sorted(store.sha256(str(number)) for number in range(images + 1))
    vectors = unit_rows([drawn])
    clock = perf_counter if device.type == "cuda" else process_time
    started, ours = perf_counter(), clock()
    pairs = update(None, vectors[:images], ids[:images], k, device)
    seconds, ours, peak = perf_counter() - started, clock() - ours, resident() - before
    old = table_of(pairs, ids[:images], "knn")
    started = perf_counter()
    update(old, vectors, ids, k, device)
    one_more = perf_counter() - started
    bare = bare_seconds(torch.from_numpy(vectors[:images]).to(device), clock)
    memory = {"MB": peak, "vectors MB": vectors.nbytes / MB**2}
    return {"wall": seconds, "seconds": ours, "bare": bare, "one more": one_more, **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [50_000, 100_000, 200_000]
    parser.add_argument("--images", type=int, nargs="+", default=sizes, metavar="N", help=f"(default: {sizes})")
    parser.add_argument("--neighbours", type=int, default=10, metavar="K", help="(default: 10)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    k, device = arguments.neighbours, torch.device(arguments.device)
    if arguments.measure:
        print(json.dumps(measure(arguments.images[0], k, device)))
        return
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    print(f"{where}, {threads} threads, torch {torch.__version__}, fp32; {k} nearest of N x {DIMENSION}")
    head = ["N", "wall s", "CPU s", "bare CPU s", "x bare", "growth", "one more s", "peak MB", "vectors MB"]
    head = [name.replace("CPU", "GPU") for name in head] if device.type == "cuda" else head
    print(" ".join(f"{name:>10s}" for name in head))
    former = None
    for images in arguments.images:
        command = ["-m", "bench.links", "--measure", "--images", str(images), "--neighbours", str(k)]
        command += ["--device", device.type]
        found = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
        took = json.loads(found.stdout)
        growth = f"x {took['seconds'] / former['seconds']:.1f}" if former else ""
        cells = tuple(f"{took[name]:.1f}" for name in ("wall", "seconds", "bare"))
        times = f"{took['seconds'] / took['bare']:.2f}"
        rest = (times, growth, f"{took['one more']:.2f}", f"{took['MB']:.0f}", f"{took['vectors MB']:.0f}")
        print(" ".join(f"{cell:>10s}" for cell in (f"{images:,}", *cells, *rest)), flush=True)
        former = took


if __name__ == "__main__":
    main()
