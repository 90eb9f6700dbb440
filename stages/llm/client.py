"""One chat completion, asked until it is answered or hopeless: openai's client under a single layer of retries.

The client's own retries are off, so the attempts of one call never exceed `llm.max_attempts`. A rate limit, a server
error, a timeout or a lost connection is tried again, after Retry-After where the server sends it and after a jittered
exponential pause where not. A wrong key, a wrong model or an empty account stops the whole run: no further call would
fare better. Every other outcome is a Reply with its status.
"""

import email.utils
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
)

from stages.command import UserError
from stages.llm.prompts import Message, Prompt, problem
from stages.params import Llm
from stages.store import canonical_json

OPENAI = "https://api.openai.com/v1"
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# A server that asks for a longer rest than this has closed for the day: stop and say so.
LONGEST_REST_S = 600.0
# Status codes after which no call of this run can succeed: wrong key, no money, not allowed, no such model or address.
HOPELESS = {401, 402, 403, 404}
NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached"}
# Shorter values stand in for a key where a local server asks for none; to hide them would garble messages.
SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Reply:
    """What came of a call. `response_json` is the answer where status is ok, else what there is to know."""

    status: str
    response_json: str
    attempts: int
    model_reported: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class Client:
    """Asks with one prompt's schema; may be shared by threads. Set `stopping` to end pauses and retries."""

    def __init__(self, prompt: Prompt, llm: Llm) -> None:
        self.prompt, self.llm = prompt, llm
        self.key = read_key(llm)
        self.stopping = threading.Event()
        self.options = request_options(prompt, llm)
        self.api = openai.OpenAI(api_key=self.key, base_url=server_of(llm), timeout=llm.timeout_s, max_retries=0)
        self.base_url = public_url(server_of(llm))

    def ask(self, messages: list[Message]) -> Reply:
        """Raises UserError where no call of this run can succeed."""
        retrying = Retrying(
            stop=stop_after_attempt(self.llm.max_attempts) | stop_when_event_set(self.stopping),
            wait=pause,
            sleep=sleep_using_event(self.stopping),
            retry=retry_if_exception(worth_another),
            reraise=True,
        )
        try:
            body = retrying(self.call, messages)
        except (openai.APIError, ValueError) as error:
            verdict = self.hopeless(error)
            if verdict:
                self.stopping.set()
                raise verdict from None
            return Reply("error", canonical_json({"error": self.message_of(error)}), attempts_of(retrying))
        return self.read(body, attempts_of(retrying))

    def call(self, messages: list[Message]) -> Any:
        # The raw body: servers leave out what openai's typed completion takes for granted.
        request: dict[str, Any] = {"model": self.llm.model, "messages": messages, **self.options}
        raw = self.api.chat.completions.with_raw_response.create(**request)
        return json.loads(raw.http_response.content)

    def read(self, body: Any, attempts: int) -> Reply:
        """Judge a completion: ok, refused, truncated, invalid, or error where it is none."""
        try:
            choice = body["choices"][0]
            message = choice["message"]
            finish_reason = text_or_none(choice.get("finish_reason"))
            content, refusal = text_or_none(message.get("content")), text_or_none(message.get("refusal"))
        except (KeyError, IndexError, TypeError, AttributeError):
            said = canonical_json({"error": "no chat completion but " + self.clean(json.dumps(body))[:300]})
            return Reply("error", said, attempts)
        if refusal or finish_reason == "content_filter":
            status, response = "refused", canonical_json({"refusal": self.clean(refusal or content or "")})
        elif finish_reason == "length":
            status, response = "truncated", canonical_json({"text": self.clean(content or "")})
        else:
            status, response = self.parse(content or "")
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Reply(
            status,
            response,
            attempts,
            text_or_none(body.get("model")),
            text_or_none(body.get("id")),
            finish_reason,
            count_or_none(usage.get("prompt_tokens")),
            count_or_none(usage.get("completion_tokens")),
        )

    def parse(self, content: str) -> tuple[str, str]:
        """The answer as canonical JSON with status ok, or what is wrong with it with status invalid."""
        answer = content
        if self.llm.response_format == "text":
            # Plain text wraps its JSON in a code fence or in talk.
            answer = content[content.find("{") : content.rfind("}") + 1]
        try:
            value = json.loads(answer)
            response = canonical_json(value)
            response.encode()
            wrong = problem(value, self.prompt.schema)
        except ValueError as error:
            wrong = f"not JSON: {error}"
        if wrong:
            return "invalid", canonical_json({"error": self.clean(wrong), "text": self.clean(content)})
        return "ok", response

    def hopeless(self, error: Exception) -> UserError | None:
        """What to tell the user where this failure means that no call of the run can succeed."""
        said, server, variable = self.message_of(error), self.base_url, self.llm.api_key_env
        if is_broke(error):
            return UserError(f"{server}: the account of the key in {variable} has no money left ({said}); top it up")
        if not isinstance(error, openai.APIStatusError):
            return None
        if error.status_code == 401:
            return UserError(f"{server} refuses the key in {variable} ({said}); export a valid one")
        if error.status_code in HOPELESS:
            return UserError(f"{server} answers {said}; check llm.model and llm.base_url in params.yaml")
        rest = retry_after(error)
        if rest is not None and rest > LONGEST_REST_S:
            return UserError(f"{server} asks to wait {rest:.0f} s ({said}); run again then, all answers are kept")
        return None

    def message_of(self, error: Exception) -> str:
        cause = f": {type(error.__cause__).__name__}" if error.__cause__ else ""
        return f"{type(error).__name__}{cause}: {self.clean(' '.join(str(error).split()))[:300]}"

    def clean(self, text: str) -> str:
        """Text that can be stored: no key in it, and valid UTF-8."""
        if len(self.key) >= SHORTEST_SECRET:
            text = text.replace(self.key, "***")
        return text.encode("utf-8", "replace").decode()


