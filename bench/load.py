"""Reading a run's inputs the first time and later, against reading their bytes and against .npy files of the same.

By default it writes random vectors as the stages write theirs: nodes of 5,994 images x 33 nodes x 512, and a moment of
3,000 images x 8,256. With --data it reads what the stages wrote for an encoder: the parts of linear_probe, which are
the global vectors alone, and all parts that are there.

"bytes" reads the Parquet files and looks at nothing; "npy" reads the same tensors from .npy files (numpy.load); "first"
is training.data.read_cache without any array in .cache/arrays, which makes them; "later" is the same with them there.
What is mapped is not read yet: to "later", and to "first", belongs a copy of every byte to memory. Each is the best of
--repeats, in turns, so that files come from the system's cache of the disk. Bar: later >= 0.5 of npy. "epoch" is one
pass over all images in random batches of 128, from arrays and from tensors in memory. With --study, the epochs are
those of its runs' timing.json, the median of a method's runs on all training images: one thread, other processes
beside it.

    python -m bench.load [--data DIR --encoder NAME --buckets N] [--study NAME]
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from fieldmark.store import bucket_path, make_table, sha256, split_buckets, vector_column, write_table
from training.data import INDEX, Cache, Parts, files_of, read_cache
from training.data.arrays import arrays_folder
from training.methods import load_method, reads_of

NODES, MOMENTS = (5994, 33, 512), (3000, 8256)
BUCKETS = 16
PARTS = ("nodes", "boxes", "pooled", "labels", "edges", "names", "concepts", "owners", "descriptions", "tokens")


def write_index(data: Path, count: int) -> list[str]:
    """An index of so many images of 200 classes; their image_ids."""
    ids = sorted(sha256(str(number)) for number in range(count))
    splits = ("train", "train", "val", "test")
    images = [
        {"path": f"{number:06d}.jpg", "image_id": image_id, "class_id": f"c{number % 200:03d}", "status": "ok"}
        | {"split": splits[number // 200 % 4]}
        for number, image_id in enumerate(ids)
    ]
    classes = [{"class_id": f"c{number:03d}", "name": f"class {number}", "from_images": True} for number in range(200)]
    for name, schema, rows in (("images", "index.images/1", images), ("classes", "index.classes/2", classes)):
        write_table(make_table(schema, rows), data / f"index/{name}.parquet", schema, {}, "index")
    return ids


def write_vectors(data: Path, schema: str, folder: str, ids: list[str], nodes: int, dimension: int) -> None:
    """Random unit vectors, `nodes` an image, as embed.nodes/1 or embed.moments/1."""
    rng = np.random.default_rng(0)
    for bucket, members in enumerate(split_buckets(ids, BUCKETS)):
        count = len(members) * nodes
        vectors = rng.standard_normal((count, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        zeros = np.zeros(count, dtype=np.float32)
        columns = {
            "image_id": np.repeat(members, nodes), "view": zeros.astype(np.int16),
            "node": np.tile(np.arange(nodes, dtype=np.int16), len(members)),
            "kind": np.tile(["global"] + ["grid"] * (nodes - 1), len(members)),
            **dict.fromkeys(("x0", "y0"), zeros), **dict.fromkeys(("x1", "y1", "norm"), zeros + 1),
            "flip": zeros > 0, "layer": zeros.astype(np.int16), "vector": vector_column(vectors),
        }  # fmt: skip
        write_table(pa.table(columns), bucket_path(data / folder, bucket), schema, {"encoder": "random"}, folder)


def files_read(data: Path, encoder: str, buckets: int, reads: frozenset[str]) -> list[Path]:
    """The Parquet files that these parts are read from."""
    paths = [data / path for path in INDEX | files_of(encoder, reads)]
    folders = [path for path in paths if path.suffix != ".parquet"]
    members = [bucket_path(folder, bucket) for folder in folders for bucket in range(buckets)]
    return [*(path for path in paths if path.suffix == ".parquet"), *members]


def best_seconds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Of each work the best of so many turns."""
    found: dict[str, float] = {}
    for _ in range(repeats):
        for name, work in works.items():
            started = perf_counter()
            work()
            found[name] = min(perf_counter() - started, found.get(name, np.inf))
    return found


