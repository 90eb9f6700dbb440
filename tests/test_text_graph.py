"""A data set without a picture: every stage runs on documents, what needs pictures says so, and none is opened."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.documents import split_sentences
from fieldmark.params import Params
from tests.project import ROOT
from tools.draw_text_graph import MARKS, OUT, draw, to_csv

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
TEXT, DESCRIPTIONS = "data/embed/conv/text.parquet", "data/descriptions/descriptions.parquet"
SETTINGS = {"features": ["descriptions"]}
SETTINGS_OF_ALL: dict[str, Any] = {
    "dataset": {"format": "text_graph", "root": "notes"},
    "llm": {"mode": "import", "min_coverage": 0.0},
    "embed": {"views": 0, "tokens": False, "grids": []},
    "links": {
        "cited": {"kind": "given", "vectors": "data/none", "texts": "data/none"},
        "alike": {"kind": "text", "vectors": TEXT, "texts": DESCRIPTIONS, "k": 3},
    },
    "train": {
        "runs": {
            "probe": {"method": "linear_probe", "encoder": "conv", "settings": SETTINGS},
            "pictures": {"method": "linear_probe", "encoder": "conv"},
        }
    },
    "report": {"reference": "probe"},
}


@pytest.fixture
def notes(project: Path, set_params: SetParams) -> Path:
    """A project of the demo's documents."""
    (project / "prompts").symlink_to(ROOT / "prompts")
    nodes, edges = draw()
    folder = project / "notes"
    folder.mkdir()
    (folder / "nodes.csv").write_text(to_csv(nodes))
    (folder / "edges.csv").write_text(to_csv(edges))
    set_params(**SETTINGS_OF_ALL)
    return folder


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening any picture is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture is opened")

    monkeypatch.setattr("PIL.Image.open", refuse)
    monkeypatch.setattr("fieldmark.pictures.decode.open_file", refuse)
    monkeypatch.setattr("stages.index_images.open_file", refuse)


def test_the_demo_is_what_the_script_draws() -> None:
    for name, rows in zip(("nodes.csv", "edges.csv"), draw(), strict=True):
        assert (ROOT / OUT / name).read_text() == to_csv(rows)


def test_what_is_planted() -> None:
    """Edges carry the class with `carry`, and without it nothing; a note depends on nothing but seed, class and k."""
    nodes, edges = draw(carry=0.7)
    label = {row["id"]: row["label"] for row in nodes}
    assert set(label.values()) == set(MARKS)
    assert len(nodes) == len({row["text"] for row in nodes}) == 240
    alike = sum(label[row["src"]] == label[row["dst"]] for row in edges) / len(edges)
    # 0.7 + 0.3 / 6, with a standard error of 0.014.
    assert abs(alike - 0.75) < 0.05
    same_nodes, bare = draw(carry=0.0)
    assert same_nodes == nodes
    assert abs(sum(label[row["src"]] == label[row["dst"]] for row in bare) / len(bare) - 1 / 6) < 0.04
    assert draw(seed=1)[0] != nodes


