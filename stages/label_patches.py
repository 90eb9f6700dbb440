"""Say what each node of each image shows, in concepts, and which nodes and concepts are worth a closer look.

Reads   data/embed/NAME/images/, data/bank/NAME.parquet; `labels` of params.yaml.
Writes  data/labels/NAME/bNNN.parquet (labels/1).
Costs   one matrix product of all nodes with the kept concepts: seconds for ten thousand images.

For node n with unit vector l_n and the kept concepts K_k (methods.md section 4, stages D and E [design]):
  P_n = softmax_k(scale * l_n . K_k / labels.temperature), of which the `labels.top` largest are stored;
  entropy H_n = -sum_k P_nk ln P_nk, in nats;  density = 1 - H_n / ln M: 1 where one concept explains the node, 0 where
  all do equally;
  selected: node 0, and `labels.select_locals` others taken one by one at the maximum of density_n - redundancy * r_n,
  r_n the largest l_n . l_m over those taken before, node 0 aside, and never under 0 (maximal marginal relevance);
  selected_concepts, on node 0: the `labels.select_concepts` largest of P_0k + sum over selected n of density_n P_nk.

    python -m stages.label_patches --encoder reef
"""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from stages import store
from stages.command import UserError, encoder_parser, run
from stages.params import Labels, load_params

EMBED = Path("data/embed")
BANK = Path("data/bank")
LABELS = Path("data/labels")
SCHEMA = "labels/1"
# Nodes labelled at once: nodes x concepts floats in memory.
CHUNK = 8_192


def concept_weights(nodes: Tensor, concepts: Tensor, scale: float) -> Tensor:
    """P (n, M): softmax over concepts of scale * cosine."""
    return torch.softmax(scale * nodes @ concepts.T, dim=1)


def entropy_of(weights: Tensor) -> Tensor:
    """Shannon entropy in nats of each row."""
    return torch.special.entr(weights).sum(dim=1)


def select_nodes(vectors: Tensor, density: Tensor, count: int, redundancy: float) -> Tensor:
    """Which nodes are selected: (B, N) bool from vectors (B, N, D) and density (B, N), node 0 always, by greedy MMR."""
    images, nodes, _ = vectors.shape
    cosine = vectors @ vectors.transpose(1, 2)
    selected = torch.zeros(images, nodes, dtype=torch.bool)
    selected[:, 0] = True
    nearest = torch.zeros(images, nodes)
    rows = torch.arange(images)
    for _ in range(min(count, nodes - 1)):
        score = (density - redundancy * nearest).masked_fill(selected, -math.inf)
        chosen = score.argmax(dim=1)
        selected[rows, chosen] = True
        nearest = torch.maximum(nearest, cosine[rows, chosen])
    return selected


def score_concepts(weights: Tensor, density: Tensor, selected: Tensor) -> Tensor:
    """How much the selected nodes show of each concept: (B, M) from P (B, N, M); node 0 counts fully."""
    share = torch.where(selected, density, 0.0)
    share[:, 0] = 1.0
    return torch.einsum("bn,bnm->bm", share, weights)


