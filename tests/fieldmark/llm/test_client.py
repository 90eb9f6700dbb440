"""The client against a server that misbehaves: statuses, attempts, pauses, and what is never stored."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.llm.client import SURROUNDINGS, Client, Reply, is_local, limit_name, public_url
from fieldmark.llm.rates import Rates
from fieldmark.params import Llm
from tests.fieldmark.llm.test_rates import Clock
from tests.fieldmark.llm.workspace import ELSEWHERE, KEY, PROMPT, llm_of
from tests.openai_server import (
    Handler,
    OpenAIServer,
    Turn,
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

GOOD = '{"x": "é"}'
MESSAGES = [{"role": "user", "content": "x?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
    monkeypatch.setattr("fieldmark.llm.client.FIRST_PAUSE_S", 0.01)
    with OpenAIServer(lambda request: {"x": "é"}) as server:
        yield server


def ask(server: OpenAIServer, **values: Any) -> Reply:
    return Client(PROMPT, llm_of(server, **values)).ask(MESSAGES)


def with_headers(headers: dict[str, str], status: int = 200) -> Turn:
    """A good answer, or a failure, with more headers."""

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        answer = completion(request, GOOD) if status == 200 else {"error": {"message": "scripted"}}
        handler.send_json(status, answer, headers)

    return turn


def page(status: int, text: str = "<html><head><title>502 Bad\nGateway</title></head></html>") -> Turn:
    """What a proxy says in place of the server behind it."""
    return lambda handler, request: handler.send_bytes(status, text.encode())


def changed(change: Any, text: str | None = GOOD) -> Turn:
    """A completion whose body `change` has changed."""

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        answer = completion(request, text)
        change(answer)
        handler.send_json(200, answer)

    return turn


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
        lambda handler, request: handler.send_bytes(200, b"[" * 100_000),
        page(200),
        page(502),
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


def test_a_server_that_is_not_there_is_named(server: OpenAIServer) -> None:
    nobody = "http://127.0.0.1:9/v1"
    reply = ask(server, base_url=nobody, max_attempts=2)
    said = json.loads(reply.response_json)["error"]
    assert (reply.status, reply.attempts, reply.unheard) == ("error", 2, 0)
    assert said.startswith(f"nobody answers at {nobody}: ConnectError: ")
    assert said.endswith("; start the server, or correct llm.base_url")


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
        (failure(402, message="Insufficient Balance"), "no money left"),
        (page(405), "a web page titled '502 Bad Gateway'"),
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
        (failure(400, message=f"bad request of {KEY}"), "error", "bad request of ***"),
        (failure(400, "context_length_exceeded", "maximum context length is 4096 tokens"), "error", "4096 tokens"),
        (body({"error": {"message": "overloaded"}}), "error", "overloaded"),
        (body([]), "error", "no chat completion"),
        (body({"choices": [{"message": None}]}), "error", "no chat completion"),
        (lambda handler, request: handler.send_json(400, {"detail": "no such field"}), "error", "no such field"),
        (lambda handler, request: handler.send_json(400, {"error": "model not loaded"}), "error", "model not loaded"),
        (lambda handler, request: handler.send_json(422, {"detail": [{"loc": "body.top"}]}), "error", "body.top"),
    ],
)
def test_what_no_second_try_mends_ends_with_a_status(server: OpenAIServer, turn: Any, status: str, said: str) -> None:
    server.script.append(turn)
    reply = ask(server)
    assert (reply.status, reply.attempts, len(server.calls)) == (status, 1, 1)
    assert said in " ".join(json.loads(reply.response_json).values())
    assert KEY not in reply.response_json


BROKEN = [
    (content('{"x": "lo', "length"), "truncated", '{"x": "lo'),
    (content("no JSON"), "invalid", "not JSON"),
    (content(""), "invalid", "the answer is empty"),
    (content("{}"), "invalid", "answer lacks x"),
    (content('{"x": "\\ud800"}'), "invalid", "not JSON"),
    (content('{"x": "a", "y": NaN}'), "invalid", "not JSON"),
    (content(f"my key is {KEY}"), "invalid", "my key is ***"),
]


@pytest.mark.parametrize(("turn", "status", "said"), BROKEN)
def test_a_broken_answer_is_asked_for_once_more(server: OpenAIServer, turn: Any, status: str, said: str) -> None:
    server.script.append(turn)
    reply = ask(server)
    assert (reply.status, reply.attempts, len(server.calls)) == ("ok", 2, 2)
    assert (reply.input_tokens, reply.output_tokens) == (200, 100)
    first, second = server.calls
    assert (second["max_tokens"], first["max_tokens"]) == (4000 if status == "truncated" else 2000, 2000)
    if status == "truncated":
        assert first["messages"] == second["messages"] == MESSAGES
    else:
        shown = json.dumps(second["messages"][1:])
        assert first["messages"] == second["messages"][:1] == MESSAGES
        assert "This answer cannot be used" in shown
        assert KEY not in shown
    for calls, attempts in ((4, 2), (5, 1)):
        server.script += [turn] * attempts
        reply = ask(server, max_attempts=attempts)
        assert (reply.status, reply.attempts, len(server.calls)) == (status, attempts, calls)
        assert said in " ".join(json.loads(reply.response_json).values())
        assert KEY not in reply.response_json


def test_the_model_is_shown_its_answer_without_its_thoughts(server: OpenAIServer) -> None:
    server.script.append(content('<think>hm {"x": "draft"}</think>{"y": 1}'))
    ask(server)
    [_, bad, told] = server.calls[1]["messages"]
    assert bad == {"role": "assistant", "content": '{"y": 1}'}
    assert told["role"] == "user"
    assert "answer lacks x" in told["content"]
    assert '"required":["x"]' in told["content"]


def test_a_long_answer_that_does_not_fit_is_not_paid_for_whole_again(server: OpenAIServer) -> None:
    server.script.append(content("x" * 3_000_000))
    assert ask(server).status == "ok"
    assert len(json.dumps(server.calls[1])) < 30_000


def test_each_remedy_is_tried_once(server: OpenAIServer) -> None:
    cut, bad = content("{", "length"), content("{}")
    server.script += [cut, bad, cut, bad]
    reply = ask(server, max_attempts=9)
    assert (reply.status, reply.attempts, len(server.calls)) == ("truncated", 3, 3)
    assert (reply.input_tokens, reply.output_tokens) == (300, 150)
    assert [call["max_tokens"] for call in server.calls] == [2000, 4000, 4000]


@pytest.mark.parametrize("attempts", range(1, 7))
def test_asking_again_and_trouble_share_the_attempts(server: OpenAIServer, attempts: int) -> None:
    server.script += [failure(429), content("{", "length"), failure(500), drop, content("{}"), failure(503)]
    reply = ask(server, max_attempts=attempts)
    assert (reply.attempts, len(server.calls)) == (attempts, attempts)
    assert reply.status == ["error", "truncated", "truncated", "truncated", "invalid", "invalid"][attempts - 1]
    answered = [0, 1, 1, 1, 2, 2][attempts - 1]
    assert reply.output_tokens == (50 * answered or None)


def test_tokens_are_unknown_where_one_answer_was_not_counted(server: OpenAIServer) -> None:
    server.script += [without_usage("{}")]
    reply = ask(server)
    assert (reply.status, reply.attempts) == ("ok", 2)
    assert (reply.input_tokens, reply.output_tokens) == (None, None)


def test_a_run_that_stops_asks_nothing_again(server: OpenAIServer) -> None:
    client = Client(PROMPT, llm_of(server))

    def stop_and_answer(handler: Handler, request: dict[str, Any]) -> None:
        client.stopping.set()
        content("{}")(handler, request)

    server.script.append(stop_and_answer)
    assert client.ask(MESSAGES).status == "invalid"
    assert client.ask(MESSAGES).attempts == 0
    assert len(server.calls) == 1


def test_servers_that_leave_things_out(server: OpenAIServer) -> None:
    bare = completion({"model": "tiny"}, GOOD)
    server.script += [without_usage(GOOD), body({"choices": bare["choices"]})]
    server.script.append(body({**bare, "usage": {"prompt_tokens": 7}}))
    assert ask(server) == Reply("ok", '{"x":"é"}', 1, "tiny-2026-01-01", "chatcmpl-1", "stop")
    assert ask(server) == Reply("ok", '{"x":"é"}', 1, finish_reason="stop")
    assert ask(server).input_tokens == 7


@pytest.mark.parametrize("response_format", ["json_schema", "json_object", "text"])
@pytest.mark.parametrize(
    "turn",
    [
        changed(lambda answer: answer["choices"][0].update(finish_reason=None)),
        changed(lambda answer: answer["choices"][0].pop("finish_reason")),
        changed(lambda answer: answer.update(model=None, id=None, usage=None)),
        changed(lambda answer: answer["choices"][0]["message"].update(reasoning_content='{"x": "no"}', refusal="")),
        changed(lambda answer: answer["choices"][0]["message"].update(content=[{"type": "text", "text": GOOD}])),
        changed(
            lambda answer: answer["choices"][0]["message"].update(
                content=[{"type": "thinking", "thinking": []}, {"text": GOOD[:5]}, {"text": GOOD[5:]}, None]
            )
        ),
        content(f'<think>It may be {{"x": "a draft"}}.</think>\n\n{GOOD}'),
        content(f"```json\n{GOOD}\n```"),
    ],
)
def test_servers_that_do_it_their_way(server: OpenAIServer, turn: Any, response_format: str) -> None:
    server.script.append(turn)
    reply = ask(server, response_format=response_format)
    assert (reply.status, reply.response_json, reply.attempts) == ("ok", '{"x":"é"}', 1)


def thoughts(text: Any, name: str, said: Any = None) -> Turn:
    """A completion that holds a text as the model's thoughts, and no more content than `said`."""
    return changed(lambda answer: answer["choices"][0]["message"].update({name: text}), said)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("said", [None, "", "\n\n"])
