"""describe_images through batch mode at growing sizes: seconds, peak memory and bytes, with nothing held and all held.

The stage's own main() runs in a fresh process, against a server in another that speaks OpenAI's protocol of files and
batches and keeps them on disk. A text of the picture's name stands for its bytes: reading and shrinking a picture is
the same work at any size, and a machine with a million of them is not needed to see what grows. `--pictures N` says
what pictures add, with N drawings of 640 x 480: bytes that go up for each, and seconds.

"cold" asks everything in batches of llm.batch_requests; "warm" has answers.parquet and asks nothing; "journal" has the
journal alone. Peak memory is that of the process, interpreter and packages (about 0.4 GB) included. Growth is the
exponent of a straight line through the logarithms: 1 is linear, and what starting costs keeps it below. CPU seconds are
those of the stage's process, where others share the cores; the server is one of them.

    python -m bench.llm_batch [--sizes N ...] [--pictures N]
"""

import argparse
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from fieldmark import store
from fieldmark.llm.answers import Item
from fieldmark.llm.prompts import Message
from stages import describe_images
from tests.openai_server import OpenAIServer

SIZES = (30_000, 100_000, 300_000)
PICTURES = 2_000
BATCH = 50_000
SPAWN = multiprocessing.get_context("spawn")
REPOSITORY = Path(__file__).parents[1]


class OnDisk(MutableMapping[str, bytes]):
    """Files of a server by id, in a folder; `moved` are the bytes that were written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.moved = folder, 0

    def __getitem__(self, name: str) -> bytes:
        return Path(self.folder, name).read_bytes()

    def __setitem__(self, name: str, content: bytes) -> None:
        self.moved += len(content)
        Path(self.folder, name).write_bytes(content)

    def __delitem__(self, name: str) -> None:
        Path(self.folder, name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self.folder.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Counter(list[Any]):
    """Takes what the server would keep for a test, and keeps how many."""

    counted = 0

    def __iadd__(self, values: Any) -> Self:  # type: ignore[misc]  # it adds up where a list grows
        self.counted += len(values)
        return self


def serve(folder: Path, pipe: Connection) -> None:
    """Send the address of a server; then, whenever asked, how many requests it answered and the bytes of its files."""
    with OpenAIServer() as server:
        files, batched = OnDisk(folder), Counter()
        server.files, server.batched = files, batched  # type: ignore[assignment]
        pipe.send(server.base_url)
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            pipe.send((batched.counted, files.moved))


class Measured(NamedTuple):
    seconds: float
    cpu_s: float  # of the stage's process
    peak_mb: float


def named(item: Item, places: Any) -> list[Message]:
    """An item's messages with the picture's id as a text in its place."""
    *before, last = item.messages
    text, image = last["content"]
    return [*before, {**last, "content": [text, {"type": "text", "text": image["image_id"]}]}]


def stage(folder: Path, as_text: bool, pipe: Connection) -> None:
    """Run the stage in a folder and send what that took."""
    os.chdir(folder)
    os.environ |= {"FIELDMARK_CACHE": str(folder / "cache"), "BENCH_KEY": "none"}
    sys.argv = ["describe_images"]
    if as_text:
        describe_images.as_sent = named
    started = perf_counter()
    with Path(folder, "said").open("w") as said, redirect_stderr(said):
        describe_images.main()
    seconds, used = perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss / 2**20 if sys.platform == "darwin" else used.ru_maxrss / 2**10
    pipe.send(Measured(seconds, used.ru_utime + used.ru_stime, peak))


def run_stage(folder: Path, as_text: bool) -> Measured:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=stage, args=(folder, as_text, there))
    process.start()
    there.close()
    try:
        measured: Measured = here.recv()
    except EOFError:
        sys.exit(f"the stage ended without an answer; it said {Path(folder, 'said').read_text()[-400:]}")
    process.join()
    return measured


def lay_out(folder: Path, images: int, base_url: str, pictures: bool) -> None:
    """A data set of so many images and the settings to describe it; the pictures themselves only where wanted."""
    shutil.copytree(REPOSITORY / "prompts", folder / "prompts")
    llm = {"mode": "batch", "base_url": base_url, "model": "tiny", "api_key_env": "BENCH_KEY"}
    content = {
        "domain": {"noun": "fish", "group": "reef fish", "attributes": ["tail"], "not_shown": []},
        "dataset": {"root": "data/photos"},
        "llm": llm | {"batch_poll_s": 0.05, "batch_requests": BATCH, "timeout_s": 600.0},
        "describe": {"enabled": True},
        "encoders": {"toy": {"model": "toy"}},
        "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "toy"}}},
        "report": {"reference": "zero_shot"},
    }
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(content, file)
    rows = []
    for number in range(images):
        path = Path("train", f"species-{number % 100}", f"{number:07d}.jpg")
        if pictures:
            draw_picture(folder / "data/photos" / path, number)
        ids = {"image_id": store.sha256(str(number)), "class_id": path.parent.name}
        rows.append({"path": path.as_posix(), "split": "train", "status": "ok", **ids})
    schema, target = "index.images/1", folder / "data/index/images.parquet"
    store.write_table(store.make_table(schema, rows), target, schema, {}, "images")
    classes = [{"class_id": f"species-{n}", "name": f"Species {n}", "from_images": True} for n in range(100)]
    schema, target = "index.classes/2", folder / "data/index/classes.parquet"
    store.write_table(store.make_table(schema, classes), target, schema, {}, "classes")


def draw_picture(path: Path, number: int) -> None:
    """Smooth colours and a little noise: a photo's size as a JPEG, near enough."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy).save(path, quality=90)


