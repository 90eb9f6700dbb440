"""The probe family: ridge on long vectors, and linear_probe beside scikit-learn's logistic regression.

Ridge: its fit with the whole grid of penalties, vectors read from a cache in memory, 3,000 random images of 100 classes
by 9,536 dimensions (pooled and isqrt of an EfficientNet), which are more dimensions than rows. The bar is 30 s on two
cores; processor seconds stand beside, for a machine that has other work.

--streamed N: that alone, for N images by 8,256 dimensions (isqrt of 128 directions) and 200 classes, which are drawn
as they are read, so that the cache takes no memory, and the peak of the process. N over 8,257 makes it read the rows in
chunks; then the peak no longer grows with N, but for a few numbers an image. It takes minutes.

Without it, and where make repro has been: linear_probe beside scikit-learn on the same Parquet, C chosen on one half of
val. Reads data/embed/ENCODER/images, data/index/images.parquet and data/runs/linear_probe/ with pyarrow alone: global
nodes of view 0, each dimension standardised by the training images; the halves of val are the run's. The two should be
within half a point of each other on test; they differ in how they scale and in the grid of strengths.

    python -m bench.probe [--streamed N]
"""

import argparse
import json
import platform
import resource
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fieldmark.params import load_params
from training.data import Cache, Part, Parts
from training.data.moments import Moments, NamedVectors
from training.methods import ridge
from training.methods.linear_probe import Probe

LONG = {"pooled": 1280, "isqrt": 8256}  # dimensions by feature
GRID = np.logspace(-5, 1, 13)
RUN = Path("data/runs/linear_probe")
METRICS = RUN / "metrics.json"


def read_globals(encoder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors (n, D), class_ids (n) and splits (n), of val `choose` or `val`, of the usable images."""
    index = pq.read_table("data/index/images.parquet", filters=[("status", "==", "ok")]).to_pylist()
    predicted = pq.read_table(RUN / "predictions.parquet", columns=["path", "split"]).to_pylist()
    split_of = {row["path"]: row["split"] for row in predicted}
    of_image = {row["image_id"]: (row["class_id"], split_of[row["path"]]) for row in index}
    nodes = pq.read_table(f"data/embed/{encoder}/images", columns=["image_id", "vector"], partitioning=None,
                          filters=[("view", "==", 0), ("node", "==", 0)])  # fmt: skip
    vectors = np.array(nodes["vector"].to_pylist(), dtype=np.float64)
    classes, splits = zip(*(of_image[image_id] for image_id in nodes["image_id"].to_pylist()), strict=True)
    return vectors, np.array(classes), np.array(splits)


@dataclass(frozen=True)
class Drawn(Part):
    """Random vectors in the place of isqrt, drawn when they are read: for the same first row the same each time."""

    dimension: int

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(rows[0]) if len(rows) else 0)
        return {"moments/isqrt": torch.randn(len(rows), self.dimension, generator=generator)}


def cache_of(part: Part, images: int, classes: int) -> Cache:
    """Training images alone."""
    y, names = torch.arange(images) % classes, [str(number) for number in range(images)]
    return Cache(
        classes=[str(number) for number in range(classes)],
        paths=names,
        image_ids=names,
        groups=names,
        split=np.array(["train"] * images),
        y=y,
        target=y,
        views=1,
        parts=Parts([part]),
        fingerprints={},
    )


def time_ridge(cache: Cache, features: list[str]) -> None:
    wall, processor = perf_counter(), process_time()
    settings = ridge.Settings(features=features)
    fitted = ridge.fit(cache, settings, 0)
    seconds, spent = perf_counter() - wall, process_time() - processor
    size = cast(nn.Linear, cast(Probe, fitted.model).layer).in_features
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"ridge  {len(cache.paths):,} x {size:,}, {len(settings.penalty)} penalties: {seconds:.0f} s, {spent:.0f} s of"
        f" processors, {torch.get_num_threads()} threads; peak of the process {peak:.1f} GiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streamed", type=int, metavar="N", help="images of the fit that holds none of them")
    arguments = parser.parse_args()
    if arguments.streamed is not None:
        time_ridge(cache_of(Drawn(LONG["isqrt"]), arguments.streamed, 200), ["isqrt"])
        return
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(3000, size, generator=generator).half() for name, size in LONG.items()}
    time_ridge(cache_of(Moments(NamedVectors(vectors)), 3000, 100), list(LONG))
    if METRICS.is_file():
        beside_scikit_learn()
    else:
        print(f"bench.probe: there is no {METRICS} yet, so nothing to hold linear_probe against; run make repro first")


def beside_scikit_learn() -> None:
    encoder = load_params().train.runs["linear_probe"].encoder
    x, y, split = read_globals(encoder)
    x = StandardScaler().fit(x[split == "train"]).transform(x)
    count = {name: int((split == name).sum()) for name in ("train", "choose", "val", "test")}
    print(f"{encoder}: {count}, {x.shape[1]} dimensions, {len(set(y))} classes; {platform.machine()}")
    start = perf_counter()
    best = (-1.0, 0.0, 0.0, 0.0)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for c in GRID:
        model = LogisticRegression(C=c, max_iter=500).fit(x[split == "train"], y[split == "train"])
        of = {name: float(model.score(x[split == name], y[split == name])) for name in ("choose", "val", "test")}
        best = max(best, (of["choose"], of["val"], of["test"], float(c)), key=lambda found: found[0])
    _, val, test, c = best
    print(f"scikit-learn  val {val:.4f}  test {test:.4f}  (C {c:.2g} of {len(GRID)}, {perf_counter() - start:.0f} s)")
    metrics = json.loads(METRICS.read_text(encoding="utf-8"))
    own = {name: metrics[name]["accuracy"] for name in ("val", "test")}
    print(f"linear_probe  val {own['val']:.4f}  test {own['test']:.4f}")


if __name__ == "__main__":
    main()
