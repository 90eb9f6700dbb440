"""A tiny synthetic cache with a planted cue, written through fieldmark.store as the stages would write it."""

import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save_file
from torch import Tensor

from fieldmark.params import Labels, Select
from fieldmark.store import (
    arrow_schema,
    bucket_path,
    fingerprint,
    make_table,
    read_table,
    sha256,
    split_buckets,
    vector_column,
    write_table,
)
from training.data import Cache
from training.data.nodes import Globals

ENCODER = "tiny"
# What `write_cache` writes, but the global vectors alone, which the nodes hold too.
ALL = frozenset(
    {
        *{"nodes", "boxes", "kinds", "pooled", "moments/isqrt", "labels", "edges", "names", "concepts", "owners"},
        *{"descriptions", "projection", "again/zoom", "tokens", "tokens/rollout", "cls", "cls/rollout"},
        *{"rollout", "parts", "attributes", "cell_descriptions", "links/near", "asked/guess"},
    }
)
GRID, HEADS, LAYERS = (3, 4), 2, (1, 2)  # of tokens; rollout stands in the row of the first layer
SCALE = 10.0  # of cosines, before the softmax over concepts


@dataclass(frozen=True)
class Plan:
    """What to plant. `cue` is where the class shows: in the global vector, in one patch, in both, or nowhere.

    Tokens show it as patches do, in one cell of each layer, to which rollout points; CLS as the global vector does. The
    part `head` has the box of the patch that shows it in view 0, or of the first one; `tail` is a point at its corner.
    """

    classes: int = 4
    train: int = 24  # images a class
    val: int = 8
    test: int = 8
    nodes: int = 8  # local nodes at most; every third image has two fewer where ragged
    dimension: int = 32
    views: int = 1
    cue: Literal["global", "local", "both", "none"] = "both"
    noise: float = 0.6  # of a vector that carries the cue; 1 leaves as much noise as cue
    concepts: int = 3  # a class, plus two generic ones
    top: int = 4
    links: int = 6  # into each image; every third image has two fewer where ragged
    linked: float = 0.75  # the share of an image's links that come from its own class
    rings: int = 0  # gains an image; 0 leaves the column null
    object: bool = True  # whether node 1 is the object, which says as little as any patch; else a cell of the grid
    shown: int = 4  # the concepts that stand for an image; every third image has two fewer where ragged
    sentences: int = 0  # that describe the first image, or all
    described: Literal["first", "all"] = "first"
    told: bool = False  # whether what a question was answered tells the class: four first guesses of five are right
    ragged: bool = True
    buckets: int = 3
    seed: int = 0


def tensors(cache: Cache) -> dict[str, Tensor]:
    """All tensors of a cache: y, target, and those of its parts as PART.NAME."""
    found = {"y": cache.y, "target": cache.target}
    for kind, part in cache.parts.by_kind.items():
        found |= {f"{kind.__name__}.{name}": value for name, value in part.tensors().items()}
    return found


