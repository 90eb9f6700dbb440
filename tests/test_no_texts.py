"""A user who has no text of any class, or none that is kept: every stage runs, and what reads no text is as ever."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import ROOT

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
INVISIBLE = {name: ["a fish that sings at dawn", "often heard", "fish"] for name in "ab"}


@pytest.fixture
def ask_nobody(project: Path, dataset: list[str], set_params: SetParams, run_stage: RunStage) -> Callable[..., None]:
    """Set the parameters of a project of twelve pictures that asks no model, and make its index."""
    (project / "prompts").symlink_to(ROOT / "prompts")

    def set_up(texts: dict[str, list[str]], min_coverage: float) -> None:
        path = "data/none"
        if texts:
            path = "texts.json"
            Path(path).write_text(json.dumps(texts))
        set_params(
            dataset={"format": "imagefolder", "val_fraction": 0.25},
            llm={"mode": "import", "min_coverage": min_coverage},
            concepts={"import": path},
        )
        run_stage("index_images")

    return set_up


def test_too_few_texts_are_an_error_unless_none_are_asked_for(
    ask_nobody: Callable[..., None], run_stage: RunStage
) -> None:
    ask_nobody({}, 0.5)
    with pytest.raises(UserError, match=r"2 of 2 classes have no texts in .*lower llm\.min_coverage") as error:
        run_stage("generate_concepts")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("texts", "rows"), [({}, 0), (INVISIBLE, 2)], ids=["no text", "all dropped"])
def test_the_chain_without_any_text(
    texts: dict[str, list[str]],
    rows: int,
    ask_nobody: Callable[..., None],
    run_stage: RunStage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask_nobody(texts, 0.0)
    for stage in ("generate_concepts", "describe_images", "clean_concepts"):
        run_stage(stage)
    assert len(store.read_table("data/concepts/answers.parquet", "llm.answers/1")) == rows
    assert json.loads(Path("data/concepts/metrics.json").read_text())["rows"] == rows
    concepts = store.read_table("data/concepts/concepts.parquet", "concepts/1").to_pylist()
    assert [row["kind"] for row in concepts if row["kept"]] == ["name", "name"]
    assert "2 classes keep no visual concept" in capsys.readouterr().err
    for stage in ("embed_images", "build_graphs", "embed_text", "select_concepts", "label_patches"):
        run_stage(stage, "--encoder", "conv")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "no concept was kept" in warnings[0]
    bank = store.read_table("data/bank/conv.parquet", "bank/1").to_pylist()
    assert [(row["kind"], row["kept"], row["class_ids"]) for row in bank] == [
        ("name", False, ["a"]), ("name", False, ["b"])
    ]  # fmt: skip
    assert json.loads(Path("data/bank/conv.json").read_text())["kept"] == 0
    nodes = store.read_buckets("data/embed/conv/images", "embed.nodes/1", 4)
    labels = store.read_buckets("data/labels/conv", "labels/1", 4)
    assert len(labels) == len(nodes) > 0
    assert set(map(len, labels["concept_idx"].to_pylist())) == {0}


def test_prototypes_stand_in_where_there_is_no_text(
    ask_nobody: Callable[..., None], set_params: SetParams, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_nobody({}, 0.0)
    set_params(
        dataset={"val_fraction": 0.25}, llm={"mode": "import", "min_coverage": 0.0}, select={"fallback": "auto"}
    )
    for stage in ("generate_concepts", "describe_images", "clean_concepts"):
        run_stage(stage)
    for stage in ("embed_images", "embed_text", "select_concepts", "label_patches"):
        run_stage(stage, "--encoder", "conv")
    assert "no concept was kept" not in capsys.readouterr().err
    kept = [row for row in store.read_table("data/bank/conv.parquet", "bank/1").to_pylist() if row["kept"]]
    assert {row["kind"] for row in kept} == {"proto"}
    labels = store.read_buckets("data/labels/conv", "labels/1", 4)
    assert set(map(len, labels["concept_idx"].to_pylist())) == {len(kept)}
