"""The report on tiny tables: numbers worked out by hand, a page that parses, escapes and loads nothing."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluation.report import choose_examples, confused_pairs, report
from fieldmark.command import UserError
from fieldmark.params import Params, Train
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
from tests.training.cache import ENCODER, Plan, with_vectors, write_cache
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


def write_health(data: Path, pairs: Sequence[tuple[str, str, int]] = (), **changes: Row) -> None:
    """What index_images finds in the data set: nothing wrong but the broken file, near duplicates, and `changes`."""
    places = {"within_split": 0, "across_splits": 0, "across_classes": 0}
    health = {
        "byte_duplicates": places,
        "near_duplicates": places,
        "groups": {"count": 0, "across_splits": 0},
        "contaminated_test": {"near_duplicates": 0, "groups": 0, "images": 0},
        "images_a_class": {split: {"min": 4, "median": 4.0, "max": 4} for split in ("train", "val", "test")},
        "classes_without": {"train": 0, "val": 0, "test": 0, "images": 0},
        "pixels": {side: {"min": None, "median": None, "max": None} for side in ("shorter_side", "longer_side")},
        "passed_over": 0,
    }
    metrics = {
        "classes": PLAN.classes,
        "images": {"train": 12, "val": 12, "test": 12},
        "unused": {"broken": 1, "duplicate": 0, "conflict": 0},
        "health": {**health, **changes},
    }
    (data / "index/metrics.json").write_text(json.dumps(metrics))
    schema = "index.near_duplicates/1"
    rows = [{"path": path, "other": other, "bits": bits} for path, other, bits in pairs]
    write_table(make_table(schema, rows), data / "index/near_duplicates.parquet", schema, {}, "index")


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
    write_health(tmp_path)
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
        "broken",
    ):
        assert expected in page.text
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#")), (tag, name)
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


class Drawn(NamedTuple):
    """A pair of near duplicates as the page draws it: bits, chips, and the caption of either picture."""

    bits: str
    chips: str
    name: str
    split: str
    path: str
    other_name: str
    other_split: str
    other: str


def drawn(page: Page) -> list[Drawn]:
    caption = r"(Class-\d\d) , (\w+) (\S+\.png)"
    return [Drawn(*found) for found in re.findall(rf"(\d+) of 64 bits differ (.*?) ?{caption} {caption}", page.text)]


def test_healthy_data_warn_nowhere(data: Path) -> None:
    summary = report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "warning" not in summary
    assert "contaminated:" not in page.text
    assert not page.of_class("warning")
    assert not page.of_class("alarm")
    assert not page.of_class("near")
    assert len(page.of_class("nil")) == 16  # of 17 counts; one file is broken
    assert "broken 1 cannot be read as an image" in page.text
    assert "test 4 (4 to 4) median (fewest to most)" in page.text
    assert "shorter side – (– to –)" in page.text


def test_contaminated_test_is_warned_of(data: Path) -> None:
    pair = ("test/class-00/0001.png", "train/class-00/0002.png", 3)
    write_health(
        data,
        [pair],
        contaminated_test={"near_duplicates": 3, "groups": 5, "images": 7},
        near_duplicates={"within_split": 11, "across_splits": 13, "across_classes": 0},
        groups={"count": 17, "across_splits": 2},
        images_a_class={split: {"min": 1, "median": 3.5, "max": 6} for split in ("train", "val", "test")},
    )
    lines = report(make_params(), data).splitlines()
    assert lines[-2:] == [
        "warning: test is contaminated: 7 of 12 images (3 with a near duplicate in train or val,"
        " 5 of a group that train or val has too); test accuracy is optimistic",
        f"report: {data}/report/index.html",
    ]
    page = Page((data / "report/index.html").read_text())
    assert len(page.of_class("warning")) == 1
    box = page.text[page.text.index("Test is contaminated") : page.text.index("Accuracy method")]
    assert box.startswith(
        "Test is contaminated: 7 of 12 test images 3 with a near duplicate in train or val"
        " 5 of a group that train or val has too An image can be both."
    )
    for expected in ("test accuracy on this page is optimistic", "dataset.val_list", "near_duplicates.parquet"):
        assert expected in box
    assert len(page.of_class("alarm")) == 5  # three of contaminated test, pairs across splits, groups across splits
    for expected in ("within a split 11 ", "across splits 13 ", "Groups in all 17 ", "val 3.5 (1 to 6)"):
        assert expected in page.text
    assert drawn(page) == [Drawn("3", "test and train", "Class-00", "test", pair[0], "Class-00", "train", pair[1])]


def test_warning_names_only_the_reason_there_is(data: Path) -> None:
    write_health(data, contaminated_test={"near_duplicates": 0, "groups": 1, "images": 1})
    summary = report(make_params(), data)
    assert "1 of 12 images (1 of a group that train or val has too);" in summary
    page = Page((data / "report/index.html").read_text())
    assert "with a near duplicate in train or val An" not in page.text
    assert "An image can be both" not in page.text
    assert not page.of_class("near")
    assert "#near" not in {attrs.get("href") for _, attrs in page.tags}


def test_pairs_drawn_are_those_of_test_and_fewest_bits(data: Path) -> None:
    folders = ("test/class-00", "train/class-00", "val/class-01")
    test, train, val = ([f"{folder}/{number:04d}.png" for number in range(4)] for folder in folders)
    pairs = [
        (test[0], train[0], 4),
        (test[0], val[0], 2),
        (test[1], train[1], 2),
        (test[2], test[3], 0),  # no leak: nothing learns from either
        (train[0], train[1], 1),
        (train[0], val[3], 0),
        (train[2], train[3], 0),
        (train[2], val[3], 9),
    ]
    write_health(data, pairs)
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "6 of 8 pairs" in page.text
    rows = drawn(page)
    assert [(row.path, row.other, int(row.bits)) for row in rows] == [pairs[place] for place in (1, 2, 0, 3, 5, 6)]
    chips = ["test and val two classes", "test and train", "test and train", "", "two classes", ""]
    assert [row.chips for row in rows] == chips
    # The pictures are those of the paths, side by side.
    thumbs = {}
    for bucket in range(PLAN.buckets):
        for row in read_table(bucket_path(data / "thumbs", bucket), "thumbs/1").to_pylist():
            thumbs[row["image_id"]] = base64.b64encode(row["webp"]).decode()
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    image_id = {row["path"]: row["image_id"] for row in index}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"][-12:]
    expected = [thumbs[image_id[path]] for row in rows for path in (row.path, row.other)]
    assert sources == [f"data:image/webp;base64,{webp}" for webp in expected]


def test_paths_and_names_of_pairs_are_escaped(data: Path) -> None:
    rewrite(data / "index/classes.parquet", "index.classes/1", {0: {"name": NASTY}})
    hostile = f"test/class-00/{NASTY}.png"
    rewrite(data / "index/images.parquet", "index.images/1", {0: {"path": hostile}})
    for method in METHODS:
        write_run(data, method, [{}])
    write_health(data, [(hostile, "train/class-00/0000.png", 1)])
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    page = Page(html)
    assert "<script" not in html
    assert len(page.of_class("near")) == 1
    assert f"{NASTY} , test {hostile} {NASTY} , train train/class-00/0000.png" in page.text


def test_health_that_cannot_stand_is_named(data: Path) -> None:
    path = data / "index/metrics.json"
    again = r"run `python -m stages\.index_images` again"
    whole = json.loads(path.read_text())
    lacking = json.loads(path.read_text())
    del lacking["health"]["pixels"]["longer_side"]["max"]
    broken = {
        "": "is not readable JSON",
        "{": "is not readable JSON",
        "[]": r"has no number images\.train",
        json.dumps({**whole, "health": {}}): r"has no number health\.contaminated_test",
        json.dumps({name: value for name, value in whole.items() if name != "health"}): r"has no number health\.",
        json.dumps({**whole, "unused": {"broken": NASTY}}): r"has no number unused\.broken",
        json.dumps(lacking): r"has no number health\.pixels\.longer_side\.max",
        json.dumps({**whole, "images": {**whole["images"], "test": 13}}): r"counts other images than images\.parquet",
    }
    for text, problem in broken.items():
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^\S+metrics\.json: {problem}.*; {again}[^\n]*$"):
            report(make_params(), data)
    path.unlink()
    with pytest.raises(UserError, match=rf"^\S+metrics\.json: is missing; {again}"):
        report(make_params(), data)

    write_health(data, [("test/class-00/0000.png", "train/broken.png", 0)])
    with pytest.raises(UserError, match=rf"near_duplicates\.parquet: names 'train/broken\.png', no usable .*{again}"):
        report(make_params(), data)
    (data / "index/near_duplicates.parquet").unlink()
    with pytest.raises(UserError, match=r"near_duplicates\.parquet: is missing"):
        report(make_params(), data)
    assert not (data / "report").exists()


def test_missing_thumbnail_of_a_pair_is_named(data: Path) -> None:
    gone, other = "train/class-00/0000.png", "train/class-00/0001.png"
    write_health(data, [(gone, other, 0)])
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    image_id = next(row["image_id"] for row in index if row["path"] == gone)
    path = bucket_path(data / "thumbs", int(image_id[:8], 16) % PLAN.buckets)
    kept = [row for row in read_table(path, "thumbs/1").to_pylist() if row["image_id"] != image_id]
    write_table(make_table("thumbs/1", kept), path, "thumbs/1", {}, "thumbs")
    with pytest.raises(UserError, match=rf"thumbs/b00\d\.parquet: lacks image {image_id}; run the stage that writes"):
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
