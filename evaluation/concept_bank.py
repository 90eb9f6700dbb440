"""The concept bank as the report shows it: owners, what became of each text and why, where it is seen, what it tells.

How much a picture shows a concept is the highest weight that label_patches gives it in any node of the picture. On
pictures of val, both halves, a concept `finds` its owners where their pictures show it more than others' do: the area
under the ROC curve, 0.5 by chance. Selection read training images alone, so val is a check of it. Two classes are told
apart by concepts whose mean weight over training images differs most, in standard deviations [Cohen's d].
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from evaluation.gallery import members, read_boxes, short
from evaluation.runs import Row, query
from training.metrics import Floats, Ints

TOP_PATCHES = 4  # pictures shown of a concept
TELLING = 4  # concepts shown of either class of a pair
LEAST = 0.05  # standard deviations: less tells nothing
SPEAKING = 4  # concepts shown that speak in a picture for one of two classes
CHANCE = 0.55  # finds no more than this: as good as chance


def count_concepts(concepts: pa.Table, bank: pa.Table) -> Row:
    """How many concepts were written and are kept, and why the others were dropped. Class names are not counted."""
    count = "SELECT count(*), count(*) FILTER (kept) FROM t WHERE kind <> 'name'"
    [(written, clean)] = query(count, t=concepts)
    [(candidates, kept)] = query(count, t=bank)
    # A reason may name the concept that was preferred behind a colon: "near duplicate of: a fish with ..."
    dropped = query(
        """SELECT stage, count(*) AS n,
                  regexp_replace(split_part(coalesce(drop_reason, 'no reason given'), ':', 1), ' of$', ' of another')
                  AS reason
           FROM (
             SELECT 'clean_concepts' AS stage, drop_reason FROM concepts WHERE NOT kept AND kind <> 'name'
             UNION ALL
             SELECT 'select_concepts', drop_reason FROM bank WHERE NOT kept AND kind <> 'name'
           ) GROUP BY stage, reason ORDER BY stage, n DESC, reason""",
        concepts=concepts,
        bank=bank,
    )
    return {"written": written, "clean": clean, "candidates": candidates, "kept": kept, "dropped": dropped}


class Seen(NamedTuple):
    """How much pictures show M concepts: n pictures one by one, training images by class."""

    weight: Floats  # (n, M)
    node: Ints  # (n, M): where the weight is highest
    mean: Floats  # (C, M) over training images
    deviation: Floats  # (C, M)


def see(
    data: Path,
    encoder: str,
    buckets: int,
    pictures: Sequence[str],
    train: Mapping[str, int],
    classes: int,
    place: Mapping[int, int],
) -> Seen:
    """Read labels/1 of pictures and of training images (image_id -> class), a bucket at a time.

    `place` says which column a concept_idx takes.
    """
    row = {image_id: number for number, image_id in enumerate(pictures)}
    to_column = np.zeros(max(place, default=0) + 1, dtype=np.int64)
    to_column[list(place)] = list(place.values())
    width = len(place)
    weight, node = np.zeros((len(row), width), np.float32), np.zeros((len(row), width), np.int16)
    sums, squares, count = np.zeros((classes, width)), np.zeros((classes, width)), np.zeros(classes)
    columns = ["image_id", "view", "node", "concept_idx", "concept_weight"]
    for table in members(data / f"labels/{encoder}", "labels/1", buckets, {*row, *train}, columns):
        table = table.combine_chunks()
        ids, own = np.unique(np.array(table["image_id"].to_pylist(), dtype=object), return_inverse=True)
        lists = table["concept_idx"].combine_chunks()
        lengths = np.asarray(lists.value_lengths())
        values = table["concept_weight"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        concept = to_column[lists.flatten().to_numpy(zero_copy_only=False)]
        image, at = np.repeat(own, lengths), np.repeat(table["node"].to_numpy(), lengths)
        # In this order the last value written to a cell is the highest weight, of the lowest node that has it.
        order = np.lexsort((-at, values))
        best, where = np.zeros((len(ids), width), np.float32), np.zeros((len(ids), width), np.int16)
        best[image[order], concept[order]] = values[order]
        where[image[order], concept[order]] = at[order]
        for number, image_id in enumerate(ids.tolist()):
            if image_id in row:
                weight[row[image_id]], node[row[image_id]] = best[number], where[number]
            if image_id in train:
                label = train[image_id]
                sums[label] += best[number]
                squares[label] += best[number] ** 2.0
                count[label] += 1
    images = np.maximum(count, 1)[:, None]
    mean = sums / images
    return Seen(weight, node, mean, np.sqrt(np.maximum(squares / images - mean**2, 0)))


def area_under_roc(own: Floats, others: Floats) -> float | None:
    """How often a value of `own` is above one of `others`, a tie counting half; None where either is empty."""
    if not own.size or not others.size:
        return None
    ordered = np.sort(others)
    below = np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")
    return float(below.mean() / (2 * ordered.size))


def telling_apart(seen: Seen, a: int, b: int, allowed: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """Of the concepts `allowed`, the TELLING that class a shows most above class b, and those of b above a."""
    spread = np.sqrt((seen.deviation[a] ** 2 + seen.deviation[b] ** 2) / 2)
    difference = np.divide(seen.mean[a] - seen.mean[b], spread, out=np.zeros_like(spread), where=spread > 0)

    def best(sign: int) -> list[Row]:
        ranked = sorted(allowed, key=lambda concept: -sign * difference[concept])
        above = [concept for concept in ranked if sign * difference[concept] >= LEAST]
        return [{"concept": one, "by": round(float(sign * difference[one]), 1)} for one in above[:TELLING]]

    return best(1), best(-1)


def speaking(weight: Floats, owners: Sequence[Sequence[int]], a: int, b: int) -> list[list[list[int]]]:
    """For class a and for class b: concepts of that one alone that a picture shows most, weight (M,) in thousandths."""

    def of(one: int, other: int) -> list[list[int]]:
        own = [concept for concept in np.flatnonzero(weight).tolist() if one in owners[concept]]
        own = sorted((concept for concept in own if other not in owners[concept]), key=lambda at: -weight[at])
        return [[concept, round(1000 * float(weight[concept]))] for concept in own[:SPEAKING]]

    return [of(a, b), of(b, a)]


def concept_rows(
    concepts: pa.Table, bank: Sequence[Row], seen: Seen, y: Ints, pictures: Sequence[str], label: Mapping[str, int]
) -> tuple[list[Row], list[tuple[int, int, int]]]:
    """The page's list of concepts: those of the bank in its order, then those that cleaning dropped.

    `y` (n,) are the classes of the n `pictures`, `label` the positions of class_ids. The second value says which
    patches stand for a concept: (concept, picture, node), those of highest weight in pictures of its own first class.
    """
    rows: list[Row] = []
    patches = []
    for number, row in enumerate(bank):
        owners = [label[class_id] for class_id in row["class_ids"]]
        weight, finds = seen.weight[:, number], None
        if row["kept"]:
            own = np.isin(y, owners)
            finds = area_under_roc(weight[own], weight[~own]) if owners else None
            best = np.argsort(-weight, kind="stable")[:TOP_PATCHES].tolist()
            patches += [(number, one, int(seen.node[one, number])) for one in best if weight[one] > 0]
        rows.append(
            {
                "text": row["text"],
                "owners": owners,
                "kind": row["kind"],
                "nats": None if row["discriminability"] is None else round(row["discriminability"], 3),
                "finds": None if finds is None else round(finds, 3),
                "kept": row["kept"],
                "reason": row["drop_reason"],
                "patches": [],
            }
        )
    for row in concepts.to_pylist():
        if not row["kept"] and row["kind"] != "name":
            owners = [label[row["class_id"]]] if row["class_id"] is not None else []
            said = {"text": row["text"], "owners": owners, "kind": row["kind"], "reason": row["drop_reason"]}
            rows.append({**said, "nats": None, "finds": None, "kept": False, "patches": []})
    return rows, patches


def add_patches(
    rows: list[Row],
    patches: Sequence[tuple[int, int, int]],
    data: Path,
    encoder: str,
    buckets: int,
    pictures: Sequence[str],
) -> None:
    """Give each concept its patches: a picture's short id and a box in thousandths."""
    boxes = read_boxes(data, encoder, buckets, [(pictures[picture], node) for _, picture, node in patches])
    for concept, picture, node in patches:
        rows[concept]["patches"].append([short(pictures[picture]), boxes[pictures[picture], node][1]])


def written_texts(concepts: pa.Table) -> dict[str, list[str]]:
    """By class_id, the texts that were written for it, each once, in their order: what `concepts.edits` replaces."""
    texts: dict[str, dict[str, None]] = defaultdict(dict)
    for row in concepts.sort_by([("class_id", "ascending"), ("rank", "ascending")]).to_pylist():
        if row["kind"] != "name" and row["class_id"] is not None:
            texts[row["class_id"]][row["text"]] = None
    return {class_id: list(own) for class_id, own in texts.items()}