def seen_twice(cache: Cache) -> Cache:
    """A cache of one view, read for its global vectors, whose images have that view twice."""
    g = cache.globals(torch.arange(len(cache.paths)))
    return replace(cache, views=2, parts=cache.parts.only(()).with_part(Globals(g.half().repeat_interleave(2, 0))))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def around(centre: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors at about `noise` times the length of `centre` (..., D) from it."""
    spread = rng.standard_normal(centre.shape) / np.sqrt(centre.shape[-1])
    return unit(centre + noise * spread)


def write_cache(folder: Path, plan: Plan) -> None:
    """Write index, nodes, moments, graphs, labels, bank, texts and descriptions for encoder `tiny` into `folder`."""
    shutil.copytree(written(plan), folder, copy_function=shutil.copy, dirs_exist_ok=True)  # with times of its own


# Where each plan is written once: many tests want the same one, to change their copy.
COPIED = tempfile.TemporaryDirectory(prefix="plans")


@functools.cache
def written(plan: Plan) -> Path:
    folder = Path(tempfile.mkdtemp(dir=COPIED.name))
    write_plan(folder, plan)
    return folder


def write_plan(folder: Path, plan: Plan) -> None:
    rng = np.random.default_rng(plan.seed)
    classes = [f"class-{number:02d}" for number in range(plan.classes)]
    prototypes = unit(rng.standard_normal((plan.classes, plan.dimension)))
    marks = {name: fingerprint(name, {"encoder": ENCODER}) for name in ("index", "embed", "text", "bank", "rest")}

    images: list[dict[str, Any]] = []
    for split, count in (("train", plan.train), ("val", plan.val), ("test", plan.test)):
        for label, class_id in enumerate(classes):
            for number in range(count):
                path = f"{split}/{class_id}/{number:04d}.png"
                images.append(
                    {
                        "path": path,
                        "image_id": sha256(path),
                        "class_id": class_id,
                        "split": split,
                        "status": "ok",
                        "label": label,
                    }
                )
    rows = [{key: value for key, value in image.items() if key != "label"} for image in images]
    rows.append({"path": "train/broken.png", "class_id": classes[0], "split": "train", "status": "broken"})
    write_table(
        make_table("index.images/1", rows), folder / "index/images.parquet", "index.images/1", {}, marks["index"]
    )
    named = [{"class_id": class_id, "name": class_id.title(), "from_images": True} for class_id in classes]
    write_table(
        make_table("index.classes/2", named), folder / "index/classes.parquet", "index.classes/2", {}, marks["index"]
    )

    bank = write_bank(folder, plan, classes, [image["image_id"] for image in images], prototypes, marks, rng)
    nodes, labels, graphs, parts = [], [], [], []
    for position, image in enumerate(images):
        count = plan.nodes - 2 * (plan.ragged and position % 3 == 0)
        for view in range(plan.views):
            vectors = unit(rng.standard_normal((count + 1, plan.dimension)))
            if plan.cue in ("global", "both"):
                vectors[0] = around(prototypes[image["label"]], plan.noise, rng)
            shows = 1
            if plan.cue in ("local", "both"):
                shows = 1 + rng.integers(count)
                vectors[shows] = around(prototypes[image["label"]], plan.noise, rng)
            vectors = vectors.astype(np.float16).astype(np.float64)
            corner = rng.uniform(0, 0.6, (count + 1, 2))
            boxes = np.concatenate([corner, corner + 0.4], axis=1)
            boxes[0] = (0, 0, 1, 1)
            nodes += node_rows(image["image_id"], view, vectors, boxes, plan.object)
            if view == 0:
                parts += part_rows(image["path"], boxes[shows], visible=position % 5 > 0)
            shown = max(plan.shown - 2 * (plan.ragged and position % 3 == 0), 0)
            gains = rng.uniform(-0.5, 0.5, plan.rings).astype(np.float32).tolist() if plan.rings else None
            labels += label_rows(image["image_id"], view, vectors, bank, plan.top, shown, gains)
            graphs.append(graph_row(image["image_id"], view, vectors, boxes))
    path = folder / "index/parts.parquet"
    write_table(make_table("index.parts/1", parts), path, "index.parts/1", {}, marks["index"])
    path, had = folder / "index/attributes.parquet", attribute_rows(classes)
    write_table(make_table("index.attributes/1", had), path, "index.attributes/1", {}, marks["index"])
    ids = [image["image_id"] for image in images]
    embed, made_by = folder / f"embed/{ENCODER}/images", {"encoder": marks["embed"]}
    write_buckets(embed, "embed.nodes/1", nodes, ids, plan.buckets, made_by, marks["embed"])
    write_buckets(
        folder / f"graphs/{ENCODER}", "graphs/1", graphs, ids, plan.buckets, {"embed": marks["embed"]}, marks["rest"]
    )
    made_from = {"embed": marks["embed"], "bank": marks["bank"], **Labels(top=plan.top).model_dump()}
    write_buckets(folder / f"labels/{ENCODER}", "labels/1", labels, ids, plan.buckets, made_from, marks["rest"])
    write_tokens(folder, plan, images)
    write_moments(folder, ENCODER, "pooled", plan.dimension + 4, plan.seed)
    write_moments(folder, ENCODER, "isqrt", plan.dimension + 6, plan.seed)
    write_projection(folder, prototypes, moment_prototypes(plan.classes, plan.dimension + 4, plan.seed))
    write_again(folder, "zoom", plan.dimension + 4, plan.seed)
    write_links(folder, "near", plan)
    write_asked(folder, "guess", plan, images, prototypes)


def write_bank(
    folder: Path,
    plan: Plan,
    classes: Sequence[str],
    image_ids: Sequence[str],
    prototypes: np.ndarray,
    marks: dict[str, str],
    rng: np.random.Generator,
) -> np.ndarray:
    """Two names and `concepts` texts a class, two generic, one dropped; returns the kept (M', vector and index)."""
    rows: list[dict[str, Any]] = []
    for label, class_id in enumerate(classes):
        for kind, count in (("name", 2), ("visual", plan.concepts)):
            for number in range(count):
                text = f"{class_id} {kind} {number}"
                vector = around(prototypes[label], 0.3, rng)
                rows.append(
                    {"text": text, "class_ids": [class_id], "kind": kind, "kept": kind != "name", "vector": vector}
                )
    for number in range(2):
        vector = unit(rng.standard_normal(plan.dimension))
        rows.append({"text": f"generic {number}", "class_ids": [], "kind": "generic", "kept": True, "vector": vector})
    far = {
        "text": "dropped",
        "class_ids": [classes[0]],
        "kind": "visual",
        "kept": False,
        "drop_reason": "duplicate",
        "vector": -prototypes[0],
    }
    rows.append(far)
    for position, row in enumerate(rows):
        row.update(concept_idx=position, concept_id=sha256(row["text"]))
    said = [
        {
            **{name: row[name] for name in ("concept_id", "text", "kind")},
            **{"class_id": next(iter(row["class_ids"]), None), "rank": 0, "kept": True},
        }
        for row in rows
    ]
    path = folder / "concepts/concepts.parquet"
    write_table(make_table("concepts/1", said), path, "concepts/1", {}, marks["rest"])
    rng_of_cells = np.random.default_rng(plan.seed + 1)  # of its own: whatever else is drawn stays as it is
    sentences, texts = [], [{**row, "text_id": row["concept_id"]} for row in rows]
    described = image_ids if plan.described == "all" else image_ids[:1]
    for place, number in itertools.product(range(len(described)), range(plan.sentences)):
        text = f"sentence {number} of image {place}"
        sentences.append({"image_id": described[place], "rank": number, "text": text})
        texts.append(
            {
                "text_id": sha256(text),
                "text": text,
                "kind": "description",
                "vector": unit(rng.standard_normal(plan.dimension)),
            }
        )
    said_of_cells = []
    for place, cell in itertools.product(range(len(described)), range(1, 1 + plan.sentences)):
        text = f"sentence about cell {cell} of image {place}"
        box = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
        said_of_cells.append({"image_id": described[place], "cell": cell, **box, "rank": 0, "text": text})
        vector = unit(rng_of_cells.standard_normal(plan.dimension))
        texts.append({"text_id": sha256(text), "text": text, "kind": "description", "vector": vector})
    for text_row in texts:
        text_row.update(n_tokens=3, truncated=False)
    origins = {"embed": marks["embed"], "text": marks["text"], **Select().model_dump()}
    write_table(with_vectors("bank/1", rows), folder / f"bank/{ENCODER}.parquet", "bank/1", origins, marks["bank"])
    made_by = {"encoder": marks["embed"], "logit_scale": SCALE}
    path = folder / f"embed/{ENCODER}/text.parquet"
    write_table(with_vectors("embed.text/1", texts), path, "embed.text/1", made_by, marks["text"])
    path = folder / "descriptions/descriptions.parquet"
    write_table(make_table("descriptions/1", sentences), path, "descriptions/1", {}, marks["rest"])
    path = folder / "descriptions/cells.parquet"
    schema = "descriptions.cells/1"
    write_table(make_table(schema, said_of_cells), path, schema, {"nodes": [2]}, marks["rest"])
    kept = [row for row in rows if row["kept"]]
    return np.stack([[*row["vector"], row["concept_idx"]] for row in kept])


def with_vectors(schema: str, rows: Sequence[dict[str, Any]], dimension: int | None = None) -> pa.Table:
    """A table of `rows` whose `vector` entries are arrays."""
    vectors = np.stack([row["vector"] for row in rows]) if rows else np.zeros((0, dimension or 1))
    columns = arrow_schema(schema, vectors.shape[1])
    plain = pa.schema([column for column in columns if column.name != "vector"])
    table = pa.Table.from_pylist([{name: row.get(name) for name in plain.names} for row in rows], schema=plain)
    return table.append_column(columns.field("vector"), vector_column(vectors)).select(columns.names)


def node_rows(
    image_id: str, view: int, vectors: np.ndarray, boxes: np.ndarray, has_object: bool
) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(("x0", "y0", "x1", "y1"), box.tolist(), strict=True)),
            **{"image_id": image_id, "view": view, "node": node, "kind": kind_of_node(node, has_object)},
            **{"flip": view % 2 == 1, "norm": 1.0, "vector": vector},
        }
        for node, (vector, box) in enumerate(zip(vectors, boxes, strict=True))
    ]


