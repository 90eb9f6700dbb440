"""Put accuracy, confusion, explained test images and the health of the data set on one page.

Reads   data/runs/METHOD/{config.json,metrics.json,predictions.parquet} of every method in train.methods;
        data/index/{images,classes,near_duplicates}.parquet, data/index/metrics.json, data/thumbs/,
        data/concepts/concepts.parquet; for the encoder of the method that is best on val also
        data/bank/E.parquet, data/labels/E/ and the boxes in data/embed/E/images/.
Writes  data/report/index.html (one page that loads nothing else) and data/report/summary.txt (its table as text).
Costs   seconds; memory for the logits of one method at a time.

Every accuracy is computed from predictions.parquet and has to agree with metrics.json. Differences are
paired, image by image, with the intervals of evaluation.statistics.paired_difference. The method shown in detail,
and its seed, are those that are best on val. What the page calls a patch or a concept comes from
label_patches: it says what the encoder sees in the picture, not why a method decided as it did. Where test images
have a near duplicate, or other images of their group, in train or val, the page and its summary warn.

    python -m evaluation.report
"""

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.statistics import Paired, paired_difference
from evaluation.words import lay_out, percent, percent_and_deviation, points, points_range
from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Params, load_params
from training.metrics import Bools, Ints, mean_and_deviation

PREDICTIONS = "run.predictions/1"
SPLITS = ("train", "val", "test")
MATRIX_CLASSES = 60  # a confusion matrix of more classes is not readable
PAIRS = 15  # most confused pairs listed
NEAR_PAIRS = 6  # near duplicates shown
TELLING = 10  # concepts listed
PATCHES = 3  # shown of an example
PATCH_CONCEPTS = 3  # shown of a patch
REASONS = 20  # kinds of unused files listed
INDEX_AGAIN = "run `python -m stages.index_images` again (dvc repro index_images)"
Row = dict[str, Any]


class Line(NamedTuple):
    """One number of data/index/metrics.json, or one spread (min, median, max), as the page words it."""

    label: str
    key: str
    meaning: str
    alarm: bool = False  # whether anything but 0 is a fault of the data set
    spread: bool = False


# The health table by subject.
HEALTH = {
    "Contaminated test images": [
        Line("near duplicate", "health.contaminated_test.near_duplicates", "with one in train or val", alarm=True),
        Line("group", "health.contaminated_test.groups", "of one that train or val has too", alarm=True),
        Line("in all", "health.contaminated_test.images", "for one reason or both", alarm=True),
    ],
    "Near-duplicate pairs": [
        Line("within a split", "health.near_duplicates.within_split", "of one class; one picture counts twice"),
        Line(
            "across splits",
            "health.near_duplicates.across_splits",
            "of one class; one gives away the other",
            alarm=True,
        ),
        Line(
            "across classes",
            "health.near_duplicates.across_classes",
            "in any split; one label may be wrong",
            alarm=True,
        ),
    ],
    "Files with equal bytes": [
        Line("within a split", "health.byte_duplicates.within_split", "left out; an equal file is used"),
        Line("across splits", "health.byte_duplicates.across_splits", "left out; test has the one used, or else val"),
        Line("across classes", "health.byte_duplicates.across_classes", "none is used; one label is wrong", alarm=True),
    ],
    "Other files": [
        Line("broken", "unused.broken", "cannot be read as an image; left out"),
        Line("passed over", "health.passed_over", "no images by their name, or too deep in the folder"),
    ],
    "Groups": [
        Line("in all", "health.groups.count", "tracks, cameras or sites that the data set names"),
        Line("across splits", "health.groups.across_splits", "one split gives away another", alarm=True),
    ],
    "Classes": [
        Line("without images", "health.classes_without.images", "no usable one in any split"),
        Line("missing in train", "health.classes_without.train", "images, but none to learn from", alarm=True),
        Line("missing in val", "health.classes_without.val", "no say in what is chosen on val"),
        Line("missing in test", "health.classes_without.test", "no part in test accuracy"),
    ],
    "Images a class": [
        Line(split, f"health.images_a_class.{split}", "median (fewest to most)", spread=True) for split in SPLITS
    ],
    "Pixels": [
        Line(f"{side} side", f"health.pixels.{side}_side", "median (least to most)", spread=True)
        for side in ("shorter", "longer")
    ],
}


