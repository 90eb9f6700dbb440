"""embed_images, from files to Parquet, against the model's bare forward pass and beside clip-retrieval.

Pictures: 1,000 photographs of ../shared/data/cub100 (227 x 227 px), and as many of 2,000 x 1,500 px made from them
(enlarged, JPEG of quality 90, in a temporary folder). Models have random weights, which cost what trained ones do, and
come to the stage as a checkpoint file; precision bf16, batch 32 on the CPU and 256 on a GPU. Nodes are those of the
demo: the whole picture and 2 x 2 and 4 x 4 cells.

"bare" is open_clip's `encode_image` on one batch that lies on the device, normalised and in bf16. "embed" is the whole
stage in a process of its own after loading, by its closing line: reading, sha256, decoding, forward, rows, Parquet.
Both are the median of --repeats, by turns. "decode" is the preparation of pictures alone, in as many threads as there
are processors. "allowed" is the ratio that decoding leaves: on the CPU it takes its time from the same processors, and
what takes 1 / decode + 1 / bare an image is decode / (decode + bare) of bare; on a GPU it runs beside it, min(1, decode
/ bare). The bar: embed is 0.9 of bare on the photographs; of the large pictures, what is allowed.

--clip-retrieval PYTHON, of an environment with clip-retrieval 2.45, has its own reader, mapper and writer embed the
same files (fp32, batch 256, 2 workers, its defaults but for the model, which is the same file), after loading too. The
bar: 3.5 x on the CPU. With --device cuda, the GPU's vectors are compared with the CPU's; the bar is a cosine of 0.999.

    python -m bench.embed [--device cpu|cuda] [--models NAME ...] [--images N] [--clip-retrieval PYTHON]
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import open_clip
import torch
from PIL import Image
from torch.nn import functional

from fieldmark import store
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.memory import keep_memory
from fieldmark.params import Embed, Encoder
from fieldmark.pictures.decode import map_ahead
from fieldmark.pictures.views import Source, prepare

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared/data/cub100/CUB_200_2011/images"
MODELS = {"cpu": ["ViT-B-32"], "cuda": ["ViT-B-16", "ViT-L-14"]}
BATCH = {"cpu": 32, "cuda": 256}
LARGE = (2000, 1500)
NODES: dict[str, Any] = {"grids": [2, 4]}
BAR, RIVAL_BAR, COSINE_BAR = 0.9, 3.5, 0.999
COMPARED = 64
# Its own parts, put together as its worker does, but loaded before the clock starts.
CLIP_RETRIEVAL = """
import sys, time
from all_clip import load_clip
from clip_retrieval.clip_inference.mapper import ClipMapper
from clip_retrieval.clip_inference.reader import FilesReader
from clip_retrieval.clip_inference.runner import Sampler
from clip_retrieval.clip_inference.writer import NumpyWriter

model, pictures, output = sys.argv[1:]
_, preprocess, tokenizer = load_clip(clip_model=model)
mapper = ClipMapper(True, False, False, False, model, True, None)
reader = FilesReader(Sampler(0, 1), preprocess, tokenizer, pictures, 256, 2, enable_text=False, enable_image=True)
started = time.perf_counter()
writer = NumpyWriter(0, output, False, True, False, 1)
count = 0
for batch in reader:
    count += len(batch["image_tensor"])
    writer(mapper(batch))
