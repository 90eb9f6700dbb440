"""The item cache: one row of llm.answers/1 an item, and a call only where no paid answer is held.

Modes live (a call an item, llm.concurrency at a time) and batch (OpenAI's Batch API, fieldmark.llm.batch) ask the same
questions under the same keys: an answer of one satisfies the other.

Two layers hold answers: the stage's own answers.parquet, which DVC persists and shares, and below it the journal, which
survives `kill -9`, a change of branch and a reverted prompt. An item is known by its key, the hash of what is asked and
of whom; where it is asked (base_url) and how patiently (limits, room for the answer) is no part of it. Of the held rows
only one that was earned and is `ok` answers an item: every other is asked again.
"""

import json
import math
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from fieldmark.command import UserError
from fieldmark.llm.batch import Asked, Batches, Upload, listed, read_uploads, record_path
from fieldmark.llm.client import LIMITS, Client, Reply, is_local, objection, public_url, server_of, total
from fieldmark.llm.held import Held, Missing, Output, Rows
from fieldmark.llm.journal import (
    BadLine,
    Entry,
    Journal,
    checked_row,
    journal_path,
    read_journal,
    warn_of_bad,
)
from fieldmark.llm.parsing import misfit
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.llm.turn import NOTHING, Spent, Turn
from fieldmark.params import Llm, Price
from fieldmark.store import canonical_json, sha256

