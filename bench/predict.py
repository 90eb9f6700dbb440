"""Asking a trained run about new pictures, against embed_images on the same pictures.

Both in one process after loading, by turns, the median of --repeats: "embed" is stages.embed_images, from files to
Parquet, view 0 alone, in a temporary folder; "predict" is tools.predict, from files to JSON lines, with all that it
says by default. The pictures are copies, each with a byte behind its end: the same pixels, but new to the run. Where
the run knows the picture that was copied, its probabilities are compared with those of the run's own predictions, the
largest difference of any class among the five that are named. "start" is a process of its own that is asked about one
picture, as a person does it.

The bars: predict is 0.9 of embed or better; probabilities differ by 1e-4 at most; the start takes 5 s on a CPU.

    python -m bench.predict [--run linear_probe] [--pictures FOLDER] [--images 1000] [--repeats 3]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch

from fieldmark import store
from fieldmark.devices import choose_device
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import update
from fieldmark.memory import keep_memory
from fieldmark.params import load_params
from fieldmark.pictures.views import Source
from tools.predict import answer_here, ask, chunk_of, open_judge
from tools.prediction.answers import Judge
from tools.prediction.output import Row, write_rows
from tools.prediction.pictures import read_question

BAR, NEAR, START_BAR = 0.9, 1e-4, 5.0


def copy_pictures(folder: Path, target: Path, count: int) -> dict[str, str]:
    """Copies with one byte more; by path, the image_id of what was copied. Exits where there are too few."""
    found = read_question(str(folder)).pictures[:count]
    if len(found) < count:
        sys.exit(f"{folder}: holds {len(found)} pictures of {count}; use --pictures, or --images with fewer")
    copies = {}
    for number, picture in enumerate(found):
        content = Path(picture.path).read_bytes()
        copy = target / f"{number:06d}{Path(picture.path).suffix}"
        copy.write_bytes(content + b"\0")
        copies[str(copy)] = store.sha256(content)
    return copies


@contextmanager
def timed(rates: list[float], cpu: list[float], images: int) -> Iterator[None]:
    """Add images a second, and seconds of a processor an image, which say something on a busy machine too."""
    started, busy = perf_counter(), process_time()
    yield
    rates.append(images / (perf_counter() - started))
    cpu.append((process_time() - busy) / images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml", metavar="FILE")
    parser.add_argument("--run", default="linear_probe", metavar="NAME", help="(default: linear_probe)")
    parser.add_argument("--pictures", type=Path, help="their folder (default: that of the data set)")
    parser.add_argument("--images", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    keep_memory()
    params, device = load_params(arguments.params), choose_device(arguments.device)
    judge, features = open_judge(params, arguments.params, arguments.run, None, device)
    encoder = features().recipes[0].encoder
    processor = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    print(f"{processor}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, load {load:.1f}")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "pictures").mkdir()
        folder = arguments.pictures or params.dataset.folder
        copies = copy_pictures(folder, Path(name, "pictures"), arguments.images)
        sources = [Source(store.sha256(Path(path).read_bytes()), Path(path)) for path in copies]
        question, out = read_question(str(Path(name, "pictures"))), Path(name, "answers.jsonl")
        nodes = nodes_of(encoder, params.embed.model_copy(update={"views": 0}))
        rates: dict[str, list[float]] = {"embed": [], "predict": []}
        cpu: dict[str, list[float]] = {"embed": [], "predict": []}
        for number in range(arguments.repeats):
            with timed(rates["embed"], cpu["embed"], len(sources)):
                update([replace(nodes, folder=Path(name, f"embed{number}"))], sources, params.dataset.buckets)
            answered = answer_here(judge, question, chunk_of(params, judge.run), 0)
            answer = partial(ask, judge, answered, len(question.pictures), False, None)
            with timed(rates["predict"], cpu["predict"], len(sources)):
                write_rows("jsonl", out, judge.names, answer)
        embed, predict = median(rates["embed"]), median(rates["predict"])
        said = f"embed {embed:.1f}, predict {predict:.1f} images/s: {predict / embed:.2f} (bar: {BAR})"
        print(f"{len(copies)} pictures, {arguments.run} on {judge.run.encoder}: {said}")
        each = ", ".join(f"{what} {1000 * median(seconds):.1f}" for what, seconds in cpu.items())
        print(f"ms of a processor for a picture: {each}", flush=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        print(f"largest difference to what the run said: {compare(judge, copies, rows)} (bar: {NEAR})")
        started = perf_counter()
        words = ["--params", arguments.params, "--run", arguments.run, "--device", arguments.device, next(iter(copies))]
        subprocess.run([sys.executable, "-m", "tools.predict", *words], check=True, capture_output=True)
        print(f"one picture, with the start: {perf_counter() - started:.1f} s (bar: {START_BAR})")


def compare(judge: Judge, copies: dict[str, str], rows: list[Row]) -> str:
    """Of the pictures that the run knows under another image_id, the largest difference of a probability."""
    known = [row for row in rows if copies[row["path"]] in judge.stored.place]
    if not known:
        return "it knows none of them"
    said = judge.stored.logits[[judge.stored.place[copies[row["path"]]] for row in known]]
    p = judge.calibration.probabilities(said[:, judge.candidates])
    place = {class_id: number for number, class_id in enumerate(judge.calibration.classes)}
    worst = max(
        abs(each["p"] - own[place[each["class_id"]]]) for own, row in zip(p, known, strict=True) for each in row["top"]
    )
    return f"{worst:.1e} in {len(known)} pictures"


if __name__ == "__main__":
    main()
