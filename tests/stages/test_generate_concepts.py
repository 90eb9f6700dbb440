"""generate_concepts against a counting server: who is asked, how often, and what is left after a kill."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.answers import summarise
from fieldmark.llm.imported import row_of
from fieldmark.llm.journal import journal_path
from stages.generate_concepts import ANSWERS, CLASSES, METRICS, main
from tests.fieldmark.llm.workspace import ELSEWHERE, KEY, REPOSITORY, Row, Workspace, answers, journal_lines
from tests.openai_server import OpenAIServer, body, completion, content, failure, refusal, without_usage

NAMES = ("Iron ray", "Moss ray", "Salt ray")
ODD = ('A/B "x" é', "..", "ray", "Ray", "../../etc/passwd", "{{ name }}")
JOURNAL = Path(".cache/generate_concepts.jsonl")


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    workspace.write_classes(*NAMES)
    return workspace


def id_of(name: str) -> str:
    return store.sha256(name)[:8]


def own_texts(workspace: Workspace, texts: dict[str, list[str]], **concepts: Any) -> None:
    """Let concepts.import be a file of these texts; no texts, no import."""
    Path("own.json").write_text(json.dumps(texts))
    workspace.blocks["concepts"] = concepts | ({"import": "own.json"} if texts else {})
    workspace.write()


def record_answers(*class_ids: str, prompt: str = "concepts") -> None:
    """Recordings of an empty answer for each of these classes, in recordings/."""
    Path("recordings").mkdir(exist_ok=True)
    record = {
        "prompt": prompt,
        "prompt_sha": sha_of(prompt),
        "sample": 0,
        "model": "authored",
        "created_at": "2026-11-21T00:00:00Z",
        "response": {"concepts": []},
    }
    lines = [json.dumps(record | {"class_id": class_id}) for class_id in class_ids]
    Path(f"recordings/{prompt}.jsonl").write_text("\n".join(lines))


def sha_of(prompt: str) -> str:
    return store.sha256(Path(f"prompts/{prompt}.md").read_bytes())


def by_class() -> dict[str, Row]:
    return {row["subject_id"]: row for row in answers()}


def edit_prompt() -> None:
    path = Path("prompts/concepts.md")
    path.write_text(path.read_text().replace("just a photo", "nothing but a photo"))


def undo_edit() -> None:
    Path("prompts/concepts.md").write_bytes((REPOSITORY / "prompts/concepts.md").read_bytes())


def test_a_second_run_asks_nobody(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    assert len(server.calls) == 3
    before = ANSWERS.read_bytes()
    workspace.run(main)
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.run(main)
    assert len(server.calls) == 3
    assert ANSWERS.read_bytes() == before


def test_an_edited_prompt_is_one_call_a_class_and_its_undo_none(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    before = ANSWERS.read_bytes()
    edit_prompt()
    workspace.run(main)
    assert len(server.calls) == 6
    assert ANSWERS.read_bytes() != before
    assert "nothing but a photo" in server.calls[-1]["messages"][-1]["content"]
    undo_edit()
    workspace.run(main)
    assert len(server.calls) == 6
    assert ANSWERS.read_bytes() == before


def test_a_class_more_is_one_call_and_its_removal_none(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    before = ANSWERS.read_bytes()
    workspace.write_classes(*NAMES, "Wing ray")
    workspace.run(main)
    assert len(server.calls) == 4
    assert "Wing ray" in server.calls[-1]["messages"][-1]["content"]
    workspace.write_classes(*NAMES)
    workspace.run(main)
    assert len(server.calls) == 4
    assert ANSWERS.read_bytes() == before


def test_odd_names_are_paid_for_once_each(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_classes(*ODD)
    workspace.run(main)
    workspace.run(main)
    assert len(server.calls) == len(ODD)
    assert len({row["subject_id"] for row in answers()}) == len(ODD)
    for name in ODD:
        assert sum(f"tell {name} from" in call["messages"][-1]["content"] for call in server.calls) == 1


def test_samples_are_separate_answers(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    workspace.blocks["concepts"] = {"samples": 3}
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 9
    assert sorted(row["sample"] for row in answers()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_limits_of_patience_do_not_change_the_file(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    before = ANSWERS.read_bytes()
    workspace.write(concurrency=1, max_attempts=7, timeout_s=9.0, max_calls=0, max_usd=0.0, max_output_tokens=5000)
    workspace.run(main)
    assert ANSWERS.read_bytes() == before
    assert len(server.calls) == 3


def test_a_failed_class_is_a_row_named_and_asked_again(server: OpenAIServer, workspace: Workspace) -> None:
    # An answer that is no JSON is asked for once more.
    server.script += [refusal("no"), content("no JSON"), content("no JSON")]
    workspace.write(concurrency=1)
    with pytest.raises(UserError, match=r"1 of 3 answered.* missing: \w+ ray \(\w+\), \w+ ray \(\w+\)"):
        workspace.run(main)
    assert sorted(row["status"] for row in answers()) == ["invalid", "ok", "refused"]
    assert len(server.calls) == 4
    workspace.run(main)
    assert len(server.calls) == 6
    assert {row["status"] for row in answers()} == {"ok"}


def test_too_many_calls_fail_before_the_first(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write(max_calls=2)
    with pytest.raises(UserError, match="max_calls"):
        workspace.run(main)
    assert server.calls == []
    assert not ANSWERS.exists()


def test_no_key_is_one_line_and_no_call(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.write(base_url=ELSEWHERE)
    with pytest.raises(UserError, match="FIELDMARK_TEST_KEY"):
        workspace.run(main)
    assert server.calls == []


def test_a_server_on_this_machine_needs_neither_key_nor_price(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.write(prices={}, max_usd=0.0)
    workspace.run(main, "--dry-run")
    assert "price: at most $0.0000" in capsys.readouterr().out
    workspace.run(main)
    assert len(server.calls) == 3
    assert "generate_concepts: asked 3, cached 0, spent $0.0000, failed: none\n" in capsys.readouterr().err


def test_a_dry_run_counts_and_asks_nobody(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.write(max_calls=0)
    workspace.run(main, "--dry-run")
    said = capsys.readouterr().out
    assert "3 items, 0 cached, 3 calls to tiny" in said
    assert "at most 6,000 out" in said
    assert "at most $0.01" in said
    assert server.calls == []
    assert not ANSWERS.exists()
    assert not JOURNAL.exists()


def test_show_prints_the_messages(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.run(main, "--show", "Iron ray")
    by_name = capsys.readouterr().out
    assert by_name.startswith("# system (prompts/concepts.md)\n\nYou know reef fish")
    assert "tell Iron ray from other reef fish" in by_name
    workspace.run(main, "--show", id_of("Iron ray"))
    assert capsys.readouterr().out == by_name
    own_texts(workspace, {"Iron ray": ["a grey fish", "a fish"]})
    workspace.run(main, "--show", "Iron ray")
    assert capsys.readouterr().out == "# from own.json (concepts.import)\n\na grey fish\na fish\n"
    workspace.run(main, "--show", "Moss ray")
    assert "tell Moss ray from other reef fish" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'Iron ray'"):
        workspace.run(main, "--show", "Iron rai")


def test_listed_answers_that_are_not_here_are_not_paid_again(server: OpenAIServer, workspace: Workspace) -> None:
    Path("dvc.lock").write_text("stages: {generate_concepts: {outs: [{path: data/concepts/answers.parquet}]}}")
    with pytest.raises(UserError, match=r"`dvc pull data/concepts/answers\.parquet`"):
        workspace.run(main)
    assert server.calls == []
    workspace.monkeypatch.setenv("FIELDMARK_COLD", "1")
    workspace.run(main)
    assert len(server.calls) == 3


def test_a_replayed_answer_never_satisfies_live(server: OpenAIServer, workspace: Workspace) -> None:
    record_answers(*map(id_of, NAMES))
    workspace.write(mode="replay", recordings="recordings")
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.run(main)
    assert server.calls == []
    assert not JOURNAL.exists()
    assert {row["source"] for row in answers()} == {"replay"}
    replayed = ANSWERS.read_bytes()
    mark = store.read_header(ANSWERS, "llm.answers/1")

    workspace.monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
    workspace.write(mode="live")
    workspace.run(main)
    assert len(server.calls) == 3
    assert {row["source"] for row in answers()} == {"live"}
    assert store.read_header(ANSWERS, "llm.answers/1") == mark

    workspace.write(mode="replay")
    workspace.run(main)
    assert ANSWERS.read_bytes() == replayed
    edit_prompt()
    with pytest.raises(UserError, match=r"prompts/concepts\.md: was edited"):
        workspace.run(main)
    assert ANSWERS.read_bytes() == replayed
    undo_edit()
    workspace.write(mode="live")
    workspace.run(main)
    assert len(server.calls) == 3


def test_imported_classes_are_never_asked_for(server: OpenAIServer, workspace: Workspace) -> None:
    names = [f"ray {number}" for number in range(6)]
    workspace.write_classes(*names)
    own_texts(workspace, {name: ["a grey fish"] for name in names[:3]}, samples=2)
    workspace.run(main)
    assert len(server.calls) == 6
    for name in names:
        asked = sum(f"tell {name} from" in call["messages"][-1]["content"] for call in server.calls)
        assert asked == (0 if name in names[:3] else 2)
    rows = answers()
    assert [row for row in rows if row["source"] == "import"] == [
        row_of(class_id, ["a grey fish"]) for class_id in sorted(map(id_of, names[:3]))
    ]
    assert sorted(row["subject_id"] for row in rows if row["source"] == "live") == sorted(2 * [*map(id_of, names[3:])])
    before = ANSWERS.read_bytes()
    workspace.run(main)
    assert len(server.calls) == 6
    assert ANSWERS.read_bytes() == before


def test_an_edit_changes_only_what_it_is_about(server: OpenAIServer, workspace: Workspace) -> None:
    own_texts(workspace, {"Iron ray": ["a grey fish"], "Moss ray": ["a green fish"]})
    workspace.run(main)
    first, header = by_class(), store.read_header(ANSWERS, "llm.answers/1")
    own_texts(workspace, {"Iron ray": ["a grey fish"], "Moss ray": ["a mossy fish"]})
    workspace.run(main)
    second = by_class()
    assert [name for name in NAMES if first[id_of(name)] != second[id_of(name)]] == ["Moss ray"]
    assert store.read_header(ANSWERS, "llm.answers/1").fingerprint != header.fingerprint
    edit_prompt()
    workspace.run(main)
    third = by_class()
    assert [name for name in NAMES if second[id_of(name)] != third[id_of(name)]] == ["Salt ray"]
    assert len(server.calls) == 2


def test_where_all_is_imported_nobody_and_nothing_is_needed(server: OpenAIServer, workspace: Workspace) -> None:
    own_texts(workspace, {name: ["a grey fish"] for name in NAMES})
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    Path("dvc.lock").write_text("stages: {generate_concepts: {outs: [{path: data/concepts/answers.parquet}]}}")
    workspace.run(main)
    made = ANSWERS.read_bytes()
    assert str(Path.cwd()).encode() not in made
    assert b"own.json" not in made

    edit_prompt()
    Path("own.json").rename("moved.json")
    workspace.blocks["concepts"]["import"] = "moved.json"
    workspace.write(mode="replay", recordings="nowhere", model="other")
    workspace.run(main)
    assert ANSWERS.read_bytes() == made
    assert server.calls == []


def test_an_import_comes_and_goes_without_a_second_payment(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    before = ANSWERS.read_bytes()
    # As if the answers had been pulled from elsewhere: the journal knows none of them.
    JOURNAL.unlink()
    for texts in (["a grey fish"], ["a green fish"]):
        own_texts(workspace, dict.fromkeys(NAMES, texts))
        workspace.run(main)
        assert {row["source"] for row in answers()} == {"import"}
    own_texts(workspace, {})
    workspace.run(main)
    assert ANSWERS.read_bytes() == before
    assert len(server.calls) == 3
    own_texts(workspace, {}, per_class=3)
    workspace.run(main)
    assert len(server.calls) == 6


def test_what_is_not_imported_is_replayed(workspace: Workspace) -> None:
    record_answers(id_of("Moss ray"), id_of("Salt ray"))
    own_texts(workspace, {"Iron ray": ["a grey fish"]})
    workspace.write(mode="replay", recordings="recordings")
    workspace.run(main)
    sources = {class_id: row["source"] for class_id, row in by_class().items()}
    assert sources == {id_of("Iron ray"): "import", id_of("Moss ray"): "replay", id_of("Salt ray"): "replay"}

    own_texts(workspace, {"Moss ray": ["a green fish"]})
    with pytest.raises(UserError, match=f"no recording of {id_of('Iron ray')}; .*own.json .* covers 1 of 3 classes"):
        workspace.run(main)
    own_texts(workspace, {})
    with pytest.raises(UserError, match=r"or record it there$"):
        workspace.run(main)


def test_a_dry_run_says_what_is_imported(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    own_texts(workspace, {"Iron ray": ["a grey fish"]})
    workspace.run(main, "--dry-run")
    live = capsys.readouterr().out
    assert "own.json (concepts.import) covers 1 of 3 classes, 0 calls" in live
    assert "2 items, 0 cached, 2 calls to tiny" in live
    own_texts(workspace, {name: ["a grey fish"] for name in NAMES})
    workspace.write(mode="replay")
    workspace.run(main, "--dry-run")
    assert "covers 3 of 3 classes, 0 calls" in capsys.readouterr().out
    assert server.calls == []
    assert not ANSWERS.exists()


def test_imported_classes_count_for_coverage(server: OpenAIServer, workspace: Workspace) -> None:
    server.script += [refusal("no")]
    own_texts(workspace, {"Iron ray": ["a grey fish"], "Moss ray": ["a green fish"]})
    with pytest.raises(UserError, match=r"2 of 3 answered.* missing: Salt ray \(refused\)"):
        workspace.run(main)
    assert {row["status"] for row in answers() if row["source"] == "import"} == {"ok"}


def test_a_wrong_import_stops_before_any_call(server: OpenAIServer, workspace: Workspace) -> None:
    own_texts(workspace, {"Iron rai": ["a grey fish"]})
    with pytest.raises(UserError, match=r"own\.json: 'Iron rai': is no .* did you mean 'Iron ray'"):
        workspace.run(main)
    assert server.calls == []
    assert not ANSWERS.exists()


def test_without_an_import_the_parameters_are_as_ever(workspace: Workspace) -> None:
    workspace.run(main)
    asked = {"prompt_sha", "domain", "model", "temperature", "per_class", "samples"}
    assert store.read_header(ANSWERS, "llm.answers/1").params.keys() == asked
    own_texts(workspace, {"Iron ray": ["a grey fish"]})
    workspace.run(main)
    params = store.read_header(ANSWERS, "llm.answers/1").params
    assert params.keys() == asked | {"import"}
    assert params["import"] == store.sha256(store.canonical_json({id_of("Iron ray"): ["a grey fish"]}))


def ask_more(workspace: Workspace, superclasses: dict[str, str] | None = None, **concepts: Any) -> None:
    """Switch the generic prompt on, and the contrast prompt for two siblings and a class alone in its superclass."""
    usual = {"Iron ray": "rays", "Moss ray": "rays", "Salt ray": "skates"}
    workspace.write_classes(*NAMES, superclasses=superclasses or usual)
    workspace.blocks["concepts"] = {"generic": 30, "contrast": True, **concepts}
    workspace.write()


def asked_with(server: OpenAIServer, text: str) -> list[str]:
    """The last message of each call that holds this text."""
    said = [call["messages"][-1]["content"] for call in server.calls]
    return [each for each in said if text in each]


def test_the_other_prompts_are_one_call_for_all_and_one_a_class_with_siblings(
    server: OpenAIServer, workspace: Workspace
) -> None:
    ask_more(workspace, samples=2)
    workspace.run(main)
    assert len(server.calls) == 6 + 1 + 2
    assert "Give 30 of them" in asked_with(server, "in photos of reef fish")[0]
    [iron] = asked_with(server, "does Iron ray alone have among them")
    assert 'heading "rays", together with:\n- Moss ray\n\n' in iron
    assert not asked_with(server, "does Salt ray alone")
    rows = answers()
    assert [row["prompt_sha"] for row in rows if row["subject_id"] == "*"] == [sha_of("generic_concepts")]
    contrasted = {row["subject_id"] for row in rows if row["prompt_sha"] == sha_of("contrast")}
    assert contrasted == {id_of("Iron ray"), id_of("Moss ray")}
    assert sum(row["prompt_sha"] == sha_of("concepts") for row in rows) == 6
    assert len({row["item_key"] for row in rows}) == len(rows) == 9


def test_beside_the_other_prompts_an_edit_is_still_one_call_a_class(server: OpenAIServer, workspace: Workspace) -> None:
    ask_more(workspace)
    workspace.run(main)
    before = ANSWERS.read_bytes()
    edit_prompt()
    workspace.run(main)
    assert len(server.calls) == 6 + 3
    undo_edit()
    workspace.run(main)
    assert ANSWERS.read_bytes() == before
    for prompt in ("generic_concepts", "contrast"):
        path = Path(f"prompts/{prompt}.md")
        path.write_text(path.read_text().replace("the most", "by far the most"))
        calls = len(server.calls)
        workspace.run(main)
        assert len(server.calls) - calls == {"generic_concepts": 1, "contrast": 2}[prompt]
    shutil.copytree(REPOSITORY / "prompts", "prompts", dirs_exist_ok=True)
    calls = len(server.calls)
    workspace.run(main)
    assert (len(server.calls), ANSWERS.read_bytes()) == (calls, before)
    assert store.read_header(ANSWERS, "llm.answers/1").params.keys() >= {"generic_prompt_sha", "contrast_prompt_sha"}


def test_of_classes_that_are_numbers_nobody_is_asked_but_once_for_all(
    server: OpenAIServer, workspace: Workspace
) -> None:
    workspace.write_classes(*(f"cultivar {number}" for number in range(40)))
    workspace.blocks["concepts"] = {"prompt": "data/none", "generic": 30}
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 1
    assert [row["subject_id"] for row in answers()] == ["*"]
    assert not any("cultivar" in json.dumps(call["messages"]) for call in server.calls)
    # A class more is no question more.
    workspace.write_classes(*(f"cultivar {number}" for number in range(41)))
    workspace.run(main)
    assert len(server.calls) == 1


def test_texts_of_no_class_can_be_imported(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_classes("cultivar 1", "cultivar 2")
    Path("words.json").write_text(json.dumps({"*": ["a leaf with a wavy margin", "a leaf with a blunt tip"]}))
    workspace.blocks["concepts"] = {"prompt": "data/none", "import": "words.json"}
    workspace.write(mode="import", min_coverage=0.0)
    workspace.run(main)
    [row] = answers()
    assert (row["subject_id"], row["source"]) == ("*", "import")
    assert [each["text"] for each in json.loads(row["response_json"])["concepts"]] == [
        *("a leaf with a wavy margin", "a leaf with a blunt tip"),
    ]
    assert not server.calls


def test_texts_of_no_class_make_up_for_none(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_classes("alpha", "beta", "gamma")
    texts = {"*": ["a fish with bars"], "alpha": ["a red fish"], "beta": ["a blue fish"]}
    Path("own.json").write_text(json.dumps(texts))
    # The words of the whole group would be paid for: they are not asked for while texts of a class are missing.
    workspace.blocks["concepts"] = {"prompt": "data/none", "import": "own.json", "generic": 5}
    workspace.write()
    with pytest.raises(UserError, match=r"2 of 3 answered, .*; missing: gamma \(not asked\); write texts of what"):
        workspace.run(main)
    workspace.run(main, "--dry-run")
    assert "own.json (concepts.import) covers 2 of 3 classes" in capsys.readouterr().out
    workspace.run(main, "--show", "*")
    assert capsys.readouterr().out.startswith("# from own.json (concepts.import)\n\na fish with bars\n")
    assert (server.calls, ANSWERS.exists()) == ([], False)
    workspace.write(min_coverage=0.5)
    workspace.run(main)
    assert len(server.calls) == 1


def test_of_many_siblings_the_first_are_named(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"ray {number:02}" for number in range(30)]
    workspace.write_classes(*names, superclass="rays")
    workspace.blocks["concepts"] = {"contrast": True}
    workspace.write()
    workspace.run(main, "--show", "ray 05")
    said = capsys.readouterr().out
    assert "# user (prompts/concepts.md)" in said
    _, _, contrast = said.partition("# user (prompts/contrast.md)")
    assert re.findall("^- (.*)$", contrast, re.MULTILINE) == [name for name in names if name != "ray 05"][:20]


def test_what_a_class_is_taken_for_stands_in_for_its_superclass(server: OpenAIServer, workspace: Workspace) -> None:
    """Classes of the data or not; a class that the file leaves out is not asked about, whatever siblings it has."""
    named = {"Iron ray": ["Salt ray", "Tin ray"], id_of("Salt ray"): [f"ray {number:02}" for number in range(30)]}
    Path("taken.json").write_text(json.dumps(named))
    ask_more(workspace, siblings="taken.json", generic=0)
    workspace.run(main)
    assert len(server.calls) == 3 + 2
    [iron] = asked_with(server, "does Iron ray alone have among them")
    assert iron.startswith("In photos of reef fish, Iron ray is easily taken for:\n- Salt ray\n- Tin ray\n\n")
    [salt] = asked_with(server, "does Salt ray alone have among them")
    assert re.findall("^- (.*)$", salt, re.MULTILINE) == named[id_of("Salt ray")][:20]
    before = ANSWERS.read_bytes()
    workspace.run(main)
    assert (len(server.calls), ANSWERS.read_bytes()) == (5, before)
    Path("taken.json").write_text(json.dumps(named | {"Iron ray": ["Salt ray"]}))
    workspace.run(main)
    assert len(server.calls) == 6
    for wrong, said in (({"*": ["Salt ray"]}, r"'\*' is no class"), ({"Iron rey": ["x"]}, "did you mean")):
        Path("taken.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=said):
            workspace.run(main)


def test_the_texts_of_no_class_are_shown(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"concepts\.generic is 0"):
        workspace.run(main, "--show", "*")
    ask_more(workspace)
    workspace.run(main, "--show", "*")
    said = capsys.readouterr().out
    assert said.startswith("# system (prompts/generic_concepts.md)\n")
    assert "Give 30 of them" in said


def test_without_a_shared_superclass_there_is_no_contrast(server: OpenAIServer, workspace: Workspace) -> None:
    for superclasses in ({}, {name: name for name in NAMES}):
        ask_more(workspace, superclasses={"": "", **superclasses})
        with pytest.raises(UserError, match=r"params\.yaml: concepts\.contrast: no two classes .* share a superclass"):
            workspace.run(main)
    assert server.calls == []


def test_coverage_counts_the_answers_of_the_main_prompt(server: OpenAIServer, workspace: Workspace) -> None:
    ask_more(workspace)
    workspace.write(concurrency=1)
    server.script += [refusal("no")]
    with pytest.raises(UserError, match=r"2 of 3 answered.* missing: (Iron|Moss|Salt) ray \(refused\)"):
        workspace.run(main)
    shutil.rmtree(".cache")
    ANSWERS.unlink()
    server.script += [content('{"concepts": []}')] * 3 + [refusal("no")] * 2
    workspace.run(main)
    failed = [row for row in answers() if row["status"] != "ok"]
    assert len(failed) == 2
    assert "*" in {row["subject_id"] for row in failed}
    calls = len(server.calls)
    workspace.run(main)
    assert len(server.calls) == calls + 2


def test_recordings_answer_the_other_prompts(workspace: Workspace) -> None:
    ask_more(workspace)
    workspace.write(mode="replay", recordings="recordings")
    record_answers(*map(id_of, NAMES))
    with pytest.raises(UserError, match=r"no recordings of prompts/generic_concepts\.md"):
        workspace.run(main)
    record_answers("*", prompt="generic_concepts")
    record_answers(id_of("Iron ray"), id_of("Moss ray"), prompt="contrast")
    workspace.run(main)
    assert [row["source"] for row in answers()] == ["replay"] * 6


def test_limits_hold_for_all_prompts_together(server: OpenAIServer, workspace: Workspace) -> None:
    ask_more(workspace)
    workspace.write(max_calls=5)
    with pytest.raises(UserError, match="max_calls: 6 calls are needed"):
        workspace.run(main)
    # 6 calls of at most 2,000 tokens at $2 a million, and a little for what is said: by prompt none passes $0.02.
    workspace.write(max_calls=6, max_usd=0.02)
    with pytest.raises(UserError, match="max_usd: 6 calls may cost"):
        workspace.run(main)
    assert server.calls == []
    workspace.write(max_usd=0.03)
    workspace.run(main)
    assert len(server.calls) == 6


def test_what_one_prompt_cost_the_next_may_not(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_classes("Iron ray")
    workspace.blocks["concepts"] = {"generic": 3}
    workspace.write(max_usd=1.0)
    dear = completion({"model": "tiny"}, '{"concepts": []}')
    dear["usage"] = {"prompt_tokens": 600_000, "completion_tokens": 0}
    server.script += [body(dear), body(dear)]
    with pytest.raises(UserError, match="max_usd"):
        workspace.run(main)
    assert len(server.calls) == 2
    assert len(journal_lines()) == 2


def test_a_dry_run_counts_each_prompt_and_their_sum(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_more(workspace)
    workspace.run(main)
    edit_prompt()
    workspace.write_classes(*NAMES, superclasses=dict.fromkeys(NAMES, "rays"))
    capsys.readouterr()
    workspace.run(main, "--dry-run")
    said = capsys.readouterr().out
    assert "generate_concepts, prompts/concepts.md: 3 items, 0 cached, 3 calls" in said
    assert "generate_concepts, prompts/generic_concepts.md: 1 items, 1 cached, 0 calls" in said
    assert "generate_concepts, prompts/contrast.md: 3 items, 0 cached, 3 calls" in said
    assert "generate_concepts in sum: 7 items, 1 cached, 6 calls" in said
    assert "at most 12,000 out" in said
    assert said.count("price: at most $") == 4
    workspace.write(mode="batch")
    workspace.run(main, "--dry-run")
    assert "batch" in capsys.readouterr().out
    assert len(server.calls) == 6


def test_each_prompt_goes_into_a_batch_of_its_own(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_more(workspace)
    workspace.write(mode="batch", batch_poll_s=0.01)
    workspace.run(main)
    assert (len(server.batches), len(server.batched), len(server.calls)) == (3, 6, 0)
    assert "generate_concepts: asked 6, cached 0, spent $0.0006, failed: none\n" in capsys.readouterr().err
    assert {row["source"] for row in answers()} == {"batch"}
    assert len(answers()) == 6
    workspace.write(mode="live")
    workspace.run(main)
    assert server.calls == []


def test_a_run_ends_with_what_it_did(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write(concurrency=1, min_coverage=0.0)
    server.script += [refusal("no"), without_usage('{"concepts": []}')]
    workspace.run(main)
    said = capsys.readouterr().err
    assert "generate_concepts: asked 3, cached 0, spent at least $0.0004, failed: 1 refused\n" in said
    workspace.run(main)
    assert "generate_concepts: asked 1, cached 2, spent $0.0002, failed: none\n" in capsys.readouterr().err
    # A name that is not known to be this machine's, so that nothing says what it costs.
    workspace.monkeypatch.setattr("fieldmark.llm.answers.is_local", lambda url: False)
    workspace.write(prices={}, model="other")
    workspace.run(main)
    assert "asked 3, cached 0, spent an unknown sum (llm.prices has no 'other')" in capsys.readouterr().err


def test_metrics_are_those_of_the_rows_whoever_asked(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.run(main)
    before = METRICS.read_bytes()
    assert json.loads(before) == summarise(answers())
    assert json.loads(before)["cost_usd"] == pytest.approx(0.0006)
    workspace.run(main)
    assert METRICS.read_bytes() == before
    own_texts(workspace, {name: ["a grey fish"] for name in NAMES})
    workspace.run(main)
    assert json.loads(METRICS.read_text())["source"] == {"import": 3}


def texts_of(row: Row) -> list[str]:
    return [concept["text"] for concept in json.loads(row["response_json"])["concepts"]]


def test_an_edited_answer_survives_prompt_model_and_import(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.run(main)
    before, first = ANSWERS.read_bytes(), by_class()
    with pytest.raises(UserError, match=r"concepts\.edits: is data/none; name a file"):
        workspace.run(main, "--edit", "Iron ray")
    workspace.blocks["concepts"] = {"edits": "mine/edits.json"}
    workspace.write()
    with pytest.raises(UserError, match=r"concepts\.edits: mine/edits\.json cannot be read .*data/none"):
        workspace.run(main)
    workspace.run(main, "--edit", "Iron ray")
    assert capsys.readouterr().out.startswith("mine/edits.json: 2 texts of 'Iron ray'")
    edits = json.loads(Path("mine/edits.json").read_text())
    assert edits == {id_of("Iron ray"): texts_of(first[id_of("Iron ray")])}

    edits[id_of("Iron ray")][1] = "a fish with an é on it"
    Path("mine/edits.json").write_text(json.dumps(edits))
    workspace.run(main)
    edited = by_class()[id_of("Iron ray")]
    assert edited == row_of(id_of("Iron ray"), edits[id_of("Iron ray")], "edited")
    assert edited["source"] == edited["model_requested"] == "edited"
    assert len(server.calls) == 3
    workspace.run(main, "--show", "Iron ray")
    assert "# from mine/edits.json (concepts.edits)\n\nA fish" in capsys.readouterr().out

    edit_prompt()
    workspace.write(model="other")
    workspace.run(main)
    assert len(server.calls) == 5
    assert by_class()[id_of("Iron ray")] == edited
    own_texts(workspace, {name: ["a grey fish"] for name in NAMES}, edits="mine/edits.json")
    workspace.run(main)
    assert {class_id: row["source"] for class_id, row in by_class().items()} == {
        id_of("Iron ray"): "edited",
        id_of("Moss ray"): "import",
        id_of("Salt ray"): "import",
    }
    assert by_class()[id_of("Iron ray")] == edited

    undo_edit()
    workspace.blocks["concepts"] = {}
    workspace.write(model="tiny")
    workspace.run(main)
    assert ANSWERS.read_bytes() == before
    assert len(server.calls) == 5


def test_an_edit_starts_from_all_that_the_class_holds(server: OpenAIServer, workspace: Workspace) -> None:
    def answer(request: dict[str, Any]) -> Any:
        kind = "contrast" if "among them" in request["messages"][-1]["content"] else "main"
        texts = [("a fish in weed", "habitat"), (f"a {kind} fish", "visual"), ("a fish\nwith fins", "visual")]
        return {"concepts": [{"text": text, "kind": kind, "part": None} for text, kind in texts]}

    server.answer = answer
    ask_more(workspace)
    workspace.run(main)
    Path("edits").mkdir()
    workspace.blocks["concepts"]["edits"] = "edits"
    workspace.write()
    workspace.run(main, "--edit", "Iron ray")
    path = Path("edits", f"{id_of('Iron ray')}.txt")
    assert path.read_text() == "a main fish\na fish with fins\na contrast fish\n"
    with pytest.raises(UserError, match=r"holds .* already; edit it there"):
        workspace.run(main, "--edit", "Iron ray")
    workspace.run(main)
    # Neither prompt asks about it, and one row stands for both answers.
    assert len(server.calls) == 6
    assert [row["source"] for row in answers() if row["subject_id"] == id_of("Iron ray")] == ["edited"]


def test_what_cannot_be_edited_is_one_line(workspace: Workspace) -> None:
    workspace.blocks["concepts"] = {"edits": "edits.json"}
    workspace.write(mode="replay", recordings="recordings")
    with pytest.raises(UserError, match=r"answers\.parquet: is missing"):
        workspace.run(main, "--edit", "Iron ray")
    record_answers(*map(id_of, NAMES))
    workspace.blocks["concepts"] = {}
    workspace.write()
    workspace.run(main)
    workspace.blocks["concepts"] = {"edits": "edits.json"}
    workspace.write()
    for wanted, said in (("Iron ray", "holds no text of 'Iron ray'"), ("Iron rai", "did you mean 'Iron ray'")):
        with pytest.raises(UserError, match=said):
            workspace.run(main, "--edit", wanted)
    assert not Path("edits.json").exists()


def test_import_asks_nobody(server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.run(main)
    before = ANSWERS.read_bytes()
    # As if the answers had been pulled from elsewhere: the journal knows none of them.
    JOURNAL.unlink()
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    workspace.write(mode="import")
    with pytest.raises(UserError, match=r"3 of 3 classes have no texts in data/none \(concepts\.edits\)"):
        workspace.run(main)
    own_texts(workspace, {"Iron ray": ["a grey fish"], "Salt ray": ["a fish"]})
    with pytest.raises(UserError, match=r"import asks nobody, and 1 of 3 .*\(concepts\.import\): Moss ray; write some"):
        workspace.run(main)
    assert ANSWERS.read_bytes() == before
    workspace.write(min_coverage=0.6)
    workspace.run(main, "--dry-run")
    assert "own.json (concepts.import) covers 2 of 3 classes, 0 calls" in capsys.readouterr().out
    workspace.run(main)
    assert {row["source"] for row in answers()} == {"import"}
    for concepts in ({"generic": 3}, {"contrast": True}):
        workspace.write_classes(*NAMES, superclass="rays")
        own_texts(workspace, {name: ["a grey fish"] for name in NAMES}, **concepts)
        with pytest.raises(UserError, match=rf"concepts\.{next(iter(concepts))}: asks a model, and llm\.mode import"):
            workspace.run(main)

    workspace.write_classes(*NAMES)
    own_texts(workspace, {})
    workspace.write(mode="live")
    workspace.run(main)
    assert ANSWERS.read_bytes() == before
    assert len(server.calls) == 3


@pytest.mark.parametrize("mode", ["live", "replay", "import"])
def test_nobody_is_asked_about_classes_of_documents(
    mode: str, server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing reads concepts there: they are chosen by the pictures that they show in."""
    classes = store.read_table(CLASSES, "index.classes/2")
    store.write_table(classes, CLASSES, "index.classes/2", {"format": "text_graph"}, "documents")
    workspace.blocks["concepts"] = {"generic": 3}
    workspace.write(mode=mode, recordings="nowhere", min_coverage=1.0)
    workspace.run(main)
    assert server.calls == answers() == []
    assert capsys.readouterr().err.count("generate_concepts: the data set is of documents, which have no pictures") == 1
    own_texts(workspace, {"Iron ray": ["a grey fish"]})
    workspace.run(main)
    assert [row["source"] for row in answers()] == ["import"]