# What someone paid for or wrote by hand; a replayed answer never stands in for a live one, an imported one has no key
# that is asked.
EARNED = {"live", "batch", "edited"}
# Answers that are asked for once more, as Client.ask does.
MENDABLE = {"truncated", "invalid"}
# What OpenAI's Batch API costs of the price of a call [mem].
BATCH_PRICE = 0.5
IN_A_ROW = 20  # questions without an answer, one after the other, after which no other is asked
ASKING = "asking"  # begins the names of the threads that ask
SETTLE_LOOK_S = 0.01  # seconds between two looks at whether they are done
# What a server on this machine costs that llm.prices does not name.
FREE = Price(input=0.0, output=0.0)
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One question. In `messages` an image stands as {"type": "image", "image_id": ..., "px": ...}, never as bytes."""

    subject_id: str
    sample: int
    messages: list[Message]


class Unaskable(Exception):
    """An item whose request cannot be made; it becomes a row with status error."""


class PlannedCalls(NamedTuple):
    """What a run has to do: the key of each item, the answers held, the items to ask (one a key).

    `base_urls` are the servers that the held answers came from, `under_way` the keys of the items to ask that are in
    batches at this server already, `bad` what could not be read, in words by file.
    """

    keys: list[str]
    held: Mapping[str, Row]
    new: Mapping[str, Item]
    base_urls: set[str]
    under_way: frozenset[str] = frozenset()
    bad: dict[Path, list[str]] = {}  # noqa: RUF012 (of a NamedTuple, never changed)

    def warn(self) -> None:
        for path, bad in self.bad.items():
            warn_of_bad(path, bad)


def item_key(item: Item, prompt: Prompt, llm: Llm) -> str:
    """The identity of an answer. max_output_tokens is a limit: more room keeps the answers that fitted."""
    identity = {
        "messages": item.messages,
        "model": llm.model,
        "sampling": {"temperature": llm.temperature},
        "schema": prompt.schema,
        "sample": item.sample,
    }
    return sha256(canonical_json(identity))


def earned(row: Row) -> bool:
    return row["status"] == "ok" and row["source"] in EARNED


def answers_with(row: Row, prompt: Prompt) -> bool:
    """Whether a row is an answer of the kind that the prompt asks for: a damaged one in the output hides none below."""
    return earned(row) and misfit(json.loads(row["response_json"]), prompt.schema) is None


def plan_calls(stage: str, items: Sequence[Item], prompt: Prompt, llm: Llm, output: Path) -> PlannedCalls:
    """Look each item up, first in the stage's output, then in its journal, then in its batches. Writes nothing.

    Memory holds for each item its key, as text and in a dictionary, and two places, no item and no row.
    """
    keys = [item_key(item, prompt, llm) for item in items]
    bad: dict[Path, list[str]] = {output: [], journal_path(stage): [], record_path(stage): []}
    places = {key: place for place, key in enumerate(keys)}
    held = Held(places, output, journal_path(stage), partial(answers_with, prompt=prompt), bad)
    new = Missing(items, held)
    here = public_url(server_of(llm))
    uploads = [upload for upload in read_uploads(stage, new, bad[record_path(stage)]) if upload.base_url == here]
    return PlannedCalls(keys, held, new, held.base_urls, keys_in(uploads, new), bad)


def traces(stage: str, output: Path) -> list[tuple[int, int, int] | None]:
    """What tells whether a plan still holds: which files it was made of, how long they are and when they changed."""
    found = [path.stat() if path.exists() else None for path in (output, journal_path(stage), record_path(stage))]
    return [each and (each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def keep_answers(stage: str, output: Path, wanted: Iterable[str]) -> None:
    """Journal what answers.parquet alone holds (pulled from elsewhere) and a new one would not: an undo stays free."""
    if lost_answers(stage, output, wanted):
        with Turn(stage):
            keep_in_turn(stage, output, wanted)


def keep_in_turn(stage: str, output: Path, wanted: Iterable[str]) -> None:
    """keep_answers for who has the turn."""
    lost = lost_answers(stage, output, wanted)
    if lost:
        with Journal(journal_path(stage)) as journal:
            for row in lost:
                journal.append(Entry(row, None))


def lost_answers(stage: str, output: Path, wanted: Iterable[str]) -> list[Row]:
    kept = set(wanted)
    rows = {}
    for _, row in Output(output):
        with suppress(BadLine):
            if row.get("item_key") not in kept and earned(row := checked_row(row)):
                rows[row["item_key"]] = row
    known = read_journal(journal_path(stage), rows) if rows else {}
    return [row for key, row in rows.items() if key not in known or not earned(known[key].row)]


def live_answers(
    stage: str,
    items: Sequence[Item],
    prompt: Prompt,
    llm: Llm,
    output: Path,
    *,
    attach: Callable[[Item], list[Message]],
) -> list[Row]:
    """One row an item, asking for what is not held, in mode live or batch, when this process has its turn. `attach`
    makes the messages to send, and may raise Unaskable.

    Raises UserError: a limit would be passed, there is no key, no call can succeed, or answers cannot be kept.
    """
    with Turn(stage) as turn:
        plan = plan_calls(stage, items, prompt, llm, output)
        plan.warn()
        keep_in_turn(stage, output, plan.keys)
        return list(answers_in_turn(turn, plan, items, prompt, llm, attach=attach))


def answers_in_turn(
    turn: Turn,
    plan: PlannedCalls,
    items: Sequence[Item],
    prompt: Prompt,
    llm: Llm,
    *,
    attach: Callable[[Item], list[Message]],
) -> Rows:
    """live_answers for who has the turn, as a plan says that was made since."""
    stage, told = turn.stage, dict[str, Row | int]()
    warn_of_other_servers(plan, llm)
    if plan.new:
        spent = turn.spent()
        check_limits(plan, llm, spent)
        client = Client(prompt, llm)
        with Journal(journal_path(stage)) as journal:
            if llm.mode == "batch":
                told = ask_in_batches(stage, plan, client, journal, attach, spent.usd)
            else:
                warn_of_batches(plan)
                told = ask_all(stage, plan.new, client, journal, attach, spent.usd)
    return Rows(plan.keys, items, plan.held, told, journal_path(stage))


def warn_of_other_servers(plan: PlannedCalls, llm: Llm) -> None:
    base_url = public_url(server_of(llm))
    others = sorted(plan.base_urls - {base_url})
    if others:
        print(
            f"warning: llm.base_url is {base_url}, but some of the {len(plan.held)} answers that are kept come from"
            f" {', '.join(others)}",
            file=sys.stderr,
        )


def warn_of_batches(plan: PlannedCalls) -> None:
    if plan.under_way:
        print(
            f"warning: {len(plan.under_way)} of the {len(plan.new)} questions are in batches that are not read yet, and"
            " are paid for twice in mode live; llm.mode batch goes on with those",
            file=sys.stderr,
        )


def ask_all(
    stage: str,
    new: Mapping[str, Item],
    client: Client,
    journal: Journal,
    attach: Callable[[Item], list[Message]],
    charged: float,
) -> dict[str, Row | int]:
    """Ask with llm.concurrency threads. However it ends, calls under way are awaited and what they bring is kept.

    By item key where the journal has each answer, and the rows of those that it has not. `charged` are the US dollars
    that count against llm.max_usd already.
    """
    llm = client.llm
    answers: dict[str, Row | int] = {}
    spent, failed = 0.0, 0
    pool = ThreadPoolExecutor(llm.concurrency, ASKING)
    progress = tqdm(total=len(new), desc=stage, unit="call", dynamic_ncols=True)
    try:
        ask = partial(ask_one, client=client, journal=journal, attach=attach)
        for told in rows_of(pool, ask, new, 2 * llm.concurrency):
            if told is None:
                continue
            entry, place = told
            row = entry.row
            answers[row["item_key"]] = row if place is None else place
            spent += row["cost_usd"] or 0.0
            charged += entry.charged or 0.0
            progress.set_postfix_str(f"${spent:.4f}" if price_of(llm) else "unknown price", refresh=False)
            progress.update()
            if passes_limit(charged, llm):
                raise overspent(charged, answers, len(new), llm)
            if entry.base_url is not None:  # a picture that cannot be read says nothing of the server
                failed = failed + 1 if row["status"] == "error" else 0
            if failed == IN_A_ROW:
                raise unheard_of(row, answers, len(new), llm)
    except BaseException as error:
        client.stopping.set()
        if isinstance(error, KeyboardInterrupt):
            progress.write(
                f"{stage}: {len(answers)} of {len(new)} calls answered; the rest remain. Calls under way are waited"
                f" for, {llm.timeout_s:g} s at most: they are paid for",
                file=sys.stderr,
            )
        raise
    finally:
        settle(pool)
        progress.close()
    return answers


def passes_limit(charged: float, llm: Llm) -> bool:
    return llm.max_usd is not None and charged > llm.max_usd


def overspent(charged: float, answers: Mapping[str, Row | int], count: int, llm: Llm) -> UserError:
    """What to say where llm.max_usd stops a run of `count` questions, with these answers."""
    kept = sum(isinstance(answer, int) for answer in answers.values())
    return UserError(
        f"params.yaml: llm.max_usd: ${charged:.4f} is spent, more than {llm.max_usd}; {kept} of {count} answers are"
        " kept, raise the limit to go on"
    )


def unheard_of(last: Row, answers: Mapping[str, Row | int], count: int, llm: Llm) -> UserError:
    """What to say where the server answers no more in a run of `count` questions; `last` is the last that failed."""
    kept = sum(isinstance(answer, int) for answer in answers.values())
    return UserError(
        f"{public_url(server_of(llm))}: {IN_A_ROW} questions in a row got no answer, each in up to"
        f" {llm.max_attempts} calls (llm.max_attempts); the last said {last['response_json'][:300]}; {kept} of"
        f" {count} answers are kept. See to the server, or to what is asked of llm.model, and run the stage again: it"
        " asks what remains"
    )


def settle(pool: ThreadPoolExecutor) -> None:
    """Wait for the calls under way in a pool of threads ASKING. They are paid for: no second signal cuts that short."""
    while True:
        try:
            pool.shutdown(wait=False, cancel_futures=True)
            # A signal while the pool starts a thread leaves the thread at work and the pool unaware of it, and one that
            # interrupts Thread.join has Python 3.11 take the thread for ended: so neither of the two is asked.
            while any(thread.name.startswith(ASKING) for thread in threading.enumerate()):
                time.sleep(SETTLE_LOOK_S)
            return
        except KeyboardInterrupt:
            continue


def rows_of(
    pool: ThreadPoolExecutor, ask: Callable[[str, Item], T | None], new: Mapping[str, Item], room: int
) -> Iterator[T | None]:
    """What `ask` gives, in the order in which it comes; no more than `room` questions wait in the pool."""
    waiting = iter(new.items())
    futures: set[Future[T | None]] = {pool.submit(ask, *question) for question in islice(waiting, room)}
    while futures:
        done, futures = wait(futures, return_when=FIRST_COMPLETED)
        futures |= {pool.submit(ask, *question) for question in islice(waiting, len(done))}
        for future in done:
            yield future.result()


def ask_one(
    key: str, item: Item, client: Client, journal: Journal, attach: Callable[[Item], list[Message]]
) -> tuple[Entry, int | None] | None:
    """Ask and journal: what came, and where the journal has it. None where the run is stopping: another call has shown
    that none can succeed."""
    if client.stopping.is_set():
        return None
    asked = Asked(key, item.subject_id, item.sample)
    try:
        messages = attach(item)
    except Unaskable as error:
        return Entry(row_of(asked, unasked(error), client.prompt.sha, client.llm), None), None
    sent = tokens_of(item.messages)
    reply = client.ask(messages, sent)
    row = row_of(asked, reply, client.prompt.sha, client.llm)
    # An error is no answer: there is nothing to keep, but what got lost may be paid for.
    if row["status"] == "error":
        lost = (reply.unheard * sent, reply.unheard * client.llm.max_output_tokens)
        return Entry(row, client.base_url, cost(*lost, price_of(client.llm))), None
    entry = Entry(row, client.base_url, charge(row, sent, client.llm, reply.unheard))
    return entry, journal.append(entry)


def charge(row: Row, sent: int, llm: Llm, unheard: int = 0) -> float | None:
    """The US dollars that an answer counts for against llm.max_usd; None without a price. `sent` is about how many
    tokens went in, `unheard` in how many calls before this one an answer may have been lost on its way.

    What a server does not count is taken to be the most it can be. What it counts is not believed below half of what
    went in and an eighth of the bytes that came out: hardly a token is longer.
    """
    inputs, outputs, attempts = row["input_tokens"], row["output_tokens"], max(1, row["attempts"])
    most = llm.max_output_tokens
    inputs = attempts * sent if inputs is None else max(inputs, sent // 2) + unheard * sent
    written = len(row["response_json"].encode()) // 8
    outputs = attempts * most if outputs is None else max(outputs, written) + unheard * most
    return cost(inputs, outputs, price_of(llm))


def ask_in_batches(
    stage: str,
    plan: PlannedCalls,
    client: Client,
    journal: Journal,
    attach: Callable[[Item], list[Message]],
    charged: float,
) -> dict[str, Row | int]:
    """Ask in batches, those of an earlier run first; what failed goes into a further one, llm.max_attempts at most.
    Where answers pass llm.max_usd no further file is sent; what is under way is paid for, and read.

    An answer that is invalid or truncated is asked for once more. However it ends, batches go on at the server and the
    next run reads them. `charged`, and what is returned, as in `ask_all`.
    """
    llm = client.llm
    answers: dict[str, Row | int] = {}
    before: dict[str, float] = {}

    def requests(todo: list[Asked]) -> Iterator[tuple[Asked, dict[str, Any]]]:
        for asked in todo:
            try:
                messages = attach(plan.new[asked.item_key])
            except Unaskable as error:
                answers[asked.item_key] = row_of(asked, unasked(error), client.prompt.sha, llm)
                batches.unsent -= 1
            else:
                yield asked, request_of(asked, messages, client)

    with (
        Journal(record_path(stage)) as record,
        tqdm(total=len(plan.new), desc=stage, unit="answer", dynamic_ncols=True) as progress,
    ):
        batches = Batches(stage, client, record, journal, progress)
        try:
            batches.resume(set(plan.new))
            under_way = keys_in(batches.open, plan.new)
            todo = [Asked(key, item.subject_id, item.sample) for key, item in plan.new.items() if key not in under_way]
            while todo or batches.open:
                if todo:
                    written = tqdm(requests(todo), f"{stage}, writing", len(todo), leave=False, dynamic_ncols=True)
                    batches.send(written, len(todo))
                todo = []
                for upload, asked, reply, passing in batches.answers():
                    if asked.item_key in plan.held:
                        continue
                    row, usd, place = row_of(asked, reply, upload.prompt_sha, llm), None, None
                    if row["status"] != "error":
                        item = plan.new.get(asked.item_key)
                        usd = charge(row, tokens_of(item.messages) if item else 0, llm)
                        place = journal.append_unsynced(Entry(row, client.base_url, usd))
                        # Of a question that is asked again, the row has what was paid before.
                        charged += (usd or 0.0) - before.get(asked.item_key, 0.0)
                        batches.stopped = batches.stopped or passes_limit(charged, llm)
                    if asked.item_key not in plan.new:
                        continue
                    answers[asked.item_key] = row if place is None else place
                    mendable = reply.status in MENDABLE and reply.status not in asked.mended
                    if row["attempts"] < llm.max_attempts and (passing or mendable):
                        if place is not None:
                            before[asked.item_key] = usd or 0.0
                        mended = (*asked.mended, reply.status) if mendable else asked.mended
                        todo.append(asked._replace(before=row, mended=mended))
                if batches.stopped and (batches.unsent or batches.open):
                    raise overspent(charged, answers, len(plan.new), llm)
                check_spending(charged, todo, plan, llm)
        except KeyboardInterrupt:
            names = listed([upload.batch_id for upload in batches.open if upload.batch_id])
            goes_on = f"; {names} goes on at the server, the same command reads what comes of it" if names else ""
            progress.write(f"{stage}: {len(answers)} of {len(plan.new)} answered{goes_on}", file=sys.stderr)
            raise
    return answers


def keys_in(uploads: list[Upload], new: Container[str]) -> frozenset[str]:
    return frozenset(key for upload in uploads for key in upload.asked if key in new)


def request_of(asked: Asked, messages: list[Message], client: Client) -> dict[str, Any]:
    """The body of a call, with the remedies that Client.ask has: more room, or what was wrong with the last answer."""
    options = dict(client.options)
    if "truncated" in asked.mended:
        limit = next(name for name in LIMITS if name in options)
        options[limit] *= 2
    if asked.before and asked.before["status"] == "invalid":
        messages = [*messages, *objection(Reply("invalid", asked.before["response_json"], 0), client.prompt)]
    return {"model": client.llm.model, "messages": messages, **options}


def check_spending(spent: float, todo: list[Asked], plan: PlannedCalls, llm: Llm) -> None:
    """Raises UserError where a further batch may pass llm.max_usd."""
    usd = estimate(plan._replace(new={asked.item_key: plan.new[asked.item_key] for asked in todo}), llm).usd
    if todo and llm.max_usd is not None and usd is not None and spent + usd > llm.max_usd:
        raise UserError(
            f"params.yaml: llm.max_usd: ${spent:.4f} is spent, and {len(todo)} calls that failed may cost ${usd:.4f}"
            f" in a further batch, more than {llm.max_usd}; all answers are kept, raise the limit to go on"
        )


def unasked(error: Unaskable) -> Reply:
    return Reply("error", canonical_json({"error": str(error)}), 0)


def row_of(asked: Asked, reply: Reply, prompt_sha: str, llm: Llm) -> Row:
    """A row of llm.answers/1. What was answered before, if badly, stands where asking again fails, and was paid for."""
    input_tokens, output_tokens = reply.input_tokens, reply.output_tokens
    if asked.before and asked.before["status"] != "error":
        if reply.status == "error":
            return {**asked.before, "attempts": reply.attempts}
        input_tokens = total([asked.before["input_tokens"], input_tokens])
        output_tokens = total([asked.before["output_tokens"], output_tokens])
    return {
        "item_key": asked.item_key,
        "subject_id": asked.subject_id,
        "sample": asked.sample,
        "prompt_sha": prompt_sha,
        "status": reply.status,
        "response_json": reply.response_json,
        "model_requested": llm.model,
        "model_reported": reply.model_reported,
        "response_id": reply.response_id,
        "finish_reason": reply.finish_reason,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cost_usd": cost(input_tokens, output_tokens, price_of(llm)),
        "attempts": reply.attempts,
        "source": llm.mode,
        "created_at": now(),
    }


def price_of(llm: Llm) -> Price | None:
    """What a token costs in this mode: by llm.prices, else nothing on this machine; None where it is not known."""
    price = llm.prices.get(llm.model) or (FREE if is_local(server_of(llm)) else None)
    if price and llm.mode == "batch":
        return Price(input=price.input * BATCH_PRICE, output=price.output * BATCH_PRICE)
    return price


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cost(input_tokens: int | None, output_tokens: int | None, price: Price | None) -> float | None:
    """US dollars, or None where the server counts no tokens or there is no price."""
    if price == FREE:
        return 0.0
    if price is None or input_tokens is None or output_tokens is None:
        return None
    return (input_tokens * price.input + output_tokens * price.output) / 1e6


class Estimate(NamedTuple):
    """Before a call: about so many tokens go in, at most so many come out, at most so many dollars (None: no price)."""

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None


def estimate(plan: PlannedCalls, llm: Llm) -> Estimate:
    inputs = sum(tokens_of(item.messages) for item in plan.new.values())
    outputs = len(plan.new) * llm.max_output_tokens
    return Estimate(len(plan.new), inputs, outputs, cost(inputs, outputs, price_of(llm)))


def tokens_of(messages: Iterable[Message]) -> int:
    """A rough count: four bytes of text a token; an image by OpenAI's tiles, 85 and 170 for each of 512 px [mem]."""
    total = 0
    for message in messages:
        content = message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image":
                total += 85 + 170 * math.ceil(part["px"] / 512) ** 2
            else:
                total += math.ceil(len(part["text"].encode()) / 4)
    return total


