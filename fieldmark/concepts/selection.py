"""Choose the concepts that tell classes apart: the concept bank of one encoder.

Reads   data/concepts/concepts.parquet, data/embed/NAME/text.parquet and images/, data/index/images.parquet (training
        images, and validation images for the judgement); `select` of params.yaml.
Writes  data/bank/NAME.parquet (bank/1): every candidate a row, with its discriminability, and why it was dropped;
        data/bank/NAME.json: how many were kept, and whether they carry signal.
Costs   two matrix products over the training images and one of candidates with candidates: seconds for ten thousand.

Discriminability of concept k: D_k = ln C - H(p(. | k)) with p(c | k) = softmax_c(scale * S(k, c)), S the mean cosine of
concept k and the training images of class c: 0 where k says nothing, ln C where it names one class [design, after the
mutual information of LaBo, Yang et al., CVPR 2023]. Candidates are taken in falling order of D; one whose cosine to a
concept already taken is over `select.max_cosine` is a near duplicate and hands its classes to that concept. Of what is
left, a concept is kept if no class owns it, or if a class that does chooses it: each class takes `select.per_class` of
its own, greedily by D_k / ln C + `select.coverage` * how much better they cover all that is said of the class
(concepts/coverage.py); with coverage 0, those of the largest D. Class names stand in the bank too (kind `name`, not
kept: zero-shot reads them, labelling does not).

What is kept is judged on validation images (concepts/gate.py). Concepts without signal are told; `select.fallback` auto
then puts prototypes in their place, and prototypes does so whatever the verdict: per_class k-means centres a class of
local training nodes, rows of kind `proto` without text, owned by the class of more than half of the nodes nearest to
it, or by none.

    python -m stages.select_concepts --encoder reef
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from fieldmark import store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.concepts import gate
from fieldmark.concepts.coverage import choose_greedily
from fieldmark.labels.kmeans import PER_CENTRE, find_centres, nearest_centres
from fieldmark.labels.splits import count_locals, read_globals, read_split, sample_locals
from fieldmark.params import Select, load_params

INDEX = Path("data/index/images.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
EMBED = Path("data/embed")
BANK = Path("data/bank")
SCHEMA = "bank/1"
# Candidates compared with those taken at once: BLOCK x candidates cosines in memory.
BLOCK = 512
# A prototype stands for so many nodes at least.
NODES_PER_PROTOTYPE = 10
Row = dict[str, Any]


def class_means(vectors: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Mean vector (C, D) of each class of vectors (n, D), classes (n,), in the order of their names."""
    return np.stack([vectors[classes == name].mean(axis=0) for name in np.unique(classes.astype(str))])


def discriminability(similarity: np.ndarray, scale: float) -> np.ndarray:
    """D (M,) in nats of concepts from their mean cosines with each class (M, C)."""
    logits = scale * (similarity - similarity.max(axis=1, keepdims=True))
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)
    return np.maximum(np.log(similarity.shape[1]) - entropy, 0)


def find_duplicates(vectors: np.ndarray, order: list[int], max_cosine: float) -> dict[int, int]:
    """Of vectors (M, D), taken in `order`, those nearer to one already taken than max_cosine, and the nearest such."""
    taken: list[int] = []
    twin_of: dict[int, int] = {}
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        before = vectors[block] @ vectors[taken].T if taken else np.full((len(block), 1), -np.inf)
        nearest, largest = before.argmax(axis=1), before.max(axis=1)
        within = vectors[block] @ vectors[block].T
        fresh: list[int] = []  # positions in the block of what it adds
        known = len(taken)
        for row, i in enumerate(block):
            twin, cosine = (taken[nearest[row]] if known else -1), largest[row]
            if fresh and within[row, fresh].max() > cosine:
                place = fresh[int(within[row, fresh].argmax())]
                twin, cosine = block[place], within[row, place]
            if cosine > max_cosine:
                twin_of[i] = twin
            else:
                fresh.append(row)
                taken.append(i)
    return twin_of