@pytest.mark.parametrize("text", [GOOD, f"\n\n{GOOD}", f"```json\n{GOOD}\n```", [{"type": "text", "text": GOOD}]])
def test_an_answer_taken_for_thoughts_is_one(server: OpenAIServer, text: Any, said: Any, name: str) -> None:
    server.script.append(thoughts(text, name, said))
    reply = ask(server)
    assert (reply.status, reply.response_json, reply.attempts, len(server.calls)) == ("ok", '{"x":"é"}', 1, 1)


def test_a_draft_amid_thoughts_is_no_answer(server: OpenAIServer) -> None:
    server.script.append(thoughts(f"It may be {GOOD}.", "reasoning_content"))
    assert ask(server).attempts == 2
    assert [message["role"] for message in server.calls[1]["messages"]] == ["user", "user"]


def test_response_formats(server: OpenAIServer) -> None:
    ask(server, temperature=0.5, max_output_tokens=77)
    request = server.calls[0]
    assert request["response_format"]["json_schema"] == {"name": "test", "schema": PROMPT.schema, "strict": True}
    assert (request["temperature"], request["max_tokens"]) == (0.5, 77)
    ask(server, response_format="json_object")
    assert server.calls[1]["response_format"] == {"type": "json_object"}
    assert "temperature" not in server.calls[1]
    assert ask(server, response_format="text").status == "ok"
    assert "response_format" not in server.calls[2]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This response_format type is unavailable now"),
        (422, "Failed to deserialize: response_format.type `json_schema` is unavailable now"),
        (500, "1 validation error: {'loc': ('body', 'response_format', 'type'), 'input': 'json_schema'}"),
        (400, "Invalid schema for response_format 'test': 'required' is missing"),
        (400, "'messages' must contain the word 'json' to use 'response_format' of type 'json_object'"),
    ],
)
def test_a_server_without_the_format_is_hopeless(server: OpenAIServer, status: int, message: str) -> None:
    server.script += [failure(status, message=message)] * 3
    with pytest.raises(UserError, match=r"refuses llm.response_format: json_schema .*set it to json_object or text in"):
        ask(server)
    with pytest.raises(UserError, match=r"response_format: json_object .*set it to json_schema or text in"):
        ask(server, response_format="json_object")
    assert ask(server, response_format="text").status == "error"
    assert len(server.calls) == 3


