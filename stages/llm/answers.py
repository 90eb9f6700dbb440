"""The item cache: one row of llm.answers/1 an item, and a call only where no paid answer is held.

Two layers hold answers: the stage's own answers.parquet, which DVC persists and shares, and below it the journal, which
survives `kill -9`, a change of branch and a reverted prompt. An item is known by its key, the hash of what is asked and
of whom; where it is asked (base_url) and how patiently (limits, room for the answer) is no part of it. Of the held rows
only one that was paid for and is `ok` answers an item: every other is asked again.
"""

import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from stages.command import UserError
from stages.llm.client import Client, public_url, server_of
from stages.llm.journal import Entry, Journal, journal_path, read_journal
from stages.llm.prompts import Message, Prompt
from stages.params import Llm, Price
from stages.store import canonical_json, read_table, sha256

SCHEMA = "llm.answers/1"
# What someone paid for or wrote by hand; a replayed answer never stands in for a live one, an imported one has no key
# that is asked.
EARNED = {"live", "batch", "edited"}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One question. In `messages` an image stands as {"type": "image", "image_id": ..., "px": ...}, never as bytes."""

    subject_id: str
    sample: int
    messages: list[Message]


class Unaskable(Exception):
    """An item whose request cannot be made; it becomes a row with status error."""


class Plan(NamedTuple):
    """What a run has to do: the key of each item, the answers held, the items to ask (one a key)."""

    keys: list[str]
    held: dict[str, Row]
    new: dict[str, Item]
    base_urls: set[str]


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


def plan_calls(stage: str, items: list[Item], prompt: Prompt, llm: Llm, output: Path) -> Plan:
    """Look each item up, first in the stage's output, then in its journal. Writes nothing."""
    keys = [item_key(item, prompt, llm) for item in items]
    wanted = set(keys)
    held = {row["item_key"]: row for row in read_rows(output) if row["item_key"] in wanted and earned(row)}
    journal = read_journal(journal_path(stage), wanted)
    for key, entry in journal.items():
        if earned(entry.row):
            held.setdefault(key, entry.row)
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in held}
    base_urls = {entry.base_url for key, entry in journal.items() if key in held and entry.base_url}
    return Plan(keys, held, new, base_urls)


def read_rows(output: Path) -> list[Row]:
    return read_table(output, SCHEMA).to_pylist() if output.exists() else []


def keep_answers(stage: str, output: Path, wanted: Iterable[str]) -> None:
    """Journal what answers.parquet alone holds (pulled from elsewhere) and a new one would not: an undo stays free."""
    kept = set(wanted)
    rows = {row["item_key"]: row for row in read_rows(output) if earned(row) and row["item_key"] not in kept}
    if not rows:
        return
    known = read_journal(journal_path(stage), rows)
    lost = [row for key, row in rows.items() if key not in known or not earned(known[key].row)]
    if lost:
        with Journal(journal_path(stage)) as journal:
            for row in lost:
                journal.append(Entry(row, None))


def live_answers(
    stage: str, items: list[Item], prompt: Prompt, llm: Llm, output: Path, *, attach: Callable[[Item], list[Message]]
) -> list[Row]:
    """One row an item, asking for what is not held. `attach` makes the messages to send, and may raise Unaskable.

    Raises UserError: a limit would be passed, there is no key, or no call can succeed.
    """
    plan = plan_calls(stage, items, prompt, llm, output)
    answers = dict(plan.held)
    warn_of_other_servers(plan, public_url(server_of(llm)))
    keep_answers(stage, output, plan.keys)
    if plan.new:
        check_limits(plan, llm)
        client = Client(prompt, llm)
        with Journal(journal_path(stage)) as journal:
            answers |= ask_all(stage, plan.new, client, journal, attach)
    return [
        {**answers[key], "subject_id": item.subject_id, "sample": item.sample}
        for key, item in zip(plan.keys, items, strict=True)
    ]


def warn_of_other_servers(plan: Plan, base_url: str) -> None:
    others = sorted(plan.base_urls - {base_url})
    if others:
        print(
            f"warning: llm.base_url is {base_url}, but some of the {len(plan.held)} answers that are kept come from"
            f" {', '.join(others)}",
            file=sys.stderr,
        )


