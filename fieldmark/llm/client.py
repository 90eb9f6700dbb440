"""Chat completions, asked until they are answered or hopeless: openai's client under a single layer of retries.

The client's own retries are off, so the calls of one item never exceed `llm.max_attempts`. A rate limit, a server
error, a timeout or a lost connection is tried again, after a jittered exponential pause; where the server limits the
rate or says how long to wait, all threads rest. An answer cut short is asked for once more with more room, one that
does not fit once more with the error shown. A wrong key, a wrong model or an empty account stops the whole run: no
further call would fare better. Every other outcome is a Reply with its status.
"""

import email.utils
import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
)

from fieldmark.command import UserError
from fieldmark.llm.bounds import Deadline, TooLong, read_whole
from fieldmark.llm.journal import token_count
from fieldmark.llm.parsing import NoAnswer, find_answer, without_thoughts
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.llm.rates import SPREAD, Rates, reset_after
from fieldmark.params import Llm, problem_of_address
from fieldmark.store import canonical_json

OPENAI = "https://api.openai.com/v1"
BASE_URL = "OPENAI_BASE_URL"
# What httpx reads in the environment.
SURROUNDINGS = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# A server that asks for a longer rest than this has closed for the day: stop and say so.
LONGEST_REST_S = 600.0
# Status codes after which no call of this run can succeed: wrong key, no money, not allowed, no such model or address.
HOPELESS = {401, 402, 403, 404, 405}
NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached"}
# Failures that come before a server has seen the request.
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
FORMATS = ["json_schema", "json_object", "text"]
# The two names of the limit on an answer's length, and how a server refuses the one that it does not know [mem].
LIMITS = ("max_completion_tokens", "max_tokens")
UNKNOWN_LIMIT = re.compile(r"\bun(?:supported|recognized|known)\b.{0,40}\bmax_(?:completion_)?tokens\b", re.IGNORECASE)
# How a server refuses a request that passes what the account may use in a minute: it can never pass [mem].
TOO_LARGE = re.compile(r"\brequest too large\b", re.IGNORECASE)
LIMIT_AND_REQUEST = re.compile(r"\blimit:? ([\d,]{1,15})\b.{0,60}\brequested:? ([\d,]{1,15})\b", re.IGNORECASE)
# Of an answer that does not fit the model is shown no more than this; in characters.
LONGEST_SHOWN = 20_000
# Of what a server says of a failure no more is looked at.
LONGEST_FAILURE = 10_000
# Shorter values stand in for a key where a local server asks for none; to hide them would garble messages.
SHORTEST_SECRET = 8
# What a server on this machine is sent in the place of a key: openai's client does not work without one.
NO_KEY = "none"
HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
# Where openai's client takes more headers from, a line each.
MORE_HEADERS = "OPENAI_CUSTOM_HEADERS"
SECRET_HEADER = re.compile(r"key|token|secret|password|cookie|auth", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What came of an item. `response_json` is the answer where status is ok, else what there is to know.

    `attempts` counts all calls, `unheard` those whose answer was lost on its way: the server may have written it, and
    bill it. Tokens are those of all answers, for all are paid, and None where one was not counted. The rest is of the
    last answer.
    """

    status: str
    response_json: str
    attempts: int
    model_reported: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    unheard: int = 0


class Stopped(Exception):
    """The run stopped before a call was made."""


class Client:
    """Asks with one prompt's schema; may be shared by threads. Set `stopping` to end pauses and retries."""

    def __init__(self, prompt: Prompt, llm: Llm) -> None:
        self.prompt, self.llm = prompt, llm
        key, headers, server = read_key(llm), read_headers(llm), server_of(llm)
        self.base_url = public_url(server)
        self.secrets = secrets_of(key, headers, llm)
        self.stopping = threading.Event()
        self.rates = Rates(llm.requests_per_minute, llm.tokens_per_minute, self.stopping)
        self.options = request_options(prompt, llm)
        self.deadline = Deadline()
        http = open_connections()
        self.deadline.hold_for(http)
        self.api = openai.OpenAI(
            api_key=key,
            organization=llm.organization,
            base_url=server,
            timeout=llm.timeout_s,
            max_retries=0,
            # Unpacked, a small body can be one without end.
            default_headers={"Accept-Encoding": "identity", **headers},
            http_client=http,
        )

    def ask(self, messages: list[Message], input_tokens: int = 0) -> Reply:
        """Ask one item, in as many calls as it takes, but never more than llm.max_attempts.

        `input_tokens` is about how many go in, for llm.tokens_per_minute. Raises UserError where no call of this run
        can succeed.
        """
        room, remedies = self.llm.max_output_tokens, {"truncated", "invalid"}
        attempts, unheard, answers = 0, 0, list[Reply]()
        while True:
            reply = self.ask_once(messages, room, input_tokens, self.llm.max_attempts - attempts)
            attempts += reply.attempts
            unheard += reply.unheard
            if reply.status != "error" or not answers:
                # What was answered stands, and is paid for, even where asking again fails.
                answers.append(reply)
            if reply.status not in remedies or attempts >= self.llm.max_attempts:
                break
            remedies.remove(reply.status)
            if reply.status == "truncated":
                room *= 2
            else:
                messages = [*messages, *objection(reply, self.prompt)]
        return replace(
            answers[-1],
            attempts=attempts,
            input_tokens=total(answer.input_tokens for answer in answers),
            output_tokens=total(answer.output_tokens for answer in answers),
            unheard=unheard,
        )

    def ask_once(self, messages: list[Message], room: int, input_tokens: int, most_attempts: int) -> Reply:
        """One answer, whatever it is worth, or an error after so many attempts. Raises UserError as `ask` does."""
        unheard = list[Exception]()
        retrying = Retrying(
            stop=stop_after_attempt(most_attempts) | stop_when_event_set(self.stopping),
            wait=self.rest_or_pause,
            sleep=sleep_using_event(self.stopping),
            retry=retry_if_exception(worth_another),
            reraise=True,
        )
        try:
            body = retrying(self.call, messages, room, input_tokens, unheard)
        except Stopped:
            said, made = {"error": "the run was stopped"}, attempts_of(retrying) - 1
            return Reply("error", canonical_json(said), made, unheard=len(unheard))
        except (openai.APIError, ValueError) as error:
            verdict = self.hopeless(error)
            if verdict:
                self.stopping.set()
                raise verdict from None
            said = {"error": self.message_of(error)}
            return Reply("error", canonical_json(said), attempts_of(retrying), unheard=len(unheard))
        return replace(self.read(body, attempts_of(retrying)), unheard=len(unheard))

    def call(self, messages: list[Message], room: int, input_tokens: int, unheard: list[Exception]) -> Any:
        """One HTTP request, when its turn comes: the body of the answer.

        Raises Stopped, APIError or ValueError, and adds it to `unheard` where an answer may have been lost on its way.
        """
        expected = input_tokens + room
        if not self.rates.take(expected):
            raise Stopped
        options = self.options
        limit = next(name for name in LIMITS if name in options)
        request: dict[str, Any] = {"model": self.llm.model, "messages": messages, **options, limit: room}
        try:
            # The raw body: servers leave out what openai's typed completion takes for granted.
            with self.deadline.within(self.llm.timeout_s):
                raw = self.api.chat.completions.with_raw_response.create(**request)
            self.rates.rest(reset_after(raw.headers, expected))
            body = load_json(raw.http_response.content)
        except openai.APIStatusError as error:
            if is_unknown_limit(error):
                self.options = rename_limit(options)
            raise
        except (openai.APIConnectionError, ValueError) as error:
            if not isinstance(error.__cause__, NOT_SENT):
                unheard.append(error)
            raise
        used = total(tokens_used(body))
        if used is not None:
            self.rates.give_back(expected - used)
        return body

    def rest_or_pause(self, state: RetryCallState) -> float:
        """Seconds that this thread pauses after a failure.

        Zero where the rate is limited or the server says how long to wait: that concerns all threads, and Rates lets
        none of them start a call until it is over.
        """
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, openai.APIStatusError):
            told = retry_after(error)
            if told or error.status_code == 429:
                _, room, input_tokens, _ = state.args
                reset = reset_after(error.response.headers, input_tokens + room)
                self.rates.rest(told or reset or longest_pause(state))
                return 0.0
        return pause(state)

    def read(self, body: Any, attempts: int) -> Reply:
        """Judge a completion: ok, refused, truncated, invalid, or error where it is none."""
        try:
            choice = body["choices"][0]
            message = choice["message"]
            content, refusal = text_of(message.get("content")), text_of(message.get("refusal"))
            finish_reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            said = canonical_json({"error": "no chat completion but " + self.clean(json.dumps(body))[:300]})
            return Reply("error", said, attempts)
        if refusal or finish_reason == "content_filter":
            status, response = "refused", canonical_json({"refusal": self.clean(refusal or content)})
        elif finish_reason == "length":
            status, response = "truncated", canonical_json({"text": self.clean(content)})
        else:
            status, response = self.parse(content if content.strip() else misplaced_in(message))
        input_tokens, output_tokens = tokens_used(body)
        return Reply(
            status,
            response,
            attempts,
            self.text_or_none(body.get("model")),
            self.text_or_none(body.get("id")),
            self.text_or_none(finish_reason),
            input_tokens,
            output_tokens,
        )

    def parse(self, content: str) -> tuple[str, str]:
        """The answer as canonical JSON with status ok, or what is wrong with it with status invalid."""
        try:
            return "ok", self.clean(canonical_json(find_answer(content, self.prompt.schema)))
        except NoAnswer as error:
            return "invalid", canonical_json({"error": self.clean(str(error)), "text": self.clean(content)})

    def hopeless(self, error: Exception) -> UserError | None:
        """What to tell the user where this failure means that no call of the run can succeed."""
        said, server, variable = self.message_of(error), self.base_url, self.llm.api_key_env
        if is_broke(error):
            return UserError(f"{server}: the account of the key in {variable} has no money left ({said}); top it up")
        if not isinstance(error, openai.APIStatusError):
            return None
        if is_too_large(error):
            return UserError(
                f"{server} lets no request of this size in ({said}); lower llm.max_output_tokens in params.yaml, or"
                f" shorten {self.prompt.path}"
            )
        if 300 <= error.status_code < 400:
            return UserError(f"{server}: {self.clean(redirection(error.response))}")
        if error.status_code == 401:
            return UserError(f"{server} refuses the key in {variable} ({said}); export a valid one")
        if error.status_code in HOPELESS:
            return UserError(f"{server} answers {said}; check llm.model and llm.base_url in params.yaml")
        if self.llm.response_format != "text" and refuses_format(error):
            used = self.llm.response_format
            others = " or ".join(name for name in FORMATS if name != used)
            return UserError(
                f"{server} refuses llm.response_format: {used} ({said}); set it to {others} in params.yaml, or change"
                f" the schema in {self.prompt.path}"
            )
        rest = retry_after(error)
        if rest is not None and rest > LONGEST_REST_S:
            return UserError(f"{server} asks to wait {rest:.0f} s ({said}); run again then, all answers are kept")
        return None

    def message_of(self, error: Exception) -> str:
        """A failure in one short line without secrets."""
        name, said = type(error).__name__, str(error)
        if isinstance(error, openai.APIStatusError):
            name, said = f"{name} {error.status_code}", said_by(error)
        elif isinstance(error.__cause__, TooLong):
            name, said = TooLong.__name__, str(error.__cause__)
        elif isinstance(error.__cause__, NOT_SENT):
            cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
            name, said = f"nobody answers at {self.base_url}", f"{cause}; start the server, or correct llm.base_url"
        elif error.__cause__:
            name += f": {type(error.__cause__).__name__}"
        return f"{name}: {self.clean(' '.join(said.split()))[:300]}"

    def clean(self, text: str) -> str:
        """Text that can be stored: no key in it, and valid UTF-8."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text.encode("utf-8", "replace").decode()

    def text_or_none(self, value: Any) -> str | None:
        return self.clean(value) if isinstance(value, str) else None


def read_key(llm: Llm) -> str:
    """The API key from the environment; a server on this machine needs none.

    Raises UserError where there is none, or none that a header can hold.
    """
    key = os.environ.get(llm.api_key_env, "").strip()
    if not key and is_local(server_of(llm)):
        return NO_KEY
    if not key:
        raise UserError(
            f"llm.mode is {llm.mode} and the environment has no {llm.api_key_env}: export it (any value for a server"
            " that needs none), or name another variable with llm.api_key_env in params.yaml"
        )
    if not is_printable(key):
        raise UserError(f"{llm.api_key_env}: is not a key: it holds characters that no header can carry")
    return key


def read_headers(llm: Llm) -> dict[str, str]:
    """llm.headers with the values env:NAME read from the environment. Raises UserError where one cannot be sent."""
    headers = {}
    for name, value in llm.headers.items():
        where = f"params.yaml: llm.headers.{name}"
        if not HEADER_NAME.fullmatch(name):
            raise UserError(f"params.yaml: llm.headers: {name!r} is no name of a header; correct it")
        if name.lower() == "authorization":
            raise UserError(f"{where}: is made of the key in {llm.api_key_env} (llm.api_key_env); take it out")
        variable = value.removeprefix("env:") if value.startswith("env:") else None
        if variable is None and SECRET_HEADER.search(name):
            raise UserError(f"{where}: may be a secret, which no file may hold; export it and write env:VARIABLE here")
        if variable is not None:
            value = os.environ.get(variable, "").strip()
            if not value:
                raise UserError(f"{where}: the environment has no {variable}; export it, or take the header out")
        if not is_printable(value):
            raise UserError(f"{where}: holds characters that no header can carry; correct it")
        headers[name] = value
    return headers


def secrets_of(key: str, headers: dict[str, str], llm: Llm) -> list[str]:
    """What must never be stored or shown, the longest first: one may be a part of another."""
    values = [key, *(header.partition(":")[2].strip() for header in os.environ.get(MORE_HEADERS, "").split("\n"))]
    values += [headers[name] for name, value in llm.headers.items() if value.startswith("env:")]
    return sorted({value for value in values if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)


def request_options(prompt: Prompt, llm: Llm) -> dict[str, Any]:
    """What a request holds beside the model and the messages."""
    options: dict[str, Any] = {limit_name(llm): llm.max_output_tokens}
    if llm.temperature is not None:
        options["temperature"] = llm.temperature
    if llm.response_format == "json_schema":
        schema = {"name": prompt.name, "schema": prompt.schema, "strict": True}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif llm.response_format == "json_object":
        options["response_format"] = {"type": "json_object"}
    return options


def limit_name(llm: Llm) -> str:
    """What a server calls the limit on an answer's length.

    OpenAI's newer models refuse max_tokens; the Batch API is OpenAI's, wherever it is served. llama.cpp and older
    servers ignore max_completion_tokens, and their answers would have no end; all of them know max_tokens [mem].
    """
    host = urlsplit(server_of(llm)).hostname or ""
    openais = llm.mode == "batch" or host.endswith((".openai.com", ".openai.azure.com"))
    return "max_completion_tokens" if openais else "max_tokens"


def rename_limit(options: dict[str, Any]) -> dict[str, Any]:
    """The same options under the limit's other name: behind a proxy or on Azure the host does not tell the model."""
    renamed = dict(zip(LIMITS, reversed(LIMITS), strict=True))
    return {renamed.get(key, key): value for key, value in options.items()}


