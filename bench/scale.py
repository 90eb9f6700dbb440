"""CPU seconds, memory and bytes of each stage before training as images grow: 10,000 and 30,000, or what --sizes says.

Every stage is a process of its own, in a folder that holds what it reads. Pictures are 8 x 8 pixels of noise, a file
each, for index_images alone; all else is drawn and written as Parquet: 200 classes, 5 nodes of 64 numbers an image, 10
texts a class, one sentence an image, groups of 10 images, 5 given edges an image. So the figures are what rows cost,
not what pictures, patches and encoders do: bench.embed, bench.graphs and bench.pool have those. `embed_images` finds
every image embedded; "again" stages find their output there.

Seconds are those of all processors together, so that a busy machine has little say in them; `wall` is beside them.
Memory is the most that the process held (ru_maxrss). What a run over BASE images takes is taken off both before growth
is fitted: `growth` is the exponent of images in CPU seconds between the first size and the last (1.0: linear),
`B an image` how many bytes of memory an image more took. Bytes are those of the stage's output. Links of the kind knn
grow with the square and have a benchmark of their own, bench.links.

    python -m bench.scale [--sizes N N ...] [--stages NAME ...] [--folder DIR]
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fieldmark import store

ROOT = Path(__file__).parents[1]
BASE = 1000
CLASSES, NODES, DIMENSION, PER_CLASS, GROUP, EDGES, BUCKETS = 200, 5, 64, 10, 10, 5, 64
SIDE = 8
# Header of a BMP of SIDE x SIDE pixels of three bytes.
BMP = b"BM" + (54 + 3 * SIDE * SIDE).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
BMP += (40).to_bytes(4, "little") + 2 * SIDE.to_bytes(4, "little") + b"\1\0\x18\0" + bytes(24)
ENCODER = {
    "embed_dim": DIMENSION,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PARAMS: dict[str, Any] = {
    "domain": {"noun": "thing", "group": "things"},
    "dataset": {"root": "images", "buckets": BUCKETS, "val_list": "data/none"},
    "llm": {"model": "none"},
    "encoders": {"tiny": {"model": "local-dir:encoder", "batch_size": 256}},
    "embed": {"views": 0, "tokens": False, "grids": [2]},
    "links": {
        "track": {"kind": "group", "k": 5, "vectors": "data/none", "texts": "data/none"},
        "edges": {"kind": "given", "vectors": "data/none", "texts": "data/none"},
    },
    "train": {"runs": {"linear_probe": {"method": "linear_probe", "encoder": "tiny"}}},
    "report": {"reference": "linear_probe"},
}


class Stage(NamedTuple):
    """A stage to be timed."""

    command: list[str]
    writes: list[str]  # what counts as its bytes
    clear: bool = True  # whether what it wrote before is removed first


EMBED_TEXT = ["stages.embed_text", "--encoder", "tiny", "--device", "cpu"]
STAGES = {
    "index_images": Stage(["stages.index_images"], ["data/index", "data/thumbs"]),
    "embed_images": Stage(["stages.embed_images", "--encoder", "tiny", "--device", "cpu"], [], clear=False),
    "embed_text": Stage(EMBED_TEXT, ["data/embed/tiny/text.parquet"]),
    "embed_text again": Stage(EMBED_TEXT, ["data/embed/tiny/text.parquet"], clear=False),
    "select_concepts": Stage(["stages.select_concepts", "--encoder", "tiny"], ["data/bank"]),
    "label_patches": Stage(["stages.label_patches", "--encoder", "tiny"], ["data/labels"]),
    "build_graphs": Stage(["stages.build_graphs", "--encoder", "tiny"], ["data/graphs"]),
    "build_graphs again": Stage(["stages.build_graphs", "--encoder", "tiny"], ["data/graphs"], clear=False),
    "links of groups": Stage(["stages.link_images", "--links", "track"], ["data/links/track.parquet"]),
    "links given": Stage(["stages.link_images", "--links", "edges"], ["data/links/edges.parquet"]),
    "tools.shards": Stage(["tools.shards"], []),
}  # fmt: skip


def hex_ids(rng: np.random.Generator, count: int) -> list[str]:
    """So many drawn image_ids, sorted."""
    text = rng.bytes(32 * count).hex()
    return sorted(text[start : start + 64] for start in range(0, len(text), 64))


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.standard_normal((count, DIMENSION), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(table: pa.Table, path: Path, schema: str, params: dict[str, Any], mark: str = "bench") -> None:
    """A table, with the columns of the contract that it lacks as nulls."""
    missing = [field for field in store.COLUMNS[schema] if field.name not in table.schema.names]
    for field in missing:
        table = table.append_column(field.name, pa.nulls(len(table), field.type))
    store.write_table(table, path, schema, params, mark)


def save_encoder(folder: Path) -> None:
    """A randomly weighted open_clip model."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"model_cfg": ENCODER, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")