class Run(NamedTuple):
    """What one method predicted: S seeds, n images in the order of their paths."""

    method: str
    encoder: str
    seeds: list[int]
    model_seed: int  # the one that is best on val, whose model is kept
    classes: list[str]
    paths: list[str]
    split: np.ndarray  # (n,) str
    y: Ints  # (n,) positions in classes
    predicted: Ints  # (S, n)
    fingerprints: dict[str, str]  # of what it was trained on, by file or folder under data/
    mark: str  # its own fingerprint

    @property
    def right(self) -> Bools:
        """(S, n)"""
        return self.predicted == self.y

    def on(self, split: str) -> Bools:
        """(S, images of the split): which are classified rightly."""
        return self.right[:, self.split == split]

    def accuracy(self, split: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds; the latter is 0 for one seed."""
        return mean_and_deviation(self.on(split).mean(axis=1).tolist())


def read_run(data: Path, method: str, encoder: str) -> Run:
    """Read one method's run. Raises UserError where a file is missing, broken, or disagrees with another."""
    folder = data / "runs" / method
    again = f"run `python -m training.train --method {method}` (dvc repro train@{method})"
    config, metrics = (read_json(folder / name, again) for name in ("config.json", "metrics.json"))
    path = folder / "predictions.parquet"
    if not path.is_file():
        raise UserError(f"{path}: is missing; {again}")
    if config["encoder"] != encoder:
        raise UserError(f"{folder}/config.json: is of encoder {config['encoder']}, not {encoder}; {again}")
    header = store.read_header(path, PREDICTIONS)
    classes = header.params["classes"]
    table = store.read_table(path, PREDICTIONS).sort_by([("seed", "ascending"), ("path", "ascending")])
    seeds = table["seed"].unique().to_pylist()
    paths = table["path"].to_pylist()
    y = pc.index_in(table["class_id"], value_set=pa.array(classes))
    images = len(paths) // max(len(seeds), 1)
    if not images or paths != paths[:images] * len(seeds):
        raise UserError(f"{path}: its seeds predict different images; {again}")
    if y.null_count or config["model_seed"] not in seeds:
        raise UserError(f"{path}: holds a class or lacks a seed that config.json does not expect; {again}")
    found = Run(
        method=method,
        encoder=encoder,
        seeds=seeds,
        model_seed=config["model_seed"],
        classes=classes,
        paths=paths[:images],
        split=np.array(table["split"].to_pylist()[:images], dtype=str),
        y=y.to_numpy().astype(np.int64)[:images],
        predicted=store.vectors_of(table, "logits").argmax(axis=1).reshape(len(seeds), images),
        fingerprints=config["fingerprints"],
        mark=header.fingerprint,
    )
    for split in SPLITS:
        if not found.on(split).size or abs(metrics[split]["accuracy"] - found.accuracy(split)[0]) > 1e-6:
            raise UserError(f"{folder}/metrics.json: disagrees with predictions.parquet on {split}; {again}")
    return found


def read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); {remedy}") from None


def check_same_images(data: Path, runs: Sequence[Run], index: pa.Table) -> None:
    """Raise UserError for the first run that was not made from the images of the index."""
    usable = index.filter(pc.field("status") == "ok").sort_by("path")
    expected = [usable[name].to_pylist() for name in ("path", "split", "class_id")]
    for found in runs:
        own = [found.paths, found.split.tolist(), [found.classes[label] for label in found.y]]
        if own != expected:
            raise UserError(
                f"{data}/runs/{found.method}: was made from other images than {data}/index holds;"
                f" run train@{found.method} again (dvc repro)"
            )


def read_marks(data: Path, encoder: str, buckets: int) -> dict[str, str]:
    """The fingerprints of the files that an explanation rests on."""
    folders = {f"embed/{encoder}/images": "embed.nodes/1", f"labels/{encoder}": "labels/1"}
    marks = {name: store.read_folder_header(data / name, schema, buckets) for name, schema in folders.items()}
    marks[f"bank/{encoder}.parquet"] = store.read_header(data / f"bank/{encoder}.parquet", "bank/1")
    return {name: header.fingerprint for name, header in sorted(marks.items())}


