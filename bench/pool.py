"""Time of pooling tokens to an isqrt; of pool_tokens, its memory as the images grow, and its time beside embed_images.

Pooling: random tokens of 81 cells x 352 numbers, as the last block of an EfficientNet-Lite2 at 260 pixels gives them,
along 128 directions, 5,902 images in batches of 32; processor time of one thread, and of all of them. The bar: 2 ms an
image and core.

The stages: JPEGs of 256 x 192 random blocks in a temporary folder, in one bucket, and a pooled vector and an isqrt of
128 directions; each stage is a process of its own. Memory is the largest resident set, Python, torch and the encoder
included; "one more" is the run after it, with one image more. Both numbers of images fill several row groups, of 1,016
such vectors each, since a writer holds some of them. Seconds are those of the closing line, after loading, and "basis"
is what the pass over its training images takes of the whole process beside. The bar: the most images take at most 5 %
more memory than the fewest.

    python -m bench.pool [--images N N ...] [--model MODEL]
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from bench.embed_memory import draw_images
from fieldmark import store
from fieldmark.moments import Basis, pool

ROOT = Path(__file__).parents[1]
IMAGES, CELLS, WIDTH, DIRECTIONS, BATCH = 5902, 81, 352, 128, 32
BAR_MS, BAR_MEMORY = 2.0, 1.05
PARAMS: dict[str, Any] = {
    "domain": {"noun": "thing", "group": "things"},
    "dataset": {"root": "images", "buckets": 1},
    "llm": {"model": "none"},
    "moments": {"bench": {"pooled": {"kind": "pooled"}, "isqrt": {"kind": "isqrt", "directions": DIRECTIONS}}},
    "embed": {"tokens": True, "grids": [2]},
    "train": {"runs": {"linear_probe": {"method": "linear_probe", "encoder": "bench"}}},
}


class Ran(NamedTuple):
    """What a stage took."""

    memory: float  # MB at most
    whole: float  # seconds, with loading
    seconds: float  # by its closing line; 0 where it had nothing to embed


def pooling_ms(threads: int) -> float:
    """Processor time of one isqrt, in milliseconds, with so many threads."""
    torch.set_num_threads(threads)
    chance = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(WIDTH, DIRECTIONS, generator=chance))
    basis, spent = Basis(torch.zeros(WIDTH), directions), 0.0
    for start in range(0, IMAGES, BATCH):
        tokens = torch.randn(min(BATCH, IMAGES - start), CELLS, WIDTH, generator=chance)
        started = process_time()
        pool("isqrt", tokens, basis)
        spent += process_time() - started
    return 1000 * spent / IMAGES


def run_stage(stage: str, folder: Path, rows: list[dict[str, Any]]) -> Ran:
    """Run a stage with these rows for an index."""
    table = store.make_table("index.images/1", rows)
    store.write_table(table, folder / "data/index/images.parquet", "index.images/1", {}, "bench")
    started = perf_counter()
    with open(folder / "progress", "wb") as progress:
        process = subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}", "--encoder", "bench", "--device", "cpu"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=progress,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    whole, said = perf_counter() - started, (folder / "progress").read_text()
    if status != 0:
        sys.exit(f"{stage} failed: {said[-2000:]}")
    closing = re.search(r"\d+ images in ([\d.]+) s", said)
    return Ran(usage.ru_maxrss / 1024, whole, float(closing[1]) if closing else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2500, 5000], help="images (default: 2500 5000)")
    demo = f"local-dir:{ROOT}/data/demo/encoder"
    parser.add_argument("--model", default=demo, help="as under `encoders` in params.yaml (default: the demo's own)")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{platform.machine()}, {cores} processors, torch {version('torch')}, fp32")
    print(f"{IMAGES} images x {CELLS} x {WIDTH} -> {DIRECTIONS} directions")
    for threads in dict.fromkeys((1, cores)):
        print(f"{threads:3d} threads {pooling_ms(threads):6.2f} ms an image and core (bar: {BAR_MS})", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoders = {"bench": {"model": arguments.model, "batch_size": BATCH}}
        (folder / "params.yaml").write_text(json.dumps(PARAMS | {"encoders": encoders}))
        rows = draw_images(folder, max(arguments.images) + 1)
        head = f"{'images':>8s} {'MB':>6s} {'one more: MB':>13s} {'seconds':>8s} {'embed_images':>13s} {'ratio':>6s}"
        print(f"{head} {'basis':>6s}")
        peaks = []
        for count in arguments.images:
            shutil.rmtree(folder / "data/embed", ignore_errors=True)
            embedded = run_stage("embed_images", folder, rows[:count])
            pooled = run_stage("pool_tokens", folder, rows[:count])
            more = run_stage("pool_tokens", folder, rows[: count + 1])
            loading = more.whole - more.seconds
            line = f"{count:8d} {pooled.memory:6.0f} {more.memory:13.0f} {pooled.seconds:8.1f} {embedded.seconds:13.1f}"
            ratio = pooled.seconds / embedded.seconds
            print(f"{line} {ratio:6.2f} {pooled.whole - pooled.seconds - loading:6.1f}", flush=True)
            peaks.append((pooled.memory, more.memory))
    grown = max(last / first for first, last in zip(peaks[0], peaks[-1], strict=True))
    print(f"{arguments.images[-1]} images take {grown:.3f} x the memory of {arguments.images[0]} (bar: {BAR_MEMORY})")


if __name__ == "__main__":
    main()
