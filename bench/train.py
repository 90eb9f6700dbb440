"""Seconds an epoch of the trained methods, and which share of them is matrix products that nothing can spare.

Bars, over the bare convolution: concept_graph 2.5, every part on 5. CATE, whose parts were among these, has no bar.

The cache is synthetic, in memory: 5,994 images (CUB's training set) x 33 nodes x 512 dimensions, 200 classes, 1,000
concepts, 16 labels a node, 5 neighbours a node; 4 sentences an image. Settings are the
methods' defaults; "every part on" is the concept graph with all that its settings switch, "width 256" the same at the
width that it had before val chose half of it. "Bare" is forward and backward of two dense convolutions of the concept
graph's width with a linear head over tensors that lie ready, in bfloat16 where the processor has it. An epoch is one
pass over the training images with its updates; of several the fastest counts, since the machine may have other work.

With --device cuda all of it is done on the GPU, "bare" too, and the cache lies there.

"Arithmetic" is the time that a step's matrix products (counted by PyTorch) take at the rate that one of them, 4,224 x
256 by 256 x 256, reaches here, over the epoch's time.

With GOMP_SPINCOUNT=3000 in front, threads wait as those of the train stage do; under `make bench` they sleep, as suits
the embedding.

    GOMP_SPINCOUNT=3000 python -m bench.train [--images N] [--epochs E] [--device cpu|cuda]
"""

import argparse
import platform
import resource
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fieldmark.devices import has_bf16, set_up_torch
from training.data import Cache, Parts
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.descriptions import Descriptions
from training.data.edges import Edges
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.layers.graphs import GCN
from training.loop import total_loss
from training.methods import load_method, reads_of
from training.methods.concept_graph import Settings

NODES, DIMENSION, CLASSES, CONCEPTS, LABELS, NEIGHBOURS = 33, 512, 200, 1000, 16, 5
SENTENCES = 4
EVERY_PART = {"description": True}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def synthetic_cache(images: int) -> Cache:
    """Random features in the shapes of CUB; every image's graph has the same number of edges."""
    torch.manual_seed(0)
    source = torch.arange(NODES).repeat_interleave(NEIGHBOURS)
    target = (source + torch.arange(1, NEIGHBOURS + 1).repeat(NODES)) % NODES
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])], dim=1).to(torch.int16)
    own = torch.zeros(CONCEPTS, CLASSES, dtype=torch.bool)
    own[torch.arange(CONCEPTS), torch.arange(CONCEPTS) % CLASSES] = True
    vectors = torch.cat([unit(min(1000, images - start), NODES, DIMENSION).half() for start in range(0, images, 1000)])
    parts = [
        Nodes(nodes=vectors, mask=torch.ones(images, NODES, dtype=torch.bool)),
        Boxes(torch.rand(images, NODES, 4)),
        Labels(
            path="synthetic",
            concept_idx=torch.randint(CONCEPTS, (images, NODES, LABELS), dtype=torch.int32),
            concept_weight=torch.full((images, NODES, LABELS), 1 / LABELS, dtype=torch.float16),
            selected=torch.ones(images, NODES, dtype=torch.bool),
            density=torch.rand(images, NODES),
            ring_gains=torch.zeros(images, 0),
            selected_concepts=torch.zeros(images, 0, dtype=torch.int32),
        ),
        Edges(
            nodes=NODES,
            start=torch.arange(images) * len(edges),
            count=torch.full((images,), len(edges)),
            ends=edges.repeat(images, 1),
            weight=torch.rand(images * len(edges), 2).half(),
        ),
        Descriptions(d=unit(images, SENTENCES, DIMENSION).half(), dm=torch.ones(images, SENTENCES, dtype=torch.bool)),
        Bank(
            path="synthetic",
            K=unit(CONCEPTS, DIMENSION),
            kind=("visual",) * CONCEPTS,
            kept=torch.ones(CONCEPTS, dtype=torch.bool),
            owners=own,
        ),
    ]
    return Cache(
        classes=[f"class-{number:03d}" for number in range(CLASSES)],
        paths=[f"{number}" for number in range(images)],
        image_ids=[f"{number}" for number in range(images)],
        groups=[f"{number}" for number in range(images)],
        split=np.array(["train"] * images),
        y=torch.arange(images) % CLASSES,
        target=torch.arange(images) % CLASSES,
        views=1,
        parts=Parts(parts),
        fingerprints={},
    )