def choose(candidates: list[Row], vectors: np.ndarray, gains: np.ndarray, settings: Select, classes: int) -> None:
    """Fill kept, drop_reason and class_ids of each candidate; `vectors` (M, D) and `gains` (M,) are theirs.

    `classes` is the number C that the gains, at most ln C, are of.
    """
    order = sorted(range(len(candidates)), key=lambda i: (-gains[i], candidates[i]["concept_id"]))
    twin_of = find_duplicates(vectors, order, settings.max_cosine)
    for i, twin in twin_of.items():
        candidates[twin]["class_ids"] |= candidates[i]["class_ids"]
        candidates[i].update(kept=False, drop_reason=f"near duplicate of: {candidates[twin]['text']}")
    members: dict[str, list[int]] = {}
    for i in order:
        if i not in twin_of:
            kept = not candidates[i]["class_ids"]
            reason = None if kept else "every class that owns it has more telling concepts"
            candidates[i].update(kept=kept, drop_reason=reason)
            for name in candidates[i]["class_ids"]:
                members.setdefault(name, []).append(i)
    worth = gains / (np.log(classes) or 1.0)
    for of_class in members.values():
        for place in choose_greedily(settings.per_class, worth[of_class], vectors[of_class], settings.coverage):
            candidates[of_class[place]].update(kept=True, drop_reason=None)