def check_limits(plan: PlannedCalls, llm: Llm, spent: Spent = NOTHING) -> None:
    """Raises UserError where the calls, or the most that they can cost, pass llm.max_calls or llm.max_usd.

    `spent` is what those who share the journal have asked while one or another of them was running.
    """
    calls, _, _, usd = estimate(plan, llm)
    besides = f" beside {spent.calls} that this and other processes made just now" if spent.calls else ""
    if llm.max_calls is not None and spent.calls + calls > llm.max_calls:
        raise UserError(
            f"params.yaml: llm.max_calls: {calls} calls are needed{besides}, more than {llm.max_calls}; raise it"
        )
    if llm.max_usd is not None:
        if usd is None:
            raise UserError(
                f"params.yaml: llm.max_usd: cannot be kept, llm.prices has no {llm.model!r}; add its price, or set"
                " max_usd: null"
            )
        if spent.usd + usd > llm.max_usd:
            already = f" beside ${spent.usd:.4f} that this and other processes spent just now" if spent.usd else ""
            raise UserError(
                f"params.yaml: llm.max_usd: {calls} calls may cost ${usd:.4f}{already}, more than {llm.max_usd}; raise"
                " it, or lower llm.max_output_tokens"
            )


def preview(stage: str, plan: PlannedCalls, llm: Llm) -> str:
    """What a run would do, for --dry-run."""
    calls, inputs, outputs, usd = estimate(plan, llm)
    price = f"unknown price (llm.prices has no {llm.model!r})" if usd is None else f"at most ${usd:.4f}"
    lines = [
        f"{stage}: {len(plan.keys)} items, {len(plan.keys) - calls} cached, {calls} calls to {llm.model}",
        f"tokens: about {inputs:,} in, at most {outputs:,} out",
        f"price: {price}",
    ]
    if llm.mode == "batch":
        lines[0] += " by batch"
        lines[2] += f", {BATCH_PRICE:.0%} of live" if usd is not None else ""
        if plan.under_way:
            lines.append(f"of these calls, {len(plan.under_way)} are in batches already and are not made anew")
    return "\n".join(lines)


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """What a stage's rows amount to, for its metrics file: the same rows in any order, the same numbers.

    They may come one by one; of each, item_key, status, source, attempts, tokens and cost_usd are looked at.

    Rows by status and by source; then, each question counted once, attempts, tokens and US dollars as far as they are
    known. `unpriced` are the questions put to a server whose cost is not: no price in params.yaml, or no usage block.
    """
    status, source, asked = Counter[str](), Counter[str](), set[bytes]()
    sums, costs = Counter[str](attempts=0, input_tokens=0, output_tokens=0, unpriced=0), array("d")
    for row in rows:
        status[row["status"]] += 1
        source[row["source"]] += 1
        key = row["item_key"].encode()
        if key in asked:
            continue
        asked.add(key)
        for name in ("attempts", "input_tokens", "output_tokens"):
            sums[name] += row[name] or 0
        if row["cost_usd"] is not None:
            costs.append(row["cost_usd"])
        elif row["source"] in ("live", "batch"):
            sums["unpriced"] += 1
    return {
        "rows": status.total(),
        "status": dict(sorted(status.items())),
        "source": dict(sorted(source.items())),
        "attempts": sums["attempts"],
        "input_tokens": sums["input_tokens"],
        "output_tokens": sums["output_tokens"],
        "cost_usd": math.fsum(costs),
        "unpriced": sums["unpriced"],
    }


