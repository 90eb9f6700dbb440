"""The questions of one stage: each prompt with its items, foreseen, asked and summed up as one.

`llm.max_calls` and `llm.max_usd` hold for a run, whatever the number of its prompts, and for all runs that share its
journal at a time: all calls together are held against them before the first one, with what the others have asked.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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
    rows_in_order,
    summarise,
    warn_of_other_servers,
)
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.llm.turn import Turn
from fieldmark.params import Llm
from fieldmark.store import write_text


class Question(NamedTuple):
    """A prompt and the items that it is asked about."""

    prompt: Prompt
    items: list[Item]


# By what a stage calls them, in the order in which they are asked.
Questions = dict[str, Question]


def plan_each(stage: str, questions: Questions, llm: Llm, output: Path) -> list[PlannedCalls]:
    return [plan_calls(stage, question.items, question.prompt, llm, output) for question in questions.values()]


def in_sum(plans: Sequence[PlannedCalls]) -> PlannedCalls:
    total = PlannedCalls([], {}, {}, set(), bad={})
    for plan in plans:
        total.keys.extend(plan.keys)
        total.held.update(plan.held)
        total.new.update(plan.new)
        total.base_urls.update(plan.base_urls)
        # Each plan reads the same files whole.
        total.bad.update(plan.bad)
    return total._replace(under_way=frozenset().union(*(plan.under_way for plan in plans)))


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
) -> dict[str, list[Row]]:
    """The rows of each question, one an item; what is not held is asked for. Says at the end what the run did.

    Another process that asks for this stage is waited for, and its answers are taken. Raises UserError as
    `live_answers` does: a limit would be passed, there is no key, no call can succeed, or answers cannot be kept.
    """
    plans = plan_each(stage, questions, llm, output)
    plan = in_sum(plans)
    plan.warn()
    rows: dict[str, list[Row]] = {}
    if plan.new:
        with Turn(stage) as turn:
            plan = in_sum(plan_each(stage, questions, llm, output))
            keep_in_turn(stage, output, plan.keys)
            if plan.new:
                check_limits(plan, llm, turn.spent())
            for name, (prompt, items) in questions.items():
                rows[name] = answers_in_turn(turn, items, prompt, llm, output, attach=attach)
    else:
        keep_answers(stage, output, plan.keys)
        for (name, (_, items)), each in zip(questions.items(), plans, strict=True):
            warn_of_other_servers(each, llm)
            rows[name] = rows_in_order(each, items, each.held)
    if questions:
        print(report(stage, plan, rows, llm), file=sys.stderr)
    return rows


def asked_now(plan: PlannedCalls, rows: dict[str, list[Row]]) -> list[Row]:
    """One row for each call of the run that the plan was made for."""
    asked = {row["item_key"]: row for each in rows.values() for row in each if row["item_key"] in plan.new}
    return [row for row in asked.values() if row["attempts"]]


def report(stage: str, plan: PlannedCalls, rows: dict[str, list[Row]], llm: Llm) -> str:
    """One line: calls, answers that were held, dollars, and how many rows are no answer."""
    asked = asked_now(plan, rows)
    sums = summarise(asked)
    spent = f"{'at least ' if sums['unpriced'] else ''}${sums['cost_usd']:.4f}"
    if price_of(llm) is None:
        spent = f"an unknown sum (llm.prices has no {llm.model!r})"
    status = summarise([row for each in rows.values() for row in each])["status"]
    failed = ", ".join(f"{count} {name}" for name, count in status.items() if name != "ok")
    cached = len(plan.keys) - len(plan.new)
    return f"{stage}: asked {len(asked)}, cached {cached}, spent {spent}, failed: {failed or 'none'}"


def write_metrics(rows: list[Row], path: Path) -> None:
    """A stage's metrics file: what all its rows amount to, whichever run asked for them."""
    write_text(path, json.dumps(summarise(rows), indent=2) + "\n")
