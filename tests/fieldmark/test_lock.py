"""dvc.lock as plain YAML: what is listed and not here, and what was made with other settings."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.lock import refuse_cold_start, refuse_old_index
from fieldmark.params import Dataset

LOCK = """\
schema: '2.0'
stages:
  draw_reef:
    cmd: python -m fieldmark.reef.draw
    deps: [{path: data/demo/species.yaml, md5: a, size: 1}]
    outs: [{path: data/reef, md5: b.dir, size: 1, nfiles: 2}]
  generate_concepts:
    cmd: python -m stages.generate_concepts
    deps:
    - {path: prompts/concepts.md, md5: c, size: 1}
    - {path: data/index/classes.parquet, md5: d, size: 1}
    params: {params.yaml: {llm.mode: live}}
    outs: [{path: data/concepts/answers.parquet, md5: e, size: 1}]
"""
ANSWERS = Path("data/concepts/answers.parquet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FIELDMARK_COLD", raising=False)
    Path("dvc.lock").write_text(LOCK)
    Path("data").mkdir()


def test_answers_that_are_listed_and_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"`dvc pull data/concepts/answers\.parquet`"):
        refuse_cold_start(ANSWERS)
    with pytest.raises(UserError, match=r"`dvc pull data/reef/train/x\.jpg`"):
        refuse_cold_start(Path("data/reef/train/x.jpg"))
    refuse_cold_start(Path("data/descriptions/answers.parquet"))
    refuse_cold_start(Path("data/index/classes.parquet"))
    ANSWERS.parent.mkdir()
    ANSWERS.touch()
    refuse_cold_start(ANSWERS)
    ANSWERS.unlink()
    monkeypatch.setenv("FIELDMARK_COLD", "1")
    refuse_cold_start(ANSWERS)
    monkeypatch.setenv("FIELDMARK_COLD", "0")
    with pytest.raises(UserError):
        refuse_cold_start(ANSWERS)
    Path("dvc.lock").unlink()
    refuse_cold_start(ANSWERS)


def test_an_index_of_other_settings_is_refused() -> None:
    def refuse(**now: Any) -> None:
        refuse_old_index(index, Dataset(**{"root": "data/reef", **now}), "params.yaml")

    index = Path("data/index/classes.parquet")
    refuse(root="data/images")  # there is no index
    index.parent.mkdir()
    index.write_bytes(b"classes")
    refuse(root="data/images")  # dvc.lock does not know of it
    md5 = hashlib.md5(b"classes").hexdigest()
    Path("dvc.lock").write_text(f"""\
schema: '2.0'
stages:
  index_images:
    cmd: python -m stages.index_images
    params: {{params.yaml: {{dataset: {{root: data/reef, val_fraction: 0.15, images: null}}}}}}
    outs: [{{path: data/index/classes.parquet, hash: md5, md5: {md5}, size: 1}}]
""")
    refuse()
    refuse(val_fraction=0.15)  # a default, written out
    wrong = r"^data/index: is of dataset\.root data/reef, and params\.yaml says data/images; run `dvc repro index"
    with pytest.raises(UserError, match=wrong):
        refuse(root="data/images", val_fraction=0.3)
    with pytest.raises(UserError, match=r"is of dataset\.val_fraction 0\.15, and params\.yaml says 0\.3"):
        refuse(val_fraction=0.3)
    index.write_bytes(b"made by hand since")
    refuse(root="data/images")
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  index_images: {cmd: x}\n")
    refuse(root="data/images")
