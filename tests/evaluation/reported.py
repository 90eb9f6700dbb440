"""A tiny data folder to report on, written as the stages and the trainer would write it, and the page taken apart."""

import io
import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fieldmark.params import Params
from fieldmark.store import (
    bucket_path,
    canonical_json,
    fingerprint,
    make_table,
    read_folder_header,
    read_header,
    read_table,
    split_buckets,
    write_table,
)
from tests.training.cache import ENCODER, Plan, with_vectors

PLAN = Plan(classes=3, train=4, val=8, test=4, nodes=6, dimension=8, buckets=2)
RUNS = {"zero_shot": ENCODER, "linear_probe": ENCODER}
NASTY = """<script src="https://evil.example/x.js">'&"</script>"""
Row = dict[str, Any]
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}
JOINED = "\N{WORD JOINER}"  # where a word may break


class Page(HTMLParser):
    """Collects tags, text and what the page tells its script, and raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}  # by id
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "wbr":
            self.words.append(JOINED)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.tags[-1][1].get("id") or "script"] = data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace(f" {JOINED} ", "")

    @property
    def data(self) -> Row:
        """What the script shows: classes, pictures, concepts."""
        found: Row = json.loads(self.scripts["report-data"])
        return found

    @property
    def pictures(self) -> dict[str, str]:
        """WebP in base64, by the first digits of image_id."""
        found: dict[str, str] = json.loads(self.scripts["report-pictures"])
        return found

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def make_params(
    reference: str = "linear_probe",
    shown: str | None = None,
    runs: Mapping[str, str] = RUNS,
    towers: Sequence[str] = (),
) -> Params:
    """Parameters with runs, each of the method of its name, by the encoder or tower that it stands on."""
    return Params.model_validate(
        {
            "domain": {"noun": "fish", "group": "reef fish"},
            "dataset": {"root": "nowhere", "buckets": PLAN.buckets},
            "llm": {"model": "none"},
            "encoders": {ENCODER: {"model": "none"}},
            "towers": {tower: {"model": "none"} for tower in towers},
            "train": {"seeds": 2, "runs": {name: {"method": name, "encoder": on} for name, on in runs.items()}},
            "report": {"reference": reference, "run": shown},
        }
    )


def rewrite(path: Path, schema: str, change: dict[int, Row]) -> None:
    """Change values of some rows of a table, whose header stays."""
    header, table = read_header(path, schema), read_table(path, schema)
    rows = table.to_pylist()
    for position, values in change.items():
        rows[position].update(values)
    if "vector" in table.schema.names:
        rows = [{**row, "vector": np.array(row["vector"])} for row in rows]
        table = with_vectors(schema, rows)
    else:
        table = make_table(schema, rows)
    write_table(table, path, schema, header.params, header.fingerprint)


def write_rest(data: Path) -> None:
    """Thumbnails and concepts, which the cache writer has no use for."""
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    ids = [row["image_id"] for row in index if row["status"] == "ok"]
    for bucket, members in enumerate(split_buckets(ids, PLAN.buckets)):
        rows = []
        for image_id in members:
            buffer = io.BytesIO()
            Image.new("RGB", (12, 8), f"#{image_id[:6]}").save(buffer, "WEBP", lossless=True)
            rows.append({"image_id": image_id, "webp": buffer.getvalue()})
        write_table(make_table("thumbs/1", rows), bucket_path(data / "thumbs", bucket), "thumbs/1", {}, "thumbs")
    # Four concepts that were written, one of which cleaning dropped; names do not count.
    concepts = [
        {
            "concept_id": f"{number}",
            "text": f"concept {number}",
            "kind": kind,
            "rank": number,
            "kept": reason is None,
            "class_id": "class-00",
            "drop_reason": reason,
        }
        for number, (kind, reason) in enumerate(
            [
                ("name", None),
                ("visual", None),
                ("visual", None),
                ("habitat", "names the class: Class-00"),
                ("visual", None),
            ]
        )
    ]
    write_table(make_table("concepts/1", concepts), data / "concepts/concepts.parquet", "concepts/1", {}, "concepts")
    judged = {"verdict": "unknown", "images": 12, "classes": PLAN.classes, "concepts": 11}
    (data / f"bank/{ENCODER}.json").write_text(json.dumps({"judged": judged}))
    for folder in ("concepts", "descriptions"):
        write_answers(data / folder / "answers.parquet", {})


def write_answers(path: Path, costs: Mapping[str, float | None], source: str = "live") -> None:
    """An answer at each of these times, and what it cost."""
    schema = "llm.answers/1"
    same = {"sample": 0, "prompt_sha": "p", "status": "ok", "model_requested": "m", "attempts": 1, "source": source}
    rows = [
        {**same, "item_key": time, "subject_id": f"class-{number:02d}", "created_at": time, "cost_usd": usd}
        for number, (time, usd) in enumerate(costs.items())
    ]
    write_table(make_table(schema, rows), path, schema, {}, "answers")


def write_health(data: Path, pairs: Sequence[tuple[str, str, int]] = (), **changes: Row) -> None:
    """What index_images finds in the data set: nothing wrong but the broken file, near duplicates, and `changes`."""
    places = {"within_split": 0, "across_splits": 0, "across_classes": 0}
    health = {
        "byte_duplicates": places,
        "near_duplicates": places,
        "groups": {"count": 0, "across_splits": 0},
        "sequences": {"count": 0, "images": 0, "across_splits": 0, "test_images": 0},
        "contaminated_test": {"near_duplicates": 0, "groups": 0, "images": 0},
        "images_a_class": {split: {"min": 4, "median": 4.0, "max": 4} for split in ("train", "val", "test")},
        "classes_without": {"train": 0, "val": 0, "test": 0, "images": 0},
        "pixels": {side: {"min": None, "median": None, "max": None} for side in ("shorter_side", "longer_side")},
        "passed_over": 0,
    }
    metrics = {
        "classes": PLAN.classes,
        "images": {"train": 12, "val": 24, "test": 12},
        "unused": {"broken": 1, "duplicate": 0, "conflict": 0},
        "health": {**health, **changes},
    }
    (data / "index/metrics.json").write_text(json.dumps(metrics))
    schema = "index.near_duplicates/1"
    rows = [{"path": path, "other": other, "bits": bits} for path, other, bits in pairs]
    write_table(make_table(schema, rows), data / "index/near_duplicates.parquet", schema, {}, "index")


def half_of(path: str, split: str) -> str:
    return "choose" if split == "val" and int(path[-5]) > 3 else split


def write_run(
    data: Path, name: str, wrong: Sequence[dict[str, str]], model_seed: int = 0, encoder: str = ENCODER
) -> None:
    """A run whose seed s gets everything right but `wrong[s]`, from path to the class it predicts.

    Of val 0000 to 0003 of a class are reported, and 0004 to 0007, which choose, are judged as these are. On ENCODER it
    has read texts; another encoder is a tower, without any.
    """
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    images = [{**row, "split": half_of(row["path"], row["split"])} for row in index if row["status"] == "ok"]
    classes = [f"class-{number:02d}" for number in range(PLAN.classes)]
    rows, accuracies = [], []
    for seed, made in enumerate(wrong):
        twins = {f"{path[:-5]}{int(path[-5]) + 4}.png": to for path, to in made.items() if "val" in path}
        mistakes = made | twins
        for row in images:
            logits = np.zeros(PLAN.classes, dtype=np.float32)
            logits[classes.index(mistakes.get(row["path"], row["class_id"]))] = 1
            rows.append(
                {
                    **{name: row[name] for name in ("path", "split", "class_id")},
                    "seed": seed,
                    "logits": logits,
                }
            )
        accuracies.append(
            {
                split: np.mean([row["path"] not in mistakes for row in images if row["split"] == split])
                for split in ("train", "val", "test")
            }
        )
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("split", pa.string()),
            ("seed", pa.int32()),
            ("class_id", pa.string()),
            ("logits", pa.list_(pa.float32(), PLAN.classes)),
        ]
    )
    mark = {"schema": "run.predictions/1", "fingerprint": fingerprint("run", {"m": name})}
    folder = data / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(
        table.replace_schema_metadata({**mark, "params": canonical_json({"classes": classes})}),
        folder / "predictions.parquet",
    )
    metrics = {split: {"accuracy": np.mean([run[split] for run in accuracies])} for split in ("train", "val", "test")}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    folders = {f"embed/{encoder}/images": "embed.nodes/1"}
    folders |= {f"labels/{encoder}": "labels/1"} if encoder == ENCODER else {}
    marks = {path: read_folder_header(data / path, of, PLAN.buckets).fingerprint for path, of in folders.items()}
    if encoder == ENCODER:
        marks[f"bank/{encoder}.parquet"] = read_header(data / f"bank/{encoder}.parquet", "bank/1").fingerprint
    config = {
        "encoder": encoder,
        "model_seed": model_seed,
        "seeds": list(range(len(wrong))),
        "fingerprints": marks,
        "regime": {"kind": "full"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    looks = [f"{seed},{epoch},0.5,{epoch / 10 + seed / 100}" for seed in range(len(wrong)) for epoch in range(4)]
    (folder / "history.csv").write_text("\n".join(["seed,epoch,val_loss,val_accuracy", *looks]) + "\n")


def write_not_made(data: Path, name: str, reason: str) -> None:
    """A run whose method cannot work on this data, as far as the report reads it."""
    folder = data / "runs" / name
    folder.mkdir(parents=True)
    for file in ("config.json", "metrics.json"):
        (folder / file).write_text(json.dumps({"encoder": ENCODER, "not_possible": reason}))
    (folder / "predictions.parquet").touch()