def test_the_limit_has_the_name_that_the_host_knows() -> None:
    def name(base_url: str | None, mode: str = "live") -> str:
        return limit_name(Llm(model="tiny", base_url=base_url, mode=mode))  # type: ignore[arg-type]

    assert name("https://api.openai.com/v1") == "max_completion_tokens"
    assert name("https://eu.api.openai.com/v1") == "max_completion_tokens"
    assert name("https://mine.openai.azure.com/openai/v1") == "max_completion_tokens"
    for other in ("http://localhost:11434/v1", "https://api.deepseek.com", "https://openai.com.evil.example/v1"):
        assert name(other) == "max_tokens"
        assert name(other, "batch") == "max_completion_tokens"


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "Unrecognized request argument supplied: max_tokens",
    ],
)
def test_a_limit_refused_by_its_name_is_renamed_for_good(server: OpenAIServer, message: str) -> None:
    client = Client(PROMPT, llm_of(server))
    server.script.append(failure(400, message=message))
    assert client.ask(MESSAGES).attempts == 2
    assert client.ask(MESSAGES).attempts == 1
    names = [[name for name in call if name.startswith("max_")] for call in server.calls]
    assert names == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    server.script += [failure(400, message="max_tokens is too large: 2000. This model supports at most 1000")]
    assert client.ask(MESSAGES).status == "error"
    assert len(server.calls) == 4


