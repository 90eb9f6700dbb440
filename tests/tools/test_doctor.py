"""The doctor: a line each of what is tried, with real encoders and a real server; one call at most, and none kept."""

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.params import Params
from tests.openai_server import OpenAIServer, content, failure
from tests.project import ROOT
from tools.doctor import Doctor

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
PRICES = {"tiny": {"input": 1.0, "output": 2.0}}


@pytest.fixture(autouse=True)
def prompts(project: Path, dataset: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run needs beside pictures and encoders; one encoder is enough."""
    shutil.copytree(ROOT / "prompts", project / "prompts")
    monkeypatch.setenv("FIELDMARK_TEST_KEY", "sk-test-0123456789")


def blocks(**llm: Any) -> dict[str, Any]:
    return {
        "llm": {"recordings": "data/none", "model": "tiny", "api_key_env": "FIELDMARK_TEST_KEY", **llm},
        "moments": {"conv": {"pooled": {"kind": "pooled"}}},
    }


def lines_of(said: str) -> dict[str, tuple[str, str]]:
    """The verdict and the words of each check, by its name."""
    found = (re.fullmatch(r"(ok|problem) +([a-z ]+): (.*)", line) for line in said.splitlines())
    return {match[2]: (match[1], match[3]) for match in found if match}


def asks(params: Params, calls: bool = True) -> str:
    """What the check of the model that is asked about classes says."""
    doctor = Doctor("params.yaml", params, calls)
    doctor.data_set()
    return doctor.concepts()


def test_all_is_well(set_params: SetParams, run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> None:
    set_params(**blocks())
    run_stage("tools.doctor")
    said = lines_of(capsys.readouterr().out)
    assert {name: verdict for name, (verdict, _) in said.items()} == dict.fromkeys(
        ["environment", "data set", "runs", "encoder conv", "encoder vit", "disk", "concepts", "remote"], "ok"
    )
    assert said["data set"][1].startswith("12 pictures of 2 classes, 6 at least (a); the data name 2 splits")
    assert re.search(r"9 nodes of \d+ numbers a view; .* pictures/s: .* for 12, and as long", said["encoder conv"][1])
    assert "nobody is asked" in said["concepts"][1]
    assert not Path("data/index").exists()
    assert not Path("data/embed").exists()


def test_every_fault_is_found_in_one_go(
    set_params: SetParams, run_stage: RunStage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(**blocks(mode="import"), dataset={"root": "images/gone"}, embed={"grids": [9]})
    monkeypatch.setattr("tools.doctor.Doctor.remote", lambda self: "none")
    names = "data set, encoder conv, encoder vit, concepts"
    with pytest.raises(UserError, match=rf"^4 problems \({names}\); the line of each says what to do$"):
        run_stage("tools.doctor")
    said = lines_of(capsys.readouterr().out)
    assert {name for name, (verdict, _) in said.items() if verdict == "problem"} == set(names.split(", "))
    assert "images/gone" in said["data set"][1]
    assert "finer than" in said["encoder conv"][1]
    assert "see `data set` above" in said["concepts"][1]


def test_packages_are_those_of_the_constraints(set_params: SetParams, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = Doctor("params.yaml", set_params(train={"device": "cuda"}), True)
    with pytest.raises(UserError, match=r"train\.device: cuda: cannot be used here"):
        doctor.environment()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.0")
    with pytest.raises(UserError, match=r"0\.0\.0 is installed, and constraints\.txt names .*; run `make setup`"):
        doctor.environment()


def test_the_disk_is_held_against_the_pictures(set_params: SetParams, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = Doctor("params.yaml", set_params(**blocks()), True)
    doctor.data_set()
    assert "GB for 12 pictures" in doctor.disk()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"for 12 pictures.*; make room"):
        doctor.disk()


def test_one_call_says_its_price_before_and_after_and_is_not_kept(
    server: OpenAIServer, set_params: SetParams, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"mode": "live", "base_url": server.base_url, "prices": PRICES, "max_calls": 1, "max_usd": 0.1}
    params = set_params(**blocks(**settings))
    assert "is not asked (--no-call); generate_concepts: 2 calls" in asks(params, calls=False)
    assert server.calls == []
    assert "asking" not in capsys.readouterr().out
    said = asks(params)
    before = r"asking tiny at http://127\.0\.0\.1:\d+/v1 one question of generate_concepts, at most \$0\.00\d\d\n"
    assert re.fullmatch(before, capsys.readouterr().out)
    assert re.search(r" answered in [\d.]+ s with FIELDMARK_TEST_KEY, json_schema accepted, ", said)
    assert re.search(r"\d+ tokens in, \d+ out, \$0\.0\d+; generate_concepts: 2 calls .* at most \$", said)
    assert len(server.calls) == 1
    assert not Path(".cache").exists()
    assert not Path("data/concepts").exists()


@pytest.mark.parametrize(
    ("turns", "settings", "words"),
    [
        ([failure(401)], {}, "refuses the key in FIELDMARK_TEST_KEY"),
        ([failure(400, message="unknown field response_format")], {}, "refuses llm.response_format: json_schema"),
        ([content("not JSON")], {}, "invalid: .* try another llm.response_format or llm.model"),
        ([], {"max_calls": 0}, "llm.max_calls: 1 calls are needed, more than 0"),
        ([], {"max_usd": 0.0001, "prices": PRICES}, "llm.max_usd: 1 calls may cost"),
        ([], {"base_url": "http://192.0.2.1/v1", "api_key_env": "NO_SUCH_VARIABLE"}, "has no NO_SUCH_VARIABLE"),
    ],
)
def test_what_a_model_lacks_is_one_line(
    server: OpenAIServer, set_params: SetParams, turns: list[Any], settings: dict[str, Any], words: str
) -> None:
    server.script += turns
    with pytest.raises(UserError, match=words):
        asks(set_params(**blocks(mode="live", **{"base_url": server.base_url, **settings})))
    assert len(server.calls) == len(turns)


def test_a_server_that_knows_the_limit_by_its_other_name_is_no_problem(
    server: OpenAIServer, set_params: SetParams
) -> None:
    server.script.append(failure(400, message="Unsupported parameter: 'max_tokens' is not supported"))
    assert " answered in " in asks(set_params(**blocks(mode="live", base_url=server.base_url)))
    limits = [set(call) & {"max_tokens", "max_completion_tokens"} for call in server.calls]
    assert limits == [{"max_tokens"}, {"max_completion_tokens"}]


def test_nobody_is_asked_about_documents_but_what_they_say(server: OpenAIServer, set_params: SetParams) -> None:
    params = set_params(
        **blocks(mode="live", base_url=server.base_url) | {"moments": {}},
        dataset={"format": "text_graph"},
        ask={"guess": {"prompt": "prompts/guess.md", "links": "data/none"}},
    )
    doctor = Doctor("params.yaml", params, True)
    assert "the data set is of documents" in doctor.concepts()
    with pytest.raises(UserError, match=r"ask\.guess: prompts/guess\.md sends pictures, and documents have none"):
        doctor.question("guess")
    assert server.calls == []


def test_a_picture_is_asked_about_where_pictures_are_described(server: OpenAIServer, set_params: SetParams) -> None:
    params = set_params(**blocks(mode="live", base_url=server.base_url), describe={"enabled": True})
    doctor = Doctor("params.yaml", params, True)
    doctor.data_set()
    assert "describe_images: 12 calls" in doctor.descriptions()
    assert "data:image/jpeg;base64" in str(server.calls)


def test_cells_are_counted_in_what_all_questions_cost(server: OpenAIServer, set_params: SetParams) -> None:
    params = set_params(**blocks(mode="live", base_url=server.base_url), describe={"enabled": True, "nodes": [2]})
    doctor = Doctor("params.yaml", params, True)
    doctor.data_set()
    assert "describe_images: 60 calls" in doctor.descriptions()  # 12 pictures, and four cells of each
    assert len(server.calls) == 1
