"""The questions of one stage: each prompt with its items, foreseen, asked and summed up as one.

`llm.max_calls` and `llm.max_usd` hold for a run, whatever the number of its prompts, and for all runs that share its
journal at a time: all calls together are held against them before the first one, with what the others have asked.
"""

import json
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fieldmark.llm.answers import (
    Item,
    PlannedCalls,
    Row,
    answers_in_turn,
    check_limits,
    keep_answers,
    keep_in_turn,
    plan_calls,
    preview,
    price_of,
    summarise,
    traces,
    warn_of_other_servers,
)
from fieldmark.llm.held import SCHEMA, Rows
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.llm.turn import Turn
from fieldmark.params import Llm
from fieldmark.store import iterate_groups, write_rows, write_text


class Question(NamedTuple):
    """A prompt and the items that it is asked about."""

    prompt: Prompt
    items: Sequence[Item]


# By what a stage calls them, in the order in which they are asked.
Questions = dict[str, Question]


def plan_each(stage: str, questions: Questions, llm: Llm, output: Path) -> list[PlannedCalls]:
    return [plan_calls(stage, question.items, question.prompt, llm, output) for question in questions.values()]


def in_sum(plans: Sequence[PlannedCalls]) -> PlannedCalls:
    # Of equal keys in two questions one is asked.
    held, new = ([getattr(plan, name) for plan in plans] for name in ("held", "new"))
    return PlannedCalls(
        keys=[key for plan in plans for key in plan.keys],
        held=ChainMap(*held),
        new=ChainMap(*new),
        base_urls=set().union(*(plan.base_urls for plan in plans)),
        under_way=frozenset().union(*(plan.under_way for plan in plans)),
        # Each plan reads the same files whole.
        bad={path: bad for plan in plans for path, bad in plan.bad.items()},
    )


def foresee(stage: str, questions: Questions, llm: Llm, output: Path) -> str:
    """What a run would do, for --dry-run: by prompt where there are several, and in sum."""
    plans = plan_each(stage, questions, llm, output)
    total = in_sum(plans)
    total.warn()
    if len(plans) < 2:
        return preview(stage, total, llm)
    prompts = [question.prompt.path for question in questions.values()]
    each = [preview(f"{stage}, {path}", plan, llm) for path, plan in zip(prompts, plans, strict=True)]
    return "\n".join([*each, preview(f"{stage} in sum", total, llm)])


def ask(
    stage: str, questions: Questions, llm: Llm, output: Path, *, attach: Callable[[Item], list[Message]]
) -> dict[str, Rows]:
    """The rows of each question, one an item; what is not held is asked for. Says at the end what the run did.

    Another process that asks for this stage is waited for, and its answers are taken. Raises UserError as
    `live_answers` does: a limit would be passed, there is no key, no call can succeed, or answers cannot be kept.
    """
    seen = traces(stage, output)
    plans = plan_each(stage, questions, llm, output)
    plan = in_sum(plans)
    plan.warn()
    rows: dict[str, Rows] = {}
    if plan.new:
        with Turn(stage) as turn:
            # Whoever had the turn before may have asked some of it.
            if traces(stage, output) != seen:
                plans = plan_each(stage, questions, llm, output)
                plan = in_sum(plans)
            keep_in_turn(stage, output, plan.keys)
            if plan.new:
                check_limits(plan, llm, turn.spent())
            for place, (name, (prompt, items)) in enumerate(questions.items()):
                # What the question before has brought may answer this one too.
                now = plan_calls(stage, items, prompt, llm, output) if place else plans[0]
                rows[name] = answers_in_turn(turn, now, items, prompt, llm, attach=attach)
    else:
        keep_answers(stage, output, plan.keys)
        for (name, (_, items)), each in zip(questions.items(), plans, strict=True):
            warn_of_other_servers(each, llm)
            rows[name] = Rows(each.keys, items, each.held, {}, output)
    if questions:
        print(report(stage, plan, rows, llm), file=sys.stderr)
    return rows


def report(stage: str, plan: PlannedCalls, rows: Mapping[str, Rows], llm: Llm) -> str:
    """One line: calls, answers that were held, dollars, and how many rows are no answer."""
    status, seen = Counter[str](), set[str]()

    def asked_now() -> Iterator[Row]:
        """One row for each call of the run."""
        for row in chain.from_iterable(rows.values()):
            status[row["status"]] += 1
            if row["attempts"] and row["item_key"] in plan.new and row["item_key"] not in seen:
                seen.add(row["item_key"])
                yield row

    sums = summarise(asked_now())
    spent = f"{'at least ' if sums['unpriced'] else ''}${sums['cost_usd']:.4f}"
    if price_of(llm) is None:
        spent = f"an unknown sum (llm.prices has no {llm.model!r})"
    failed = ", ".join(f"{count} {name}" for name, count in sorted(status.items()) if name != "ok")
    cached = len(plan.keys) - len(plan.new)
    return f"{stage}: asked {sums['rows']}, cached {cached}, spent {spent}, failed: {failed or 'none'}"


def write_answers(
    answered: Sequence[Sequence[Row]], path: Path, content: dict[str, Any], mark: str, metrics: Path
) -> None:
    """A stage's answers.parquet, sorted by key, and its metrics file; of `Rows` one row group is in memory."""
    order = sorted(
        (*key, number, place) for number, rows in enumerate(answered) for place, key in enumerate(keys_of(rows))
    )
    write_rows((answered[number][place] for *_, number, place in order), path, SCHEMA, content, mark)
    columns = ["item_key", "status", "source", "attempts", "input_tokens", "output_tokens", "cost_usd"]
    write_metrics(read_answers(path, columns), metrics)


def keys_of(rows: Sequence[Row]) -> Iterator[tuple[str, int, str]]:
    """What orders each row of llm.answers/1; none of `Rows` is read for it."""
    if isinstance(rows, Rows):
        return ((item.subject_id, item.sample, key) for key, item in zip(rows.keys, rows.items, strict=True))
    return ((row["subject_id"], row["sample"], row["item_key"]) for row in rows)


def read_answers(path: Path, columns: list[str]) -> Iterator[Row]:
    """Some columns of the rows of an answers.parquet, one row group in memory."""
    for group in iterate_groups(path, SCHEMA, columns):
        yield from group.to_pylist()


def write_metrics(rows: Iterable[Row], path: Path) -> None:
    """A stage's metrics file: what all its rows amount to, whichever run asked for them."""
    write_text(path, json.dumps(summarise(rows), indent=2) + "\n")