def find_prototypes(images: Path, buckets: int, train: dict[str, str], per_class: int) -> tuple[list[Row], np.ndarray]:
    """Rows of kind proto, and their unit vectors (K, D): k-means of the training images' local nodes.

    Raises UserError where images have none.
    """
    count = count_locals(images, buckets, train)
    if count == 0:
        raise UserError(
            f"{images}: images have no node but the global one, and prototypes are made of the others;"
            " set embed.tokens, embed.grids or embed.crops, or select.fallback to none"
        )
    wanted = max(1, min(per_class * len(set(train.values())), count // NODES_PER_PROTOTYPE))
    vectors, classes = sample_locals(images, buckets, train, PER_CENTRE * wanted / count)
    nodes = torch.from_numpy(vectors)
    centres = find_centres(nodes, wanted)
    number = nearest_centres(nodes, centres)
    nearest: list[Counter[str]] = [Counter() for _ in centres]
    for prototype, name in zip(number.tolist(), classes, strict=True):
        nearest[prototype][name] += 1
    rows: list[Row] = []
    for counts in nearest:
        owners = {name for name, size in counts.items() if 2 * size > counts.total()}
        row = {"concept_id": None, "text": None, "kind": "proto", "class_ids": owners}
        rows.append({**row, "kept": True, "drop_reason": None})
    return rows, F.normalize(centres, dim=1).numpy()


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


def read_candidates(text_path: Path) -> tuple[list[Row], list[Row], dict[str, np.ndarray]]:
    """Name rows and candidates (merge_candidates), and the vector (D,) of each concept_id."""
    texts = store.read_table(text_path, "embed.text/1", ["text_id", "vector"])
    vector_of = dict(zip(texts.column("text_id").to_pylist(), store.vectors_of(texts).astype(np.float32), strict=True))
    concepts = [row for row in store.read_table(CONCEPTS, "concepts/1").to_pylist() if row["kept"]]
    absent = [row["text"] for row in concepts if row["concept_id"] not in vector_of]
    if absent:
        raise UserError(f"{text_path}: has no vector of {absent[0]!r}; run embed_text again")
    names, candidates = merge_candidates(concepts)
    return names, candidates, vector_of


def warn(found: Row, fallback: str) -> None:
    """Say on stderr where concepts carry no signal, and what to do."""
    if found["verdict"] in ("none", "weak") and fallback == "none":
        print(
            f"warning: {gate.VERDICTS[found['verdict']]}; set select.fallback to prototypes, or to auto, which acts on"
            " no signal at all, to put visual prototypes in their place",
            file=sys.stderr,
        )


def main() -> None:
    arguments = encoder_parser(__doc__).parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    settings, buckets = params.select, params.dataset.buckets
    images, text_path = EMBED / arguments.encoder / "images", EMBED / arguments.encoder / "text.parquet"
    image_header = store.read_folder_header(images, "embed.nodes/1", buckets)
    text_header = store.read_header(text_path, "embed.text/1")
    if image_header.params["encoder"] != text_header.params["encoder"]:
        raise UserError(f"{text_path}: is of another encoder than {images}; run embed_images and embed_text again")
    names, candidates, vector_of = read_candidates(text_path)
    if not candidates and settings.fallback == "none":
        raise UserError(f"{CONCEPTS}: no concept was kept; see its drop_reason column, or set select.fallback")
    train_images = read_split(INDEX, "train")
    if not train_images:
        raise UserError(f"{INDEX}: holds no training image; concepts are selected on them")
    train = read_globals(images, buckets, train_images)
    val = read_globals(images, buckets, read_split(INDEX, "val"))
    means, scale = class_means(*train), text_header.params["logit_scale"]
    vectors = np.array([vector_of[row["concept_id"]] for row in candidates]).reshape(-1, means.shape[1])
    gains = discriminability(vectors @ means.T, scale)
    choose(candidates, vectors, gains, settings, len(means))

    kept = [i for i, row in enumerate(candidates) if row["kept"]]
    found = gate.judge(train, val, vectors[kept], [candidates[i]["class_ids"] for i in kept])
    print(f"{arguments.encoder}: {gate.say(found)}")
    warn(found, settings.fallback)
    prototypes: list[Row] = []
    if settings.fallback == "prototypes" or (settings.fallback == "auto" and (found["verdict"] == "none" or not kept)):
        prototypes, centres = find_prototypes(images, buckets, train_images, settings.per_class)
        vectors = np.concatenate([vectors, centres])
        gains = np.concatenate([gains, discriminability(centres @ means.T, scale)])
        for i in kept:
            candidates[i].update(kept=False, drop_reason="visual prototypes stand in for named concepts")

    rows = names + candidates + prototypes
    numbers: list[float | None] = [None] * len(names) + [float(gain) for gain in gains]
    of_names = np.array([vector_of[row["concept_id"]] for row in names]).reshape(-1, means.shape[1])
    made_by = {
        **settings.model_dump(),
        "embed": image_header.fingerprint,
        "text": text_header.fingerprint,
        "index": store.read_header(INDEX, "index.images/1").fingerprint,
    }
    table = pa.table({
        "concept_idx": pa.array(range(len(rows)), pa.int32()),
        "concept_id": pa.array([row["concept_id"] for row in rows], store.TEXT),
        "text": pa.array([row["text"] for row in rows], store.TEXT),
        "class_ids": pa.array([sorted(row["class_ids"]) for row in rows], store.items(store.TEXT)),
        "kind": [row["kind"] for row in rows],
        "discriminability": pa.array(numbers, pa.float32()),
        "vector": store.vector_column(np.concatenate([of_names, vectors])),
        "kept": [row["kept"] for row in rows],
        "drop_reason": pa.array([row["drop_reason"] for row in rows], store.TEXT),
    })
    path = BANK / f"{arguments.encoder}.parquet"
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by))
    still_kept = sum(row["kept"] for row in candidates)
    counts = {"candidates": len(candidates), "kept": still_kept, "prototypes": len(prototypes)}
    metrics = json.dumps({**counts, "judged": found}, indent=2)
    store.write_text(path.with_suffix(".json"), metrics + "\n")
    made = f", {len(prototypes)} prototypes made" if prototypes else ""
    print(f"{path}: {still_kept} of {len(candidates)} concepts kept, {len(names)} name texts{made}")


if __name__ == "__main__":
    run(main)