def ask_all(
    stage: str, new: dict[str, Item], client: Client, journal: Journal, attach: Callable[[Item], list[Message]]
) -> dict[str, Row]:
    """Ask with llm.concurrency threads. However it ends, calls under way are awaited and what they bring is kept."""
    llm = client.llm
    answers: dict[str, Row] = {}
    spent = 0.0
    pool = ThreadPoolExecutor(llm.concurrency)
    progress = tqdm(total=len(new), desc=stage, unit="call", dynamic_ncols=True)
    try:
        futures = [pool.submit(ask_one, key, item, client, journal, attach) for key, item in new.items()]
        for future in as_completed(futures):
            row = future.result()
            if row is None:
                continue
            answers[row["item_key"]] = row
            spent += row["cost_usd"] or 0.0
            progress.set_postfix_str(f"${spent:.4f}" if llm.model in llm.prices else "unknown price", refresh=False)
            progress.update()
            if llm.max_usd is not None and spent > llm.max_usd:
                raise UserError(
                    f"params.yaml: llm.max_usd: ${spent:.4f} is spent, more than {llm.max_usd}; {len(answers)} of"
                    f" {len(new)} answers are kept, raise the limit to go on"
                )
    except BaseException as error:
        client.stopping.set()
        if isinstance(error, KeyboardInterrupt):
            progress.write(f"{stage}: {len(answers)} of {len(new)} calls answered; the rest remain", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
    return answers


def ask_one(
    key: str, item: Item, client: Client, journal: Journal, attach: Callable[[Item], list[Message]]
) -> Row | None:
    """Ask and journal. None where the run is stopping: another call has shown that none can succeed."""
    if client.stopping.is_set():
        return None
    llm = client.llm
    row: Row = {
        "item_key": key,
        "subject_id": item.subject_id,
        "sample": item.sample,
        "prompt_sha": client.prompt.sha,
        "model_requested": llm.model,
        "source": "live",
    }
    try:
        messages = attach(item)
    except Unaskable as error:
        said = canonical_json({"error": str(error)})
        return {**row, "status": "error", "response_json": said, "attempts": 0, "created_at": now()} | dict.fromkeys(
            ["model_reported", "response_id", "finish_reason", "input_tokens", "output_tokens", "cost_usd"]
        )
    reply = client.ask(messages)
    row |= {
        "status": reply.status,
        "response_json": reply.response_json,
        "model_reported": reply.model_reported,
        "response_id": reply.response_id,
        "finish_reason": reply.finish_reason,
        "input_tokens": reply.input_tokens,
        "output_tokens": reply.output_tokens,
        "cost_usd": cost(reply.input_tokens, reply.output_tokens, llm.prices.get(llm.model)),
        "attempts": reply.attempts,
        "created_at": now(),
    }
    # An error is no answer: there is nothing to keep.
    if row["status"] != "error":
        journal.append(Entry(row, client.base_url))
    return row


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cost(input_tokens: int | None, output_tokens: int | None, price: Price | None) -> float | None:
    """US dollars, or None where the server counts no tokens or params.yaml has no price."""
    if price is None or input_tokens is None or output_tokens is None:
        return None
    return (input_tokens * price.input + output_tokens * price.output) / 1e6


class Estimate(NamedTuple):
    """Before a call: about so many tokens go in, at most so many come out, at most so many dollars (None: no price)."""

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None


def estimate(plan: Plan, llm: Llm) -> Estimate:
    inputs = sum(tokens_of(item.messages) for item in plan.new.values())
    outputs = len(plan.new) * llm.max_output_tokens
    return Estimate(len(plan.new), inputs, outputs, cost(inputs, outputs, llm.prices.get(llm.model)))


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


def check_limits(plan: Plan, llm: Llm) -> None:
    """Raises UserError where the calls, or the most that they can cost, pass llm.max_calls or llm.max_usd."""
    calls, _, _, usd = estimate(plan, llm)
    if llm.max_calls is not None and calls > llm.max_calls:
        raise UserError(f"params.yaml: llm.max_calls: {calls} calls are needed, more than {llm.max_calls}; raise it")
    if llm.max_usd is not None:
        if usd is None:
            raise UserError(
                f"params.yaml: llm.max_usd: cannot be kept, llm.prices has no {llm.model!r}; add its price, or set"
                " max_usd: null"
            )
        if usd > llm.max_usd:
            raise UserError(
                f"params.yaml: llm.max_usd: {calls} calls may cost ${usd:.4f}, more than {llm.max_usd}; raise it, or"
                " lower llm.max_output_tokens"
            )


def preview(stage: str, plan: Plan, llm: Llm) -> str:
    """What a run would do, for --dry-run."""
    calls, inputs, outputs, usd = estimate(plan, llm)
    price = f"unknown price (llm.prices has no {llm.model!r})" if usd is None else f"at most ${usd:.4f}"
    return "\n".join(
        [
            f"{stage}: {len(plan.keys)} items, {len(plan.keys) - calls} cached, {calls} calls to {llm.model}",
            f"tokens: about {inputs:,} in, at most {outputs:,} out",
            f"price: {price}",
        ]
    )


def check_coverage(rows: list[Row], names: dict[str, str], llm: Llm, output: Path) -> None:
    """Raises UserError naming the subjects without an `ok` row where their share passes 1 - llm.min_coverage.

    `names` maps every subject_id to what a person calls it.
    """
    answered = {row["subject_id"] for row in rows if row["status"] == "ok"}
    failed = {row["subject_id"]: row for row in rows if row["subject_id"] not in answered}
    if names and len(answered) < llm.min_coverage * len(names):
        listed = [f"{names[subject]} ({row['status']})" for subject, row in failed.items()]
        first = next(iter(failed.values()))
        raise UserError(
            f"{output}: {len(answered)} of {len(names)} answered, under llm.min_coverage {llm.min_coverage}; missing:"
            f" {', '.join(listed[:20])}{f' and {len(listed) - 20} more' if len(listed) > 20 else ''}; the first said"
            f" {first['response_json'][:200]}; run the stage again (make retry), or lower llm.min_coverage"
        )