def measure(images: int, *, pictures: bool) -> tuple[dict[str, Measured], dict[str, int]]:
    """The stage with nothing held, with all held, and with the journal alone; and what lies on disk or moved, bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        Path(name, "server").mkdir()
        here, there = SPAWN.Pipe()
        server = SPAWN.Process(target=serve, args=(Path(name, "server"), there), daemon=True)
        server.start()
        there.close()
        lay_out(folder, images, here.recv(), pictures)
        took = {"cold": run_stage(folder, not pictures)}
        here.send(None)
        asked, moved = here.recv()
        output = folder / "data/descriptions/answers.parquet"
        made = output.read_bytes()
        took["warm"] = run_stage(folder, not pictures)
        output.unlink()
        took["journal"] = run_stage(folder, not pictures)
        here.send(None)
        if asked != images or here.recv()[0] != images or output.read_bytes() != made:
            sys.exit(f"{asked} requests for {images} images, or other bytes from the journal")
        here.close()
        server.join()
        sizes = {
            "moved": moved,
            "journal": (folder / "cache/describe_images.jsonl").stat().st_size,
            "answers": len(made),
            "texts": (folder / "data/descriptions/descriptions.parquet").stat().st_size,
        }
        return took, sizes


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The exponent with which values grow."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, metavar="N", help="numbers of images")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="real pictures; 0: none")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {BATCH:,} requests a file")
    columns = f"{'seconds':>8s} {'CPU s':>8s} {'peak MB':>8s}"
    print(f"{'images':>9s} {'':8s} {columns}   MB moved  journal  answers    texts")
    found = []
    for images in arguments.sizes:
        took, sizes = measure(images, pictures=False)
        found.append(took)
        show(images, took, sizes)
    if len(found) > 1:
        for name in found[0]:
            seconds, cpu, peaks = zip(*(took[name] for took in found), strict=True)
            kb = (peaks[-1] - peaks[0]) * 1024 / (arguments.sizes[-1] - arguments.sizes[0])
            print(
                f"{name:8s} seconds grow as images ^ {growth(arguments.sizes, seconds):.2f}, CPU seconds"
                f" ^ {growth(arguments.sizes, cpu):.2f}, memory by {kb:.2f} kB an image"
            )
    if arguments.pictures:
        print("with pictures, at most 512 px:")
        show(arguments.pictures, *measure(arguments.pictures, pictures=True))


def show(images: int, took: dict[str, Measured], sizes: dict[str, int]) -> None:
    on_disk = " ".join(f"{size / 1e6:8.1f}" for size in sizes.values())
    for name, (seconds, cpu, peak) in took.items():
        sized = on_disk if name == "cold" else ""
        print(f"{images:9,} {name:8s} {seconds:8.1f} {cpu:8.1f} {peak:8.0f}   {sized}", flush=True)


if __name__ == "__main__":
    main()
