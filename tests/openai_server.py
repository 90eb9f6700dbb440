"""A real HTTP server on this machine that speaks chat/completions, counts calls and misbehaves on demand.

with OpenAIServer() as server:
    server.script += [failure(429, retry_after=0), content("not JSON")]   # the next two calls
    ...                                                                    # ask server.base_url
    assert len(server.calls) == 3
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Turn = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.server.fake
        with fake.lock:
            fake.calls.append(request)
            fake.keys.append(self.headers["Authorization"])
            turn = fake.script.popleft() if fake.script else None
        time.sleep(fake.latency)
        if self.path != "/v1/chat/completions":
            failure(404)(self, request)
        elif turn:
            turn(self, request)
        else:
            self.send_json(200, completion(request, json.dumps(fake.answer(request))))

    def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(body).encode(), headers)

    def send_bytes(
        self, status: int, payload: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        pass


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: "OpenAIServer"

    def handle_error(self, *args: Any) -> None:
        """A client that is killed or tired of waiting leaves a broken pipe: no news here."""


class OpenAIServer:
    """`calls` are the requests' bodies in order of arrival, `keys` their Authorization headers."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any] | None = None, latency: float = 0.0) -> None:
        self.answer = answer or default_answer
        self.latency = latency
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.script: deque[Turn] = deque()
        self.lock = threading.Lock()
        self.listener = Listener(("127.0.0.1", 0), Handler)
        self.listener.fake = self
        self.base_url = f"http://127.0.0.1:{self.listener.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.shutdown()
        self.listener.server_close()


def default_answer(request: dict[str, Any]) -> Any:
    """Two concepts, or two sentences where an image is asked about; a function of nothing but the request."""
    asked = request["messages"][-1]["content"]
    if isinstance(asked, list):
        return {"sentences": ["A fish with a forked tail.", f"A fish of {len(json.dumps(asked))} bytes."]}
    return {
        "concepts": [
            {"text": "A fish with a forked tail.", "kind": "visual", "part": "tail"},
            {"text": f"a fish with {len(asked)} scales", "kind": "visual", "part": None},
        ]
    }


def completion(request: dict[str, Any], content: str | None, finish_reason: str = "stop", **message: Any) -> Any:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": f"{request['model']}-2026-01-01",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }


def content(text: str, finish_reason: str = "stop") -> Turn:
    """Answer with this text, whether it is JSON or not."""
    return lambda handler, request: handler.send_json(200, completion(request, text, finish_reason))


def refusal(text: str) -> Turn:
    return lambda handler, request: handler.send_json(200, completion(request, None, refusal=text))


def body(value: Any) -> Turn:
    """Answer 200 with any JSON in place of a completion."""
    return lambda handler, request: handler.send_json(200, value)


def without_usage(text: str) -> Turn:
    def turn(handler: Handler, request: dict[str, Any]) -> None:
        answer = completion(request, text)
        del answer["usage"]
        handler.send_json(200, answer)

    return turn


def failure(status: int, code: str = "", message: str = "scripted", retry_after: float | str | None = 0) -> Turn:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    error = {"error": {"message": message, "type": code, "code": code}}
    return lambda handler, request: handler.send_json(status, error, headers)


def drop(handler: Handler, request: dict[str, Any]) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def drop_mid_body(handler: Handler, request: dict[str, Any]) -> None:
    """Close the connection after the first bytes of the answer."""
    handler.send_bytes(200, b'{"id": "chat', length=1000)
    handler.close_connection = True


def stall(seconds: float) -> Turn:
    """Say nothing for so long, then close."""

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return turn
