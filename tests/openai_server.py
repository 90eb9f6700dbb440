"""A real HTTP server on this machine that speaks chat/completions and batches, counts, and misbehaves on demand.

with OpenAIServer() as server:
    server.script += [failure(429, retry_after=0), content("not JSON")]   # the next two calls
    ...                                                                    # ask server.base_url
    assert len(server.calls) == 3

    server.courses.append(Course(looks=2, status="expired", answers=1))    # what becomes of the next batch
    server.detours["create"].append(failure(500))                          # the next call of that kind
    ...
    assert (len(server.uploads), len(server.batches)) == (1, 1)
"""

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Turn = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        fake = self.server.fake
        if self.path == "/v1/files":
            return self.detour("upload", lambda: fake.keep_upload(content, self.headers["Content-Type"]))
        if self.path == "/v1/batches":
            return self.detour("create", lambda: fake.make_batch(json.loads(content)))
        request = json.loads(content)
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

    def do_GET(self) -> None:
        fake, path = self.server.fake, urlsplit(self.path)
        names = path.path.split("/")[2:]
        if names == ["batches"]:
            query = parse_qs(path.query)
            self.detour("list", lambda: fake.list_batches(query.get("after", [""])[0], int(query["limit"][0])))
        elif names[0] == "batches" and names[1] in fake.batches:
            self.detour("retrieve", lambda: fake.look(names[1]))
        elif names[0] == "files" and names[1] in fake.files:
            self.detour("content", lambda: fake.files[names[1]])
        else:
            failure(404)(self, {})

    def detour(self, kind: str, serve: Callable[[], Any]) -> None:
        """Serve a call for files or batches, unless its kind has a detour: that is given what would have been done."""
        fake = self.server.fake
        with fake.lock:
            fake.kinds.append(kind)
            turn = fake.detours[kind].popleft() if fake.detours[kind] else None
        if turn:
            return turn(self, {"serve": serve})
        answer = serve()
        if isinstance(answer, bytes):
            self.send_bytes(200, answer)
        else:
            self.send_json(200, answer)

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


@dataclass
class Course:
    """What becomes of a batch: after so many looks it has that status, and this many answers where not all.

    `lines` are the outcomes of single requests by their place, as the line of the output or error file without its
    custom_id; None is in neither.
    """

    looks: int = 0
    status: str = "completed"
    answers: int | None = None
    lines: dict[int, dict[str, Any] | None] = field(default_factory=dict)
    error: tuple[str, str] = ("invalid_request", "scripted")


class OpenAIServer:
    """`calls` are the requests' bodies in order of arrival, `keys` their Authorization headers.

    Of batches: `uploads` are the ids of files that were uploaded, `batches` what was made of them, `batched` the bodies
    of the requests that were answered in them, `kinds` the calls for files and batches in order.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any] | None = None, latency: float = 0.0) -> None:
        self.answer = answer or default_answer
        self.latency = latency
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.script: deque[Turn] = deque()
        self.files: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.batches: dict[str, dict[str, Any]] = {}
        self.batched: list[dict[str, Any]] = []
        self.kinds: list[str] = []
        self.page = 100
        self.courses: deque[Course] = deque()
        self.course_of: dict[str, Course] = {}
        self.detours: defaultdict[str, deque[Turn]] = defaultdict(deque)
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


    def keep_upload(self, content: bytes, content_type: str) -> Any:
        """A file of purpose batch from a multipart form."""
        with self.lock:
            parts = content.split(b"--" + content_type.partition("boundary=")[2].encode())
            fields = [part.partition(b"\r\n\r\n") for part in parts]
            assert any(b'name="purpose"' in head and body.strip() == b"batch" for head, _, body in fields)
            [file] = [body for head, _, body in fields if b'name="file"' in head]
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = file.removesuffix(b"\r\n")
            self.uploads.append(file_id)
        return {"id": file_id, "object": "file", "bytes": len(file), "purpose": "batch", "status": "processed"}

    def make_batch(self, request: dict[str, Any]) -> Any:
        with self.lock:
            batch_id = f"batch-{len(self.batches)}"
            self.course_of[batch_id] = self.courses.popleft() if self.courses else Course()
            total = self.files[request["input_file_id"]].count(b"\n")
            counts = {"total": total, "completed": 0, "failed": 0}
            self.batches[batch_id] = {"id": batch_id, "object": "batch", "created_at": len(self.batches), **request}
            self.batches[batch_id] |= {"status": "validating", "request_counts": counts}
            return self.batches[batch_id]

    def list_batches(self, after: str, limit: int) -> Any:
        """A page, the newest first."""
        with self.lock:
            ids = list(self.batches)[::-1]
            start = ids.index(after) + 1 if after else 0
            page = [self.batches[batch_id] for batch_id in ids[start : start + min(limit, self.page)]]
            return {"object": "list", "data": page, "has_more": start + len(page) < len(ids)}

    def look(self, batch_id: str) -> Any:
        """A batch, one look further on its course."""
        with self.lock:
            batch, course = self.batches[batch_id], self.course_of[batch_id]
            if batch["status"] in ("validating", "in_progress"):
                course.looks -= 1
                batch["status"] = "in_progress" if course.looks >= 0 else course.status
                if course.looks < 0:
                    self.finish(batch, course)
            return batch

    def finish(self, batch: dict[str, Any], course: Course) -> None:
        if course.status == "failed":
            code, message = course.error
            batch["errors"] = {"object": "list", "data": [{"code": code, "message": message, "line": 1}]}
            return
        good: list[bytes] = []
        bad: list[bytes] = []
        requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        for place, request in enumerate(requests):
            assert (request["method"], request["url"]) == ("POST", batch["endpoint"])
            if course.answers is not None and place >= course.answers:
                outcome: Any = {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
            elif place in course.lines:
                outcome = course.lines[place]
            else:
                body = completion(request["body"], json.dumps(self.answer(request["body"])))
                outcome = answered(body)
            if outcome:
                line = json.dumps({"id": f"r-{place}", "custom_id": request["custom_id"], **outcome}).encode() + b"\n"
                is_good = (outcome["response"] or {}).get("status_code") == 200
                (good if is_good else bad).append(line)
                self.batched += [request["body"]] * is_good
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        # A server answers in whatever order it likes.
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"".join(lines)


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


def answered(body: Any, status_code: int = 200) -> dict[str, Any]:
    """The line of a batch's file for one request."""
    return {"response": {"status_code": status_code, "request_id": "r", "body": body}, "error": None}


def unheard(handler: Handler, request: dict[str, Any]) -> None:
    """Do what was asked about files or batches, and close the connection without a word."""
    request["serve"]()
    handler.close_connection = True


def hold(reached: threading.Event, *, done: bool) -> Turn:
    """Say that a call has come, do what it asks or not, and never answer."""

    def turn(handler: Handler, request: dict[str, Any]) -> None:
        if done:
            request["serve"]()
        reached.set()
        handler.connection.recv(1)
        handler.close_connection = True

    return turn


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
