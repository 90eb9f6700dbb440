"""embed_images with `embed.regions` against plain embedding, and against the bare forward passes that it takes.

Photographs as they are, or enlarged to 2000 x 1500 JPEGs (--large), in a temporary folder; decoding, cutting and rows
are timed, writing is not. "bare" is the encoder's forward pass alone, at the same batch and precision, times the passes
an image needs. Each line is the median of --repeats runs, bare and extractor one after the other. Processor time is
beside wall time, since on a busy machine it is what can be compared.

The bar: of wall time at least 0.9 of the bare passes, as embed_images has without regions.

    python -m bench.regions [--images N] [--model MODEL] [--device cuda] [--large]
"""

import argparse
import os
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from bench.embed import LARGE, PHOTOGRAPHS, ROOT, build_project, choose_photographs
from fieldmark import store
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import forward_sources
from fieldmark.memory import keep_memory
from fieldmark.params import Embed, Encoder, Regions
from fieldmark.pictures.views import Source, count_passes

BAR = 0.9
EXTRACTORS = {
    "plain": Embed(),
    "windows 3 x 3": Embed(crops=[3]),
    "map, crops map": Embed(regions=Regions()),
    "map, crops grid": Embed(regions=Regions(crops="grid")),
    "map, crops random": Embed(regions=Regions(crops="random")),
    "whole, crops grid": Embed(regions=Regions(object="whole", crops="grid")),
}


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall time and of all processors."""
    started, spent = perf_counter(), process_time()
    run()
    return perf_counter() - started, process_time() - spent


def run_bare(encoder: LoadedEncoder, passes: int) -> None:
    """So many forward passes, in whole batches."""
    height, width = encoder.preprocessing["size"]
    pixels = torch.zeros(encoder.batch_size, 3, height, width, dtype=torch.uint8, device=encoder.device)
    for _ in range(round(passes / encoder.batch_size)):
        encoder.embed_images(encoder.normalise(pixels))
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()


def run_all(encoder: LoadedEncoder, embed: Embed, sources: list[Source]) -> None:
    deque(forward_sources(sources, [nodes_of(encoder, embed)]), maxlen=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    demo = f"local-dir:{ROOT / 'data/demo/encoder'}"
    parser.add_argument("--model", default=demo, help="local-dir:FOLDER (default: the demo's)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="(default: fp32)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: 32)")
    parser.add_argument("--images", type=int, default=1000, help="photographs (default: 1000)")
    parser.add_argument("--pictures", type=Path, default=PHOTOGRAPHS, help="their folder (default: that of cub100)")
    parser.add_argument("--large", action="store_true", help=f"enlarge them to {LARGE[0]} x {LARGE[1]} first")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    arguments = parser.parse_args()
    keep_memory()
    settings = {"model": arguments.model, "precision": arguments.precision, "batch_size": arguments.batch_size}
    encoder = load_encoder("bench", Encoder(**settings), torch.device(arguments.device))
    photographs = choose_photographs(arguments.pictures, arguments.images)
    where = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, {arguments.device}"
    print(f"{where}, {arguments.precision}, batch {arguments.batch_size}; {len(photographs)} photographs")
    print(f"{'extractor':18s} {'passes':>6s} {'images/s':>9s} {'bare':>7s} {'ratio':>6s} {'of processor time':>18s}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        build_project(folder, photographs, LARGE if arguments.large else None, settings)
        sources = [Source(store.sha256(path.read_bytes()), path) for path in sorted(folder.glob("images/*"))]
        run_bare(encoder, arguments.batch_size)
        for title, embed in EXTRACTORS.items():
            passes = count_passes(embed)
            bare_run = partial(run_bare, encoder, passes * len(sources))
            whole_run = partial(run_all, encoder, embed, sources)
            found = [(*timed(bare_run), *timed(whole_run)) for _ in range(arguments.repeats)]
            bare, bare_processor, whole, processor = (median(each) for each in zip(*found, strict=True))
            rates = f"{len(sources) / whole:9.1f} {len(sources) / bare:7.1f} {bare / whole:6.2f}"
            print(f"{title:18s} {passes:6d} {rates} {bare_processor / processor:18.2f}", flush=True)
    print(f"bar of the ratio: {BAR}")


if __name__ == "__main__":
    main()