def kind_of_node(node: int, has_object: bool) -> str:
    if node == 0:
        return "global"
    return "object" if node == 1 and has_object else "grid"


def part_rows(path: str, box: np.ndarray, visible: bool) -> list[dict[str, Any]]:
    """A part with a box, and one that is a point, or out of sight."""
    x, y = ((box[:2] + box[2:]) / 2).tolist()
    tail = {"x": float(box[2]), "y": float(box[3])} if visible else {}
    return [
        {"path": path, "part": "head", "x": x, "y": y, "visible": True, "box": box.tolist()},
        {"path": path, "part": "tail", "visible": visible, **tail},
    ]


def attribute_rows(classes: Sequence[str]) -> list[dict[str, Any]]:
    """A colour of each class's own, and a bill that the first half of them has, as words and as a share of people."""
    first = len(classes) // 2
    return [
        {"class_id": class_id, "attribute": attribute, "value": value}
        for number, class_id in enumerate(classes)
        for attribute, value in (
            ("bill", "hooked" if number < first else "straight"),
            ("colour", f"colour {number:02d}"),
            ("hooked", "87.5" if number < first else "3.25"),
        )
    ]


def write_other(folder: Path, name: str, dimension: int, seed: int = 0) -> None:
    """The nodes of `tiny` as another encoder sees them: other vectors (D'), which show the class in every node."""
    rng = np.random.default_rng(seed)
    index = read_table(folder / "index/images.parquet", "index.images/1", ["image_id", "class_id"])
    classes = sorted(set(index["class_id"].to_pylist()))
    class_of = {row["image_id"]: classes.index(row["class_id"]) for row in index.to_pylist() if row["image_id"]}
    prototypes = unit(rng.standard_normal((len(classes), dimension)))
    for path in sorted((folder / f"embed/{ENCODER}/images").glob("b*.parquet")):
        rows = read_table(path, "embed.nodes/1").to_pylist()
        for row in rows:
            row["vector"] = around(prototypes[class_of[row["image_id"]]], 0.6, rng)
        table, mark = with_vectors("embed.nodes/1", rows), fingerprint("images", {"of": name})
        write_table(table, folder / f"embed/{name}/images" / path.name, "embed.nodes/1", {}, mark)