@pytest.mark.parametrize(
    ("turn", "seconds"),
    [
        (failure(429, retry_after=30), 30),
        (failure(503, retry_after=30), 30),
        (with_headers({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "40s"}, 429), 40),
        (with_headers({"x-ratelimit-remaining-tokens": "2099", "x-ratelimit-reset-tokens": "7s"}, 429), 7),
        (with_headers({"x-ratelimit-remaining-tokens": "2100", "x-ratelimit-reset-tokens": "7s"}, 429), 0.01),
        (failure(429), 0.01),
        (with_headers({"x-ratelimit-remaining-tokens": "2099", "x-ratelimit-reset-tokens": "2s"}), 2),
        (with_headers({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}), 60),
        (with_headers({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "6m0s"}), 0),
        (failure(500), 0),
        (failure(400, retry_after=30), 0),
    ],
)
def test_a_rest_that_one_call_is_told_to_take_is_taken_by_the_next(
    server: OpenAIServer, turn: Any, seconds: float
) -> None:
    client, clock = Client(PROMPT, llm_of(server, max_attempts=1)), Clock()
    client.rates = Rates(None, None, clock, clock)
    server.script.append(turn)
    client.ask(MESSAGES, 100)
    assert clock.waits == []
    assert client.ask(MESSAGES, 100).status == "ok"
    assert len(clock.waits) == (seconds > 0)
    assert seconds <= sum(clock.waits) <= 1.25 * seconds