def tensors_of(cache: Cache) -> Iterator[np.ndarray]:
    return (value.numpy() for part in cache.parts.by_kind.values() for value in part.tensors().values())


def read(read_it: Callable[[], Cache], anew: bool) -> None:
    """read_cache, and every byte of its tensors copied to memory; `anew` without arrays."""
    if anew:
        shutil.rmtree(arrays_folder(), ignore_errors=True)
    for value in tensors_of(read_it()):
        np.array(value)


def pass_over(cache: Cache) -> None:
    """One epoch's batches."""
    order = torch.randperm(len(cache.paths), generator=torch.Generator().manual_seed(0))
    for images in order.split(128):
        cache.batch(images)


def in_memory(cache: Cache) -> Cache:
    parts = cache.parts.by_kind.values()
    copied = [part.changed({name: value.clone() for name, value in part.tensors().items()}) for part in parts]
    return replace(cache, parts=Parts(copied))


def measure(title: str, data: Path, encoder: str, buckets: int, reads: frozenset[str], repeats: int) -> float:
    """Print how long these parts take; what a later reading is of one of .npy files."""
    files = files_read(data, encoder, buckets, reads)
    read_it = partial(read_cache, data, encoder, buckets, reads)
    with tempfile.TemporaryDirectory() as folder:
        saved = []
        for number, tensor in enumerate(tensors_of(read_it())):
            saved.append(Path(folder) / f"{number}.npy")
            np.save(saved[-1], tensor)
        size, tensors = (sum(file.stat().st_size for file in each) / 1e6 for each in (files, saved))
        print(f"{title}: {len(files)} files of {size:.1f} MB, {tensors:.1f} MB as tensors")
        mapped, held = read_it(), in_memory(read_it())
        seconds = best_seconds(
            {
                "bytes": lambda: [file.read_bytes() for file in files],
                "npy": lambda: [np.load(file) for file in saved],
                "first": partial(read, read_it, True),
                "later": partial(read, read_it, False),
                "epoch, arrays": partial(pass_over, mapped),
                "epoch, memory": partial(pass_over, held),
            },
            repeats,
        )
    for name, value in seconds.items():
        print(f"    {name:14s} {value:7.3f} s  {(size if name == 'bytes' else tensors) / value:7.1f} MB/s")
    ratio = seconds["npy"] / seconds["later"]
    print(f"    later is {ratio:.2f} of npy (bar: 0.5)")
    return ratio


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
    parser.add_argument("--data", type=Path, help="where the stages wrote (default: random vectors)")
    parser.add_argument("--encoder", default="reef", help="(default: reef)")
    parser.add_argument("--buckets", type=int, default=BUCKETS, help=f"as dataset.buckets (default: {BUCKETS})")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--study", metavar="NAME", help="tell its methods' epochs too")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        # Arrays of this run alone, so that the first reading is one.
        os.environ["FIELDMARK_CACHE"] = folder
        if arguments.data is None:
            data = Path(folder) / "nodes"
            write_vectors(data, "embed.nodes/1", "embed/random/images", write_index(data, NODES[0]), *NODES[1:])
            measure(f"nodes {NODES}", data, "random", BUCKETS, frozenset({"nodes"}), arguments.repeats)
            data = Path(folder) / "moments"
            ids = write_index(data, MOMENTS[0])
            write_vectors(data, "embed.moments/1", "embed/random/moments/isqrt", ids, 1, MOMENTS[1])
            measure(f"moments {MOMENTS}", data, "random", BUCKETS, frozenset({"moments/isqrt"}), arguments.repeats)
        else:
            data, encoder, buckets = arguments.data, arguments.encoder, arguments.buckets
            there = [part for part in PARTS if all((data / file).exists() for file in files_of(encoder, {part}))]
            probe = reads_of("linear_probe", load_method("linear_probe").Settings())
            measure("linear_probe", data, encoder, buckets, probe, arguments.repeats)
            measure(", ".join(there), data, encoder, buckets, frozenset(there), arguments.repeats)
    if arguments.study:
        print("seconds an epoch")
        studies = (arguments.data or Path("data")) / "studies"
        for method, seconds in sorted(epoch_seconds(studies / arguments.study).items()):
            print(f"    {method:20s} {seconds:7.3f}")


if __name__ == "__main__":
    main()