def write_moments(
    folder: Path, encoder: str, name: str, dimension: int, seed: int = 0, made_by: dict[str, Any] | None = None
) -> None:
    """Moments of a NAME for the images and views of `tiny`: vectors (dimension) that show the class, of any length."""
    rng = np.random.default_rng(seed)
    index = read_table(folder / "index/images.parquet", "index.images/1", ["image_id", "class_id"])
    class_of = dict(zip(index["image_id"].to_pylist(), index["class_id"].to_pylist(), strict=True))
    classes = sorted(set(class_of.values()))
    prototypes = unit(rng.standard_normal((len(classes), dimension)))
    rows = [
        {
            **{"image_id": image_id, "view": view, "layer": None if name == "pooled" else 3, "kind": name},
            "vector": 3 * around(prototypes[classes.index(class_of[image_id])], 0.6, rng),
        }
        for image_id, view in keys_of(folder)
    ]
    made_by = {"encoder": fingerprint("embed", {"encoder": ENCODER})} if made_by is None else made_by
    ids, mark = sorted({row["image_id"] for row in rows}), fingerprint("moments", {"name": name, "seed": seed})
    target = folder / f"embed/{encoder}/moments/{name}"
    write_buckets(target, "embed.moments/1", rows, ids, len(bucket_files(folder)), made_by, mark)