def draw_pictures(folder: Path, count: int) -> None:
    """A file an image, in folders of their classes."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        (folder / f"images/class-{number}").mkdir(parents=True)
    for number in range(count):
        path = folder / f"images/class-{number % CLASSES}/picture-{number * 7919 % 1_000_003:07d}.bmp"
        path.write_bytes(BMP + rng.bytes(3 * SIDE * SIDE))


def draw_data(folder: Path, count: int) -> None:
    """What the other stages read, written as Parquet."""
    from fieldmark.devices import choose_device
    from fieldmark.encoders.loading import load_image_encoder
    from fieldmark.encoders.nodes import nodes_of
    from fieldmark.params import load_params

    params = load_params(str(folder / "params.yaml"))
    encoder = load_image_encoder("tiny", params.image_encoder("tiny"), choose_device("cpu"), params.towers)
    product = nodes_of(encoder, params.embed)
    rng = np.random.default_rng(1)
    ids = hex_ids(rng, count)
    names = [f"class-{number:03d}" for number in range(CLASSES)]
    of_class = rng.integers(0, CLASSES, count)
    index = pa.table({
        "path": [f"class-{number:03d}/picture-{place:08d}.jpg" for place, number in enumerate(of_class)],
        "image_id": ids,
        "class_id": pa.array(names).take(pa.array(of_class)),
        "split": pa.array(["train", "train", "train", "val", "test"]).take(pa.array(rng.integers(0, 5, count))),
        "width": pa.array(np.full(count, 640), pa.int32()), "height": pa.array(np.full(count, 480), pa.int32()),
        "status": pa.repeat(pa.scalar("ok"), count),
        "group": pa.array([f"track {number}" for number in rng.integers(0, max(1, count // GROUP), count)]),
    })  # fmt: skip
    write(index, folder / "data/index/images.parquet", "index.images/1", {"format": "manifest"})
    classes = pa.table({"class_id": names, "name": names, "from_images": pa.repeat(pa.scalar(True), CLASSES)})
    write(classes, folder / "data/index/classes.parquet", "index.classes/2", {})
    ends = rng.integers(0, count, (2, EDGES * count))
    edges = {end: index["path"].take(pa.array(places)) for end, places in zip(("src", "dst"), ends, strict=True)}
    weight = pa.array(rng.random(EDGES * count, dtype=np.float32))
    edge_table = pa.table({**edges, "weight": weight, "kind": pa.repeat(pa.scalar("citation"), EDGES * count)})
    write(edge_table, folder / "data/index/links.parquet", "index.links/1", {})

    texts = [f"mark {number} of a thing" for number in range(CLASSES * PER_CLASS)]
    owners = [names[number % CLASSES] for number in range(len(texts))]
    concepts = pa.table({
        "concept_id": [store.sha256(text) for text in texts], "text": texts, "class_id": owners,
        "kind": pa.repeat(pa.scalar("visual"), len(texts)), "rank": pa.array(range(len(texts)), pa.int32()),
        "kept": pa.repeat(pa.scalar(True), len(texts)),
    })  # fmt: skip
    write(concepts, folder / "data/concepts/concepts.parquet", "concepts/1", {})
    said = pa.table({
        "image_id": ids, "rank": pa.array(np.zeros(count), pa.int32()),
        "text": [f"a thing with {each[:12]} stripes" for each in ids],
    })  # fmt: skip
    write(said, folder / "data/descriptions/descriptions.parquet", "descriptions/1", {})
    cells = store.arrow_schema("descriptions.cells/1").empty_table()
    write(cells, folder / "data/descriptions/cells.parquet", "descriptions.cells/1", {"nodes": []})

    corners = np.array([(0, 0, 1, 1)] + [(x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)], np.float32)
    centres = unit(rng, CLASSES)
    class_of = dict(zip(ids, of_class.tolist(), strict=True))
    for bucket, wanted in enumerate(store.split_buckets(ids, BUCKETS)):
        rows = len(wanted) * NODES
        own = centres[[class_of[each] for each in wanted]]
        vectors = 0.5 * np.repeat(own, NODES, axis=0) + unit(rng, rows)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        nodes = pa.table({
            "image_id": np.repeat(wanted, NODES) if wanted else pa.array([], pa.string()),
            "view": pa.array(np.zeros(rows), pa.int16()),
            "node": pa.array(np.tile(np.arange(NODES), len(wanted)), pa.int16()),
            "kind": pa.array((["global"] + ["grid"] * (NODES - 1)) * len(wanted), pa.string()),
            **{side: np.tile(corners[:, place], len(wanted)) for place, side in enumerate(("x0", "y0", "x1", "y1"))},
            "flip": pa.repeat(pa.scalar(False), rows), "norm": np.ones(rows, np.float32),
            "vector": store.vector_column(vectors),
        })  # fmt: skip
        path = store.bucket_path(folder / product.folder, bucket)
        store.write_table(nodes, path, product.schema, product.made_by, product.fingerprint)


def prepare(folder: Path, count: int, pictures: bool) -> Path:
    """A folder that a stage can run in, with pictures or with all else; made once."""
    folder /= f"{'pictures' if pictures else 'data'}-{count}"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(json.dumps(PARAMS))
    (folder / "data").mkdir()
    (folder / "data/none").touch()
    (folder / "prompts").symlink_to(ROOT / "prompts")
    # In a process of its own: what this one holds would count as memory of those that it starts.
    what = "pictures" if pictures else "data"
    command = [sys.executable, "-m", "bench.scale", "--draw", what, str(count)]
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    return folder


def draw(what: str, count: int) -> None:
    """What `prepare` asks for, in the working folder."""
    if what == "pictures":
        draw_pictures(Path(), count)
    else:
        save_encoder(Path("encoder"))
        draw_data(Path(), count)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 where there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


class Taken(NamedTuple):
    wall: float
    seconds: float  # of all processors
    memory: float  # MB
    size: int  # bytes


def measure(folder: Path, stage: Stage) -> Taken:
    """Run a stage in a process of its own."""
    outputs = [folder / each for each in stage.writes]
    if stage.clear:
        for path in [file for each in outputs for file in ([each] if each.is_file() else each.rglob("*.parquet"))]:
            path.unlink()
    started = perf_counter()
    with open(folder / "log", "wb") as log:
        command = [sys.executable, "-m", *stage.command]
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        # The folder may be a temporary one, and gone when somebody looks.
        sys.exit(f"{' '.join(stage.command)} failed:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
    wall, seconds = perf_counter() - started, usage.ru_utime + usage.ru_stime
    return Taken(wall, seconds, usage.ru_maxrss / 1024, sum(map(size_of, outputs)))


def growth(sizes: list[int], taken: list[Taken], of: Callable[[Taken], float]) -> float:
    """The exponent of images in what is over the BASE run, between the first size and the last."""
    first, last = (max(of(taken[place]) - of(taken[0]), 1e-3) for place in (1, -1))
    return math.log(last / first) / math.log(sizes[-1] / sizes[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [10_000, 30_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N", help=f"(default: {sizes})")
    names = ", ".join(STAGES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="NAME", help=names)
    parser.add_argument("--folder", type=Path, help="where rows are drawn, and kept (default: a temporary folder)")
    parser.add_argument("--draw", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw[0], int(arguments.draw[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        counts = [BASE, *sorted(arguments.sizes)]
        machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
        print(f"{machine}, {BUCKETS} buckets; what {BASE} images take is taken off growth and B an image")
        heads = {"images": 9, "wall": 8, "CPU s": 8, "MB": 7, "written MB": 11, "growth": 7, "B an image": 11}
        print(" ".join([f"{'stage':20s}", *(f"{head:>{width}s}" for head, width in heads.items())]))
        for name in arguments.stages:
            taken: list[Taken] = []
            for place, count in enumerate(counts):
                found = measure(prepare(folder, count, pictures=name == "index_images"), STAGES[name])
                taken.append(found)
                more = ""
                if place > 1 and place == len(counts) - 1:
                    each = (found.memory - taken[0].memory) * 2**20 / count
                    more = f"{growth(counts, taken, lambda one: one.seconds):7.2f} {each:11.0f}"
                line = f"{name:20s} {count:9,d} {found.wall:8.1f} {found.seconds:8.1f} {found.memory:7.0f}"
                print(f"{line} {found.size / 1e6:11.1f} {more}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