writer.flush()
print(count, time.perf_counter() - started)
"""


def choose_photographs(folder: Path, count: int) -> list[Path]:
    """The same photographs every time, no two of them alike. Exits where there are too few."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    random.Random(0).shuffle(files)
    chosen = list({store.sha256(path.read_bytes()): path for path in files[: count + count // 10]}.values())[:count]
    if len(chosen) < count:
        sys.exit(f"{folder}: holds {len(chosen)} pictures of {count}; use --pictures, or --images with fewer")
    return chosen


def build_project(folder: Path, photographs: list[Path], size: tuple[int, int] | None, encoder: dict[str, Any]) -> None:
    """A project with these photographs, as they are or enlarged to `size`, and their index."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, photograph in enumerate(photographs):
        path = folder / f"images/{number}.jpg"
        if size is None:
            path.write_bytes(photograph.read_bytes())
        else:
            with Image.open(photograph) as image:
                image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        image_id = store.sha256(path.read_bytes())
        rows.append({"path": path.name, "image_id": image_id, "class_id": "a", "split": "train", "status": "ok"})
    table = store.make_table("index.images/1", rows)
    store.write_table(table, folder / "data/index/images.parquet", "index.images/1", {}, "bench")
    params = {
        "domain": {"noun": "bird", "group": "birds"},
        "dataset": {"root": "images", "buckets": 16},
        "llm": {"model": "none"},
        "encoders": {"bench": encoder},
        "embed": NODES,
        "train": {"runs": {"linear_probe": {"method": "linear_probe", "encoder": "bench"}}},
        "report": {"reference": "linear_probe"},
    }
    (folder / "params.yaml").write_text(json.dumps(params))


def settings_of(model: str, device: str, folder: Path) -> dict[str, Any]:
    """An entry of `encoders`: a model of open_clip's with random weights in a file, or a local-dir: as it is."""
    shared = {"model": model, "precision": "bf16", "batch_size": BATCH[device]}
    if model.startswith("local-dir:"):
        return shared
    path = folder / f"{model}.pt"
    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), path)
    return shared | {"pretrained": str(path)}


@torch.inference_mode()
def bare_rate(encoder: LoadedEncoder, seconds: float) -> float:
    """Images a second of encode_image alone."""
    model: Any = encoder.model
    height, width = encoder.preprocessing["size"]
    pixels = torch.randn(encoder.batch_size, 3, height, width)
    pixels = pixels.to(encoder.device, encoder.dtype, memory_format=torch.channels_last)

    def forward() -> None:
        model.encode_image(pixels)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    # A first pass is slower than those that follow.
    forward()
    count, started = 0, perf_counter()
    while (spent := perf_counter() - started) < seconds:
        forward()
        count += len(pixels)
    return count / spent


def decode_rate(encoder: LoadedEncoder, sources: list[Source]) -> float:
    """Images a second of preparing pictures alone."""
    workers, started = os.cpu_count() or 1, perf_counter()
    views = map_ahead(lambda source: prepare(source, encoder, Embed(**NODES)), sources, workers, 2 * encoder.batch_size)
    deque(views, maxlen=0)
    return len(sources) / (perf_counter() - started)


def embed_rate(folder: Path, device: str) -> tuple[float, str]:
    """Images a second of the stage after loading, from nothing, and where its time went, by its closing line."""
    shutil.rmtree(folder / "data/embed", ignore_errors=True)
    process = subprocess.run(
        [sys.executable, "-m", "stages.embed_images", "--encoder", "bench", "--device", device],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    closing = re.search(r"(\d+) images in ([\d.]+) s, .*; (.*)\n\Z", process.stderr)
    if process.returncode or closing is None:
        sys.exit(f"embed_images failed: {process.stderr[-2000:]}")
    return int(closing[1]) / float(closing[2]), closing[3]


def clip_retrieval_rate(python: str, folder: Path, encoder: dict[str, Any]) -> float:
    """Images a second of clip-retrieval after loading."""
    model = f"open_clip:{encoder['model']}/{encoder['pretrained']}"
    said = subprocess.run(
        [python, "-c", CLIP_RETRIEVAL, model, str(folder / "images"), str(folder / "clip-retrieval")],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.split()  # fmt: skip
    return int(said[-2]) / float(said[-1])


def compare_devices(encoder: LoadedEncoder, settings: dict[str, Any], sources: list[Source]) -> float:
    """The lowest cosine between what the GPU and the CPU make of the same pictures."""
    on_cpu = load_encoder("bench", Encoder(**settings), torch.device("cpu"))
    pixels = torch.cat([prepare(source, on_cpu, Embed(**NODES))[0].pixels for source in sources[:COMPARED]])
    there, here = encoder.embed_images(pixels)[0].cpu(), on_cpu.embed_images(pixels)[0]
    return float(functional.cosine_similarity(there, here).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    models = "names of open_clip, or local-dir:PATH (default: ViT-B-32; with cuda ViT-B-16 and ViT-L-14)"
    parser.add_argument("--models", nargs="+", help=models)
    parser.add_argument("--images", type=int, default=1000, help="photographs (default: 1000)")
    parser.add_argument("--pictures", type=Path, default=PHOTOGRAPHS, help="their folder (default: that of cub100)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each bare forward rate (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="of bare and embed (default: 3)")
    parser.add_argument("--clip-retrieval", metavar="PYTHON", help="python of an environment with clip-retrieval 2.45")
    arguments = parser.parse_args()
    device = arguments.device
    keep_memory()
    photographs = choose_photographs(arguments.pictures, arguments.images)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch", "pillow"))
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, {versions}")
    print(f"{len(photographs)} images, bf16, batch {BATCH[device]}, {device}; images a second")
    head = f"{'model':12s} {'pictures':>10s} {'bare':>7s} {'embed':>7s} {'ratio':>6s} {'decode':>7s} {'allowed':>7s}"
    print(f"{head} {'clip-r.':>7s}  waited for", flush=True)
    for model in arguments.models or MODELS[device]:
        with tempfile.TemporaryDirectory() as name:
            settings = settings_of(model, device, Path(name))
            encoder = load_encoder("bench", Encoder(**settings), torch.device(device))
            for title, size in (("as it is", None), (f"{LARGE[0]} x {LARGE[1]}", LARGE)):
                folder = Path(name, title)
                build_project(folder, photographs, size, settings)
                sources = [Source(store.sha256(path.read_bytes()), path) for path in folder.glob("images/*")]
                decode = decode_rate(encoder, sources)
                bare_rates, rates = [], []
                for _ in range(arguments.repeats):
                    bare_rates.append(bare_rate(encoder, arguments.seconds))
                    embedded, shares = embed_rate(folder, device)
                    rates.append(embedded)
                bare, rate = median(bare_rates), median(rates)
                allowed = decode / (decode + bare) if device == "cpu" else min(1.0, decode / bare)
                line = f"{Path(model).name:12s} {title:>10s} {bare:7.1f} {rate:7.1f} {rate / bare:6.2f} {decode:7.1f}"
                rival = ""
                if arguments.clip_retrieval:
                    rival = f"{clip_retrieval_rate(arguments.clip_retrieval, folder, settings):.1f}"
                print(f"{line} {allowed:7.2f} {rival:>7s}  {shares}", flush=True)
                if rival:
                    print(f"    {rate / float(rival):.1f} x clip-retrieval (bar on the CPU: {RIVAL_BAR})", flush=True)
            if device == "cuda":
                cosine = compare_devices(encoder, settings, sources)
                print(f"    lowest cosine between GPU and CPU: {cosine:.6f} (bar: {COSINE_BAR})", flush=True)
    print(f"bar of the ratio: {BAR} as they are, what is allowed for large ones")


if __name__ == "__main__":
    main()