class Waiters(threading.Event):
    """A `stopping` that counts who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.count.release()
        return super().wait(timeout)


def test_a_rest_holds_all_threads_back(server: OpenAIServer) -> None:
    client, stopping = Client(PROMPT, llm_of(server)), Waiters()
    client.stopping, client.rates = stopping, Rates(None, None, stopping)
    server.script.append(failure(429, retry_after=500))
    replies: list[Reply] = []
    threads = [threading.Thread(target=lambda: replies.append(client.ask(MESSAGES)), daemon=True) for _ in range(8)]
    threads[0].start()
    # Of itself it pauses not at all, and rests with all others.
    assert all(stopping.count.acquire(timeout=30) for _ in range(2))
    for thread in threads[1:]:
        thread.start()
    assert all(stopping.count.acquire(timeout=30) for _ in threads[1:])
    stopping.set()
    for thread in threads:
        thread.join(30)
    assert sorted(reply.attempts for reply in replies) == [0] * 7 + [1]
    assert len(server.calls) == 1


def test_what_an_answer_used_corrects_what_was_expected(server: OpenAIServer) -> None:
    client, clock = Client(PROMPT, llm_of(server, max_output_tokens=500)), Clock()
    client.rates = Rates(None, 60, clock, clock)
    client.ask(MESSAGES, 100)
    client.ask(MESSAGES, 100)
    assert sum(clock.waits) == pytest.approx(150)
    server.script.append(without_usage(GOOD))
    client.ask(MESSAGES, 100)
    client.ask(MESSAGES)
    assert sum(clock.waits) == pytest.approx(150 + 150 + 600)


def test_the_limits_of_params_are_the_client_s(server: OpenAIServer) -> None:
    rates = Client(PROMPT, llm_of(server, requests_per_minute=120, tokens_per_minute=600)).rates
    assert rates.requests
    assert rates.tokens
    assert (rates.requests.per_second, rates.tokens.per_second) == (2, 10)


SENT = {"OpenAI-Organization": "org-mine", "X-Team": "fish", "X-Api-Key": "from-the-environment"}


def test_organisation_and_headers_are_sent_and_secrets_kept(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str | None]] = []

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        seen.append({name: handler.headers[name] for name in SENT})
        failure(400, message="I saw from-the-environment and the password of-a-gateway")(handler, request)

    def echo(handler: Handler, request: dict[str, Any]) -> None:
        told = completion(request, '{"x": "from-the-environment"}')
        handler.send_json(200, {**told, "model": "from-the-environment"})

    monkeypatch.setenv("GATEWAY_KEY", " from-the-environment\n")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Pass: of-a-gateway")
    server.script += [turn, echo]
    values = {
        "organization": "org-mine",
        "headers": {"X-Team": "fish", "X-Api-Key": "env:GATEWAY_KEY"},
    }
    assert json.loads(ask(server, **values).response_json)["error"].endswith("I saw *** and the password ***")
    assert seen == [SENT]
    reply = ask(server, **values)
    assert (reply.response_json, reply.model_reported) == ('{"x":"***"}', "***")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("X-Team", "env:NOT_THERE", "llm.headers.X-Team: the environment has no NOT_THERE"),
        ("X-Team", "env:", "llm.headers.X-Team: the environment has no"),
        ("X-Team", "fi\nsh", "llm.headers.X-Team: holds characters"),
        ("X-Team", "f\u00e9", "llm.headers.X-Team: holds characters"),
        ("X Team", "fish", "llm.headers: 'X Team' is no name"),
        ("authorization", "Bearer x", "llm.headers.authorization: is made of the key in FIELDMARK_TEST_KEY"),
        ("Authorization", "env:FIELDMARK_TEST_KEY", "llm.headers.Authorization: is made of the key"),
        ("X-Api-Key", "abc", "llm.headers.X-Api-Key: may be a secret"),
    ],
)
def test_headers_that_cannot_be_sent_are_one_line_before_any_call(
    server: OpenAIServer, name: str, value: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        ask(server, headers={name: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert value == "fish" or value not in str(caught.value) or value.startswith("env:")
    assert server.calls == []


@pytest.mark.parametrize("key", ["", "  ", "sk-\u00e9", "sk\n1"])
def test_no_usable_key_is_one_line_before_any_call(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("FIELDMARK_TEST_KEY", key)
    with pytest.raises(UserError, match="FIELDMARK_TEST_KEY"):
        ask(server, base_url=ELSEWHERE if key.isspace() or not key else server.base_url)
    assert server.calls == []


def test_a_server_on_this_machine_needs_no_key(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIELDMARK_TEST_KEY")
    assert ask(server).status == "ok"
    assert server.keys == ["Bearer none"]
    monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
    ask(server)
    assert server.keys[1:] == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://llm.localhost:1/v1", True),
        ("http://127.0.0.1:11434/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost.example.org/v1", False),
        ("http://192.168.0.2/v1", False),
        ("http://0.0.0.0/v1", False),
        ("https://api.openai.com/v1", False),
        ("http://[x/v1", False),
    ],
)
def test_which_addresses_are_on_this_machine(address: str, local: bool) -> None:
    assert is_local(address) == local


@pytest.mark.parametrize(
    "address", ["localhost:8000/v1", "http://", "http://[x/v1", "http://x:123456/v1", "ftp://x/v1"]
)
def test_what_is_no_address_is_refused(server: OpenAIServer, address: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        ask(server, base_url=address)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://me:hunter22@host:8000/v1", "holds a user or a password"),
        ("https://hunter22@host/v1", "holds a user or a password"),
        ("https://host/v1?token=hunter22", "holds a query"),
        ("https://host/v1?hunter22", "holds a query"),
        ("https://host/v1#hunter22", "holds a query"),
        ("https://me:hunter22@host:x/v1", "is no address"),
        ("https://host/v1 hunter22", "is no address"),
        ("https://host/v1\n", "is no address"),
    ],
)
@pytest.mark.parametrize("by", ["file", "variable"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, address: str, said: str, by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(UserError) as caught:
        ask(server, base_url=address if by == "file" else None)
    where = "params.yaml: llm.base_url" if by == "file" else "OPENAI_BASE_URL"
    assert str(caught.value).startswith(f"{where}: {said}" if by == "variable" else "")
    assert said in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_an_address_is_stored_as_it_is_compared() -> None:
    assert public_url("https://host:8000/v1/") == "https://host:8000/v1"


def redirect(code: int, target: str) -> Turn:
    return lambda handler, request: handler.send_json(code, {}, {"Location": target})


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "from-the-environment")
    with OpenAIServer(lambda request: {"x": "of a stranger"}) as stranger:
        new = f"http://localhost:{stranger.listener.server_port}/v1/chat/completions"
        server.script.append(redirect(code, new.replace("://", "://me:hunter22@") + "?token=hunter22"))
        with pytest.raises(UserError) as caught:
            ask(server, organization="org-mine", headers={"X-Api-Key": "env:GATEWAY_KEY"})
        assert (len(server.calls), stranger.calls, stranger.kinds) == (1, [], [])
    assert f"redirect ({code}) to {new};" in str(caught.value)
    assert "hunter22" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["/v2/chat/completions", "http://[x", "\x1b[31m", ""])
def test_a_redirect_to_anything_is_one_line(server: OpenAIServer, target: str) -> None:
    server.script.append(redirect(307, target))
    with pytest.raises(UserError, match="answers with a redirect"):
        ask(server)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTP_PROXY", "socks5://me:hunter22@127.0.0.1:1", "HTTP_PROXY: is no proxy that can be used"),
        ("ALL_PROXY", "gopher://me:hunter22@127.0.0.1", "ALL_PROXY: is no proxy that can be used"),
        ("HTTPS_PROXY", "http://me:hunter22@host:port", "HTTPS_PROXY: is no proxy that can be used"),
        ("SSL_CERT_FILE", "/not/there.pem", "SSL_CERT_FILE: there are no certificates"),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE: there are no certificates"),
    ],
)
def test_surroundings_that_no_call_can_be_made_in_are_one_line(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    for name in SURROUNDINGS:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        ask(server)
    assert str(caught.value).startswith(said)
    assert "hunter22" not in str(caught.value)
    assert server.calls == []


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "headers",
    [
        {"x-ratelimit-remaining-tokens": DIGITS},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "-1"},
        {"x-ratelimit-remaining-requests": "1e999"},
        {"retry-after": DIGITS},
        {"retry-after": "nan", "x-ratelimit-reset-tokens": f"{DIGITS}h"},
    ],
)
def test_no_header_costs_a_paid_answer(server: OpenAIServer, headers: dict[str, str]) -> None:
    server.script.append(with_headers(headers))
    assert (ask(server).status, len(server.calls)) == ("ok", 1)


@pytest.mark.parametrize("told", [DIGITS, f"-{DIGITS}", "nan", "inf", "Thu, 01 Jan 99999 00:00:00 GMT", ""])
def test_an_absurd_time_to_wait_is_none(server: OpenAIServer, told: str) -> None:
    server.script.append(failure(503, retry_after=told))
    assert (ask(server).status, len(server.calls)) == ("ok", 2)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "Request too large for gpt-4 on tokens per min (TPM): Limit 1000, Requested 2300."),
        (429, "Rate limit reached on tokens per min (TPM): Limit 1,000, Used 0, Requested 2,300. Try again in 5s."),
        (413, "Request too large for model `x`: Limit 6000, Requested 7200, please reduce your message size"),
        (429, "The request too large"),
    ],
)
def test_a_request_that_can_never_pass_is_not_tried_again(server: OpenAIServer, status: int, message: str) -> None:
    server.script += [failure(status, "rate_limit_exceeded", message)] * 5
    with pytest.raises(UserError, match=r"lower llm\.max_output_tokens in params\.yaml, or shorten prompts/test\.md"):
        ask(server)
    assert len(server.calls) == 1


def test_a_rate_that_others_used_up_is_waited_for(server: OpenAIServer) -> None:
    server.script.append(failure(429, message="Rate limit reached: Limit 30000, Used 29000, Requested 2300"))
    assert (ask(server).status, len(server.calls)) == ("ok", 2)


@pytest.mark.parametrize(
    "count", [9223372036854775808, 10**400, -1_000_000_000, 2**53 + 1, 1.5, 100.0, True, "7", None]
)
def test_a_count_of_tokens_that_can_be_none_is_unknown(server: OpenAIServer, count: Any) -> None:
    server.script.append(changed(lambda answer: answer.update(usage={"prompt_tokens": count, "completion_tokens": 5})))
    reply = ask(server)
    assert (reply.status, reply.input_tokens, reply.output_tokens) == ("ok", None, 5)


def drip(piece: bytes, head: bytes = b"", pause: float = 0.05) -> Turn:
    """Send `head`, then `piece` again and again."""

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        while True:
            handler.wfile.write(piece)
            time.sleep(pause)

    return turn


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS = HEAD + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    "trouble",
    [
        drip(b" ", ENDLESS),
        drip(b"x", HEAD + b"X-Header: "),
        drip(b"H"),
        drip(b" ", ENDLESS.replace(b"200 OK", b"500 Oh")),
        drip(b"1\r\n \r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
    ],
)
def test_an_answer_by_drops_is_out_of_time(server: OpenAIServer, trouble: Turn) -> None:
    server.script += [trouble] * 2
    begin = time.monotonic()
    reply = ask(server, timeout_s=0.4, max_attempts=2)
    assert time.monotonic() - begin < 5
    assert (reply.status, len(server.calls)) == ("error", 2)
    assert "Timeout" in reply.response_json


@pytest.mark.parametrize("status", [b"200 OK", b"500 Oh", b"429 Oh"])
def test_an_answer_without_an_end_is_cut_and_not_paid_again(server: OpenAIServer, status: bytes) -> None:
    server.script.append(drip(b" " * 2**20, ENDLESS.replace(b"200 OK", status), pause=0))
    reply = ask(server)
    assert (reply.status, reply.attempts, len(server.calls)) == ("error", 1, 1)
    assert "the answer is longer than 4 MB" in reply.response_json


def test_a_small_body_that_unpacks_without_end_is_cut(server: OpenAIServer) -> None:
    packed = gzip.compress(b" " * 200_000_000, 1)
    server.script.append(lambda handler, request: handler.send_bytes(200, packed, {"Content-Encoding": "gzip"}))
    assert "the answer is longer than 4 MB" in ask(server).response_json
    assert len(server.calls) == 1


def test_a_page_of_titles_and_brackets_in_brackets_are_read_in_no_time(server: OpenAIServer) -> None:
    titles, brackets = "<title" * 300_000, "[" * 900 + "1," * 300_000 + "x] and so on"
    server.script += [page(200, titles), content(brackets), page(500, titles), content(brackets)]
    begin = time.monotonic()
    assert ask(server, max_attempts=2).status == "invalid"
    assert ask(server, max_attempts=2).status == "invalid"
    assert time.monotonic() - begin < 20
