"""What answers cost, by day and model; and how large the journals are, with what compacting them would save.

Reads   every data/*/answers.parquet and data/asked/*/answers.parquet (llm.answers/1), a row group at a time; with
        --compact the journals in .cache/ of the original checkout, or in $FIELDMARK_CACHE.
Writes  to stdout, a table of the answers that are in use: those of former prompts are in the journal alone. A question
        that stands in two tables counts once. Days are UTC's. With --compact the stage's journal and its record of
        batches anew, without lines that are superseded (fieldmark/llm/compaction.py): no answer is lost by it.
Costs   nothing; seconds for a hundred thousand answers.

    python -m tools.costs
    python -m tools.costs --compact describe_images
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fieldmark.command import UserError, printable, run
from fieldmark.llm.compaction import compact
from fieldmark.llm.held import SCHEMA
from fieldmark.llm.tables import PAID, answer_tables
from fieldmark.store import iterate_groups

DATA = Path("data")
COLUMNS = ["item_key", "source", "model_requested", "input_tokens", "output_tokens", "cost_usd", "created_at"]
# Names of stages that have a journal.
STAGES = ("generate_concepts", "describe_images", "ask")


class Day(NamedTuple):
    """What came of a model on a day."""

    answers: int = 0
    unpriced: int = 0  # of these, those whose price is not known
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


def by_day(paths: Iterable[Path]) -> dict[tuple[str, str, str], Day]:
    """By day, model and mode, sorted. Raises UserError where a table is broken."""
    found: defaultdict[tuple[str, str, str], Day] = defaultdict(Day)
    seen: set[bytes] = set()
    for path in paths:
        for group in iterate_groups(path, SCHEMA, COLUMNS):
            for row in group.to_pylist():
                key = bytes(row["item_key"], "utf-8")
                if row["source"] not in PAID or key in seen:
                    continue
                seen.add(key)
                name = row["created_at"][:10], row["model_requested"], row["source"]
                day, usd = found[name], row["cost_usd"]
                found[name] = Day(
                    day.answers + 1,
                    day.unpriced + (usd is None),
                    day.input_tokens + (row["input_tokens"] or 0),
                    day.output_tokens + (row["output_tokens"] or 0),
                    day.usd + (usd or 0.0),
                )
    return dict(sorted(found.items()))


def lay_out(days: dict[tuple[str, str, str], Day]) -> str:
    """The days as a table, with their sum below."""
    total = Day(*map(sum, zip(*days.values(), strict=True))) if days else Day()
    rows = [*((*name, day) for name, day in days.items()), ("in sum", "", "", total)]
    wide = max(len(model) for _, model, _, _ in rows)
    wide = max(wide, len("model"))
    lines = [f"{'day':10s}  {'model':{wide}s}  {'mode':5s} {'answers':>9s} {'unpriced':>9s} {'tokens in':>13s} "
             f"{'tokens out':>13s} {'USD':>11s}"]  # fmt: skip
    lines += [
        f"{day:10s}  {model:{wide}s}  {mode:5s} {one.answers:9,} {one.unpriced:9,} {one.input_tokens:13,} "
        f"{one.output_tokens:13,} {one.usd:11,.4f}"
        for day, model, mode, one in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said = f"compact the journal of {', '.join(STAGES[:-1])} or {STAGES[-1]}"
    parser.add_argument("--compact", metavar="STAGE", choices=STAGES, help=said)
    stage = parser.parse_args().compact
    if stage is not None:
        for done in compact(stage):
            (lines, left), (before, after) = done.lines, done.size
            print(f"{done.path}: {lines:,} lines, {left:,} kept; {before / 1e6:,.1f} MB, now {after / 1e6:,.1f}")
        return
    paths = answer_tables(DATA)
    if not paths:
        raise UserError(f"{DATA}: holds no answers.parquet; run the stages that ask (dvc repro), or dvc pull them")
    print(printable(lay_out(by_day(paths)), "\n"))


if __name__ == "__main__":
    run(main)