def test_the_chain(
    notes: Path, no_picture: None, set_params: SetParams, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    with (notes / "nodes.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    run_stage("index_images")
    assert "documents: 120 train, 48 val, 72 test" in capsys.readouterr().out
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert {row["path"]: (row["class_id"], row["split"]) for row in index} == {
        name: (row["label"], row["split"]) for name, row in rows.items()
    }
    by_path = {row["path"]: row["image_id"] for row in index}
    said_by = {name: store.canonical_json([row["title"], row["text"]]) for name, row in rows.items()}
    assert by_path == {name: store.sha256(said) for name, said in said_by.items()}
    assert {(row["width"], row["height"], row["dhash"], row["status"]) for row in index} == {(None, None, None, "ok")}
    assert len(store.read_buckets("data/thumbs", "thumbs/1", 4)) == 0
    health = json.loads(Path("data/index/metrics.json").read_text())["health"]
    assert health["pixels"]["longer_side"] == {"min": None, "median": None, "max": None}

    for stage in ("generate_concepts", "describe_images", "clean_concepts"):
        run_stage(stage)
    said = {
        (row["image_id"], row["rank"]): row["text"]
        for row in store.read_table(DESCRIPTIONS, "descriptions/1").to_pylist()
    }
    assert said == {
        (by_path[name], rank): text
        for name, row in rows.items()
        for rank, text in enumerate([row["title"], *split_sentences(row["text"])])
    }
    assert len(store.read_table("data/descriptions/answers.parquet", "llm.answers/1")) == 0

    for stage in ("embed_images", "build_graphs", "embed_text", "select_concepts", "label_patches"):
        run_stage(stage, "--encoder", "conv")
    assert "documents have no pictures to choose concepts by" in capsys.readouterr().out
    of_pictures = {"embed/conv/images": "embed.nodes/1", "graphs/conv": "graphs/1", "labels/conv": "labels/1"}
    assert [len(store.read_buckets(f"data/{folder}", schema, 4)) for folder, schema in of_pictures.items()] == [0] * 3
    bank = store.read_table("data/bank/conv.parquet", "bank/1").to_pylist()
    assert {(row["kind"], row["kept"]) for row in bank} == {("name", False)}

    for name in ("cited", "alike"):
        run_stage("link_images", "--links", name)
    with (notes / "edges.csv").open() as file:
        edges = {(by_path[row["src"]], by_path[row["dst"]]) for row in csv.DictReader(file)}
    cited = store.read_table("data/links/cited.parquet", "links/1").to_pylist()
    assert {(row["src"], row["dst"]) for row in cited} == edges
    assert {(row["kind"], row["weight"]) for row in cited} == {("cited", 1.0)}
    alike = store.read_table("data/links/alike.parquet", "links/1").to_pylist()
    assert len(alike) == 3 * len(rows)

    run_stage("training.train", "--run", "probe")
    metrics = json.loads(Path("data/runs/probe/metrics.json").read_text())
    assert metrics["train"]["accuracy"] > 0.3  # of six classes, with a text tower of random weights
    with pytest.raises(UserError, match="images: is of pictures, and documents have none; let runs read"):
        run_stage("training.train", "--run", "pictures")
    alone = {name: block for name, block in SETTINGS_OF_ALL.items() if name != "train"}
    set_params(**alone, train={"runs": {"probe": SETTINGS_OF_ALL["train"]["runs"]["probe"]}})
    run_stage("evaluation.report")
    assert "There are none: the data set is of documents" in Path("data/report/index.html").read_text()


def test_a_document_more_is_one_row_more(notes: Path, run_stage: RunStage) -> None:
    """And one of a text that is there already is a duplicate; one without a text is of no use."""
    run_stage("index_images")
    before = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    path = notes / "nodes.csv"
    first = next(iter(csv.DictReader(path.read_text().splitlines())))
    more = [
        {"id": "new", "title": "New", "text": "It is new.", "label": "mimic", "split": "train"},
        {**first, "id": "twin"},
        {"id": "zero", "title": "", "text": "", "label": "mimic", "split": "train"},
    ]
    path.write_text(path.read_text() + to_csv(more).partition("\n")[2])
    run_stage("index_images")
    after = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert {name: after[name] for name in before} == before
    assert after["new"]["status"] == "ok"
    assert (after["twin"]["status"], after["twin"]["duplicate_of"]) == ("duplicate", first["id"])
    assert (after["zero"]["status"], after["zero"]["error"]) == ("broken", "has no text")


def test_an_id_may_hold_the_mark_of_a_box(notes: Path, run_stage: RunStage) -> None:
    """`FILE#ID` is a box of a file among pictures, and C#1 a name among documents."""
    path = notes / "nodes.csv"
    more = [{"id": "C#1", "title": "", "text": "It is sharp.", "label": "mimic", "split": "train"}]
    path.write_text(path.read_text() + to_csv(more).partition("\n")[2])
    (notes / "edges.csv").write_text(f"src,dst\nC#1,{next(csv.DictReader(path.read_text().splitlines()))['id']}\n")
    for stage in ("index_images", "describe_images"):
        run_stage(stage)
    run_stage("link_images", "--links", "cited")
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    [row] = [row for row in index if row["path"] == "C#1"]
    assert row["status"] == "ok"
    [link] = store.read_table("data/links/cited.parquet", "links/1").to_pylist()
    assert link["src"] == row["image_id"]
    said = store.read_table(DESCRIPTIONS, "descriptions/1").to_pylist()
    assert [each["text"] for each in said if each["image_id"] == row["image_id"]] == ["It is sharp."]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"describe": {"enabled": True}}, "describe.enabled: documents have a text of their own; set it to false"),
        ({"moments": {"conv": {"pooled": {"kind": "pooled"}}}}, "moments: is made of pictures, and documents have"),
        ({"towers": {"t": {"model": "resnet10t"}}}, "towers: is made of pictures"),
        ({"select": {"fallback": "auto"}}, "select.fallback: prototypes are of patches, and documents have none"),
    ],
    ids=str,
)
def test_what_needs_pictures_is_refused(set_params: SetParams, block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_params(dataset={"format": "text_graph"}, **block)


def test_tools_that_are_for_pictures_say_so(notes: Path, run_stage: RunStage) -> None:
    with pytest.raises(UserError, match="this project runs on documents of a text graph, and only pictures are asked"):
        run_stage("tools.predict", "notes/nodes.csv")
    with pytest.raises(UserError, match="is of documents, and --to coco is of pictures; choose one of: card, dataset"):
        run_stage("tools.export", "--to", "coco", "--run", "probe", "out")