def label(table: pa.Table, concepts: Tensor, numbers: np.ndarray, scale: float, settings: Labels) -> pa.Table:
    """The labels rows of a bucket's nodes; `numbers` (M,) are the concept_idx of `concepts` (M, D)."""
    if len(table) == 0:
        return store.arrow_schema(SCHEMA).empty_table()
    keys = table.select(["image_id", "view", "node"])
    vectors = torch.from_numpy(store.vectors_of(table).astype(np.float32))
    # A view's nodes stand together and begin with node 0; every view of an encoder has the same number of them.
    starts = np.flatnonzero(table.column("node").to_numpy() == 0)
    size = len(table) // len(starts)
    if not np.array_equal(starts, np.arange(len(starts)) * size) or len(starts) * size != len(table):
        raise UserError("data/embed: views of one encoder differ in their nodes; run embed_images again")
    top = min(settings.top, len(concepts))
    names = ("idx", "weight", "entropy", "density", "selected", "shown")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    step = max(1, CHUNK // size)
    for start in range(0, len(starts), step):
        nodes = vectors[start * size : (start + step) * size]
        weights = concept_weights(nodes, concepts, scale / settings.temperature)
        entropy = entropy_of(weights)
        most = math.log(len(concepts)) or 1.0  # one concept explains all: H is 0, density 1
        density = (1 - entropy / most).clamp(0, 1)
        grouped = density.reshape(-1, size)
        by_view = nodes.reshape(-1, size, nodes.shape[1])
        selected = select_nodes(by_view, grouped, settings.select_locals, settings.redundancy)
        shown = score_concepts(weights.reshape(-1, size, len(concepts)), grouped, selected)
        weight, idx = weights.topk(top, dim=1)
        parts["idx"].append(numbers[idx.numpy()])
        parts["weight"].append(weight.numpy())
        parts["entropy"].append(entropy.numpy())
        parts["density"].append(density.numpy())
        parts["selected"].append(selected.reshape(-1).numpy())
        best = shown.topk(min(settings.select_concepts, len(concepts)), dim=1).indices
        parts["shown"].append(numbers[best.numpy()])
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    shown_rows: list[list[int] | None] = [None] * len(table)
    for row, chosen in zip(starts, columns["shown"].tolist(), strict=True):
        shown_rows[row] = chosen
    return pa.table({
        **{name: keys.column(name) for name in keys.column_names},
        "concept_idx": list_column(columns["idx"].astype(np.int32)),
        "concept_weight": list_column(columns["weight"].astype(np.float16)),
        "entropy": columns["entropy"].astype(np.float32),
        "density": columns["density"].astype(np.float32),
        "selected": columns["selected"],
        "ring_gains": pa.nulls(len(table), store.items(store.FLOAT)),
        "selected_concepts": pa.array(shown_rows, store.items(store.INT)),
    })


def list_column(values: np.ndarray) -> pa.Array:
    """A (n, k) array as a column of n lists of k."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def main() -> None:
    arguments = encoder_parser(__doc__).parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    buckets = params.dataset.buckets
    images, bank_path = EMBED / arguments.encoder / "images", BANK / f"{arguments.encoder}.parquet"
    embed_mark = store.read_folder_header(images, "embed.nodes/1", buckets).fingerprint
    bank_header = store.read_header(bank_path, "bank/1")
    if bank_header.params["embed"] != embed_mark:
        raise UserError(f"{bank_path}: was selected on other embeddings than {images} holds; run select_concepts again")
    text_header = store.read_header(EMBED / arguments.encoder / "text.parquet", "embed.text/1")
    bank = store.read_table(bank_path, "bank/1", ["concept_idx", "vector", "kept"]).filter(pc.field("kept"))
    concepts = torch.from_numpy(store.vectors_of(bank).astype(np.float32))
    numbers = bank.column("concept_idx").to_numpy()

    made_by = {**params.labels.model_dump(), "embed": embed_mark, "bank": bank_header.fingerprint}
    mark = store.fingerprint(SCHEMA, made_by)
    folder = LABELS / arguments.encoder
    columns = ["image_id", "view", "node", "vector"]
    for bucket in tqdm(range(buckets), desc=f"label {arguments.encoder}", unit="bucket"):
        nodes = store.read_table(store.bucket_path(images, bucket), "embed.nodes/1", columns)
        labels = label(nodes, concepts, numbers, text_header.params["logit_scale"], params.labels)
        store.write_table(labels, store.bucket_path(folder, bucket), SCHEMA, made_by, mark)
    store.remove_strays(folder, buckets)
    print(f"{folder}: nodes labelled with {len(concepts)} concepts")


if __name__ == "__main__":
    run(main)
