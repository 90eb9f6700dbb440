"""The report on tiny tables: numbers worked out by hand, a page that parses, escapes and loads nothing."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.command import UserError
from stages.params import Params, Train
from stages.store import (
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
from tests.training.cache import ENCODER, Plan, with_vectors, write_cache
from training.report import choose_examples, confused_pairs, report, signed
from training.train import train

PLAN = Plan(classes=3, train=4, val=4, test=4, nodes=6, dimension=8, buckets=2)
METHODS = ("zero_shot", "linear_probe")
NASTY = """<script src="https://evil.example/x.js">'&"</script>"""
Row = dict[str, Any]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def make_params(reference: str = "linear_probe", examples: int = 6, methods: Sequence[str] = METHODS) -> Params:
    return Params.model_validate(
        {
            "domain": {"noun": "fish", "group": "reef fish"},
            "dataset": {"root": "nowhere", "buckets": PLAN.buckets},
            "llm": {"model": "none"},
            "encoders": {ENCODER: {"model": "none"}},
            "train": {"seeds": 2, "methods": {method: {"encoder": ENCODER} for method in methods}},
            "report": {"reference": reference, "examples": examples},
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


def write_run(data: Path, method: str, wrong: Sequence[dict[str, str]], model_seed: int = 0) -> None:
    """A run whose seed s gets everything right but `wrong[s]`, from path to the class it predicts."""
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    images = [row for row in index if row["status"] == "ok"]
    classes = [f"class-{number:02d}" for number in range(PLAN.classes)]
    rows, accuracies = [], []
    for seed, mistakes in enumerate(wrong):
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
    mark = {"schema": "run.predictions/1", "fingerprint": fingerprint("run", {"m": method})}
    folder = data / "runs" / method
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(
        table.replace_schema_metadata({**mark, "params": canonical_json({"classes": classes})}),
        folder / "predictions.parquet",
    )
    metrics = {split: {"accuracy": np.mean([run[split] for run in accuracies])} for split in ("train", "val", "test")}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    names = {f"embed/{ENCODER}/images": "embed.nodes/1", f"labels/{ENCODER}": "labels/1"}
    marks = {name: read_folder_header(data / name, schema, PLAN.buckets).fingerprint for name, schema in names.items()}
    marks[f"bank/{ENCODER}.parquet"] = read_header(data / f"bank/{ENCODER}.parquet", "bank/1").fingerprint
    config = {
        "encoder": ENCODER,
        "model_seed": model_seed,
        "seeds": list(range(len(wrong))),
        "fingerprints": marks,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 images a split; on test zero_shot is 9/12 and 8/12 right, linear_probe 11/12 in both its seeds."""
    write_cache(tmp_path, PLAN)
    write_rest(tmp_path)
    first, second, third = ([f"test/class-{label:02d}/{number:04d}.png" for number in range(4)] for label in range(3))
    a, b, c = (f"class-{label:02d}" for label in range(3))
    seed_0 = {first[0]: b, first[1]: b, second[0]: a, "val/class-00/0000.png": b}
    seed_1 = {first[0]: b, first[1]: b, second[0]: a, third[3]: a, "train/class-00/0000.png": c}
    write_run(tmp_path, "zero_shot", [seed_0, seed_1])
    write_run(tmp_path, "linear_probe", [{first[0]: b}, {first[0]: c}], model_seed=1)
    return tmp_path


def test_summary_says_what_a_hand_computes(data: Path) -> None:
    lines = report(make_params(), data).splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert lines[0].endswith("test - linear_probe [95 %]")
    # train 1 and 11/12, val 11/12 and 1: mean 23/24, deviation sqrt(2)/24; test 9/12 and 8/12: 17/24.
    row = re.split(r"  +", lines[1])
    assert row[:4] == ["zero_shot", "95.8 +- 5.9", "95.8 +- 5.9", "70.8 +- 5.9"]
    difference, low, high = map(float, re.findall(r"[+-]\d+\.\d", row[4]))
    assert difference == -20.8  # 17/24 - 22/24
    assert -50 < low < difference < high <= 0
    assert re.split(r"  +", lines[2]) == [
        "linear_probe",
        "100.0 +- 0.0",
        "100.0 +- 0.0",
        "91.7 +- 0.0",
        "reference",
    ]
    assert lines[-1] == f"report: {data}/report/index.html"
    assert (data / "report/summary.txt").read_text().splitlines() == lines


def test_page_holds_every_part_and_loads_nothing(data: Path) -> None:
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    page = Page(html)
    for expected in (
        *METHODS,
        "reef fish",
        "kinds of fish apart",
        f"encoder {ENCODER}",
        "1 of 12 test images",
        "unreadable",
    ):
        assert expected in page.text
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:image/webp;base64,"), (tag, name)
        assert not any(name.startswith("on") for name in attrs)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in html
    assert str(data) not in html


def test_confusion_is_that_of_the_kept_seed(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    # linear_probe is best on val; its seed 1 takes one image of class 0 for class 2.
    assert "Class-00 taken for Class-02: 1 of 4" in page.text
    assert "Class-00 taken for Class-01" not in page.text
    assert "Class-00 taken for Class-00: 3 of 4" in page.text
    assert "Class-00 Class-02 1 of 4 0 of 4" in page.text
    assert len(page.of_class("hit")) - 5 == 3  # 5 right examples of 6, and the diagonal
    assert len(page.of_class("empty")) == 9 - 4


def test_example_shows_thumbnail_boxes_and_concepts(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    index = {row["path"]: row for row in read_table(data / "index/images.parquet", "index.images/1").to_pylist()}
    shown = index["test/class-00/0000.png"]  # the only one that is wrong, so it comes first
    bucket = int(shown["image_id"][:8], 16) % PLAN.buckets
    thumbs = {
        row["image_id"]: row["webp"] for row in read_table(bucket_path(data / "thumbs", bucket), "thumbs/1").to_pylist()
    }
    source = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert source is not None
    assert base64.b64decode(source.split(",")[1]) == thumbs[shown["image_id"]]

    def own(folder: str, schema: str) -> list[Row]:
        rows = read_table(bucket_path(data / folder, bucket), schema).to_pylist()
        return [row for row in rows if row["image_id"] == shown["image_id"] and row["view"] == 0]

    labels = own(f"labels/{ENCODER}", "labels/1")
    best = max((row for row in labels if row["node"] and row["selected"]), key=lambda row: row["density"])
    node = own(f"embed/{ENCODER}/images", "embed.nodes/1")[best["node"]]
    style = page.of_class("p1")[0]["style"]
    assert style is not None
    sizes = [float(value) for value in re.findall(r"[\d.]+", style)]
    expected = [node["x0"], node["y0"], node["x1"] - node["x0"], node["y1"] - node["y0"]]
    assert np.allclose(sizes, 100 * np.array(expected), atol=0.06)
    bank = read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()
    weight, text = float(best["concept_weight"][0]), bank[best["concept_idx"][0]]["text"]
    assert f"{100 * weight:.1f} % {text}" in page.text
    assert f"density {best['density']:.3f}" in page.text


def test_concepts_are_counted_with_their_reasons(data: Path) -> None:
    # The bank: 6 names, 9 visual concepts, 2 generic ones, 1 dropped as a duplicate.
    rewrite(
        data / f"bank/{ENCODER}.parquet",
        "bank/1",
        {2: {"discriminability": 0.25}, 3: {"discriminability": 0.75}},
    )
    report(make_params(), data)
    text = Page((data / "report/index.html").read_text()).text
    assert "Of 4 concepts, 3 stood after cleaning by text." in text.replace("concepts , ", "concepts, ")
    assert "12 candidates, of which 11 were kept" in text
    assert "clean_concepts names the class 1" in text
    assert "select_concepts duplicate 1" in text
    assert text.index("0.750") < text.index("0.250")


def test_text_is_escaped(data: Path) -> None:
    rewrite(data / "index/classes.parquet", "index.classes/1", {0: {"name": NASTY}})
    rewrite(data / "index/images.parquet", "index.images/1", {12: {"error": NASTY}})
    everything = {position: {"text": f"{NASTY} {position}"} for position in range(18)}
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", everything)
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    assert "<script" not in html
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert NASTY in Page(html).text


def test_same_inputs_same_bytes(data: Path) -> None:
    outputs = []
    for _ in range(2):
        report(make_params(), data)
        outputs.append([path.read_bytes() for path in sorted((data / "report").iterdir())])
    assert len(outputs[0]) == 2
    assert outputs[0] == outputs[1]


def test_nothing_wrong(data: Path) -> None:
    write_run(data, "linear_probe", [{}])
    report(make_params(examples=20), data)
    page = Page((data / "report/index.html").read_text())
    assert "0 of 12 test images are classified wrongly" in page.text
    assert "No pair of classes is confused." in page.text
    assert not page.of_class("miss")
    assert len(page.of_class("example")) == 12


def test_runs_that_cannot_stand_are_named(data: Path) -> None:
    folder = data / "runs/zero_shot"

    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "test": {"accuracy": 0.99}}))
    with pytest.raises(
        UserError, match=r"metrics\.json: disagrees with predictions\.parquet on test; .*train@zero_shot"
    ):
        report(make_params(), data)

    for name in ("predictions.parquet", "metrics.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"zero_shot/{name}: is missing; .*training\.train --method zero_shot"):
            report(make_params(), data)
    assert not (data / "report").exists()


def test_stale_inputs_are_refused(data: Path) -> None:
    config = json.loads((data / "runs/linear_probe/config.json").read_text())
    config["fingerprints"][f"labels/{ENCODER}"] = "former"
    (data / "runs/linear_probe/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"was trained on another .*labels/{ENCODER} .* train@linear_probe"):
        report(make_params(), data)

    rewrite(data / "index/images.parquet", "index.images/1", {0: {"status": "broken"}})
    with pytest.raises(UserError, match=r"runs/zero_shot: was made from other images"):
        report(make_params(), data)

    bucket_path(data / "thumbs", 0).unlink()
    (data / "index/classes.parquet").unlink()
    with pytest.raises(UserError, match=r"classes\.parquet: is missing"):
        report(make_params(), data)


def test_missing_thumbnail_is_named(data: Path) -> None:
    for bucket in range(PLAN.buckets):
        empty = make_table("thumbs/1", [])
        write_table(empty, bucket_path(data / "thumbs", bucket), "thumbs/1", {}, "thumbs")
    with pytest.raises(UserError, match=r"thumbs/b00\d\.parquet: lacks image"):
        report(make_params(), data)


def test_reads_what_train_writes(data: Path) -> None:
    # Two strengths are enough here: what linear_probe finds is not the question.
    block = {"zero_shot": {"encoder": ENCODER}, "linear_probe": {"encoder": ENCODER, "l2": [0.1, 1.0]}}
    params = make_params(reference="zero_shot")
    params = params.model_copy(update={"train": Train.model_validate({"seeds": 2, "methods": block})})
    for method in METHODS:
        train(params, "params.yaml", method, data)
    summary = report(params, data)
    for line, method in zip(summary.splitlines()[1:], METHODS, strict=False):
        metrics = json.loads((data / f"runs/{method}/metrics.json").read_text())
        cells = re.split(r"  +", line)
        expected = [
            f"{100 * metrics[split]['accuracy']:.1f} +- {100 * metrics[split]['accuracy_std']:.1f}"
            for split in ("train", "val", "test")
        ]
        assert cells[:4] == [method, *expected]


def test_choose_examples_takes_both_kinds() -> None:
    right = np.array([True, False, True, False, True])
    assert choose_examples(["c", "d", "a", "b", "e"], right, 2) == [3, 2]
    assert choose_examples(["c", "d", "a", "b", "e"], right, 4) == [3, 1, 2, 0]
    assert choose_examples(["c", "d", "a", "b", "e"], right, 99) == [3, 1, 2, 0, 4]
    assert choose_examples(["b", "a"], np.array([False, False]), 3) == [1, 0]
    assert choose_examples(["b", "a"], np.array([True, True]), 1) == [1]


def test_confused_pairs_count_both_ways() -> None:
    matrix = np.array([[9, 1, 0], [2, 8, 4], [0, 0, 5]])
    assert confused_pairs(matrix) == [(1, 2, 4, 0), (0, 1, 1, 2)]
    assert confused_pairs(np.eye(3, dtype=int)) == []


def test_no_negative_zero() -> None:
    assert [signed(value) for value in (-0.0001, 0.0, -0.1, 0.123)] == ["+0.0", "+0.0", "-10.0", "+12.3"]
