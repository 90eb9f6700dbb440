"""linear_probe beside scikit-learn's logistic regression on the same Parquet, C chosen on one half of val.

Reads what make repro left, data/embed/ENCODER/images, data/index/images.parquet and data/runs/linear_probe/, with
pyarrow alone: global nodes of view 0, each dimension standardised by the training images; the halves of val are the
run's. The two should be within half a point of each other on test; they differ in how they scale and in the grid of
strengths.

    python -m bench.probe
"""

import argparse
import json
import platform
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow.parquet as pq
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fieldmark.params import load_params

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not METRICS.is_file():
        print(f"bench.probe: there is no {METRICS} yet; run make repro first")
        return
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
        scores = [float(model.score(x[split == name], y[split == name])) for name in ("choose", "val", "test")]
        best = max(best, (*scores, float(c)), key=lambda found: found[0])
    _, val, test, c = best
    print(f"scikit-learn  val {val:.4f}  test {test:.4f}  (C {c:.2g} of {len(GRID)}, {perf_counter() - start:.0f} s)")
    metrics = json.loads(METRICS.read_text(encoding="utf-8"))
    own = {name: metrics[name]["accuracy"] for name in ("val", "test")}
    print(f"linear_probe  val {own['val']:.4f}  test {own['test']:.4f}")


if __name__ == "__main__":
    main()
