"""What a stage reads, by dvc.lock; a run, by its plan."""

import json
import sys
from pathlib import Path

import pytest

from fieldmark.command import UserError
from tools.inputs import data_of, main, outputs_of

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
  embed_images@toy:
    cmd: x
    outs: [{path: data/embed/toy/images, md5: f.dir, size: 1}, {path: data/embed/toy/tokens, md5: f.dir, size: 1}]
  train@probe:
    cmd: python -m training.train --run probe
    deps:
    - {path: data/inputs/probe.json, md5: g, size: 1}
    outs: [{path: data/runs/probe, md5: k.dir, size: 1}]
  plan_runs:
    cmd: python -m training.plan_runs
    deps: [{path: training, md5: g.dir, size: 1}]
    outs: [{path: data/inputs, md5: l.dir, size: 1}]
  report:
    cmd: python -m evaluation.report
    deps:
    - {path: data/embed, md5: h.dir, size: 1}
    - {path: data/reef/train, md5: i.dir, size: 1}
    - {path: data/concepts/answers.parquet, md5: e, size: 1}
    - {path: data/demo/species.yaml, md5: a, size: 1}
    - {path: data/mine, md5: j, size: 1}
    - {path: database/x, md5: j, size: 1}
    outs: [{path: data/report, md5: k.dir, size: 1}]
"""
PIPELINE = """\
stages:
  draw_reef: {cmd: python -m fieldmark.reef.draw}
  generate_concepts: {cmd: python -m stages.generate_concepts}
  embed_images: {foreach: "${encoders}", do: {cmd: x}}
  train: {foreach: "${train.runs}", do: {cmd: "python -m training.train --run ${key}"}}
  plan_runs: {cmd: python -m training.plan_runs}
  report: {cmd: python -m evaluation.report}
"""
PARAMS = "{encoders: {toy: {}}, train: {runs: {probe: {}}}}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(LOCK)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("params.yaml").write_text(PARAMS)
    Path("data").mkdir()
    Path("data/mine.dvc").touch()


def test_what_a_stage_reads() -> None:
    assert data_of("report") == [
        "data/concepts/answers.parquet",
        "data/embed/toy/images",
        "data/embed/toy/tokens",
        "data/mine",
        "data/reef/train",
    ]
    assert data_of("generate_concepts") == []
    assert data_of("embed_images@toy") == []


def test_what_a_run_reads_is_what_its_plan_says() -> None:
    with pytest.raises(UserError, match=r"data/inputs/probe\.json: cannot be read .*`dvc pull data/inputs`"):
        data_of("train@probe")
    Path("data/inputs").mkdir()
    files = {"embed/toy/images": "a", "concepts/answers.parquet": "b", "demo/species.yaml": "c"}
    Path("data/inputs/probe.json").write_text(json.dumps({"files": files, "code": {"training/train.py": "d"}}))
    assert data_of("train@probe") == [
        "data/concepts/answers.parquet",
        "data/embed/toy/images",
        "data/inputs/probe.json",
    ]


def test_what_params_yaml_no_longer_names_is_passed_over() -> None:
    """DVC leaves the stages of an encoder that is gone in dvc.lock, and knows their outputs no more."""
    gone = "  embed_images@gone:\n    cmd: x\n    outs: [{path: data/embed/gone/images, md5: f.dir, size: 1}]\n"
    Path("dvc.lock").write_text(LOCK + gone)
    assert "data/embed/gone/images" not in data_of("report")
    with pytest.raises(UserError, match="has no stage 'embed_images@gone'; did you mean embed_images@toy"):
        data_of("embed_images@gone")
    Path("params.yaml").write_text(PARAMS.replace("toy", "gone"))
    assert "data/embed/gone/images" in data_of("report")


def test_the_command_prints_one_path_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inputs", "report"])
    main()
    assert capsys.readouterr().out.splitlines() == data_of("report")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LOCK, "has no run 'prob'; did you mean probe?"),
        ("x: [", "not a lock file"),
        ("3", "not a lock file"),
        ("schema: '2.0'", "not a lock file"),
        ("stages:", "not a lock file"),
        ("stages: {}", "it knows none"),
        (None, "dvc.lock: is missing"),
    ],
)
def test_what_cannot_be_looked_up_is_one_line(text: str | None, said: str) -> None:
    Path("dvc.lock").unlink()
    if text is not None:
        Path("dvc.lock").write_text(text)
    with pytest.raises(UserError) as caught:
        data_of("train@prob")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_a_run_runs_are_listed_and_of_a_stage_stages() -> None:
    with pytest.raises(UserError, match=r"^dvc\.lock: has no run 'nope'; it knows probe$"):
        data_of("train@nope")
    with pytest.raises(UserError, match=r"^dvc\.lock: has no stage 'nope'; it knows draw_reef, generate_concepts, "):
        data_of("nope")


@pytest.mark.parametrize(
    ("parts", "encoders", "found"),
    [
        ([], ["toy"], ["data/embed/toy/images", "data/embed/toy/tokens"]),
        (["tokens"], ["toy"], ["data/embed/toy/tokens"]),
        (["concepts", "images"], [], ["data/concepts/answers.parquet", "data/embed/toy/images"]),
        (["embed"], [], ["data/embed/toy/images", "data/embed/toy/tokens"]),
        (["runs"], [], ["data/runs/probe"]),
    ],
)
def test_outputs_are_found_by_part_and_by_encoder(parts: list[str], encoders: list[str], found: list[str]) -> None:
    assert outputs_of(parts, encoders) == found


def test_what_a_tuned_encoder_is_loaded_from_is_of_it() -> None:
    tuned = "  adapt_encoder@mine:\n    cmd: x\n    outs: [{path: data/adapted/mine, md5: f.dir, size: 1}]\n"
    Path("dvc.lock").write_text(LOCK + tuned)
    Path("dvc.yaml").write_text(PIPELINE + '  adapt_encoder: {foreach: "${adapt}", do: {cmd: x}}\n')
    encoders = "{toy: {model: local-dir:data/adapted/mine}, other: {model: x}}"
    Path("params.yaml").write_text(f"{{encoders: {encoders}, adapt: {{mine: {{}}}}, train: {{runs: {{probe: {{}}}}}}}}")
    assert outputs_of([], ["toy"]) == ["data/adapted/mine", "data/embed/toy/images", "data/embed/toy/tokens"]
    assert outputs_of(["adapted"], ["toy"]) == ["data/adapted/mine"]


def test_a_part_or_encoder_that_is_not_there_is_one_line() -> None:
    # A run or the pictures of the demo may have an encoder's name and are not of it.
    with pytest.raises(UserError, match=r"no output is of encoder 'probe'; it knows toy"):
        outputs_of([], ["probe"])
    with pytest.raises(UserError, match=r"no output is of parts 'moment'; it knows concepts, embed, images"):
        outputs_of(["moment"], [])
    with pytest.raises(UserError, match="no output is of both, parts runs and encoder toy"):
        outputs_of(["runs"], ["toy"])