def test_classes_of_one_name_are_told_apart_by_their_id(workspace: Workspace) -> None:
    rows = [{"class_id": class_id, "name": "Twin", "from_images": False} for class_id in ("a", "b")]
    store.write_table(store.make_table("index.classes/2", rows), CLASSES, "index.classes/2", {}, "twins")
    with pytest.raises(UserError, match="--show: 'Twin' is the name of a, b; give one of these"):
        workspace.run(main, "--show", "Twin")
    workspace.run(main, "--show", "b")


def test_nothing_secret_is_stored_or_said(server: OpenAIServer, workspace: Workspace) -> None:
    server.script += [failure(400, message=f"your key {KEY} is fine"), *[content(f"my key is {KEY}")] * 2]
    workspace.write(concurrency=1, base_url=server.base_url.replace("//", f"//user:{KEY}@"))
    process = workspace.start("generate_concepts")
    refused = "".join(process.communicate())
    assert refused.startswith("error: params.yaml: llm.base_url: holds a user or a password")
    assert KEY not in refused
    assert server.calls == []
    workspace.write(base_url=server.base_url)
    process = workspace.start("generate_concepts")
    said = "".join(process.communicate())
    assert process.returncode == 1
    assert "error: data/concepts/answers.parquet: 1 of 3 answered" in said
    assert len(server.calls) == 4
    assert KEY not in said
    files = [path for path in Path().rglob("*") if path.is_file() and path != Path("params.yaml")]
    assert {ANSWERS, JOURNAL} <= set(files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in str(answers())


def settle(server: OpenAIServer) -> None:
    """Wait until the server has counted what a killed process had sent."""
    seen = -1
    while seen != len(server.calls):
        seen = len(server.calls)
        time.sleep(0.3)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_loses_no_answer_and_pays_none_twice(kills: int, server: OpenAIServer, workspace: Workspace) -> None:
    total, in_flight = 16 * kills, 4
    server.latency = 0.02
    workspace.write_classes(*(f"ray {number}" for number in range(total)))
    draw = random.Random(0)
    paid = 0
    for _ in range(kills):
        process = workspace.start("generate_concepts")
        target = len(server.calls) + draw.randint(1, 12)
        while len(server.calls) < target and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        settle(server)
        assert process.returncode == -signal.SIGKILL
        assert not ANSWERS.exists()
        lines = journal_lines()
        assert paid <= len(lines)
        assert len(lines) <= len(server.calls) <= len(lines) + kills * in_flight
        paid = len(lines)
    # As if the last line had been torn in the writing.
    with journal_path("generate_concepts").open("ab") as journal:
        journal.write(b'{"base_url":"http://torn","row":{"item_key":"')
    before = len(server.calls)
    workspace.run(main)
    assert len(server.calls) - before == total - paid
    assert len({row["item_key"] for row in answers()}) == total
    workspace.run(main)
    assert len(server.calls) - before == total - paid


def test_ctrl_c_exits_with_130(server: OpenAIServer, workspace: Workspace) -> None:
    server.latency = 0.1
    workspace.write_classes(*(f"ray {number}" for number in range(40)))
    process = workspace.start("generate_concepts")
    while not server.calls:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "of 40 calls answered" in said
    assert "Traceback" not in said
    paid = len(journal_lines())
    before = len(server.calls)
    assert paid == before
    workspace.run(main)
    assert len(server.calls) == 40


def test_help_says_what_it_reads_writes_and_costs(
    run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("generate_concepts", "describe_images", "clean_concepts"):
        with pytest.raises(SystemExit) as ended:
            run_stage(stage, "--help")
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in ("Reads", "Writes", "Costs"))


@pytest.mark.parametrize("option", ["--dry-run", "--show=Iron ray", "--edit=Iron ray", None])
def test_nothing_is_shown_priced_or_asked_of_the_former_data_set(
    server: OpenAIServer, workspace: Workspace, option: str | None
) -> None:
    arguments = [option] if option else []
    workspace.lock_index("data/reef", "classes")
    with pytest.raises(UserError, match=r"data/index: is of dataset\.root data/reef, and params\.yaml says data/ph"):
        workspace.run(main, *arguments)
    assert not server.calls
