"""Seconds to link and to label all of CUB: 11,788 images x 33 nodes x 512 dimensions, 1,000 concepts.

The nodes are random unit vectors with random boxes. "Bare" is the one matrix product that labelling cannot do without:
all nodes with all concepts in float32. Reading and writing Parquet is not in it. The bar is 10 s for each.

    python -m bench.graphs [--images N]
"""

import argparse
import platform
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from fieldmark import store
from fieldmark.graphs.patches import graph_rows
from fieldmark.labels.labelling import Reference
from fieldmark.params import Graphs, Labels
from stages.label_patches import label

NODES, DIMENSION, CONCEPTS, BUCKETS, SCALE = 33, 512, 1000, 16, 100.0


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.standard_normal((count, DIMENSION), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_nodes(rng: np.random.Generator, images: int) -> pa.Table:
    """The embed.nodes columns that both stages read, for one bucket."""
    count = images * NODES
    corner = rng.random((count, 2), dtype=np.float32) * 0.8
    return pa.table({
        "image_id": np.repeat([f"{number:064x}" for number in range(images)], NODES),
        "view": pa.array(np.zeros(count), pa.int16()),
        "node": pa.array(np.tile(np.arange(NODES), images), pa.int16()),
        "kind": np.tile(np.array(["global"] + ["grid"] * (NODES - 1)), images),
        "x0": corner[:, 0], "y0": corner[:, 1], "x1": corner[:, 0] + 0.2, "y1": corner[:, 1] + 0.2,
        "vector": store.vector_column(unit(rng, count)),
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=11788, help="images (default: 11788)")
    images = parser.parse_args().images
    rng = np.random.default_rng(0)
    concepts = torch.from_numpy(unit(rng, CONCEPTS))
    numbers = np.arange(CONCEPTS)
    seconds = {"bare product": 0.0, "labels": 0.0, "graphs": 0.0}
    for members in np.array_split(np.arange(images), BUCKETS):
        nodes = random_nodes(rng, len(members))
        vectors = torch.from_numpy(store.vectors_of(nodes).astype(np.float32))
        for name, work in (
            ("bare product", lambda vectors=vectors: vectors @ concepts.T),
            ("labels", lambda nodes=nodes: label(nodes, concepts, numbers, SCALE, Labels(), Reference())),
            ("graphs", lambda nodes=nodes: graph_rows(nodes, Graphs())),
        ):
            started = perf_counter()
            work()
            seconds[name] += perf_counter() - started
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32")
    print(f"{images} images x {NODES} nodes x {DIMENSION}, {CONCEPTS} concepts")
    for name, spent in seconds.items():
        print(f"{name:14s} {spent:6.2f} s")


if __name__ == "__main__":
    main()