def objection(reply: Reply, prompt: Prompt) -> list[Message]:
    """The messages that show a model its own invalid answer and what is wrong with it."""
    bad = json.loads(reply.response_json)
    # What goes back is paid for as well.
    answer = without_thoughts(bad["text"])[:LONGEST_SHOWN]
    said = (
        f"This answer cannot be used: {bad['error']}. Answer the question again, with nothing but JSON that fits this"
        f" schema: {canonical_json(prompt.schema)}"
    )
    return [*([{"role": "assistant", "content": answer}] if answer else []), {"role": "user", "content": said}]


def open_connections() -> httpx2.Client:
    """openai's HTTP client, which follows no redirect: headers and prompts go to the address that was named, alone.

    Raises UserError where the environment names a proxy or a file of certificates that cannot be used.
    """
    try:
        return openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [read_whole]})
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
        # The message is left out: it may hold the password of a proxy.
        set_here = [name for name in SURROUNDINGS if os.environ.get(name) or os.environ.get(name.lower())]
        certificates = isinstance(error, OSError)
        named = [name for name in set_here if name.startswith("SSL") == certificates]
        names = ", ".join(named) or "the system's settings"
        if certificates:
            raise UserError(f"{names}: there are no certificates to be read; correct the path, or unset it") from None
        raise UserError(
            f"{names}: is no proxy that can be used; write http://HOST:PORT (for socks5:// also `pip install socksio`),"
            " or unset it"
        ) from None