def check_marks(data: Path, found: Run, marks: Mapping[str, str]) -> None:
    """Raise UserError where a run was trained on other tables than the page would explain it with."""
    for name, mark in marks.items():
        if found.fingerprints.get(name) != mark:
            raise UserError(
                f"{data}/runs/{found.method}: was trained on another {data / name} than is there now;"
                f" run train@{found.method} again (dvc repro)"
            )


def query(sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of a DuckDB query over Arrow tables."""
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return connection.execute(sql).fetchall()


def count_dataset(index: pa.Table, classes: pa.Table) -> Row:
    """Classes, usable images by split, and the unused files by reason."""
    per_split = dict(query("SELECT split, count(*) FROM t WHERE status = 'ok' GROUP BY split", t=index))
    unused = query(
        """SELECT status, count(*) AS files, min(path), CASE
                   WHEN error IS NOT NULL THEN error
                   WHEN duplicate_of IS NOT NULL THEN 'the same bytes as a file that is used'
                   ELSE 'no reason given' END AS reason
            FROM t WHERE status <> 'ok' GROUP BY status, reason ORDER BY files DESC, status, reason""",
        t=index,
    )
    return {
        "classes": len(classes),
        "images": {split: per_split.get(split, 0) for split in SPLITS},
        "unused": unused[:REASONS],
        "unused_files": sum(files for _, files, _, _ in unused),
        "unused_more": sum(files for _, files, _, _ in unused[REASONS:]),
    }


def read_health(path: Path, images: Mapping[str, int]) -> dict[str, float | None]:
    """The numbers behind HEALTH, from metrics.json; a spread's are KEY.min, KEY.median and KEY.max, or None.

    Raises UserError where one is missing, or where it was counted on other images than `images`, by split.
    """
    metrics = read_json(path, INDEX_AGAIN)

    def find(key: str, kinds: tuple[type, ...] = (int,)) -> Any:
        value = metrics
        for part in key.split("."):
            value = value.get(part, "missing") if isinstance(value, dict) else "missing"
        if not isinstance(value, kinds):
            raise UserError(f"{path}: has no number {key}; {INDEX_AGAIN}")
        return value

    if any(find(f"images.{split}") != count for split, count in images.items()):
        raise UserError(f"{path}: counts other images than images.parquet beside it holds; {INDEX_AGAIN}")
    health = {}
    for line in (line for lines in HEALTH.values() for line in lines):
        if line.spread:
            keys = [f"{line.key}.{end}" for end in ("min", "median", "max")]
            health.update({key: find(key, (int, float, NoneType)) for key in keys})
        else:
            health[line.key] = find(line.key)
    return health


def contamination(health: Mapping[str, float | None], test_images: int) -> Row | None:
    """How many test images are given away by train or val, and why; None where none is."""
    found = {name: health[f"health.contaminated_test.{name}"] for name in ("images", "near_duplicates", "groups")}
    if not found["images"]:
        return None
    reasons = [
        (found["near_duplicates"], "with a near duplicate in train or val"),
        (found["groups"], "of a group that train or val has too"),
    ]
    return {"images": found["images"], "of": test_images, "reasons": [reason for reason in reasons if reason[0]]}


def near_pairs(data: Path, index: pa.Table, buckets: int) -> Row:
    """How many pairs of near duplicates there are, and the NEAR_PAIRS that most want a look, with their thumbnails.

    Pairs of a test image and one of train or val come first, then those of fewest bits, then the lowest paths.
    Raises UserError where a pair is not of usable images or a thumbnail is missing.
    """
    path = data / "index/near_duplicates.parquet"
    pairs = store.read_table(path, "index.near_duplicates/1")
    usable = index.filter(pc.field("status") == "ok").select(["path", "image_id", "class_id", "split"])
    [(stray,)] = query(
        """SELECT min(path) FROM (SELECT path FROM pairs UNION SELECT other FROM pairs)
           WHERE path NOT IN (SELECT path FROM usable)""",
        pairs=pairs,
        usable=usable,
    )
    if stray is not None:
        raise UserError(f"{path}: names {stray!r}, no usable image of images.parquet beside it; {INDEX_AGAIN}")
    chosen = query(
        f"""SELECT bits, (a.split = 'test') <> (b.split = 'test') AS leak, a, b
            FROM pairs JOIN usable a ON pairs.path = a.path JOIN usable b ON pairs.other = b.path
            ORDER BY leak DESC, bits, a.path, b.path LIMIT {NEAR_PAIRS}""",
        pairs=pairs,
        usable=usable,
    )
    thumbs = read_thumbs(data, buckets, [image["image_id"] for _, _, *both in chosen for image in both])
    shown = [
        {"bits": bits, "leak": leak, "images": [{**image, "webp": thumbs[image["image_id"]]} for image in both]}
        for bits, leak, *both in chosen
    ]
    return {"count": len(pairs), "shown": shown}


def confused_pairs(matrix: Ints) -> list[tuple[int, int, int, int]]:
    """Pairs of classes by how often one is taken for the other: (a, b, a taken for b, b taken for a)."""
    true, predicted = np.nonzero(matrix * (1 - np.eye(len(matrix), dtype=int)))
    table = pa.table({"true": true, "predicted": predicted, "images": matrix[true, predicted]})
    return query(
        f"""SELECT least("true", predicted) AS a, greatest("true", predicted) AS b,
                   sum(CASE WHEN "true" < predicted THEN images ELSE 0 END)::BIGINT AS ab,
                   sum(CASE WHEN "true" > predicted THEN images ELSE 0 END)::BIGINT AS ba
            FROM t GROUP BY a, b ORDER BY ab + ba DESC, a, b LIMIT {PAIRS}""",
        t=table,
    )


def order_classes(classes: pa.Table, chosen: Sequence[str]) -> list[int]:
    """Positions in `chosen`, such that classes of one superclass stand together."""
    row = {row["class_id"]: row for row in classes.to_pylist()}

    def place(position: int) -> tuple[str, str, str]:
        class_id = chosen[position]
        return row[class_id]["superclass"] or "", row[class_id]["name"], class_id

    return sorted(range(len(chosen)), key=place)


def choose_examples(image_ids: Sequence[str], right: Bools, count: int) -> list[int]:
    """`count` positions: the lowest image_ids, half of them wrong, half right where there are enough.

    image_id is a hash of the picture's bytes, so the lowest are a draw nobody chose. Wrong ones come first.
    """
    order = sorted(range(len(image_ids)), key=lambda position: image_ids[position])
    wrong = [position for position in order if not right[position]]
    rightly = [position for position in order if right[position]]
    wrongs = min(len(wrong), max(count // 2, count - len(rightly)))
    return wrong[:wrongs] + rightly[: count - wrongs]


def rows_of(
    folder: Path, schema: str, buckets: int, image_ids: Iterable[str], columns: list[str]
) -> dict[str, list[Row]]:
    """The rows of a few images (view 0 where there are views). Raises UserError where an image has none."""
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
    """The thumbnails of a few images, WebP in base64. Raises UserError where an image has none."""
    rows = rows_of(data / "thumbs", "thumbs/1", buckets, set(image_ids), ["image_id", "webp"])
    return {image_id: base64.b64encode(row["webp"]).decode() for image_id, [row] in rows.items()}


def name_concept(row: Row, names: Mapping[str, str]) -> str:
    """A concept's text; a prototype has none and is called by its classes."""
    return row["text"] or "prototype of " + ", ".join(names[class_id] for class_id in row["class_ids"])


def explain(nodes: Sequence[Row], labels: Sequence[Row], bank: Mapping[int, Row], names: Mapping[str, str]) -> Row:
    """The densest selected patches of one image with their best concepts, and its selected concepts."""

    def concept(idx: int, weight: float | None = None) -> Row:
        return {"text": name_concept(bank[idx], names), "classes": bank[idx]["class_ids"], "weight": weight}

    node = {row["node"]: row for row in nodes}
    local = [row for row in labels if row["node"] > 0 and row["selected"]]
    patches = []
    for row in sorted(local, key=lambda row: (-row["density"], row["node"]))[:PATCHES]:
        # Written by falling weight; equal weights in the order of the bank.
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
    bank: pa.Table,
    names: Mapping[str, str],
    *,
    buckets: int,
    count: int,
) -> list[Row]:
    """Test images as the page shows them, by the rule of choose_examples on the kept model's predictions."""
    image_id = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    test = np.flatnonzero(shown.split == "test")
    predicted = shown.predicted[shown.seeds.index(shown.model_seed), test]
    ids = [image_id[shown.paths[position]] for position in test]
    chosen = choose_examples(ids, predicted == shown.y[test], count)

    wanted = {ids[position] for position in chosen}
    thumbs = read_thumbs(data, buckets, wanted)
    boxes = ["image_id", "view", "node", "kind", "x0", "y0", "x1", "y1"]
    nodes = rows_of(data / f"embed/{shown.encoder}/images", "embed.nodes/1", buckets, wanted, boxes)
    columns = ["concept_idx", "concept_weight", "density", "selected", "selected_concepts"]
    columns = ["image_id", "view", "node", *columns]
    labels = rows_of(data / f"labels/{shown.encoder}", "labels/1", buckets, wanted, columns)
    by_idx = {row["concept_idx"]: row for row in bank.to_pylist()}
    examples = []
    for position in chosen:
        own = ids[position]
        examples.append(
            {
                "path": shown.paths[test[position]],
                "webp": thumbs[own],
                "true": shown.classes[shown.y[test[position]]],
                "predicted": shown.classes[predicted[position]],
                **explain(nodes[own], labels[own], by_idx, names),
            }
        )
    return examples


