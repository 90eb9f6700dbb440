"""The client against a server that misbehaves: statuses, attempts, pauses, and what is never stored."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stages.command import UserError
from stages.llm.client import Client, Reply, public_url
from stages.llm.prompts import Prompt
from stages.params import Llm
from tests.openai_server import (
    OpenAIServer,
    body,
    completion,
    content,
    drop,
    drop_mid_body,
    failure,
    refusal,
    stall,
    without_usage,
)
from tests.stages.llm.workspace import KEY

SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}
PROMPT = Prompt("prompts/test.md", "0" * 64, "a test", (), SCHEMA, ())
GOOD = '{"x": "é"}'
MESSAGES = [{"role": "user", "content": "x?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
    monkeypatch.setattr("stages.llm.client.FIRST_PAUSE_S", 0.01)
    with OpenAIServer(lambda request: {"x": "é"}) as server:
        yield server


def llm_of(server: OpenAIServer, **values: Any) -> Llm:
    return Llm(
        **{
            "mode": "live",
            "base_url": server.base_url,
            "model": "tiny",
            "api_key_env": "FIELDMARK_TEST_KEY",
            "timeout_s": 5.0,
            "max_attempts": 3,
            **values,
        }
    )


def ask(server: OpenAIServer, **values: Any) -> Reply:
    return Client(PROMPT, llm_of(server, **values)).ask(MESSAGES)


def test_an_answer_comes_whole(server: OpenAIServer) -> None:
    assert ask(server) == Reply("ok", '{"x":"é"}', 1, "tiny-2026-01-01", "chatcmpl-1", "stop", 100, 50)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    "trouble",
    [
        failure(429),
        failure(500),
        failure(503, retry_after=None),
        failure(408),
        drop,
        drop_mid_body,
        failure(429, retry_after="Thu, 01 Jan 1970 00:00:00 GMT"),
        stall(0.6),
        lambda handler, request: handler.send_bytes(200, b'{"cut'),
        lambda handler, request: handler.send_bytes(200, b'{"x": "\xff"}'),
    ],
)
def test_passing_trouble_is_tried_again(server: OpenAIServer, trouble: Any) -> None:
    server.script += [trouble, trouble]
    reply = ask(server, timeout_s=0.3)
    assert (reply.status, reply.attempts, len(server.calls)) == ("ok", 3, 3)


@pytest.mark.parametrize("trouble", [failure(429), failure(500), drop])
@pytest.mark.parametrize("attempts", [1, 4])
def test_attempts_are_never_multiplied(server: OpenAIServer, trouble: Any, attempts: int) -> None:
    server.script += [trouble] * 20
    reply = ask(server, max_attempts=attempts)
    assert (reply.status, reply.attempts, len(server.calls)) == ("error", attempts, attempts)
    assert "Error" in json.loads(reply.response_json)["error"]


def test_retry_after_is_waited_for(server: OpenAIServer) -> None:
    server.script.append(failure(429, retry_after=0.4))
    begin = time.monotonic()
    assert ask(server).attempts == 2
    # A lower bound: the pause that this server did not ask for would be 0.01 s.
    assert time.monotonic() - begin >= 0.4


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (failure(401, message=f"Incorrect API key provided: {KEY}"), "refuses the key in FIELDMARK_TEST_KEY"),
        (failure(403), "check llm.model"),
        (failure(404, "model_not_found"), "check llm.model"),
        (failure(402), "check llm.model"),
        (failure(429, "insufficient_quota"), "no money left"),
        (failure(429, retry_after=86400), "asks to wait 86400 s"),
    ],
)
def test_hopeless_trouble_stops_at_once(server: OpenAIServer, trouble: Any, said: str) -> None:
    server.script.append(trouble)
    with pytest.raises(UserError, match=said) as caught:
        ask(server)
    assert len(server.calls) == 1
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("turn", "status", "said"),
    [
        (refusal("I cannot"), "refused", "I cannot"),
        (content("", "content_filter"), "refused", ""),
        (content('{"x": "lo', "length"), "truncated", '{"x": "lo'),
        (content("no JSON"), "invalid", "not JSON"),
        (content(""), "invalid", "not JSON"),
        (content("{}"), "invalid", "answer lacks x"),
        (content('{"x": "\\ud800"}'), "invalid", "not JSON"),
        (content('{"x": "a", "y": NaN}'), "invalid", "not JSON"),
        (content(f"```json\n{GOOD}\n```"), "invalid", "not JSON"),
        (failure(400, message=f"bad request of {KEY}"), "error", "bad request of ***"),
        (body({"error": {"message": "overloaded"}}), "error", "overloaded"),
        (body([]), "error", "no chat completion"),
        (body({"choices": [{"message": None}]}), "error", "no chat completion"),
    ],
)
def test_what_is_no_answer_ends_with_a_status(server: OpenAIServer, turn: Any, status: str, said: str) -> None:
    server.script.append(turn)
    reply = ask(server)
    assert (reply.status, reply.attempts, len(server.calls)) == (status, 1, 1)
    assert said in " ".join(json.loads(reply.response_json).values())
    assert KEY not in reply.response_json


def test_servers_that_leave_things_out(server: OpenAIServer) -> None:
    bare = completion({"model": "tiny"}, GOOD)
    server.script += [without_usage(GOOD), body({"choices": bare["choices"]})]
    server.script.append(body({**bare, "usage": {"prompt_tokens": 7}}))
    assert ask(server) == Reply("ok", '{"x":"é"}', 1, "tiny-2026-01-01", "chatcmpl-1", "stop")
    assert ask(server) == Reply("ok", '{"x":"é"}', 1, finish_reason="stop")
    assert ask(server).input_tokens == 7


def test_response_formats(server: OpenAIServer) -> None:
    ask(server, temperature=0.5, max_output_tokens=77)
    request = server.calls[0]
    assert request["response_format"]["json_schema"] == {"name": "test", "schema": SCHEMA, "strict": True}
    assert (request["temperature"], request["max_completion_tokens"]) == (0.5, 77)
    ask(server, response_format="json_object")
    assert server.calls[1]["response_format"] == {"type": "json_object"}
    assert "temperature" not in server.calls[1]
    server.script.append(content(f"Here it is:\n```json\n{GOOD}\n```"))
    assert ask(server, response_format="text").status == "ok"
    assert "response_format" not in server.calls[2]


@pytest.mark.parametrize("key", ["", "  ", "sk-\u00e9", "sk\n1"])
def test_no_usable_key_is_one_line_before_any_call(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("FIELDMARK_TEST_KEY", key)
    with pytest.raises(UserError, match="FIELDMARK_TEST_KEY"):
        ask(server)
    assert server.calls == []


@pytest.mark.parametrize(
    "address", ["localhost:8000/v1", "http://", "http://[x/v1", "http://x:123456/v1", "ftp://x/v1"]
)
def test_what_is_no_address_is_refused(server: OpenAIServer, address: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        ask(server, base_url=address)


def test_the_stored_address_holds_no_password() -> None:
    assert public_url("https://me:secret@host:8000/v1/?token=secret") == "https://host:8000/v1"