def moment_prototypes(classes: int, dimension: int, seed: int) -> np.ndarray:
    """What moments (dimension) of a class's images lie around (C, dimension), as `write_moments` draws it."""
    return unit(np.random.default_rng(seed).standard_normal((classes, dimension)))


def write_projection(folder: Path, prototypes: np.ndarray, pooled: np.ndarray) -> None:
    """What brings a class's `pooled` vector (C, d) to its prototype (C, D), and a small bias."""
    rng, width = np.random.default_rng(0), pooled.shape[1]
    weight = (np.linalg.pinv(pooled) @ prototypes).T + 0.02 * rng.standard_normal((prototypes.shape[1], width))
    tensors = {"weight": weight.astype(np.float32), "bias": np.full(len(weight), 0.01, np.float32)}
    made_by = {"made_by": json.dumps({"encoder": fingerprint("embed", {"encoder": ENCODER})})}
    save_file(tensors, folder / f"embed/{ENCODER}/projection.safetensors", made_by)


def write_again(folder: Path, name: str, dimension: int, seed: int = 0, encoder: str = ENCODER) -> None:
    """A second look of a NAME for the images and views of `tiny`: vectors (dimension) that say nothing."""
    rng = np.random.default_rng(seed)
    rows = [
        {"image_id": image_id, "view": view, "branch": branch, "vector": 3 * rng.standard_normal(dimension)}
        for image_id, view in keys_of(folder)
        for branch in ("complementary", "discriminative")
    ]
    ids, made_by = sorted({row["image_id"] for row in rows}), {"encoder": fingerprint("embed", {"encoder": encoder})}
    mark = fingerprint("again", {"name": name, "seed": seed})
    write_buckets(folder / f"again/{name}", "again/1", rows, ids, len(bucket_files(folder)), made_by, mark)