def count_concepts(concepts: pa.Table, bank: pa.Table, names: Mapping[str, str]) -> Row:
    """How many concepts there were and are, why the others went, the most telling ones; class names apart."""
    count = "SELECT count(*), count(*) FILTER (kept) FROM t WHERE kind <> 'name'"
    [(written, clean)] = query(count, t=concepts)
    [(candidates, kept)] = query(count, t=bank)
    # A reason may name the concept that was preferred behind a colon.
    dropped = query(
        """SELECT stage, count(*) AS n, split_part(coalesce(drop_reason, 'no reason given'), ':', 1) AS reason
           FROM (
             SELECT 'clean_concepts' AS stage, drop_reason FROM concepts WHERE NOT kept AND kind <> 'name'
             UNION ALL
             SELECT 'select_concepts', drop_reason FROM bank WHERE NOT kept AND kind <> 'name'
           ) GROUP BY stage, reason ORDER BY stage, n DESC, reason""",
        concepts=concepts,
        bank=bank,
    )
    best = sorted(
        (row for row in bank.to_pylist() if row["kept"] and row["discriminability"] is not None),
        key=lambda row: (-row["discriminability"], row["concept_idx"]),
    )
    telling = [
        {
            "text": name_concept(row, names),
            "classes": [names[class_id] for class_id in row["class_ids"]],
            "kind": row["kind"],
            "nats": row["discriminability"],
        }
        for row in best[:TELLING]
    ]
    counts = {"written": written, "clean": clean, "candidates": candidates, "kept": kept}
    return {**counts, "dropped": dropped, "telling": telling}


