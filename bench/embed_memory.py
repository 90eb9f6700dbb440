"""Peak memory of embed_images as the images grow: of a process for 1,000 of them, and of one for 5,000.

The pictures are JPEGs of 256 x 192 random blocks in a temporary folder, the encoder is the demo's own with all its
tokens; all images lie in one bucket, since a bucket is what a run could be tempted to hold. "One more" is the run after
it, which reads the bucket and writes it again with one image more. Memory is the largest resident set, Python, torch
and the encoder included. The bar: 5,000 images take at most 5 % more than 1,000.

    python -m bench.embed_memory [--images N N ...]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from fieldmark import store

ROOT = Path(__file__).parents[1]
PARAMS = {
    "domain": {"noun": "thing", "group": "things"},
    "dataset": {"root": "images", "buckets": 1},
    "llm": {"model": "none"},
    "encoders": {"demo": {"model": f"local-dir:{ROOT}/data/demo/encoder"}},
    "embed": {"tokens": True, "grids": [2]},
    "train": {"runs": {"linear_probe": {"method": "linear_probe", "encoder": "demo"}}},
}
BAR = 1.05


def draw_images(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures in folder/images, and their rows of the index."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        path = folder / f"images/{number}.jpg"
        blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((256, 192)).save(path)
        image_id = store.sha256(path.read_bytes())
        rows.append({"path": path.name, "image_id": image_id, "class_id": "a", "split": "train", "status": "ok"})
    return rows


def embed(folder: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Peak memory in MB and seconds of embed_images in a process of its own, with these rows for an index."""
    table = store.make_table("index.images/1", rows)
    store.write_table(table, folder / "data/index/images.parquet", "index.images/1", {}, "bench")
    started = perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.embed_images", "--encoder", "demo", "--device", "cpu"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit("embed_images failed")
    return usage.ru_maxrss / 1024, perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000], help="images (default: 1000 5000)")
    counts = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "params.yaml").write_text(json.dumps(PARAMS))
        rows = draw_images(folder, max(counts) + 1)
        print(f"{platform.machine()}, {os.cpu_count()} processors, torch {version('torch')}, fp32, batch 32, 1 bucket")
        print(f"{'images':>8s} {'MB':>8s} {'seconds':>8s} {'one more: MB':>14s}")
        peaks = []
        for count in counts:
            store.bucket_path(folder / "data/embed/demo/images", 0).unlink(missing_ok=True)
            peak, seconds = embed(folder, rows[:count])
            more, _ = embed(folder, rows[: count + 1])
            peaks.append((peak, more))
            print(f"{count:8d} {peak:8.0f} {seconds:8.1f} {more:14.0f}", flush=True)
    ratio = max(last / first for first, last in zip(peaks[0], peaks[-1], strict=True))
    print(f"{counts[-1]} images take {ratio:.3f} x the memory of {counts[0]} (bar: {BAR})")


if __name__ == "__main__":
    main()