def write_tokens(folder: Path, plan: Plan, images: Sequence[dict[str, Any]]) -> None:
    """Cells and CLS of two layers for the images and views of `tiny`, and rollout in the rows of the first."""
    rng, width, cells = np.random.default_rng(plan.seed), plan.dimension + 4, GRID[0] * GRID[1]
    marks = {name: fingerprint(name, {"encoder": ENCODER}) for name in ("embed", "tokens")}
    prototypes = unit(rng.standard_normal((len(LAYERS), plan.classes, width)))
    rows = []
    for image in images:
        for view in range(plan.views):
            place, label = rng.integers(cells), image["label"]
            for number, layer in enumerate(LAYERS):
                vectors, cls = unit(rng.standard_normal((cells, width))), unit(rng.standard_normal(width))
                if plan.cue in ("local", "both"):
                    vectors[place] = around(prototypes[number, label], plan.noise, rng)
                if plan.cue in ("global", "both"):
                    cls = around(prototypes[number, label], plan.noise, rng)
                rollout = rng.random((HEADS, cells))
                rollout[:, place] += plan.cue in ("local", "both")
                rows.append(
                    {
                        **{"image_id": image["image_id"], "view": view, "layer": layer},
                        **{"grid_h": GRID[0], "grid_w": GRID[1], "width": width},
                        "vectors": (3 * vectors).astype(np.float16).ravel(),
                        "cls": (3 * cls).astype(np.float16),
                        "rollout": rollout.astype(np.float16).ravel() if layer == LAYERS[0] else None,
                    }
                )
    ids = [image["image_id"] for image in images]
    target, made_by = folder / f"embed/{ENCODER}/tokens", {"encoder": marks["embed"]}
    write_buckets(target, "embed.tokens/1", rows, ids, plan.buckets, made_by, marks["tokens"])


def write_links(folder: Path, name: str, plan: Plan) -> None:
    """Links of a NAME between images of any split: `plan.linked` of those into an image come from its own class."""
    rng = np.random.default_rng(plan.seed + 2)
    index = read_table(folder / "index/images.parquet", "index.images/1", ["image_id", "class_id"]).to_pylist()
    images = [row for row in index if row["image_id"]]
    rows = []
    for place, image in enumerate(images):
        count = max(plan.links - 2 * (plan.ragged and place % 3 == 0), 0)
        others = [other for other in images if other is not image]
        own = [other for other in others if other["class_id"] == image["class_id"]]
        heard = {rng.choice(own if rng.random() < plan.linked else others)["image_id"] for _ in range(count)}
        rows += [
            {"src": source, "dst": image["image_id"], "weight": rng.uniform(0.2, 1), "kind": "knn"}
            for source in sorted(heard)
        ]
    mark = fingerprint("links", {"name": name, "seed": plan.seed})
    made_by: dict[str, Any] = {"kind": "knn", "k": plan.links, "sources": {}}
    write_table(make_table("links/1", rows), folder / f"links/{name}.parquet", "links/1", made_by, mark)


def write_asked(
    folder: Path, name: str, plan: Plan, images: Sequence[dict[str, Any]], prototypes: np.ndarray
) -> None:
    """Answers to a question of a NAME: `reasons`, two texts an image, and `guesses`, three classes by their names.

    Where ragged, every third image has one reason, and as its last guess no class, and every eleventh no answer.
    """
    rng = np.random.default_rng(plan.seed + 3)
    names = [f"Class-{number:02d}" for number in range(plan.classes)]
    rows, texts = [], []
    for place, image in enumerate(images):
        order = rng.permutation(plan.classes)
        if plan.told:
            order = np.concatenate([[image["label"]], order[order != image["label"]]])
            order = order[[1, 0, *range(2, plan.classes)]] if rng.random() < 0.2 else order
        few = plan.ragged and place % 3 == 0
        guesses = [names[number] for number in order[:3]]
        guesses = [*guesses[:-1], "a shoe"] if few else guesses
        reasons = [f"reason {number} of image {place}" for number in range(1 if few else 2)]
        if plan.ragged and place % 11 == 10:
            guesses, reasons = [], []
        for text in reasons:
            vector = unit(rng.standard_normal(plan.dimension))
            vector = around(prototypes[image["label"]], plan.noise, rng) if plan.told else vector
            texts.append({"text_id": sha256(text), "text": text, "kind": "asked", "n_tokens": 3, "truncated": False,
                          "vector": vector})  # fmt: skip
        of_image = {"subject_id": image["image_id"], "sample": 0}
        rows += [
            {**of_image, "field": field, "rank": rank, "text": text}
            for field, said in (("guesses", guesses), ("reasons", reasons))
            for rank, text in enumerate(said)
        ]
    mark = fingerprint("asked", {"name": name, "seed": plan.seed})
    made_by = {"subject": "image", "guesses": "guesses", "mask": True, "told": False}
    write_table(make_table("asked/1", rows), folder / f"asked/{name}/texts.parquet", "asked/1", made_by, mark)
    made_by = {"encoder": fingerprint("embed", {"encoder": ENCODER}), "logit_scale": SCALE}
    path = folder / f"asked/{name}/vectors/{ENCODER}.parquet"
    write_table(with_vectors("embed.text/1", texts), path, "embed.text/1", made_by, mark)


