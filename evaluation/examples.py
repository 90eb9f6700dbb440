"""Test images as the report shows them: the thumbnail, what was predicted, the densest patches and their concepts."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.runs import Row, Run
from fieldmark import store
from fieldmark.command import UserError
from training.metrics import Bools

PATCHES = 3  # shown of an example
PATCH_CONCEPTS = 3  # shown of a patch


def choose_examples(image_ids: Sequence[str], right: Bools, count: int) -> list[int]:
    """`count` positions: those of the lowest image_ids, half of them wrong and half right where there are enough.

    image_id is a hash of the picture's bytes: nobody chose which are the lowest. Wrong ones come first.
    """
    order = sorted(range(len(image_ids)), key=lambda position: image_ids[position])
    wrong = [position for position in order if not right[position]]
    rightly = [position for position in order if right[position]]
    wrongs = min(len(wrong), max(count // 2, count - len(rightly)))
    return wrong[:wrongs] + rightly[: count - wrongs]


def rows_of(
    folder: Path, schema: str, buckets: int, image_ids: Iterable[str], columns: list[str]
) -> dict[str, list[Row]]:
    """By image_id, the rows that a folder of buckets has of a few images; of view 0 where `columns` has a view.

    Raises UserError where an image has none.
    """
    wanted = store.split_buckets(list(image_ids), buckets)
    rows: dict[str, list[Row]] = defaultdict(list)
    for bucket, members in enumerate(wanted):
        if not members:
            continue
        path = store.bucket_path(folder, bucket)
        table = store.read_table(path, schema, columns)
        table = table.filter(pc.is_in(table["image_id"], value_set=pa.array(members)))
        if "view" in columns:
            table = table.filter(pc.field("view") == 0)
        for row in table.to_pylist():
            rows[row["image_id"]].append(row)
        absent = [image_id for image_id in members if image_id not in rows]
        if absent:
            remedy = f"run the stage that writes {folder} again (dvc repro)"
            raise UserError(f"{path}: lacks image {absent[0]}; {remedy}")
    return rows


def read_thumbs(data: Path, buckets: int, image_ids: Iterable[str]) -> dict[str, str]:
    """By image_id, the thumbnails of a few images: WebP in base64. Raises UserError where an image has none."""
    rows = rows_of(data / "thumbs", "thumbs/1", buckets, set(image_ids), ["image_id", "webp"])
    return {image_id: base64.b64encode(row["webp"]).decode() for image_id, [row] in rows.items()}


def name_concept(row: Row, names: Mapping[str, str]) -> str:
    """A concept's text; a prototype has no text and is named after its classes."""
    return row["text"] or "prototype of " + ", ".join(names[class_id] for class_id in row["class_ids"])


def patches_and_concepts(
    nodes: Sequence[Row], labels: Sequence[Row], bank: Mapping[int, Row], names: Mapping[str, str]
) -> Row:
    """The densest selected patches of one image with their best concepts, and the concepts selected for the image.

    `nodes` and `labels` are the image's rows of embed.nodes/1 and labels/1, `bank` the rows of bank/1 by concept_idx,
    `names` the classes' names by class_id.
    """

    def concept(idx: int, weight: float | None = None) -> Row:
        return {"text": name_concept(bank[idx], names), "classes": bank[idx]["class_ids"], "weight": weight}

    node = {row["node"]: row for row in nodes}
    local = [row for row in labels if row["node"] > 0 and row["selected"]]
    patches = []
    for row in sorted(local, key=lambda row: (-row["density"], row["node"]))[:PATCHES]:
        # The file has them by falling weight; equal weights in the order of the bank.
        weighted = list(zip(row["concept_idx"], map(float, row["concept_weight"]), strict=True))
        x0, y0, x1, y1 = (node[row["node"]][side] for side in ("x0", "y0", "x1", "y1"))
        patches.append(
            {
                "kind": node[row["node"]]["kind"],
                "density": row["density"],
                "left": x0,
                "top": y0,
                "width": x1 - x0,
                "height": y1 - y0,
                "concepts": [concept(idx, weight) for idx, weight in weighted[:PATCH_CONCEPTS]],
            }
        )
    selected = next((row["selected_concepts"] for row in labels if row["node"] == 0), None)
    return {"patches": patches, "selected": [concept(idx) for idx in selected or []]}


def make_examples(
    data: Path,
    shown: Run,
    index: pa.Table,
    bank: pa.Table | None,
    names: Mapping[str, str],
    *,
    buckets: int,
    count: int,
) -> list[Row]:
    """`count` test images as the page shows them, chosen by choose_examples from what the kept model predicts.

    Without a `bank` (the encoder is a tower) they have no patches and no concepts. Raises UserError where an image has
    no thumbnail, no nodes or no labels.
    """
    image_id = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    test = np.flatnonzero(shown.split == "test")
    predicted = shown.predicted[shown.seeds.index(shown.model_seed), test]
    ids = [image_id[shown.paths[position]] for position in test]
    chosen = choose_examples(ids, predicted == shown.y[test], count)

    wanted = {ids[position] for position in chosen}
    thumbs = read_thumbs(data, buckets, wanted)
    said = {} if bank is None else explain_images(data, shown.encoder, bank, names, buckets, wanted)
    examples = []
    for position in chosen:
        own = ids[position]
        examples.append(
            {
                "path": shown.paths[test[position]],
                "webp": thumbs[own],
                "true": shown.classes[shown.y[test[position]]],
                "predicted": shown.classes[predicted[position]],
                **said.get(own, {"patches": [], "selected": []}),
            }
        )
    return examples


def explain_images(
    data: Path, encoder: str, bank: pa.Table, names: Mapping[str, str], buckets: int, image_ids: Iterable[str]
) -> dict[str, Row]:
    """By image_id, patches_and_concepts of a few images."""
    image_ids = list(image_ids)
    boxes = ["image_id", "view", "node", "kind", "x0", "y0", "x1", "y1"]
    nodes = rows_of(data / f"embed/{encoder}/images", "embed.nodes/1", buckets, image_ids, boxes)
    columns = ["concept_idx", "concept_weight", "density", "selected", "selected_concepts"]
    columns = ["image_id", "view", "node", *columns]
    labels = rows_of(data / f"labels/{encoder}", "labels/1", buckets, image_ids, columns)
    by_idx = {row["concept_idx"]: row for row in bank.to_pylist()}
    return {one: patches_and_concepts(nodes[one], labels[one], by_idx, names) for one in image_ids}
