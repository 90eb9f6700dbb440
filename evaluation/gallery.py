"""Pictures as the report shows them: what a run says of each, and what the encoder sees in its patches.

An image goes by the first SHORT digits of its image_id. Everything is of view 0, the picture as it is.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.runs import Row, Run, query
from fieldmark import store
from fieldmark.command import UserError
from training.metrics import Floats, Ints

SHORT = 16
PICTURES = 5_000  # on the page, at most: it is read by people, and in one piece
LIKELY = 3  # classes shown of an answer
PATCHES = 3  # shown of a picture
PATCH_CONCEPTS = 3  # shown of a patch


def short(image_id: str) -> str:
    return image_id[:SHORT]


def members(
    folder: Path, schema: str, buckets: int, image_ids: Iterable[str], columns: list[str]
) -> Iterator[pa.Table]:
    """What a folder of buckets has of some images, bucket by bucket; of view 0 where `columns` has a view.

    Raises UserError where an image has no row.
    """
    for bucket, wanted in enumerate(store.split_buckets(sorted(set(image_ids)), buckets)):
        if not wanted:
            continue
        path = store.bucket_path(folder, bucket)
        table = store.read_table(path, schema, columns)
        table = table.filter(pc.is_in(table["image_id"], value_set=pa.array(wanted)))
        if "view" in columns:
            table = table.filter(pc.field("view") == 0)
        absent = set(wanted) - set(table["image_id"].unique().to_pylist())
        if absent:
            remedy = f"run the stage that writes {folder} again (dvc repro)"
            raise UserError(f"{path}: lacks image {min(absent)}; {remedy}")
        yield table


def read_thumbs(data: Path, buckets: int, image_ids: Iterable[str]) -> dict[str, bytes]:
    """By short image_id, the thumbnails of some images, WebP. Raises UserError where an image has none."""
    thumbs: dict[str, bytes] = {}
    for table in members(data / "thumbs", "thumbs/1", buckets, image_ids, ["image_id", "webp"]):
        thumbs |= {short(row["image_id"]): row["webp"] for row in table.to_pylist()}
    return thumbs


def read_boxes(
    data: Path, encoder: str, buckets: int, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, list[int]]]:
    """The kind of some nodes (image_id, node) and their boxes [x0, y0, x1, y1] in thousandths of the picture."""
    rows = sorted(set(wanted))
    asked = pa.table({"image_id": [one for one, _ in rows], "node": pa.array([node for _, node in rows], pa.int16())})
    columns = ["image_id", "view", "node", "kind", "x0", "y0", "x1", "y1"]
    found = {}
    images = asked["image_id"].unique().to_pylist()
    for table in members(data / f"embed/{encoder}/images", "embed.nodes/1", buckets, images, columns):
        sql = "SELECT image_id, node, kind, x0, y0, x1, y1 FROM t SEMI JOIN asked USING (image_id, node)"
        for image_id, node, kind, *box in query(sql, t=table, asked=asked):
            found[image_id, node] = kind, [round(1000 * side) for side in box]
    return found


def read_patches(
    data: Path, encoder: str, buckets: int, image_ids: Sequence[str], place: Mapping[int, int]
) -> dict[str, Row]:
    """By image_id, the densest selected patches of a picture with their best concepts, and those of the whole of it.

    `place` says where a concept_idx stands in the report's list of concepts. Weights are in thousandths.
    """
    columns = ["concept_idx", "concept_weight", "density", "selected", "selected_concepts"]
    columns = ["image_id", "view", "node", *columns]
    rows: list[tuple[Any, ...]] = []
    chosen: dict[str, list[int]] = {}
    for table in members(data / f"labels/{encoder}", "labels/1", buckets, image_ids, columns):
        whole = table.filter(pc.field("node") == 0).select(["image_id", "selected_concepts"]).to_pylist()
        chosen |= {row["image_id"]: [place[idx] for idx in row["selected_concepts"] or []] for row in whole}
        at = table.schema.get_field_index("concept_weight")
        table = table.set_column(at, "concept_weight", table["concept_weight"].cast(pa.list_(pa.float32())))
        # The file has concepts by falling weight; equal weights in the order of the bank.
        rows += query(
            f"""SELECT image_id, node, density, concept_idx[1:{PATCH_CONCEPTS}], concept_weight[1:{PATCH_CONCEPTS}]
                FROM t WHERE selected AND node > 0
                QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY density DESC, node) <= {PATCHES}
                ORDER BY image_id, density DESC, node""",
            t=table,
        )
    boxes = read_boxes(data, encoder, buckets, [(image_id, node) for image_id, node, *_ in rows])
    patches: dict[str, list[Row]] = defaultdict(list)
    for image_id, node, density, concepts, weights in rows:
        kind, box = boxes[image_id, node]
        said = [[place[idx], round(1000 * weight)] for idx, weight in zip(concepts, weights, strict=True)]
        patches[image_id].append({"kind": kind, "box": box, "density": round(density, 3), "concepts": said})
    return {one: {"patches": patches[one], "selected": chosen[one]} for one in image_ids}


def answer(probabilities: Floats, true: int) -> list[list[int]]:
    """The LIKELY classes of highest probability (C,), with it in thousandths; the true one last where it is not there.

    Equal ones stand in the order of classes.
    """
    order = np.argsort(-probabilities, kind="stable")[:LIKELY].tolist()
    return [[label, round(1000 * float(probabilities[label]))] for label in [*order, *{true}.difference(order)]]


def draw_pictures(paths: Sequence[str], positions: Ints) -> Ints:
    """Of images at `positions`, those that the page has: all, or the PICTURES whose paths have the lowest sha256."""
    if len(positions) <= PICTURES:
        return positions
    marks = [store.sha256(paths[position]) for position in positions.tolist()]
    return np.sort(positions[np.argsort(marks)[:PICTURES]])


def picture_rows(
    shown: Run, runs: Sequence[Run], positions: Ints, probabilities: Floats, index: pa.Table
) -> list[tuple[str, Row]]:
    """(image_id, what the page says of it) of the images at `positions` of a run.

    `probabilities` (len(positions), C) are what the run that is shown says of them; what the others answer stands in
    `runs`' order.
    """
    wanted = pa.array([shown.paths[position] for position in positions.tolist()], pa.string())
    named = index.select(["path", "image_id", "group"]).filter(pc.is_in(index["path"], value_set=wanted))
    rows = {row["path"]: row for row in named.to_pylist()}
    guesses = [run.predicted[run.seeds.index(run.model_seed)] for run in runs]
    found = []
    for position, probability in zip(positions.tolist(), probabilities, strict=True):
        row = rows[shown.paths[position]]
        picture = {
            "id": short(row["image_id"]),
            "path": row["path"],
            "split": str(shown.split[position]),
            "group": row["group"],
            "y": int(shown.y[position]),
            "top": answer(probability, int(shown.y[position])),
            "guesses": [int(guess[position]) for guess in guesses],
        }
        found.append((row["image_id"], picture))
    return found