def accuracy_rows(runs: Sequence[Run], reference: Run) -> list[Row]:
    """One row a method: accuracies by split, on test the difference to the reference (None for itself)."""
    rows = []
    for found in runs:
        paired: Paired | None = None
        if found is not reference:
            paired = paired_difference(found.on("test"), reference.on("test"), found.y[found.split == "test"])
        splits = {split: found.accuracy(split) for split in SPLITS}
        row = {"method": found.method, "encoder": found.encoder, "seeds": len(found.seeds), "paired": paired}
        rows.append({**row, **splits})
    return rows


def number(value: float | None) -> str:
    """A count or a median as it is: no decimals where it has none, a dash where there is nothing."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def summarise(rows: Sequence[Row], reference: str, warning: Row | None, page: Path) -> str:
    """The plain-text table, in % and points, and what it must not be read without."""
    lines = [["method", *SPLITS, f"test - {reference} [95 %]"]]
    for row in rows:
        splits = [percent_and_deviation(*row[split]) for split in SPLITS]
        paired = row["paired"]
        compared = "reference" if paired is None else f"{points(paired.difference)} {points_range(paired.images)}"
        lines.append([row["method"], *splits, compared])
    counts = sorted({row["seeds"] for row in rows})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"accuracy in %, mean +- standard deviation over seeds ({seeds}); paired difference in points"
    lasts = [note, f"report: {page.as_posix()}"]
    if warning is not None:
        reasons = ", ".join(f"{images} {reason}" for images, reason in warning["reasons"])
        counts_of = f"{warning['images']} of {warning['of']} images ({reasons})"
        lasts.insert(1, f"warning: test is contaminated: {counts_of}; test accuracy is optimistic")
    return "\n".join([lay_out(lines), "", *lasts]) + "\n"


def render(content: Row) -> str:
    """The page. Everything that comes from data is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, points=points, points_range=points_range, number=number)
    return environment.get_template("report.html.jinja").render(content)


