"""Reading the trainer's cache against reading its files, and what an epoch of each method of a study took.

Reads what the stages wrote for one encoder: by default the demo's; cub100's with `--data`, wherever its pipeline ran.
"bytes" reads the files and looks at nothing, "parquet" decodes every column of them by pyarrow alone, checksums
verified as the trainer does; "cache" is training.data.read_cache: decoding, joining with the index, tensors. Each is
the best of --repeats, so that files come from the system's cache of the disk. With --study, the epochs are those of
its runs' timing.json, the median of a method's runs on all training images: one thread, other processes beside it.

    python -m bench.load [--data DIR] [--encoder NAME] [--buckets N] [--study NAME]
"""

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import pyarrow.parquet as pq

from training.data import Cache, read_cache


def cache_files(data: Path, encoder: str) -> list[Path]:
    """The Parquet files that read_cache reads all of."""
    folders = [data / f"{name}/{encoder}" for name in ("graphs", "labels")] + [data / f"embed/{encoder}/images"]
    return [data / "index/images.parquet", *(file for folder in folders for file in sorted(folder.glob("*.parquet")))]


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        found.append(perf_counter() - started)
    return min(found)


def tensor_bytes(cache: Cache) -> int:
    tensors = [value for value in vars(cache).values() if hasattr(value, "element_size")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def epoch_seconds(study: Path) -> dict[str, float]:
    """By method, the median over its runs without control on all training images, where a method has epochs."""
    found = defaultdict(list)
    for file in sorted(study.glob("*/timing.json")):
        _, method, control, regime, _ = file.parent.name.split(".")
        timing = json.loads(file.read_text(encoding="utf-8"))
        if (control, regime) == ("none", "full") and timing["epoch_seconds"]:
            found[method].append(timing["epoch_seconds"])
    return {method: median(seconds) for method, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the stages wrote (default: data)")
    parser.add_argument("--encoder", default="reef", help="(default: reef)")
    parser.add_argument("--buckets", type=int, default=16, help="as dataset.buckets (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--study", metavar="NAME", help="tell its methods' epochs too")
    arguments = parser.parse_args()
    files = cache_files(arguments.data, arguments.encoder)
    cache = read_cache(arguments.data, arguments.encoder, arguments.buckets)
    images, nodes, dimension = cache.vectors.shape
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{platform.machine()}, {arguments.encoder}: {images} images and views x {nodes} nodes x {dimension}")
    print(f"{len(files)} files of {size:.1f} MB, {tensor_bytes(cache) / 1e6:.1f} MB as tensors")
    for name, work in (
        ("bytes", lambda: [file.read_bytes() for file in files]),
        ("parquet", lambda: [pq.read_table(file, page_checksum_verification=True) for file in files]),
        ("cache", lambda: read_cache(arguments.data, arguments.encoder, arguments.buckets)),
    ):
        seconds = best_seconds(work, arguments.repeats)
        print(f"{name:8s} {seconds:7.3f} s  {size / seconds:7.1f} MB/s")
    if arguments.study:
        print("seconds an epoch")
        for method, seconds in sorted(epoch_seconds(arguments.data / "studies" / arguments.study).items()):
            print(f"    {method:20s} {seconds:7.3f}")


if __name__ == "__main__":
    main()
