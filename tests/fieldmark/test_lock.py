"""dvc.lock as plain YAML: what is listed and not here."""

from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.lock import refuse_cold_start

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