def report(params: Params, data: Path) -> str:
    """Write data/report/ and return the summary."""
    buckets = params.dataset.buckets
    index = store.read_table(data / "index/images.parquet", "index.images/1")
    classes = store.read_table(data / "index/classes.parquet", "index.classes/1")
    names = dict(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True))
    runs = [read_run(data, name, method.encoder) for name, method in params.train.runs.items()]
    check_same_images(data, runs, index)
    dataset = count_dataset(index, classes)
    health = read_health(data / "index/metrics.json", dataset["images"])
    warning = contamination(health, dataset["images"]["test"])

    # Of equals, the first in params.yaml.
    shown = max(runs, key=lambda found: found.accuracy("val")[0])
    marks = read_marks(data, shown.encoder, buckets)
    check_marks(data, shown, marks)
    bank = store.read_table(
        data / f"bank/{shown.encoder}.parquet",
        "bank/1",
        ["concept_idx", "text", "class_ids", "kind", "discriminability", "kept", "drop_reason"],
    )
    columns = ["kind", "kept", "drop_reason"]
    concepts = store.read_table(data / "concepts/concepts.parquet", "concepts/1", columns)
    reference = next(found for found in runs if found.method == params.report.reference)
    rows = accuracy_rows(runs, reference)

    test = shown.split == "test"
    guesses = shown.predicted[shown.seeds.index(shown.model_seed), test]
    matrix = np.zeros((len(shown.classes), len(shown.classes)), dtype=np.int64)  # rows: the true classes
    np.add.at(matrix, (shown.y[test], guesses), 1)
    order = order_classes(classes, shown.classes)
    content = {
        "domain": params.domain,
        "dataset": dataset,
        "health_table": HEALTH,
        "health": health,
        "warning": warning,
        "near": near_pairs(data, index, buckets),
        "rows": rows,
        "reference": reference.method,
        "reach": max([0.01, *(abs(end) for row in rows if row["paired"] for end in row["paired"].images)]),
        "shown": shown,
        "names": names,
        "test_images": int(test.sum()),
        "wrong": int((guesses != shown.y[test]).sum()),
        "pairs": confused_pairs(matrix),
        "totals": matrix.sum(axis=1).tolist(),
        "order": order if len(order) <= MATRIX_CLASSES else [],
        "matrix": matrix.tolist(),
        "examples": make_examples(data, shown, index, bank, names, buckets=buckets, count=params.report.examples),
        "concepts": count_concepts(concepts, bank, names),
        "marks": {**marks, **{f"runs/{found.method}/predictions.parquet": found.mark for found in runs}},
    }
    page = data / "report/index.html"
    html, summary = render(content), summarise(rows, reference.method, warning, page)
    store.write_text(page, html)
    store.write_text(page.with_name("summary.txt"), summary)
    return summary


def main() -> None:
    parser = stage_parser(__doc__)
    where = "where the stages wrote (default: data)"
    parser.add_argument("--data", default="data", metavar="DIR", help=where)
    arguments = parser.parse_args()
    report(load_params(arguments.params), Path(arguments.data))
    print(f"{Path(arguments.data) / 'report'}: index.html and summary.txt are written")


if __name__ == "__main__":
    run(main)