def read_key(llm: Llm) -> str:
    """The API key from the environment. Raises UserError where there is none that a header can hold."""
    key = os.environ.get(llm.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"llm.mode is live and the environment has no {llm.api_key_env}: export it (any value for a server that"
            " needs none), or name another variable with llm.api_key_env in params.yaml"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{llm.api_key_env}: is not a key: it holds characters that no header can carry")
    return key


def request_options(prompt: Prompt, llm: Llm) -> dict[str, Any]:
    options: dict[str, Any] = {"max_completion_tokens": llm.max_output_tokens}
    if llm.temperature is not None:
        options["temperature"] = llm.temperature
    if llm.response_format == "json_schema":
        schema = {"name": prompt.name, "schema": prompt.schema, "strict": True}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif llm.response_format == "json_object":
        options["response_format"] = {"type": "json_object"}
    return options


def server_of(llm: Llm) -> str:
    """The address that is asked: llm.base_url, else the variable that every OpenAI client knows, else OpenAI."""
    return llm.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI


def public_url(url: str) -> str:
    """A server's address without user, password and query. Raises UserError where it is none."""
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        complete = False
    if not complete:
        raise UserError("params.yaml: llm.base_url: is no address; write it as https://HOST/v1 or http://HOST:PORT/v1")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def worth_another(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        rest = retry_after(error)
        if is_broke(error) or (rest is not None and rest > LONGEST_REST_S):
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    # A body cut short of its JSON is a lost connection that nobody noticed.
    return isinstance(error, openai.APIConnectionError | ValueError)


def is_broke(error: BaseException) -> bool:
    return isinstance(error, openai.APIError) and bool(NO_MONEY & {error.code, error.type})


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number or a date), or None."""
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the server asked for or 1, 2, 4 ... 60, spread so that threads part."""
    error = state.outcome.exception() if state.outcome else None
    told = retry_after(error) if isinstance(error, openai.APIStatusError) else None
    if told is not None:
        return told * random.uniform(1.0, 1.1)
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (state.attempt_number - 1))
    return longest * random.uniform(0.5, 1.0)


def attempts_of(retrying: Retrying) -> int:
    return int(retrying.statistics["attempt_number"])


def text_or_none(value: Any) -> str | None:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def count_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) else None
