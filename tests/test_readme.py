"""The README's "Reading the files": its queries and commands on what the pipeline writes, and every file opened."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from fieldmark import store
from tests.checkout import ROOT, edit_params

SECTION = "Reading the files"
OF_ENCODER = ["embed_images", "embed_tokens", "embed_text", "embed_controls", "select_concepts", "label_patches",
              "build_graphs"]  # fmt: skip
STAGES = ["draw_reef", "index_images", "generate_concepts", "describe_images", "clean_concepts", *OF_ENCODER]
CLASSES, TRAIN, TEST = 24, 3, 1


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in the section."""
    section = re.search(rf"^## {SECTION}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    return re.findall(rf"```{language}\n(.*?)```", section[1], re.DOTALL)


def run_module(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which the whole pipeline ran on four pictures a species; the working directory of these tests."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("training", "prompts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "data/none").touch()
    for name in ("demo", "controls"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def make_small(params: Any) -> None:
        params["demo"]["reef"].update(train_per_class=TRAIN, test_per_class=TEST, size=96)
        params["dataset"].update(buckets=2, val_fraction=0.34)
        params["train"].update(seeds=1, methods={"zero_shot": params["train"]["methods"]["zero_shot"]})
        params["tokens"] = {"reef": {"layers": [-1]}}
        params["controls"] = {"reef": {"per_class": 2}}
        params["report"]["reference"] = "zero_shot"

    edit_params(folder, make_small)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in STAGES:
            run_module(f"stages.{name}", *(["--encoder", "reef"] if name in OF_ENCODER else []))
        run_module("training.train", "--method", "zero_shot")
        yield folder


def test_there_is_something_to_run() -> None:
    assert [len(blocks(language)) for language in ("sql", "python", "sh")] == [4, 2, 2]


def test_the_queries_answer() -> None:
    images, nearest, shown, dropped = (duckdb.sql(query) for query in blocks("sql"))
    counts = {(split, status): count for split, status, _, count in images.fetchall()}
    assert counts == {("train", "ok"): CLASSES * (TRAIN - 1), ("val", "ok"): CLASSES, ("test", "ok"): CLASSES * TEST}

    rows = nearest.fetchall()
    texts = store.read_table("data/embed/reef/text.parquet", "embed.text/1")
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    image_id = next(row["image_id"] for row in index if row["path"] == "test/ember-bandit/000.jpg")
    bucket = store.bucket_path("data/embed/reef/images", store.bucket_of(image_id, 2))
    nodes = store.read_images(bucket, "embed.nodes/1", [image_id]).filter(pq.filters_to_expression([("view", "=", 0)]))
    cosines = store.vectors_of(nodes).astype(np.float32) @ store.vectors_of(texts).astype(np.float32).T
    assert [row[0] for row in rows] == list(range(len(nodes)))
    np.testing.assert_allclose([row[-1] for row in rows], cosines.max(axis=1), atol=2e-3)

    assert shown.columns == ["text", "shown", "its_own"]
    weights = [row[1] for row in shown.fetchall()]
    assert 0 < len(weights) <= 10
    assert weights == sorted(weights, reverse=True)

    concepts = store.read_table("data/concepts/concepts.parquet", "concepts/1").to_pylist()
    reasons = {reason: count for reason, count, _ in dropped.fetchall()}
    assert sum(reasons.values()) == sum(not row["kept"] for row in concepts) > 0
    assert None not in reasons


def test_the_commands_and_the_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    for line in "".join(blocks("sh")).splitlines():
        python, dash_m, module, *arguments = shlex.split(line)
        assert (python, dash_m) == ("python", "-m")
        run_module(module, *arguments)
    said = capsys.readouterr().out
    assert f"data/export/reef.safetensors: {CLASSES * (TRAIN + TEST)} images" in said
    assert "data/embed/reef/images" in said
    arrays, exported = blocks("python")
    found: dict[str, Any] = {}
    exec(exported, found)
    assert len(found["names"]) == len(found["vectors"]) == CLASSES * (TRAIN + TEST)
    assert len(set(found["names"])) == CLASSES
    pytest.importorskip("pandas")
    pytest.importorskip("polars")
    exec(arrays, found)
    assert found["vectors"].shape == (CLASSES * (TRAIN + TEST), found["nodes"]["vector"].dtype.shape[0])
    np.testing.assert_allclose(np.linalg.norm(found["vectors"].astype(np.float32), axis=1), 1, atol=2e-3)
    assert found["classes"].value_counts().to_dict() == dict.fromkeys(set(found["classes"]), TRAIN + TEST)


def parquet_files() -> list[Path]:
    files = sorted(path for path in Path("data").rglob("*.parquet"))
    schemas = {pq.read_schema(path).metadata[b"schema"].decode() for path in files}
    assert schemas == {*store.COLUMNS, "run.predictions/1"}
    return files


def assert_same(path: Path, columns: list[str], values: list[Any]) -> None:
    """A column as another library read it is what Arrow reads: numbers, texts, lists and vectors."""
    expected = pq.read_table(path, partitioning=None)
    assert columns == expected.schema.names
    for name, found in zip(columns, values, strict=True):
        wanted = expected.column(name).to_pylist()
        assert [plain(value) for value in found] == [plain(value) for value in wanted], f"{path}: {name}"


def plain(value: Any) -> Any:
    """A cell without the library's own types; pandas' not-a-number is a missing value, None."""
    if isinstance(value, np.ndarray | list | tuple) or type(value).__name__ == "Series":  # polars' vectors
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if value != value else value


def test_duckdb_opens_every_file() -> None:
    for path in parquet_files():
        relation = duckdb.sql(f"SELECT * FROM '{path}'")
        rows = relation.fetchall()
        assert_same(path, relation.columns, [[row[column] for row in rows] for column in range(len(relation.columns))])


def test_pandas_opens_every_file() -> None:
    pandas = pytest.importorskip("pandas")
    for path in parquet_files():
        frame = pandas.read_parquet(path)
        assert_same(path, list(frame.columns), [frame[name].tolist() for name in frame.columns])


def test_polars_opens_every_file() -> None:
    polars = pytest.importorskip("polars")
    for path in parquet_files():
        frame = polars.read_parquet(path)
        assert_same(path, frame.columns, [frame[name].to_list() for name in frame.columns])
