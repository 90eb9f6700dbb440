"""Out-of-fold images on the page: each once, as the fold that held it out answers it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.report import report
from fieldmark.command import UserError
from fieldmark.store import canonical_json, read_table
from tests.evaluation.reported import PLAN, Page, make_params
from tests.training.cache import ENCODER
from training.runs import SCHEMA

WRONG = "train/class-00/0001.png"


def write_folds(data: Path, row: str, held: list[list[str]]) -> None:
    """A study's row whose fold k answers `held[k]` rightly but for WRONG, and the others all wrong."""
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    classes = [f"class-{number:02d}" for number in range(PLAN.classes)]
    for fold, paths in enumerate(held):
        folder = data / f"studies/small/{ENCODER}.{row}.none.folds-2.{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for image in index:
            if image["status"] == "ok" and image["split"] != "test":
                own = classes.index(image["class_id"])
                right = image["path"] in paths and image["path"] != WRONG
                logits = np.eye(PLAN.classes)[own if right else (own + 1) % PLAN.classes]
                split = "held_out" if image["path"] in paths else "train"
                said = {"path": image["path"], "split": split, "class_id": image["class_id"]}
                rows.append({**said, "seed": fold, "logits": logits.tolist()})
        header = {"schema": SCHEMA, "fingerprint": f"{row}{fold}", "params": canonical_json({"classes": classes})}
        table = pa.Table.from_pylist(rows)
        columns = {"seed": pa.int32(), "logits": pa.list_(pa.float32(), PLAN.classes)}
        schema = pa.schema([(name, columns.get(name, pa.string())) for name in table.schema.names])
        pq.write_table(table.cast(schema).replace_schema_metadata(header), folder / "predictions.parquet")
        regime, control = {"kind": "folds", "folds": 2}, {"name": "none"}
        config = {"encoder": ENCODER, "regime": regime, "control": control, "classes": classes}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def held(data: Path) -> list[list[str]]:
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    paths = [row["path"] for row in index if row["status"] == "ok" and row["split"] != "test"]
    return [paths[::2], paths[1::2]]


def test_each_image_is_answered_by_the_fold_that_held_it_out(data: Path, held: list[list[str]]) -> None:
    write_folds(data, "linear_probe", held)
    write_folds(data, "other", held)
    report(make_params(shown="linear_probe"), data, study="small")
    page = Page((data / "report/index.html").read_text())
    assert "1 of 36 out-of-fold images are classified wrongly by the fits of study small" in page.text
    pictures = page.data["pictures"]
    assert {picture["path"] for picture in pictures} == {path for paths in held for path in paths}
    assert [picture["path"] for picture in pictures if picture["top"][0][0] != picture["y"]] == [WRONG]
    assert [run["name"] for run in page.data["runs"]] == ["linear_probe", "other"]
    assert page.data["explained"] == []


def test_a_row_that_is_not_there_or_not_whole_is_named(data: Path, held: list[list[str]]) -> None:
    write_folds(data, "other", held)
    with pytest.raises(UserError, match=r"studies/small: has no row linear_probe on tiny in folds; .*: other$"):
        report(make_params(shown="linear_probe"), data, study="small")
    write_folds(data, "linear_probe", [held[0], held[0]])
    with pytest.raises(UserError, match=r"folds of linear_probe do not hold each image .* once; run `make study"):
        report(make_params(shown="linear_probe"), data, study="small")
