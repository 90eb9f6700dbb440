"""Seconds, memory and bytes of training, judging and reporting as images grow: what is not linear shows here.

The cache is written straight, without a picture: an index (groups of four images), vectors of N images (a global one of
D dimensions around a prototype of their class), graphs, and what the report asks for beside them; buckets of about a
thousand images. Eight of ten images train, one is val, one is test. Then each command runs as a process of its own, as
`dvc repro` runs it:

    plan     training.plan_runs: the sha256 of all that runs read
    read     training.data.read_cache of the probes' parts, the first time, when arrays are made
    ridge, lda, linear_probe    training.train; settings of one size, so that growth is of images alone (below)
    concept_graph               training.train: one epoch, two nodes beside the global one, no texts
    choose   reading val's half of predictions, as tools.export does (evaluation.calibration.read_half)
    report   evaluation.report of these runs

"peak" is the most memory that the process held (VmHWM: Linux), pages of mapped files among them, which the system takes
back when it wants them; "own" is the most without these, looked at every 20 ms. "growth" is the slope of log seconds of
CPU and of log own memory over log images, by least squares: 1 is linear. Logistic regression is given one strength and
20 steps, and ridge and lda three strengths each.

    python -m bench.scale_training [--sizes 30000 100000 300000] [--classes C] [--dimension D] [--folder DIR]
        [--only NAME ...]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from ruamel.yaml import YAML

from evaluation.health import HEALTH
from fieldmark.store import bucket_path, make_table, sha256, split_buckets, vector_column, write_table

ENCODER, MARK = "bench", "bench"
IMAGES_A_BUCKET, NODES, NOISE = 1000, 3, 1.5
SPLITS = ("train",) * 8 + ("val", "test")
RUNS: dict[str, dict[str, Any]] = {
    "ridge": {"penalty": [10.0, 1.0, 0.1]},
    "lda": {"shrinkage": [0.1, 0.5, 0.9]},
    "linear_probe": {"l2": [0.01], "max_iterations": 20},
    "concept_graph": {"start_l2": 0.01, "texts": 0, "epochs": 1, "weight_decay": [0.01], "hidden": 64},
}
PRELUDE = "import sys; from pathlib import Path; data, buckets = Path(sys.argv[1]), int(sys.argv[2]);"
READ = f"from training.data import read_cache; read_cache(data, {ENCODER!r}, buckets, frozenset({{'globals'}}))"
CHOOSE = "from evaluation.calibration import read_half; read_half(data, 'ridge')"


class Measured(NamedTuple):
    seconds: float
    cpu: float  # seconds of all threads
    peak: float  # MB
    own: float  # MB


def write_index(data: Path, count: int, classes: int) -> dict[str, int]:
    """The index of so many images; the class of each, by image_id, in the order of the paths."""
    ids = [sha256(str(number)) for number in range(count)]
    numbers = np.arange(count)
    table = pa.table({
        "path": [f"{number:08d}.jpg" for number in range(count)],
        "image_id": ids,
        "class_id": [f"c{number % classes:05d}" for number in range(count)],
        "split": np.array(SPLITS)[numbers // classes % len(SPLITS)],
        # Four pictures of a class and split are one, as frames of a track are: so halves, intervals and votes go by it.
        "group": [
            f"{n % classes}-{n // classes % len(SPLITS)}-{n // classes // len(SPLITS) // 4}" for n in range(count)
        ],
        "status": pa.array(["ok"] * count), "width": pa.array(200 + numbers % 100, pa.int32()),
        "height": pa.array(np.full(count, 200), pa.int32()),
    })  # fmt: skip
    empty = make_table("index.images/1", [])
    absent = [name for name in empty.schema.names if name not in table.schema.names]
    for name in absent:
        table = table.append_column(name, pa.nulls(count, empty.schema.field(name).type))
    write_table(table, data / "index/images.parquet", "index.images/1", {}, MARK)
    named = [
        {"class_id": f"c{number:05d}", "name": f"class {number}", "from_images": True} for number in range(classes)
    ]
    write_table(make_table("index.classes/2", named), data / "index/classes.parquet", "index.classes/2", {}, MARK)
    health: dict[str, Any] = {f"images.{split}": int((table["split"].to_numpy() == split).sum()) for split in SPLITS}
    for finding in (finding for findings in HEALTH.values() for finding in findings):
        ends = (".min", ".median", ".max") if finding.spread else ("",)
        health |= {f"{finding.key}{end}": 0 for end in ends}
    nested: dict[str, Any] = {}
    for key, value in health.items():
        *folders, last = key.split(".")
        place = nested
        for name in folders:
            place = place.setdefault(name, {})
        place[last] = value
    (data / "index/metrics.json").write_text(json.dumps(nested))
    for path, schema in [
        ("index/near_duplicates.parquet", "index.near_duplicates/1"), ("concepts/answers.parquet", "llm.answers/1"),
        ("descriptions/answers.parquet", "llm.answers/1"), ("descriptions/descriptions.parquet", "descriptions/1"),
        ("descriptions/cells.parquet", "descriptions.cells/1"),
    ]:  # fmt: skip
        write_table(make_table(schema, []), data / path, schema, {}, MARK)
    return dict(zip(ids, (numbers % classes).tolist(), strict=True))


def write_vectors(data: Path, label: dict[str, int], buckets: int, classes: int, dimension: int) -> None:
    """Nodes, graphs and thumbnails of these images."""
    rng = np.random.default_rng(0)
    prototypes = rng.standard_normal((classes, dimension), dtype=np.float32)
    edge = {"src": [0, 0], "dst": [1, 2], "spatial": [np.float16(1)] * 2, "semantic": [np.float16(0.5)] * 2}
    for bucket, members in enumerate(split_buckets(list(label), buckets)):
        count = len(members) * NODES
        vectors = rng.standard_normal((len(members), NODES, dimension), dtype=np.float32) * NOISE
        vectors[:, 0] += prototypes[[label[image_id] for image_id in members]]
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        zeros = np.zeros(count, dtype=np.float32)
        nodes = pa.table({
            "image_id": np.repeat(members, NODES), "view": zeros.astype(np.int16),
            "node": np.tile(np.arange(NODES, dtype=np.int16), len(members)),
            "kind": np.tile(["global"] + ["grid"] * (NODES - 1), len(members)),
            **dict.fromkeys(("x0", "y0"), zeros), **dict.fromkeys(("x1", "y1", "norm"), zeros + 1),
            "flip": zeros > 0, "vector": vector_column(vectors.reshape(count, dimension)),
        })  # fmt: skip
        path = bucket_path(data / f"embed/{ENCODER}/images", bucket)
        write_table(nodes, path, "embed.nodes/1", {"encoder": MARK}, MARK)
        graphs = make_table("graphs/1", [{"image_id": image_id, "view": 0, **edge} for image_id in members])
        write_table(graphs, bucket_path(data / f"graphs/{ENCODER}", bucket), "graphs/1", {"embed": MARK}, MARK)
        thumbs = make_table("thumbs/1", [{"image_id": image_id, "webp": b"webp"} for image_id in members])
        write_table(thumbs, bucket_path(data / "thumbs", bucket), "thumbs/1", {}, MARK)


def write_params(path: Path, buckets: int) -> None:
    """params.yaml of this repository with these runs on a tower, which has no texts."""
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["dataset"]["buckets"] = buckets
    params["towers"] = {ENCODER: {"model": "none"}}
    runs = {name: {"method": name, "encoder": ENCODER, "settings": settings} for name, settings in RUNS.items()}
    params["train"] |= {"runs": runs, "seeds": 1, "device": "cpu"}
    params["report"] = {"reference": "linear_probe", "run": "ridge"}
    YAML(typ="safe").dump(params, path)


def measure(command: Sequence[str], cache: Path) -> Measured:
    """Run a command to its end. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"FIELDMARK_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    peak, own = 0, 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        held = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith("kB")}
        peak, own = max(peak, held.get("VmHWM", 0)), max(own, held.get("RssAnon", 0) + held.get("RssShmem", 0))
        time.sleep(0.02)
    seconds, (_, code, used) = time.perf_counter() - started, ended
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(seconds, used.ru_utime + used.ru_stime, peak / 1024, own / 1024)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(sizes) > 1 else float("nan")


