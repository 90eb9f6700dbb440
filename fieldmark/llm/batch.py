"""OpenAI's Batch API: requests go up as files, answers come back within a day, for half the price [mem].

Each step is recorded before the next is taken: the file that was uploaded with all that is asked in it, the batch that
was made of it, and its end, once every answer is journalled. A run that is killed goes on from there; what the server
did and a dying process did not write down is found again in the server's list of batches. One JSON object a line in
batches-STAGE.jsonl, beside the stage's journal and kept the same way.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

import httpx2
import openai
from openai.types import Batch
from tenacity import Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, stop_when_event_set
from tqdm import tqdm

from fieldmark.command import UserError
from fieldmark.llm.bounds import LARGEST_BODY
from fieldmark.llm.client import HOPELESS, NO_MONEY, Client, Reply, pause, worth_another
from fieldmark.llm.journal import (
    LONGEST_LINE,
    BadLine,
    Journal,
    Row,
    cannot_keep,
    checked_row,
    is_text,
    journal_path,
    load_line,
    read_lines,
)
from fieldmark.store import canonical_json

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
# OpenAI takes files of at most 200 MB and 50,000 requests (llm.batch_requests) [mem].
LARGEST_FILE = 200_000_000
# What is recorded of a file is one line, no longer than a line may be: else it could not be read, and what is in its
# batch would be paid for again. Of requests that are asked again it holds what was answered before.
LONGEST_NOTE = LONGEST_LINE // 2
# Batches under way at a time. The next file is written and sent when one of these has ended: a million pictures are
# hundreds of files of LARGEST_FILE, which the server's queue does not have to hold all at once, and what is answered in
# the first of them may show that no more is to be sent (llm.max_usd).
MOST_OPEN = 100
# Bytes a second, on average, under which a download is none.
SLOWEST_DOWNLOAD = 1_000
ENDED = {"completed", "failed", "expired", "cancelled"}
# The account has as many tokens in its batches as it may: nothing is wrong with this one.
QUEUE_FULL = "token_limit_exceeded"
# Status codes of single requests that may fare better in a further batch, as in `worth_another`.
PASSING = {408, 409, 429}
T = TypeVar("T")


class Asked(NamedTuple):
    """A request, with what its row needs when the answer comes.

    `before` is the row of the tries before, `mended` the statuses of answers that asking once more was to mend.
    """

    item_key: str
    subject_id: str
    sample: int
    before: Row | None = None
    mended: Sequence[str] = ()

    @property
    def attempts(self) -> int:
        return 1 + (self.before["attempts"] if self.before else 0)


@dataclass
class Upload:
    """A file of requests at a server. `doubtful`: it may have a batch that nobody noted."""

    file_id: str
    base_url: str
    prompt_sha: str
    asked: dict[str, Asked]
    batch_id: str | None = None
    doubtful: bool = False


class Answered(NamedTuple):
    """What came of a request, and whether a failure may be a passing one."""

    upload: Upload
    asked: Asked
    reply: Reply
    passing: bool


def record_path(stage: str) -> Path:
    path = journal_path(stage)
    return path.with_name(f"batches-{path.name}")


def read_uploads(stage: str, wanted: Container[str], bad: list[str] | None = None) -> list[Upload]:
    """The recorded uploads that have not ended and hold a wanted item key; the lines that are no record are added to
    `bad`, in words. A last line without an end was torn by a kill and is passed over in silence."""
    uploads: dict[tuple[str, str], Upload] = {}
    for line in read_lines(record_path(stage)):
        try:
            note(load_line(line.content), uploads)
        except BadLine as error:
            if bad is not None and line.is_whole:
                bad.append(f"line {line.number} ({error})")
    return [upload for upload in uploads.values() if any(key in wanted for key in upload.asked)]


def note(content: dict[str, Any], uploads: dict[tuple[str, str], Upload]) -> None:
    """Take one line of the record into account. Raises BadLine."""
    base_url, file_id = content.get("base_url"), content.get("file_id")
    if not (is_text(base_url) and is_text(file_id)):
        raise BadLine("no base_url or file_id")
    name = base_url, file_id
    if "asked" in content:
        if not (is_text(content.get("prompt_sha")) and isinstance(content["asked"], list)):
            raise BadLine("no prompt_sha, or `asked` is no list")
        asked = [asked_of(fields) for fields in content["asked"]]
        named = {each.item_key: each for each in asked}
        uploads[name] = Upload(file_id, base_url, content["prompt_sha"], named, doubtful=True)
    elif "ended" in content:
        uploads.pop(name, None)
    elif not (content.get("batch_id") is None or is_text(content["batch_id"])) or "batch_id" not in content:
        raise BadLine("no batch_id")
    elif name in uploads:
        uploads[name].batch_id = content["batch_id"]


def asked_of(fields: Any) -> Asked:
    """A request as the record has it. Raises BadLine."""
    try:
        key, subject, sample, before, mended = fields
    except (TypeError, ValueError):
        raise BadLine("`asked` holds what is no request") from None
    if not (is_text(key) and is_text(subject) and type(sample) is int and isinstance(mended, list)):
        raise BadLine("`asked` holds what is no request")
    return Asked(key, subject, sample, before and checked_row(before), mended)


class Batches:
    """What a stage has at its server. `open` are the uploads that are not read to their end, `waiting` the files that
    are not written yet, with `unsent` requests. Once `stopped`, nothing more is sent, and what is under way is read.

    Every method raises UserError where the server refuses or cannot be reached; what is recorded is then resumed by the
    next run. Whoever takes the answers appends them to `journal`, which is on the disk before a batch counts as ended.
    """

    def __init__(
        self, stage: str, client: Client, record: Journal, journal: Journal, progress: "tqdm[Any]"
    ) -> None:
        self.stage, self.client, self.record, self.progress = stage, client, record, progress
        self.journal = journal
        self.open: list[Upload] = []
        self.waiting: Iterator[tuple[IO[bytes], dict[str, Asked]]] = iter(())
        self.unsent = 0
        self.full = False
        self.stopped = False
        self.taken = 0
        self.failed = 0

    def note(self, upload: Upload, **content: Any) -> None:
        line = canonical_json({"base_url": upload.base_url, "file_id": upload.file_id, **content})
        try:
            self.record.keep(line.encode() + b"\n")
        except OSError as error:
            raise cannot_keep(self.record.path, error) from None

    def resume(self, wanted: set[str]) -> None:
        """Open what earlier runs left at this server that holds a wanted key. A file is free, its batch is not: one
        that no batch was made of is used only where all that it asks is still wanted."""
        elsewhere: dict[str, int] = {}
        for upload in read_uploads(self.stage, wanted):
            if upload.base_url != self.client.base_url:
                elsewhere[upload.base_url] = elsewhere.get(upload.base_url, 0) + len(wanted & upload.asked.keys())
            elif upload.batch_id or upload.asked.keys() <= wanted or self.insist(partial(self.find, upload), upload):
                self.open.append(upload)
            else:
                self.note(upload, ended="unused")
        for server, count in elsewhere.items():
            print(
                f"warning: llm.base_url is {self.client.base_url}; {count} of these questions are in batches at"
                f" {server}, which are not read now",
                file=sys.stderr,
            )

    def send(self, requests: Iterable[tuple[Asked, dict[str, Any]]], count: int) -> None:
        """Upload `count` requests in files, and start a batch of each; those beyond MOST_OPEN as `answers` comes to the
        end of others. Whoever leaves some of them out counts `unsent` down."""
        self.waiting, self.unsent = self.files_of(requests), count
        self.fill()

    def fill(self) -> None:
        """Send what there is room for."""
        while (
            len(self.open) < MOST_OPEN
            and not (self.full or self.stopped)
            and (written := next(self.waiting, None))
        ):
            self.upload(*written)

    def files_of(
        self, requests: Iterable[tuple[Asked, dict[str, Any]]]
    ) -> Iterator[tuple[IO[bytes], dict[str, Asked]]]:
        """Files of llm.batch_requests, or of as many as LARGEST_FILE and LONGEST_NOTE have room for, each written to
        disk request by request when it is wanted: the file is the same one each time."""
        limit = self.client.llm.batch_requests
        asked: dict[str, Asked] = {}
        noted = 0
        with tempfile.TemporaryFile(dir=record_path(self.stage).parent) as file:
            for one, body in requests:
                request = {"custom_id": one.item_key, "method": "POST", "url": ENDPOINT, "body": body}
                line, note_size = json.dumps(request).encode() + b"\n", len(canonical_json(one).encode())
                full = file.tell() + len(line) > LARGEST_FILE or noted + note_size > LONGEST_NOTE
                if asked and (len(asked) == limit or full):
                    yield file, asked
                    file.seek(0)
                    file.truncate()
                    asked, noted = {}, 0
                file.write(line)
                asked[one.item_key] = one
                noted += note_size
            if asked:
                yield file, asked

    def upload(self, file: IO[bytes], asked: dict[str, Asked]) -> None:
        def attempt() -> str:
            file.seek(0)
            return id_of(self.client.api.files.create(file=("requests.jsonl", file), purpose="batch"))

        upload = Upload(self.insist(attempt), self.client.base_url, self.client.prompt.sha, asked)
        self.note(upload, prompt_sha=upload.prompt_sha, asked=list(asked.values()))
        self.open.append(upload)
        self.unsent -= len(asked)
        self.start(upload)

    def start(self, upload: Upload) -> None:
        """Make the batch of a file, unless a try that was cut short did: the connection or the process may have died
        between the server's deed and its answer."""

        def attempt() -> str:
            batch = self.find(upload) if upload.doubtful else None
            upload.doubtful = True
            return id_of(
                batch
                or self.client.api.batches.create(
                    input_file_id=upload.file_id,
                    endpoint=ENDPOINT,
                    completion_window="24h",
                    metadata={"fieldmark": self.stage},
                )
            )

        upload.batch_id = self.insist(attempt, upload)
        self.note(upload, batch_id=upload.batch_id)

    def find(self, upload: Upload) -> Batch | None:
        """The batch that the server made of a file, but for one that it would not run."""
        for batch in self.client.api.batches.list(limit=100):
            if batch.input_file_id == upload.file_id and batch.status != "failed":
                return batch
        return None

    def answers(self) -> Iterator[Answered]:
        """What became of every request, as its batch ends. A batch counts as ended when all its answers were taken.
        Files without a batch are left for the next run where this one is stopped.

        Raises UserError where a batch failed or was cancelled, or a request shows that none can succeed; first it
        gives the answers that there are.
        """
        trouble: list[str] = []
        while self.expected():
            done = 0
            for upload in list(self.open):
                if upload.batch_id is None:
                    if self.full or self.stopped:
                        continue
                    self.start(upload)
                batch = self.look(upload)
                if batch.status == "failed" and self.postpone(upload, batch):
                    continue
                if batch.status in ENDED:
                    for answered in self.read(upload, batch, trouble):
                        self.taken += 1
                        self.failed += answered.reply.status == "error"
                        yield answered
                    self.journal.sync()
                    self.note(upload, ended=batch.status)
                    self.open.remove(upload)
                    self.full = False
                elif batch.request_counts:
                    done += batch.request_counts.completed + batch.request_counts.failed
            self.show(done)
            if trouble:
                raise UserError(trouble[0])
            self.fill()
            if self.expected():
                self.client.stopping.wait(self.client.llm.batch_poll_s)

    def expected(self) -> list[Upload]:
        """The uploads whose answers this run waits for."""
        return [upload for upload in self.open if upload.batch_id or not self.stopped]

    def postpone(self, upload: Upload, batch: Batch) -> bool:
        """Whether a batch failed for want of room and others of ours will make some: it is then made again."""
        codes = {error.code for error in (batch.errors and batch.errors.data) or []}
        if QUEUE_FULL not in codes or not any(other.batch_id for other in self.open if other is not upload):
            return False
        upload.batch_id = None
        self.note(upload, batch_id=None)
        self.full = True
        return True

    def look(self, upload: Upload) -> Batch:
        def attempt() -> Batch:
            batch = self.client.api.batches.retrieve(str(upload.batch_id))
            id_of(batch)
            return batch

        return self.insist(attempt, upload)

    def read(self, upload: Upload, batch: Batch, trouble: list[str]) -> Iterator[Answered]:
        """The outcome of each request of a batch that has ended; adds to `trouble` what must stop the run."""
        server, name = self.client.base_url, f"batch {batch.id}"
        if batch.status == "failed":
            errors = (batch.errors and batch.errors.data) or []
            reasons = "; ".join(error.message or error.code or "" for error in errors)
            remedy = "lower llm.batch_requests" if QUEUE_FULL in {error.code for error in errors} else "mend that"
            trouble.append(
                f"{server}: {name} failed and nothing in it was asked ({self.brief(reasons)}); {remedy} and run again"
            )
            return
        missing, failed = dict(upload.asked), self.failed
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in self.download(file_id, upload):
                asked = missing.pop(line["custom_id"], None)
                if asked:
                    yield self.judge(line, upload, asked, trouble)
        for asked in missing.values():
            said = canonical_json({"error": f"{name}, {batch.status}, holds no answer"})
            yield Answered(upload, asked, Reply("error", said, asked.attempts), True)
        if batch.status == "cancelled":
            share = f"{self.failed - failed} of {len(upload.asked)}"
            trouble.append(f"{server}: {name} was cancelled with {share} requests unanswered; run again to ask them")

    def judge(self, line: dict[str, Any], upload: Upload, asked: Asked, trouble: list[str]) -> Answered:
        """What one line of an output or error file says."""
        response, error = line.get("response"), line.get("error")
        response = response if isinstance(response, dict) else {}
        code, body = response.get("status_code"), response.get("body")
        code = code if isinstance(code, int) else None
        if code == 200:
            return Answered(upload, asked, self.client.read(body, asked.attempts), False)
        if isinstance(body, dict) and not error:
            error = body.get("error")
        if not isinstance(error, dict):
            error = {"message": str(error or body)}
        said = self.brief(f"{code or error.get('code')}: {error.get('message')}")
        if code in HOPELESS or NO_MONEY & {str(error.get("code")), str(error.get("type"))}:
            trouble.append(f"{self.client.base_url} refuses what is in batch {upload.batch_id} ({said}); mend that")
        passing = code is None or code in PASSING or code >= 500
        return Answered(upload, asked, Reply("error", canonical_json({"error": said}), asked.attempts), passing)

    def download(self, file_id: str, upload: Upload) -> Iterator[dict[str, Any]]:
        """The lines of a file of answers, which goes through the disk: memory holds one of them."""
        with tempfile.TemporaryFile(dir=record_path(self.stage).parent) as file:

            def attempt() -> None:
                file.seek(0)
                file.truncate()
                begin = time.monotonic()
                try:
                    with self.client.api.files.with_streaming_response.content(file_id) as response:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
                            self.check_download(file.tell(), len(upload.asked), time.monotonic() - begin)
                except httpx2.TransportError as error:
                    # openai's client lets through what happens while a body is read.
                    raise openai.APIConnectionError(request=error.request) from error

            self.insist(attempt, upload)
            file.seek(0)
            while line := file.readline(LONGEST_LINE):
                if line.strip():
                    yield self.parse(line, file_id)

    def check_download(self, size: int, requests: int, seconds: float) -> None:
        """Raises UserError where a file of answers has no end, or comes by drops."""
        if size > requests * LARGEST_BODY:
            raise UserError(f"{self.client.base_url}: sends more than {requests} answers can be; look at the server")
        if seconds > self.client.llm.timeout_s and size < seconds * SLOWEST_DOWNLOAD:
            raise UserError(
                f"{self.client.base_url}: sends answers by drops, {size} bytes in {seconds:.0f} s; run again, or raise"
                " llm.timeout_s"
            )

    def parse(self, line: bytes, file_id: str) -> dict[str, Any]:
        try:
            content = json.loads(line)
            content["custom_id"].encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{self.client.base_url}: {file_id} holds what is no answer of a batch:"
                f" {self.brief(line[:1000].decode(errors='replace'))!r}; run again to read it again"
            ) from None
        return content

    def insist(self, call: Callable[[], T], upload: Upload | None = None) -> T:
        """Call, with the pauses and the patience of a chat call."""
        client = self.client
        retrying = Retrying(
            stop=stop_after_attempt(client.llm.max_attempts) | stop_when_event_set(client.stopping),
            wait=pause,
            sleep=sleep_using_event(client.stopping),
            retry=retry_if_exception(worth_another),
            reraise=True,
        )
        try:
            return retrying(call)
        except (openai.APIError, ValueError) as error:
            said, code = f"{client.base_url}: {client.message_of(error)}", getattr(error, "status_code", None)
            if upload and code in (400, 404):
                raise UserError(
                    f"{said}; if {upload.batch_id or upload.file_id} is gone for good, remove the lines with"
                    f" {upload.file_id} from {record_path(self.stage)}: it is asked anew then"
                ) from None
            if code in (404, 405):
                raise UserError(f"{said}; llm.mode batch needs a server with OpenAI's Batch API") from None
            raise client.hopeless(error) or UserError(f"{said}; run again, it goes on where it was") from None

    def brief(self, text: str) -> str:
        return self.client.clean(" ".join(text.split()))[:300]

    def show(self, done: int) -> None:
        """Progress: requests whose answers are here, and those that batches under way have done."""
        under_way = [upload.batch_id or "waiting for room" for upload in self.open]
        self.progress.total = self.taken + sum(len(upload.asked) for upload in self.open) + self.unsent
        self.progress.n = self.taken + done
        self.progress.set_postfix_str(f"{listed(under_way)}; {self.failed} failed")


def id_of(thing: Any) -> str:
    """The id of what the server made. Raises ValueError where it answers with something else."""
    name = getattr(thing, "id", None)
    if not isinstance(name, str):
        raise ValueError(f"no id but {str(thing)[:100]}")
    return name


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