def check_coverage(rows: Iterable[Row], names: Mapping[str, str], llm: Llm, output: Path) -> None:
    """Raises UserError naming the subjects without an `ok` row where their share passes 1 - llm.min_coverage, whether
    they have another row or none.

    Of the rows, which may come one by one, subject_id, status and response_json are looked at. `names` maps every
    subject_id to what a person calls it.
    """
    answered, failed = set[str](), dict[str, Row]()
    for row in rows:
        subject = row["subject_id"]
        if row["status"] == "ok":
            answered.add(subject)
            failed.pop(subject, None)
        elif subject not in answered:
            failed[subject] = row
    if names and len(answered) < llm.min_coverage * len(names):
        missing = [*failed, *(subject for subject in names if subject not in answered and subject not in failed)]
        listed = [
            f"{names[subject]} ({failed[subject]['status'] if subject in failed else 'not asked'})"
            for subject in missing[:20]
        ]
        what_next = "write texts of what was not asked about"
        if failed:
            said = next(iter(failed.values()))["response_json"][:200]
            what_next = f"the first said {said}; run the stage again (make retry)"
        raise UserError(
            f"{output}: {len(answered)} of {len(names)} answered, under llm.min_coverage {llm.min_coverage}; missing:"
            f" {', '.join(listed)}{f' and {len(missing) - 20} more' if len(missing) > 20 else ''}; {what_next}, or"
            " lower llm.min_coverage"
        )