def of_size(folder: Path, count: int, classes: int, dimension: int, only: Sequence[str]) -> dict[str, Measured]:
    """Write a cache of so many images, and run every command on it; prints a line for each."""
    data, cache, params = folder / "data", folder / "cache", folder / "params.yaml"
    buckets = max(1, round(count / IMAGES_A_BUCKET))
    started = time.perf_counter()
    write_vectors(data, write_index(data, count, classes), buckets, classes, dimension)
    write_params(params, buckets)
    wrote = time.perf_counter() - started
    print(f"{count:,} images, {buckets} buckets, {bytes_of(data) / 1e6:,.0f} MB of Parquet written in {wrote:.0f} s")
    options, parts = ["--params", str(params), "--data", str(data)], [str(data), str(buckets)]
    commands = {
        "plan": ["-m", "training.plan_runs", *options],
        "read": ["-c", PRELUDE + READ, *parts],
        **{name: ["-m", "training.train", *options, "--run", name] for name in RUNS},
        "choose": ["-c", PRELUDE + CHOOSE, *parts],
        "report": ["-m", "evaluation.report", *options],
    }
    found = {}
    for name, command in commands.items():
        if only and name not in only:
            continue
        found[name] = measure([sys.executable, *command], cache)
        written = {"report": data / "report"}.get(name, data / "runs" / name)
        made = f"{bytes_of(written) / 1e6:9,.1f} MB written" if written.is_dir() else ""
        seconds, cpu, peak, own = found[name]
        print(f"  {name:14s} {seconds:8.1f} s  cpu {cpu:8.1f} s  peak {peak:7,.0f} MB", end=" ")
        print(f" own {own:7,.0f} MB {made}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[30_000, 100_000, 300_000], metavar="N")
    parser.add_argument("--classes", type=int, default=100, metavar="C", help="(default: 100)")
    parser.add_argument("--dimension", type=int, default=512, metavar="D", help="(default: 512)")
    parser.add_argument("--folder", default=None, metavar="DIR", help="where the caches are written, one at a time")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the commands above")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__},", end=" ")
    print(f"{arguments.classes} classes, {arguments.dimension} dimensions")
    found = []
    for count in arguments.sizes:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            found.append(of_size(folder, count, arguments.classes, arguments.dimension, arguments.only))
        finally:
            shutil.rmtree(folder)
    print("growth (1: linear)")
    for name in found[0]:
        cpu, own = ([getattr(each[name], field) for each in found] for field in ("cpu", "own"))
        print(f"  {name:14s} cpu {growth(arguments.sizes, cpu):5.2f}  own memory", end=" ")
        print(f"{growth(arguments.sizes, own):5.2f}")


if __name__ == "__main__":
    main()