def redirection(response: httpx2.Response) -> str:
    """What to tell of an answer that names another address, without what may be secret in that one."""
    try:
        new = str(response.url.join(response.headers["location"]).copy_with(userinfo=b"", query=None, fragment=None))
    except (KeyError, ValueError, httpx2.InvalidURL):
        new = "nowhere"
    remedy = "nothing was sent there; if that is the server you mean, set llm.base_url to it in params.yaml"
    return f"answers with a redirect ({response.status_code}) to {new[:300]}; {remedy}"


def server_of(llm: Llm) -> str:
    """The address that is asked: llm.base_url, else the variable that every OpenAI client knows, else OpenAI."""
    return llm.base_url or os.environ.get(BASE_URL) or OPENAI


def is_local(url: str) -> bool:
    """Whether an address names this machine: localhost (RFC 6761, 6.3) or a loopback address. No name is looked up."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def public_url(url: str) -> str:
    """A server's address as it is compared and stored. Raises UserError where it is none, or holds a secret."""
    problem = problem_of_address(url)
    if problem:
        where = BASE_URL if url == os.environ.get(BASE_URL) else "params.yaml: llm.base_url"
        raise UserError(f"{where}: {problem}")
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def refuses_format(error: openai.APIStatusError) -> bool:
    """Whether the server lacks what llm.response_format asks of it, or cannot read the schema.

    llama-cpp-python says so with 500 (tried with 0.3.36).
    """
    told = f"{error.param} {said_by(error)}"
    return error.status_code in (400, 422, 500) and any(
        name in told for name in ("response_format", "json_schema", "json_object")
    )