def bucket_files(folder: Path) -> list[Path]:
    return sorted((folder / f"embed/{ENCODER}/images").glob("b*.parquet"))


def keys_of(folder: Path) -> list[tuple[str, int]]:
    """Image and view of each row that `tiny` has."""
    found = pa.concat_tables([read_table(path, "embed.nodes/1", ["image_id", "view"]) for path in bucket_files(folder)])
    return sorted(set(zip(found["image_id"].to_pylist(), found["view"].to_pylist(), strict=True)))


def label_rows(
    image_id: str, view: int, vectors: np.ndarray, bank: np.ndarray, top: int, shown: int, gains: list[float] | None
) -> list[dict[str, Any]]:
    similarity = SCALE * vectors @ bank[:, :-1].T
    weights = np.exp(similarity - similarity.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    order = np.argsort(-weights, axis=1)[:, :top]
    whole = np.argsort(-weights[0])
    entropy = -(weights * np.log(weights)).sum(1)
    density = 1 - entropy / np.log(len(bank))
    selected = density >= np.median(density)
    return [
        {
            **{"image_id": image_id, "view": view, "node": node},
            "concept_idx": bank[order[node], -1].astype(int).tolist(),
            "concept_weight": weights[node, order[node]].astype(np.float16).tolist(),
            **{
                "entropy": entropy[node],
                "density": density[node],
                "selected": bool(node and selected[node]),
            },
            "selected_concepts": bank[whole[:shown], -1].astype(int).tolist() if node == 0 else None,
            "ring_gains": gains if node == 0 else None,
        }
        for node in range(len(vectors))
    ]


def graph_row(image_id: str, view: int, vectors: np.ndarray, boxes: np.ndarray) -> dict[str, Any]:
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = np.square(centre[:, None] - centre[None]).sum(-1)
    spatial = np.exp(-distance / (2 * 0.25**2))
    semantic = np.clip(vectors @ vectors.T, 0, 1)
    linked = (spatial > 0.1) & ~np.eye(len(vectors), dtype=bool)
    source, target = np.nonzero(linked)
    edges = {"src": source.tolist(), "dst": target.tolist()}
    weights = {
        "spatial": spatial[linked].astype(np.float16).tolist(),
        "semantic": semantic[linked].astype(np.float16).tolist(),
    }
    return {"image_id": image_id, "view": view, **edges, **weights}


def write_buckets(
    folder: Path,
    schema: str,
    rows: Sequence[dict[str, Any]],
    ids: Sequence[str],
    buckets: int,
    params: dict[str, Any],
    mark: str,
) -> None:
    dimension = len(rows[0]["vector"]) if "vector" in rows[0] else None
    for bucket, members in enumerate(split_buckets(ids, buckets)):
        wanted = set(members)
        chosen = [row for row in rows if row["image_id"] in wanted]
        table = make_table(schema, chosen) if dimension is None else with_vectors(schema, chosen, dimension)
        write_table(table, bucket_path(folder, bucket), schema, params, mark)
