"""Seconds an epoch of graph networks over links, beside the same network by torch-geometric's own passing of messages.

The graph is synthetic, in memory: N images of D numbers, each hearing so many others drawn at random; 40 classes; two
layers of width 256 as link_gnn has them, in float32. An epoch is one pass over the training images with its updates; of
several the fastest counts, since the machine may have other work.

    pyg, gather and scatter   GCNConv and SAGEConv on an edge list, one step for the whole graph
    pyg, sparse matrix        the same on a sparse matrix (torch.sparse, CSR), which PyG multiplies by in one go
    link_gnn, full batch      one step for all images: they send as they stand in the batch
    link_gnn, batches         steps of --batch images with all that reaches them, of which --fanout links into each node

Batches take more products than the full batch: of b images with f links into each they lay out up to b (1 + f + f f)
nodes a step. They are for graphs whose full batch does not fit into memory.

    python -m bench.link_epochs [--images N] [--neighbours K] [--epochs E] [--batch B] [--fanout F] [--device cpu|cuda]
"""

import argparse
import platform
import resource
import warnings
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.devices import set_up_torch
from training.data import Cache, Parts
from training.data.links import Incoming, Links
from training.data.nodes import Globals
from training.links import Memory
from training.loop import decayed_groups
from training.methods import link_gnn
from training.methods.link_gnn import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import GCNConv, SAGEConv

CLASSES, WIDTH = 40, 256


def synthetic_cache(images: int, dimension: int, neighbours: int) -> Cache:
    """Random vectors, and as many random links into each image."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(images, dimension, generator=generator), dim=-1).half()
    source = torch.randint(images, (images * neighbours,), generator=generator)
    edges = Incoming(torch.arange(images + 1) * neighbours, source, torch.rand(len(source), generator=generator))
    y = torch.randint(CLASSES, (images,), generator=generator)
    names = [f"{number}" for number in range(images)]
    parts = Parts([Globals(vectors), Links(torch.arange(images), {"near": edges})])
    return Cache(
        classes=[f"class-{number:02d}" for number in range(CLASSES)], paths=names, image_ids=names, groups=names,
        split=np.array(["train"] * images), y=y, target=y, views=1, parts=parts, fingerprints={},
    )  # fmt: skip


class Plain(nn.Module):
    """The network of link_gnn with PyG's layers: x = x + dropout(GELU(conv(LN(x)))), twice."""

    def __init__(self, conv: type[nn.Module], dimension: int, dropout: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dimension, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList(conv(WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, passed: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        x = self.enter(x)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + self.dropout(F.gelu(passed(layer, norm(x))))
        out: Tensor = self.leave(self.dropout(self.norms[2](x)))
        return out


def plain_epoch(cache: Cache, kind: str, sparse: bool) -> float:
    """Seconds of one step of PyG's layers on the whole graph. What does not change by training is made before."""
    settings = Settings()
    memory = Memory.of(cache, settings)
    hop, count = memory.whole(), len(memory.key)
    edges = torch.stack([hop.sender, hop.receiver])
    matrix = torch.sparse_csr_tensor(memory.start, memory.source, memory.weight, (count, count))

    def passed(layer: nn.Module, x: Tensor) -> Tensor:
        given = (matrix,) if sparse else (edges,) if kind == "sage" else (edges, memory.weight)
        out: Tensor = layer(x, *given)
        return out

    torch.manual_seed(0)
    x = cache.globals(torch.arange(count))
    model = Plain(GCNConv if kind == "gcn" else SAGEConv, x.shape[1], settings.dropout).to(x.device)
    optimiser = torch.optim.AdamW(decayed_groups(model, 0.01), lr=1e-3, fused=True)
    started = perf_counter()
    loss = F.cross_entropy(model(x, passed), cache.target)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return perf_counter() - started


def our_epoch(cache: Cache, kind: str, batch: int, fanout: int | None) -> float:
    settings = Settings.model_validate(
        {"conv": kind, "epochs": 1, "batch_size": batch, "fanout": fanout, "weight_decay": [0.01], "precision": "fp32"}
    )
    return link_gnn.fit(cache, settings, 0).epoch_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="training images (default: 100000)")
    parser.add_argument("--dimension", type=int, default=512, help="numbers an image (default: 512)")
    parser.add_argument("--neighbours", type=int, default=10, help="links into each image (default: 10)")
    parser.add_argument("--epochs", type=int, default=3, help="of which the fastest counts (default: 3)")
    parser.add_argument("--batch", type=int, default=4096, help="images a step, in batches (default: 4096)")
    parser.add_argument("--fanout", type=int, default=5, help="links into a node that a step draws (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    device, images = torch.device(arguments.device), arguments.images
    set_up_torch()
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")  # of PyG's way, each run anew
    cache = synthetic_cache(images, arguments.dimension, arguments.neighbours).on(device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, deterministic")
    print(f"{images:,} images x {arguments.dimension}, {arguments.neighbours} links into each; width {WIDTH}, 2 layers")
    batches = f"link_gnn, batches of {arguments.batch:,}, fanout {arguments.fanout}"
    for kind in ("gcn", "sage"):
        rows: dict[str, Callable[[], float]] = {
            "pyg, gather and scatter": lambda kind=kind: plain_epoch(cache, kind, sparse=False),  # type: ignore[misc]
            "pyg, sparse matrix": lambda kind=kind: plain_epoch(cache, kind, sparse=True),  # type: ignore[misc]
            "link_gnn, full batch": lambda kind=kind: our_epoch(cache, kind, images, None),  # type: ignore[misc]
            batches: lambda kind=kind: our_epoch(cache, kind, arguments.batch, arguments.fanout),  # type: ignore[misc]
        }
        first: float | None = None
        for name, epoch in rows.items():
            seconds = min(epoch() for _ in range(arguments.epochs))
            first = seconds if first is None else first
            print(f"{kind:5s} {name:42s} {seconds:7.2f} s an epoch, {seconds / first:5.2f} x the first")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