def bare_epoch(images: int, width: int, batch: int, device: torch.device) -> float:
    """Seconds of the arithmetic alone: two dense convolutions and a head, forward and backward."""
    torch.manual_seed(0)
    layers = nn.ModuleList([GCN(DIMENSION, width), GCN(width, width)]).to(device)
    head = nn.Linear(width, CLASSES).to(device)
    x, y = unit(batch, NODES, DIMENSION).to(device), torch.arange(batch, device=device) % CLASSES
    edges = torch.rand(batch, NODES, NODES, 2, device=device)
    mask = torch.ones(batch, NODES, dtype=torch.bool, device=device)
    adjacency = GCN.prepare(edges, mask)
    started = perf_counter()
    for _ in range(-(-images // batch)):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            hidden = x
            for layer in layers:
                hidden = F.gelu(layer(hidden, adjacency))
            logits = head(hidden.mean(1))
        F.cross_entropy(logits.float(), y).backward()
    wait_for(device)
    return perf_counter() - started


def wait_for(device: torch.device) -> None:
    """A GPU works on when it has been asked for something: until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second of one matrix product, the best of several."""
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    x, w = (torch.randn(*shape).to(device, dtype) for shape in ((4224, 256), (256, 256)))
    best = float("inf")
    for _ in range(50):
        started = perf_counter()
        x @ w
        wait_for(device)
        best = min(best, perf_counter() - started)
    return 2 * x.numel() * 256 / best


def operations(model: nn.Module, cache: Cache, images: int = 128) -> int:
    """Floating-point operations of the matrix products of one epoch, forward and backward, counted on `images`."""
    batch = cache.batch(torch.arange(images))
    with FlopCounterMode(display=False) as counter:
        output = model.train()(batch)
        total_loss(output, batch.target, dict.fromkeys(output.losses, 1.0)).backward()
    return int(counter.get_total_flops() * len(cache.paths) / images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5994, help="training images (default: 5994)")
    parser.add_argument("--epochs", type=int, default=5, help="of which the fastest counts (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    images, device = arguments.images, torch.device(arguments.device)
    set_up_torch()
    cache = synthetic_cache(images)
    precision = "bf16" if has_bf16(device) else "fp32"
    rate = max(matrix_rate(device) for _ in range(3))
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision},", end=" ")
    print(f"{rate / 1e9:.0f} GFLOP/s in a matrix product")
    print(f"{images} images x {NODES} nodes x {DIMENSION}, {CLASSES} classes")
    default = Settings()
    bare_epoch(1280, default.hidden, default.batch_size, device)
    bare = min(bare_epoch(images, default.hidden, default.batch_size, device) for _ in range(arguments.epochs))
    print(f"{'bare two-layer convolution':41s} {bare:6.3f} s an epoch")
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("attention_pool", "attention_pool", {}),
        ("concept_graph", "concept_graph", {}),
        ("concept_graph, every part on", "concept_graph", EVERY_PART),
        ("concept_graph, every part on, width 256", "concept_graph", {**EVERY_PART, "hidden": 256}),
        ("cate", "cate", {}),
    ]
    for name, method, knobs in variants:
        module = load_method(method)
        settings = module.Settings.model_validate({"epochs": 1, "weight_decay": [0.01], **knobs})
        seen = cache.only(reads_of(method, settings)).on(device)
        fits = [module.fit(seen, settings, 0) for _ in range(arguments.epochs)]
        seconds = min(fitted.epoch_seconds for fitted in fits)
        share = operations(fits[0].model, seen) / rate / seconds
        print(f"{name:41s} {seconds:6.3f} s an epoch, {seconds / bare:.1f} x bare, arithmetic {share:4.0%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    vectors = cache.part(Nodes).nodes.nbytes / 2**20
    print(f"peak memory {peak:,.0f} MB, of which the cache's vectors are {vectors:,.0f} MB")


if __name__ == "__main__":
    main()
