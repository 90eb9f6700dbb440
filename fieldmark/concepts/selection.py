"""Which concepts tell classes apart in the space of one encoder, and visual prototypes to stand in for them.

Discriminability of concept k: D_k = ln C - H(p(. | k)) with p(c | k) = softmax_c(scale * S(k, c)), S the mean cosine of
concept k and the training images of class c: 0 where k says nothing, ln C where it names one class [design, after the
mutual information of LaBo, Yang et al., CVPR 2023]. Candidates are taken in falling order of D; one whose cosine to a
concept already taken is over `select.max_cosine` is a near duplicate and hands its classes to that concept. Of what is
left, a concept is kept if no class owns it, or if a class that does chooses it: each class takes `select.per_class` of
its own, greedily by D_k / ln C + `select.coverage` * how much better they cover all that is said of the class
(coverage.py); with coverage 0, those of the largest D. Class names stand in the bank too (kind `name`, not kept:
zero-shot reads them, labelling does not).

Prototypes are `select.per_class` k-means centres a class of local training nodes, rows of kind `proto` without text,
owned by the class of more than half of the nodes nearest to it, or by none.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.concepts.coverage import choose_greedily
from fieldmark.labels.kmeans import PER_CENTRE, find_centres, nearest_centres
from fieldmark.labels.splits import count_locals, sample_locals
from fieldmark.params import Select
from fieldmark.store import read_table, vectors_of

# Candidates compared with those taken at once: BLOCK x candidates cosines in memory.
BLOCK = 512
# A prototype stands for so many nodes at least.
NODES_PER_PROTOTYPE = 10
Row = dict[str, Any]


class Texts(NamedTuple):
    """What a bank is selected from."""

    names: list[Row]  # texts of class names
    candidates: list[Row]  # one a distinct text, with the classes that own it
    vector_of: dict[str, np.ndarray]  # (D,) float32, of each concept_id


class Selected(NamedTuple):
    """A bank: names, candidates and prototypes, in this order."""

    rows: list[Row]  # concept_id, text, kind, class_ids (a set), kept, drop_reason
    vectors: np.ndarray  # (M, D) float32
    gains: list[float | None]  # discriminability; None for names
    judged: Row  # what `judge` found


def class_means(vectors: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Mean vector (C, D) float32 of each class of vectors (n, D), classes (n,), in the order of their names."""
    number_of = {name: number for number, name in enumerate(sorted(set(classes.tolist())))}
    numbers = np.array([number_of[name] for name in classes.tolist()])
    ends = np.cumsum(np.bincount(numbers))
    members = np.split(np.argsort(numbers, kind="stable"), ends[:-1])
    return np.stack([vectors[rows].astype(np.float32).mean(axis=0) for rows in members])


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


def find_prototypes(
    images: Path, buckets: int, train: Mapping[str, str], per_class: int
) -> tuple[list[Row], np.ndarray]:
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


def read_texts(concepts_path: Path, text_path: Path, classes: Collection[str] | None = None) -> Texts:
    """Names and candidates of data/concepts/concepts.parquet, with their vectors of an encoder's text.parquet.

    With `classes`, texts of other classes are left out. Raises UserError for a text without a vector.
    """
    texts = read_table(text_path, "embed.text/1", ["text_id", "vector"])
    vector_of = dict(zip(texts.column("text_id").to_pylist(), vectors_of(texts).astype(np.float32), strict=True))
    concepts = [row for row in read_table(concepts_path, "concepts/1").to_pylist() if row["kept"]]
    if classes is not None:
        concepts = [row for row in concepts if row["class_id"] is None or row["class_id"] in classes]
    absent = [row["text"] for row in concepts if row["concept_id"] not in vector_of]
    if absent:
        raise UserError(f"{text_path}: has no vector of {absent[0]!r}; run embed_text again")
    return Texts(*merge_candidates(concepts), vector_of)


def select_bank(
    texts: Texts,
    means: np.ndarray,
    scale: float,
    settings: Select,
    judge: Callable[[np.ndarray, list[set[str]]], Row],
    make_prototypes: Callable[[], tuple[list[Row], np.ndarray]],
) -> Selected:
    """The bank of one encoder, from the mean vectors (C, D) of the training images of C classes and its logit scale.

    `judge` is told the vectors (M', D) and owners of what is kept and gives a `verdict` (gate.py). `make_prototypes`,
    as find_prototypes, is called where they stand in for concepts: by `settings.fallback`, prototypes whatever the
    verdict, auto where it is `none` or nothing is kept. Where no class owns a concept, the gate has nothing to judge:
    auto makes prototypes as well, and the words of no class stay beside them as names of what patches show.
    """
    names, candidates, vector_of = texts
    vectors = np.array([vector_of[row["concept_id"]] for row in candidates]).reshape(-1, means.shape[1])
    gains = discriminability(vectors @ means.T, scale)
    choose(candidates, vectors, gains, settings, len(means))
    kept = [i for i, row in enumerate(candidates) if row["kept"]]
    found = judge(vectors[kept], [candidates[i]["class_ids"] for i in kept])
    prototypes: list[Row] = []
    owned = any(candidates[i]["class_ids"] for i in kept)
    auto = settings.fallback == "auto"
    if settings.fallback == "prototypes" or (auto and (found["verdict"] == "none" or not owned)):
        prototypes, centres = make_prototypes()
        vectors = np.concatenate([vectors, centres])
        gains = np.concatenate([gains, discriminability(centres @ means.T, scale)])
        for i in kept if owned or not auto else ():
            candidates[i].update(kept=False, drop_reason="visual prototypes stand in for named concepts")
    of_names = np.array([vector_of[row["concept_id"]] for row in names]).reshape(-1, means.shape[1])
    numbers: list[float | None] = [None] * len(names) + [float(gain) for gain in gains]
    return Selected(names + candidates + prototypes, np.concatenate([of_names, vectors]), numbers, found)
