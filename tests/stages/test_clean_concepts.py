"""clean_concepts: what it reads of the answers and classes, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from stages.clean_concepts import CONCEPTS, main
from tests.fieldmark.llm.workspace import Row, Workspace


def answer(*texts: str, key: str, **changes: Any) -> Row:
    concepts = [{"text": text, "kind": "visual", "part": None} for text in texts]
    row = {"item_key": key, "subject_id": "k", "sample": 0, "prompt_sha": "s", "status": "ok", "attempts": 1}
    more = {"model_requested": "m", "source": "live", "created_at": "2026-11-21T00:00:00Z"}
    return row | more | {"response_json": json.dumps({"concepts": concepts})} | changes


def test_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(monkeypatch, "http://unused")
    workspace.write()
    workspace.write_classes("Iron ray", "Moss ray", "Salt ray")
    ids = {name: store.sha256(name)[:8] for name in ("Iron ray", "Moss ray", "Salt ray")}
    rows = [
        answer("a fish with a tail", subject_id=ids["Iron ray"], key="a", sample=1),
        answer("a fish with a tail.", "a fish that sings", subject_id=ids["Iron ray"], key="b"),
        answer("a fish with a tail", subject_id=ids["Moss ray"], key="c"),
        answer("a fish with a fin", subject_id=ids["Salt ray"], key="d", status="invalid"),
        answer("a fish with a gill", "a fish like a moss ray", subject_id="*", key="e"),
    ]
    schema = "llm.answers/1"
    store.write_table(store.make_table(schema, rows), "data/concepts/answers.parquet", schema, {}, "m")
    workspace.run(main)
    concepts = store.read_table(CONCEPTS, "concepts/1").to_pylist()
    found = {(row["class_id"], row["item_key"], row["drop_reason"]) for row in concepts if row["kind"] == "visual"}
    # One row a class, though the text is the same; within a class the first sample counts.
    assert found == {
        (ids["Iron ray"], "b", None),
        (ids["Iron ray"], "b", "sound"),
        (ids["Iron ray"], "a", "duplicate"),
        (ids["Moss ray"], "c", None),
    }
    assert {row["class_id"] for row in concepts if row["kind"] == "name"} == set(ids.values())
    # Without a class, and last of all.
    assert [(row["class_id"], row["kind"], row["drop_reason"]) for row in concepts[-2:]] == [
        (None, "generic", None),
        (None, "generic", "class_name"),
    ]
    said = capsys.readouterr().err
    assert "1 class keeps no visual concept: Salt ray" in said
    assert "6 texts, 3 kept; dropped: " in said
    assert all(f"1 {reason}" in said for reason in ("sound", "duplicate", "class_name"))

    before = CONCEPTS.read_bytes()
    mark = store.read_header(CONCEPTS, "concepts/1").fingerprint
    workspace.write(concurrency=1, mode="replay", model="other")
    workspace.run(main)
    assert CONCEPTS.read_bytes() == before
    workspace.blocks["clean"] = {"max_words": 9}
    workspace.write()
    workspace.run(main)
    assert store.read_header(CONCEPTS, "concepts/1").fingerprint != mark


def test_one_s_own_texts_are_named_where_they_are_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.clean_concepts.SHOWN", 2)
    workspace = Workspace(monkeypatch, "http://unused")
    workspace.write()
    workspace.write_classes("Iron ray", "Moss ray", "Salt ray")
    ids = {name: store.sha256(name)[:8] for name in ("Iron ray", "Moss ray", "Salt ray")}
    own = ["a fish with charm", "a fish with a tail", "a fish that sings", "a fish of 3 kg"]
    rows = [
        answer(*own, subject_id=ids["Iron ray"], key="a", source="import"),
        answer(*own, subject_id=ids["Moss ray"], key="b", source="edited"),
        answer(*own, subject_id=ids["Salt ray"], key="c"),
    ]
    schema = "llm.answers/1"
    store.write_table(store.make_table(schema, rows), "data/concepts/answers.parquet", schema, {}, "m")
    workspace.run(main)
    edited = ["Moss ray: nothing_visible: a fish with charm", "Moss ray: sound: a fish that sings"]
    edited.append("Moss ray: size: a fish of 3 kg")
    imported = [line.replace("Moss", "Iron") for line in edited]
    said = capsys.readouterr().err.splitlines()
    start = next(place for place, line in enumerate(said) if line.startswith("warning: 6 texts of your own"))
    assert "clean.visibility: off" in said[start]
    more = "and 1 more, which `python -m stages.clean_concepts --dropped` prints"
    assert said[start + 1 :] == [f"  {line}" for line in [*edited, *imported[:2], more]]

    before = CONCEPTS.read_bytes()
    workspace.run(main, "--dropped")
    assert capsys.readouterr().out.splitlines() == [*edited, *imported]
    assert CONCEPTS.read_bytes() == before
    workspace.blocks["clean"] = {"visibility": "off"}
    workspace.write()
    workspace.run(main)
    assert "your own" not in capsys.readouterr().err
    assert all(row["kept"] for row in store.read_table(CONCEPTS, "concepts/1").to_pylist())


@pytest.mark.parametrize(("text", "source", "warns"), [
    ("a long tail", "import", True),
    ("a Fish with a long tail", "import", False),
    ("a long tail", "live", False),
])  # fmt: skip
def test_a_noun_that_no_imported_text_says_is_told_with_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    text: str, source: str, *, warns: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(monkeypatch, "http://unused")
    workspace.write()
    workspace.write_classes("Iron ray")
    rows = [answer(text, "a grey fin", subject_id=store.sha256("Iron ray")[:8], key="a", source=source)]
    schema = "llm.answers/1"
    store.write_table(store.make_table(schema, rows), "data/concepts/answers.parquet", schema, {}, "m")
    workspace.run(main)
    said = "warning: params.yaml: domain.noun: none of 2 imported texts says 'fish'; is it what your pictures show?\n"
    assert (said in capsys.readouterr().err) == warns
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(f"# params.yaml with profiles/own.yaml laid over it; x\n{params}")
    workspace.run(main)
    assert ("show? (in profiles/own.yaml, which" in capsys.readouterr().err) == warns
