"""generate_concepts against a counting server: who is asked, how often, and what is left after a kill."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import store
from stages.command import UserError
from stages.generate_concepts import ANSWERS, main
from stages.llm.imported import row_of
from stages.llm.journal import journal_path
from tests.openai_server import OpenAIServer, content, failure, refusal
from tests.stages.llm.workspace import KEY, REPOSITORY, Row, Workspace, answers, journal_lines

NAMES = ("Iron ray", "Moss ray", "Salt ray")
ODD = ('A/B "x" é', "..", "ray", "Ray", "../../etc/passwd", "{{ name }}")
JOURNAL = Path(".cache/generate_concepts.jsonl")


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def workspace(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.llm.client.FIRST_PAUSE_S", 0.01)
    workspace = Workspace(monkeypatch, server.base_url)
    workspace.write()
    workspace.write_classes(*NAMES)
    return workspace


def id_of(name: str) -> str:
    return store.sha256(name)[:8]


def own_texts(workspace: Workspace, texts: dict[str, list[str]], **concepts: Any) -> None:
    """Let concepts.import be a file of these texts; no texts, no import."""
    Path("own.json").write_text(json.dumps(texts))
    workspace.blocks["concepts"] = concepts | ({"import": "own.json"} if texts else {})
    workspace.write()


def record_answers(*names: str) -> None:
    """Recordings of an empty answer for each of these classes, in recordings/."""
    Path("recordings").mkdir(exist_ok=True)
    record = {
        "prompt": "concepts",
        "prompt_sha": store.sha256(Path("prompts/concepts.md").read_bytes()),
        "sample": 0,
        "model": "authored",
        "created_at": "2026-11-21T00:00:00Z",
        "response": {"concepts": []},
    }
    lines = [json.dumps(record | {"class_id": id_of(name)}) for name in names]
    Path("recordings/concepts.jsonl").write_text("\n".join(lines))


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
    server.script += [refusal("no"), content("no JSON")]
    workspace.write(concurrency=1)
    with pytest.raises(UserError, match=r"1 of 3 answered.* missing: \w+ ray \(\w+\), \w+ ray \(\w+\)"):
        workspace.run(main)
    assert sorted(row["status"] for row in answers()) == ["invalid", "ok", "refused"]
    workspace.run(main)
    assert len(server.calls) == 5
    assert {row["status"] for row in answers()} == {"ok"}


def test_too_many_calls_fail_before_the_first(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write(max_calls=2)
    with pytest.raises(UserError, match="max_calls"):
        workspace.run(main)
    assert server.calls == []
    assert not ANSWERS.exists()


def test_no_key_is_one_line_and_no_call(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    with pytest.raises(UserError, match="FIELDMARK_TEST_KEY"):
        workspace.run(main)
    assert server.calls == []


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
    assert "# system" in by_name
    assert "tell Iron ray from other reef fish" in by_name
    workspace.run(main, "--show", id_of("Iron ray"))
    assert capsys.readouterr().out == by_name
    own_texts(workspace, {"Iron ray": ["a grey fish", "a fish"]})
    workspace.run(main, "--show", "Iron ray")
    assert capsys.readouterr().out == "# imported from own.json\n\na grey fish\na fish\n"
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
    record_answers(*NAMES)
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
    record_answers("Moss ray", "Salt ray")
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
    assert params.keys() == asked | {"imported"}
    assert params["imported"] == store.sha256(store.canonical_json({id_of("Iron ray"): ["a grey fish"]}))


def test_nothing_secret_is_stored_or_said(server: OpenAIServer, workspace: Workspace) -> None:
    server.script += [failure(400, message=f"your key {KEY} is fine"), content(f"my key is {KEY}")]
    workspace.write(concurrency=1, base_url=server.base_url.replace("//", f"//user:{KEY}@"))
    process = workspace.start("generate_concepts")
    said = "".join(process.communicate())
    assert process.returncode == 1
    assert "error: data/concepts/answers.parquet: 1 of 3 answered" in said
    # A user and password in the address go before the key as httpx sends them; neither may stay behind.
    assert len(server.calls) == 3
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


def test_a_kill_loses_no_answer_and_pays_none_twice(server: OpenAIServer, workspace: Workspace) -> None:
    total, in_flight, kills = 48, 4, 3
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


def test_help_says_what_it_reads_writes_and_costs() -> None:
    for stage in ("generate_concepts", "describe_images", "clean_concepts", "lock"):
        command = [sys.executable, "-m", f"stages.{stage}", "--help"]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        assert all(word in said for word in ("Reads", "Writes", "Costs"))