def worth_another(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        if refuses_format(error):
            return False
        rest = retry_after(error)
        if is_broke(error) or is_too_large(error) or (rest is not None and rest > LONGEST_REST_S):
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500 or is_unknown_limit(error)
    if isinstance(error.__cause__, TooLong):
        return False
    # A body cut short of its JSON is a lost connection that nobody noticed.
    return isinstance(error, openai.APIConnectionError | ValueError)


def is_broke(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError) and error.status_code == 402:
        return True
    return isinstance(error, openai.APIError) and bool(NO_MONEY & {error.code, error.type})


def is_too_large(error: openai.APIStatusError) -> bool:
    """Whether one request asks for more than the server ever lets in; that others used some is no part of it."""
    if error.status_code not in (413, 429):
        return False
    said = said_by(error)
    numbers = LIMIT_AND_REQUEST.search(said)
    if numbers:
        limit, requested = (int(number.replace(",", "") or 0) for number in numbers.groups())
        return requested > limit
    return bool(TOO_LARGE.search(said))


def is_unknown_limit(error: openai.APIStatusError) -> bool:
    return error.status_code == 400 and bool(UNKNOWN_LIMIT.search(said_by(error)))


def said_by(error: openai.APIStatusError) -> str:
    """What a server says of its failure, in the shapes that servers and the proxies before them use."""
    body = error.body
    if isinstance(body, dict):
        texts = [body[key] for key in ("message", "detail", "error") if isinstance(body.get(key), str)]
        return texts[0][:LONGEST_FAILURE] if texts else json.dumps(body)[:LONGEST_FAILURE]
    return readable(body[:LONGEST_FAILURE]) if isinstance(body, str) else ""


def readable(text: str) -> str:
    """A text that may be a web page, where only its title is worth a line."""
    if not text.lstrip().startswith("<"):
        return text
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    return f"a web page titled {' '.join(title[1].split())!r}" if title else "a web page"


def load_json(content: bytes) -> Any:
    """The body of an answer. Raises ValueError where it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"<"):
            page = readable(content[:LONGEST_FAILURE].decode("utf-8", "replace"))
            raise ValueError(f"{page} in place of JSON; is llm.base_url the address of an API?") from None
        raise ValueError(f"the answer's body is not JSON: {error}") from None


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number or a date), or None."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the server asks for or 1, 2, 4 ... 60, spread so that threads part."""
    error = state.outcome.exception() if state.outcome else None
    told = retry_after(error) if isinstance(error, openai.APIStatusError) else None
    if told:
        return told * random.uniform(1.0, 1.0 + SPREAD)
    return longest_pause(state) * random.uniform(0.5, 1.0)


def longest_pause(state: RetryCallState) -> float:
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (state.attempt_number - 1))
    return longest


def attempts_of(retrying: Retrying) -> int:
    return int(retrying.statistics["attempt_number"])


def tokens_used(body: Any) -> tuple[int | None, int | None]:
    """The tokens that went in and came out, as far as the server counts them and the count can be one."""
    usage = body.get("usage") if isinstance(body, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    return token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))


def total(counts: Iterable[int | None]) -> int | None:
    """The sum; unknown rather than wrong where one is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def text_of(content: Any) -> str:
    """A message's content: a text, a list of parts of which some are text, or nothing."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def misplaced_in(message: dict[str, Any]) -> str:
    """The answer of a message without content, where the server took it for thoughts; else nothing.

    vLLM's reasoning parsers do so where a schema leaves a model no thoughts (0.8.2 and 0.9.0.1: its issues 15618 and
    19222), as `reasoning_content` or, by its later name, `reasoning`. Thoughts that are more than JSON are no answer:
    what they hold is a draft.
    """
    thoughts = text_of(message.get("reasoning_content")) or text_of(message.get("reasoning"))
    return thoughts if thoughts.lstrip().startswith(("{", "[", "```")) else ""


def is_printable(value: str) -> bool:
    return value.isascii() and value.isprintable()
