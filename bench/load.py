"""Reading the trainer's cache against reading its files, and what an epoch of each method of a study took.

Reads what the stages wrote for one encoder: by default the demo's; cub100's with `--data`, wherever its pipeline ran.
It is read twice: the parts of linear_probe, which are the global vectors alone, and all parts. "bytes" reads the files
and looks at nothing, "parquet" decodes every column of them by pyarrow alone, checksums verified as the trainer does;
"cache" is training.data.read_cache: decoding what the parts need, joining with the index, tensors. Each is the best of
--repeats, so that files come from the system's cache of the disk. With --study, the epochs are those of its runs'
timing.json, the median of a method's runs on all training images: one thread, other processes beside it.

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

from fieldmark.store import bucket_path
from training.data import INDEX, Cache, files_of, part_kinds, read_cache
from training.data.nodes import Nodes
from training.methods import load_method, reads_of

PARTS = {
    "linear_probe": reads_of("linear_probe", load_method("linear_probe").Settings()),
    "all parts": frozenset(part_kinds()) - {"globals"},  # the nodes hold them too
}


def files_read(data: Path, encoder: str, buckets: int, reads: frozenset[str]) -> list[Path]:
    """The Parquet files that these parts are read from."""
    paths = [data / path for path in INDEX | files_of(encoder, reads)]
    folders = [path for path in paths if path.suffix != ".parquet"]
    members = [bucket_path(folder, bucket) for folder in folders for bucket in range(buckets)]
    return [*(path for path in paths if path.suffix == ".parquet"), *members]


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        found.append(perf_counter() - started)
    return min(found)


def tensor_bytes(cache: Cache) -> int:
    return sum(value.nbytes for part in cache.parts.by_kind.values() for value in part.tensors().values())


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
    data, encoder, buckets = arguments.data, arguments.encoder, arguments.buckets
    images, nodes, dimension = read_cache(data, encoder, buckets, {"nodes"}).part(Nodes).nodes.shape
    print(f"{platform.machine()}, {encoder}: {images} images and views x {nodes} nodes x {dimension}")
    loading = {}
    for title, reads in PARTS.items():
        files = files_read(data, encoder, buckets, reads)
        size = sum(file.stat().st_size for file in files) / 1e6
        tensors = tensor_bytes(read_cache(data, encoder, buckets, reads)) / 1e6
        print(f"{title}: {len(files)} files of {size:.1f} MB, {tensors:.1f} MB as tensors")
        works: dict[str, Callable[[], object]] = {
            "bytes": lambda files=files: [file.read_bytes() for file in files],
            "parquet": lambda files=files: [pq.read_table(file, page_checksum_verification=True) for file in files],
            "cache": lambda reads=reads: read_cache(data, encoder, buckets, reads),
        }
        measured = {name: best_seconds(work, arguments.repeats) for name, work in works.items()}
        for name, seconds in measured.items():
            print(f"    {name:8s} {seconds:7.3f} s  {size / seconds:7.1f} MB/s")
        loading[title] = measured["cache"]
    probe, everything = loading.values()
    print(f"a probe's parts load in {probe / everything:.2f} of the time that all parts take")
    if arguments.study:
        print("seconds an epoch")
        for method, seconds in sorted(epoch_seconds(data / "studies" / arguments.study).items()):
            print(f"    {method:20s} {seconds:7.3f}")


if __name__ == "__main__":
    main()
