"""Choose the concepts that tell classes apart: the concept bank of one encoder.

Reads   data/concepts/concepts.parquet, data/embed/NAME/text.parquet and images/, data/index/images.parquet (training
        images only); `select` of params.yaml.
Writes  data/bank/NAME.parquet (bank/1): every candidate a row, with its discriminability, and why it was dropped.
Costs   two matrix products over the training images: seconds.

Discriminability of concept k: D_k = ln C - H(p(. | k)) with p(c | k) = softmax_c(scale * S(k, c)), S the mean cosine of
concept k and the training images of class c: 0 where k says nothing, ln C where it names one class [design, after the
mutual information of LaBo, Yang et al., CVPR 2023]. Candidates are taken in falling order of D; one whose cosine to a
concept already taken is over `select.max_cosine` is a near duplicate and hands its classes to that concept. Of what is
left, a concept is kept if it is among the `select.per_class` best of any class that owns it, or if no class does. Class
names stand in the bank too (kind `name`, not kept: zero-shot reads them, labelling does not).

    python -m stages.select_concepts --encoder reef
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import store
from stages.command import UserError, encoder_parser, run
from stages.params import Select, load_params

INDEX = Path("data/index/images.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
EMBED = Path("data/embed")
BANK = Path("data/bank")
SCHEMA = "bank/1"
Row = dict[str, Any]


def class_means(folder: Path, buckets: int) -> np.ndarray:
    """Mean global embedding (C, D) of the training images of each class that has any, view 0."""
    index = store.read_table(INDEX, "index.images/1", ["image_id", "class_id", "split", "status"])
    index = index.filter((pc.field("split") == "train") & (pc.field("status") == "ok"))
    if len(index) == 0:
        raise UserError(f"{INDEX}: holds no training image; concepts are selected on them")
    columns = ["image_id", "view", "node", "vector"]
    whole = (pc.field("view") == 0) & (pc.field("node") == 0)
    # Bucket by bucket: of all nodes in memory, only the global ones stay.
    nodes = pa.concat_tables(
        store.read_table(store.bucket_path(folder, bucket), "embed.nodes/1", columns).filter(whole)
        for bucket in range(buckets)
    )
    vectors = store.vectors_of(nodes).astype(np.float32)
    row_of = {image_id: row for row, image_id in enumerate(nodes.column("image_id").to_pylist())}
    wanted = index.column("image_id").to_pylist()
    absent = [image_id for image_id in wanted if image_id not in row_of]
    if absent:
        raise UserError(f"{folder}: has no row of image {absent[0]} (and {len(absent) - 1} more); run embed_images")
    rows = np.array([row_of[image_id] for image_id in wanted])
    classes = np.array(index.column("class_id").to_pylist())
    return np.stack([vectors[rows[classes == name]].mean(axis=0) for name in np.unique(classes)])


def discriminability(similarity: np.ndarray, scale: float) -> np.ndarray:
    """D (M,) in nats of concepts from their mean cosines with each class (M, C)."""
    logits = scale * (similarity - similarity.max(axis=1, keepdims=True))
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)
    return np.maximum(np.log(similarity.shape[1]) - entropy, 0)


def choose(candidates: list[Row], vectors: np.ndarray, gains: np.ndarray, settings: Select) -> None:
    """Fill kept, drop_reason and class_ids of each candidate; `vectors` (M, D) and `gains` (M,) are theirs."""
    order = sorted(range(len(candidates)), key=lambda i: (-gains[i], candidates[i]["concept_id"]))
    taken: list[int] = []
    for i in order:
        cosines = vectors[taken] @ vectors[i]
        if taken and cosines.max() > settings.max_cosine:
            twin = candidates[taken[int(cosines.argmax())]]
            twin["class_ids"] |= candidates[i]["class_ids"]
            candidates[i].update(kept=False, drop_reason=f"near duplicate of: {twin['text']}")
        else:
            taken.append(i)
    best: dict[str, int] = {}
    for i in taken:
        row = candidates[i]
        row["kept"] = not row["class_ids"] or any(best.get(name, 0) < settings.per_class for name in row["class_ids"])
        row["drop_reason"] = None if row["kept"] else "every class that owns it has more telling concepts"
        for name in row["class_ids"]:
            best[name] = best.get(name, 0) + 1


def merge_candidates(concepts: list[Row]) -> tuple[list[Row], list[Row]]:
    """Name rows, and one candidate a distinct text with the classes that own it; both in a fixed order."""
    names: list[Row] = []
    candidates: dict[str, Row] = {}
    for row in sorted(concepts, key=lambda row: (row["class_id"] or "", row["rank"], row["concept_id"])):
        owner = set() if row["class_id"] is None else {row["class_id"]}
        entry = {"concept_id": row["concept_id"], "text": row["text"], "kind": row["kind"], "class_ids": owner}
        if row["kind"] == "name":
            names.append({**entry, "kept": False, "drop_reason": "a class name"})
        else:
            candidates.setdefault(row["concept_id"], entry)["class_ids"] |= owner
    return names, [candidates[key] for key in sorted(candidates)]


def main() -> None:
    arguments = encoder_parser(__doc__).parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    images, text_path = EMBED / arguments.encoder / "images", EMBED / arguments.encoder / "text.parquet"
    image_header = store.read_folder_header(images, "embed.nodes/1", params.dataset.buckets)
    text_header = store.read_header(text_path, "embed.text/1")
    if image_header.params["encoder"] != text_header.params["encoder"]:
        raise UserError(f"{text_path}: is of another encoder than {images}; run embed_images and embed_text again")

    texts = store.read_table(text_path, "embed.text/1", ["text_id", "vector"])
    vector_of = dict(zip(texts.column("text_id").to_pylist(), store.vectors_of(texts).astype(np.float32), strict=True))
    concepts = [row for row in store.read_table(CONCEPTS, "concepts/1").to_pylist() if row["kept"]]
    absent = [row["text"] for row in concepts if row["concept_id"] not in vector_of]
    if absent:
        raise UserError(f"{text_path}: has no vector of {absent[0]!r}; run embed_text again")
    names, candidates = merge_candidates(concepts)
    if not candidates:
        raise UserError(f"{CONCEPTS}: no concept was kept; see its drop_reason column")
    vectors = np.stack([vector_of[row["concept_id"]] for row in candidates])
    means = class_means(images, params.dataset.buckets)
    gains = discriminability(vectors @ means.T, text_header.params["logit_scale"])
    choose(candidates, vectors, gains, params.select)

    rows = names + candidates
    numbers: list[float | None] = [None] * len(names) + [float(gain) for gain in gains]
    made_by = {
        **params.select.model_dump(),
        "embed": image_header.fingerprint,
        "text": text_header.fingerprint,
        "index": store.read_header(INDEX, "index.images/1").fingerprint,
    }
    table = pa.table({
        "concept_idx": pa.array(range(len(rows)), pa.int32()),
        "concept_id": [row["concept_id"] for row in rows],
        "text": [row["text"] for row in rows],
        "class_ids": [sorted(row["class_ids"]) for row in rows],
        "kind": [row["kind"] for row in rows],
        "discriminability": pa.array(numbers, pa.float32()),
        "vector": store.vector_column(np.stack([vector_of[row["concept_id"]] for row in rows])),
        "kept": [row["kept"] for row in rows],
        "drop_reason": [row["drop_reason"] for row in rows],
    })
    path = BANK / f"{arguments.encoder}.parquet"
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by))
    print(f"{path}: {sum(row['kept'] for row in rows)} of {len(candidates)} concepts kept, {len(names)} name texts")


if __name__ == "__main__":
    run(main)
