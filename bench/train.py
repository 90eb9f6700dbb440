"""Seconds an epoch of the trained methods, beside a bare two-layer graph convolution on the same batches.

The cache is synthetic, in memory: 5,994 images (CUB's training set) x 33 nodes x 512 dimensions, 200 classes, 1,000
concepts, 16 labels a node, 5 neighbours a node. "Bare" is forward and backward of two dense convolutions of width 256
with a linear head over tensors that lie ready, in bfloat16 where the processor has it: what no trainer can beat.

    python -m bench.train [--images N]
"""

import argparse
import platform
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Bank, Cache
from training.layers import GraphConv, normalise_adjacency
from training.loop import has_bf16
from training.methods import load_method

NODES, DIMENSION, CLASSES, CONCEPTS, LABELS, NEIGHBOURS, BATCH = 33, 512, 200, 1000, 16, 5, 128


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def synthetic_cache(images: int) -> Cache:
    """Random features in the shapes of CUB; every image's graph has the same number of edges."""
    torch.manual_seed(0)
    validation = images // 10
    total = images + validation
    source = torch.arange(NODES).repeat_interleave(NEIGHBOURS)
    target = (source + torch.arange(1, NEIGHBOURS + 1).repeat(NODES)) % NODES
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])], dim=1).to(torch.int16)
    own = torch.zeros(CONCEPTS, CLASSES, dtype=torch.bool)
    own[torch.arange(CONCEPTS), torch.arange(CONCEPTS) % CLASSES] = True
    vectors = torch.cat([unit(min(1000, total - start), NODES, DIMENSION).half() for start in range(0, total, 1000)])
    return Cache(
        classes=[f"class-{number:03d}" for number in range(CLASSES)],
        paths=[f"{number}" for number in range(total)],
        split=np.array(["train"] * images + ["val"] * validation),
        y=torch.arange(total) % CLASSES,
        target=torch.arange(total) % CLASSES,
        views=1,
        vectors=vectors,
        mask=torch.ones(total, NODES, dtype=torch.bool),
        boxes=torch.rand(total, NODES, 4),
        concept_idx=torch.randint(CONCEPTS, (total, NODES, LABELS), dtype=torch.int32),
        concept_weight=torch.full((total, NODES, LABELS), 1 / LABELS, dtype=torch.float16),
        selected=torch.ones(total, NODES, dtype=torch.bool),
        density=torch.rand(total, NODES),
        edge_start=torch.arange(total) * len(edges),
        edge_count=torch.full((total,), len(edges)),
        edge_nodes=edges.repeat(total, 1),
        edge_weight=torch.rand(total * len(edges), 2).half(),
        sentences=torch.zeros(total, 0, DIMENSION, dtype=torch.float16),
        sentence_mask=torch.zeros(total, 0, dtype=torch.bool),
        bank=Bank(
            path="synthetic", K=unit(CONCEPTS, DIMENSION), own=own, kind=("visual",) * CONCEPTS,
            kept=torch.ones(CONCEPTS, dtype=torch.bool),
        ),
        fingerprints={},
    )


def bare_epoch(images: int, width: int = 256) -> float:
    """Seconds of the arithmetic alone: two dense convolutions and a head, forward and backward."""
    torch.manual_seed(0)
    layers = nn.ModuleList([GraphConv(DIMENSION, width), GraphConv(width, width)])
    head = nn.Linear(width, CLASSES)
    x, y = unit(BATCH, NODES, DIMENSION), torch.arange(BATCH) % CLASSES
    adjacency = normalise_adjacency(torch.rand(BATCH, NODES, NODES), torch.ones(BATCH, NODES, dtype=torch.bool))
    started = perf_counter()
    for _ in range(-(-images // BATCH)):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            hidden = x
            for layer in layers:
                hidden = F.gelu(layer(hidden, adjacency))
            logits = head(hidden.mean(1))
        F.cross_entropy(logits.float(), y).backward()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5994, help="training images (default: 5994)")
    images = parser.parse_args().images
    cache = synthetic_cache(images)
    precision = "bf16" if has_bf16() else "fp32"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    print(f"{images} images x {NODES} nodes x {DIMENSION}, {CLASSES} classes, batch {BATCH}")
    bare_epoch(10 * BATCH)
    bare = bare_epoch(images)
    print(f"{'bare two-layer convolution':30s} {bare:6.2f} s an epoch")
    for name in ("attention_pool", "concept_graph"):
        module = load_method(name)
        settings = module.Settings.model_validate({"epochs": 3, "batch_size": BATCH, "weight_decay": [0.01]})
        seconds = module.fit(cache, settings, 0).epoch_seconds
        print(f"{name:30s} {seconds:6.2f} s an epoch, {seconds / bare:.1f} x bare")


if __name__ == "__main__":
    main()
