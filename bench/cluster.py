"""What a cluster on one machine adds to embed_images: Ray with loaded workers against one process, same threads.

Pictures are drawn, 64 x 64 px, all different; the encoder is reef's own (data/demo/encoder). "plain" is the stage in
one process with all processors; "ray" is the same stage with one worker of all processors, and with a worker a
processor. By turns, --repeats times. All are timed from where each worker has finished a bucket to the last bucket, so
that loading does not count: images a second, and milliseconds of a processor an image, of the command and all that it
started (Ray's own processes too), which say something on a busy machine too. The bytes of all are compared.

The bar: ray takes at most 1.10 times what plain takes, by the median of the ratios of each turn.

    python -m bench.cluster [--images 20000] [--buckets 16] [--repeats 1]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from fieldmark import store

ROOT = Path(__file__).parents[1]
FOLDER = Path("data/embed/reef/images")
BAR = 1.10
LOOK_S = 0.05


class Measured(NamedTuple):
    rate: float  # images a second
    cpu: float  # milliseconds of a processor an image


def write_project(folder: Path, images: int, buckets: int) -> None:
    """Pictures, an index of them, and params.yaml."""
    rows = []
    for number in range(images):
        path = folder / f"images/train/a/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.BICUBIC).save(path, compress_level=1)
        rows.append({
            "path": f"train/a/{number}.png", "image_id": store.sha256(path.read_bytes()), "class_id": "a",
            "split": "train", "width": 64, "height": 64, "status": "ok",
        })  # fmt: skip
    table = store.make_table("index.images/1", rows)
    store.write_table(table, folder / "data/index/images.parquet", "index.images/1", {}, "drawn")
    params = {
        "domain": {"noun": "fish", "group": "reef fish"},
        "dataset": {"root": "images", "buckets": buckets},
        "llm": {"model": "none"},
        "encoders": {"reef": {"model": f"local-dir:{ROOT / 'data/demo/encoder'}", "batch_size": 32}},
        "embed": {"grids": [2]},
        "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "reef"}}},
        "report": {"reference": "zero_shot"},
    }
    (folder / "params.yaml").write_text(json.dumps(params))


def cpu_seconds(command: psutil.Process, known: dict[int, float]) -> float:
    """What a command and all that it started have taken; `known` keeps what those that ended had taken."""
    with suppress(psutil.Error):
        for process in [command, *command.children(recursive=True)]:
            with suppress(psutil.Error):
                spent = process.cpu_times()
                known[process.pid] = spent.user + spent.system
    return sum(known.values())


def measure(folder: Path, buckets: int, images: int, workers: int, options: list[str]) -> Measured:
    """Run the stage on nothing, and time it from as many finished buckets as there are workers to the last one."""
    for path in (folder / FOLDER).glob("*"):
        path.unlink()
    command = [sys.executable, "-m", "stages.embed_images", "--encoder", "reef", "--device", "cpu", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "FIELDMARK_ENGINE": "plain"}
    with open(folder / "log", "w") as log:
        running = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
        process = psutil.Process(running.pid)
        known: dict[int, float] = {}
        first: tuple[float, float, int] | None = None
        while running.poll() is None:
            count, now, spent = len(list((folder / FOLDER).glob("b*"))), time.perf_counter(), 0.0
            if count >= workers and first is None:
                first = now, cpu_seconds(process, known), count
            if first is not None:
                spent = cpu_seconds(process, known)
            if count == buckets:
                break
            time.sleep(LOOK_S)
        if running.wait() or first is None:
            sys.exit((folder / "log").read_text())
    done = images * (buckets - first[2]) / buckets
    return Measured(done / (now - first[0]), 1000 * (spent - first[1]) / done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000, help="(default: 20000)")
    parser.add_argument("--buckets", type=int, default=16, help="(default: 16)")
    parser.add_argument("--repeats", type=int, default=1, help="(default: 1)")
    arguments = parser.parse_args()
    cpus = os.cpu_count() or 1
    ways: dict[str, tuple[int, list[str]]] = {"plain": (1, [])}
    for workers in sorted({1, cpus}):
        ways[f"ray {workers} x {cpus // workers}"] = workers, ["--engine", "ray", "--cpus", str(cpus // workers)]
    print(f"{platform.processor() or platform.machine()}, {cpus} processors, load {os.getloadavg()[0]:.1f};", end=" ")
    print(f"{arguments.images} drawn images of 64 px in {arguments.buckets} buckets, encoder reef, batch 32")
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder, arguments.images, arguments.buckets)
        made: dict[str, bytes] = {}
        for _ in range(arguments.repeats):
            for way, (workers, options) in ways.items():
                found[way].append(measure(folder, arguments.buckets, arguments.images, workers, options))
                files = {path.name: path.read_bytes() for path in (folder / FOLDER).glob("b*")}
                made = made or files
                print(f"{way}: {found[way][-1].rate:.1f} images/s; bytes {'equal' if files == made else 'DIFFER'}")
    print(f"{'':12s} {'images/s':>9s} {'ms/image':>9s} {'time':>6s} {'cpu':>6s}")
    for way, each in found.items():
        pairs = list(zip(each, found["plain"], strict=True))
        times = median(base.rate / one.rate for one, base in pairs)
        spent = median(one.cpu / base.cpu for one, base in pairs)
        rate, cpu = (median(values) for values in zip(*each, strict=True))
        bar = "" if way == "plain" else f"  {'ok' if times <= BAR else 'over'} (bar {BAR})"
        print(f"{way:12s} {rate:9.1f} {cpu:9.2f} {times:6.2f} {spent:6.2f}{bar}")


if __name__ == "__main__":
    main()
