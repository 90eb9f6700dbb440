"""Put a study's runs into tables: what each method reaches, and whether it beats the tuned probe and its own controls.

Reads   studies/NAME.yaml; data/studies/NAME/RUN/ of every run; data/index/images.parquet; where test is
        declared, data/index/metrics.json.
Writes  data/studies/NAME/tables.txt, tables.csv and tables.tex: a table for each encoder and regime, a row for each
        method and control; where the study asks questions, answers.md; where test is declared, test_was_read.json.
Costs   seconds; memory for the logits of one run at a time.

All figures are of val, unless the study declares test. Then test is read for the methods, variants, controls, regimes,
seeds and questions that the study names at that moment: test_was_read.json remembers them, and another list is refused
from then on.

A difference is a method's accuracy minus that of linear_probe under the same encoder, regime and draw, image by image.
Its intervals are over images, classes and groups, and they are wide enough for what other seeds or draws would change
(evaluation.statistics.paired_differences). p is two-sided, over images, and corrected by Holm for the methods of a
table. Where a study has controls, each method is also compared with itself under each control that changes something
it reads; these p are corrected for the number of such comparisons in the table, and the p of its questions for the
number of questions.

    python -m evaluation.compare --name baselines
"""

import csv
import io
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from evaluation.choices import choice_notes
from evaluation.health import contamination, read_health
from evaluation.plan import Cell, Plan, Question, RowKey, cells, make_plan, rival_cells
from evaluation.statistics import LEVEL, Paired
from evaluation.study import is_made
from evaluation.verdicts import REFERENCE, Table, Verdict, again, answer, judge, read_results
from evaluation.words import lay_out, percent_of_runs, points, points_range, written_p
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import load_params
from fieldmark.store import read_table, write_text
from training.controls import Control
from training.data import SPLITS
from training.metrics import Ints, mean_and_deviation
from training.regimes import Folds, LongTail, Regime, Shots, Unseen
from training.runs import write_json

MARKER = "test_was_read.json"
Judged = Sequence[tuple[Table, list[Verdict]]]


# Words and files.


def shown_figures(regime: Regime) -> list[str]:
    """The figures that the text and LaTeX tables of a regime have; tables.csv has all."""
    more = {LongTail: ["few", "medium", "many"], Unseen: ["seen", "unseen", "harmonic"]}
    return ["accuracy", "macro", "top-5", "ECE", "ECE, scaled", *more.get(type(regime), [])]


def columns_of(table: Table, groups: Ints | None) -> list[str]:
    """The head of the text and LaTeX tables."""
    over = intervals_over(groups is not None)
    return ["method", "control", *shown_figures(table.regime), "- probe", *over, "p (Holm)", "verdict"]


def intervals_over(groups: bool) -> list[str]:
    return ["over images", "over classes", *(["over groups"] if groups else [])]


def paired_fields(paired: Paired) -> list[str]:
    """A difference and its intervals, in points."""
    ends = [paired.images, paired.classes, *([paired.groups] if paired.groups else [])]
    return [points(paired.difference), *map(points_range, ends)]


def fields_of(verdict: Verdict, regime: Regime, groups: Ints | None) -> list[str]:
    """A row of the text and LaTeX tables."""
    result, paired, figures = verdict.result, verdict.paired, []
    for name in shown_figures(regime):
        values = [of_run[name] for of_run in result.figures if name in of_run]
        figures.append(percent_of_runs(values) if values else "")
    intervals = [""] * (3 if groups is None else 4) if paired is None else paired_fields(paired)
    p = "" if verdict.p is None else written_p(verdict.p)
    return [result.method, result.control.label, *figures, *intervals, p, verdict.words]


def title_of(table: Table, split: str) -> str:
    split = "out of fold" if isinstance(table.regime, Folds) else split
    classes, runs = len(np.unique(table.y)), max(len(result.correct) for result in table.results)
    images = f"{len(table.paths)} images of {classes} classes"
    return f"{table.encoder}, {table.regime.label}: {split}, {images}, {runs} run{'s' * (runs > 1)}"


def as_text(judged: Judged, split: str, groups: Mapping[str, str] | None, heading: str, foot: Sequence[str]) -> str:
    """The tables as columns of text, under a heading and with notes at the foot."""
    blocks = [heading]
    for table, verdicts in judged:
        own = group_numbers(table, groups)
        lines = [columns_of(table, own), *(fields_of(verdict, table.regime, own) for verdict in verdicts)]
        blocks.append(f"{title_of(table, split)}\n{lay_out(lines)}")
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


def as_latex(judged: Judged, split: str, groups: Mapping[str, str] | None, heading: str, foot: Sequence[str]) -> str:
    """The same tables in LaTeX, each a tabular that needs the package booktabs."""
    blocks = [f"% {heading}"]
    for table, verdicts in judged:
        own = group_numbers(table, groups)
        head, *body = [columns_of(table, own), *(fields_of(verdict, table.regime, own) for verdict in verdicts)]
        lines = [" & ".join(map(escape_latex, fields)) + r" \\" for fields in (head, *body)]
        blocks.append(
            "\n".join(
                [
                    f"% {title_of(table, split)}",
                    rf"\begin{{tabular}}{{ll{'r' * (len(head) - 3)}l}}",
                    r"\toprule",
                    lines[0],
                    r"\midrule",
                    *lines[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join([*blocks, "\n".join(f"% {line}" for line in foot)]) + "\n"


def escape_latex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    return escaped.replace("+-", r"$\pm$")


def as_markdown(tables: Sequence[Table], plan: Plan, split: str, groups: Mapping[str, str] | None, commit: str) -> str:
    """answers.md: a table of answers for each encoder and regime, and what the study leaves open."""
    blocks = [
        f"# What study {plan.name} answers",
        f"Read on {split}" + (f", code {commit}" if commit else "") + f"; made by `make compare NAME={plan.name}`.",
        "\n".join(f"- {note}" for note in answer_notes(plan, split, groups is not None)),
    ]
    for table in tables:
        own = group_numbers(table, groups)
        rows = [["question", "compared", "difference", *intervals_over(groups is not None), "p (Holm)", "answer"]]
        there = {result.method for result in table.results if result.control == Control()}
        asked = [question for question in plan.study.questions if {question.of, question.against} <= there]
        for found in answer(table, asked, own):
            fields = [*paired_fields(found.paired), written_p(found.p), found.words]
            rows.append([found.question.ask, compared(found.question), *fields])
        for question in plan.study.questions:
            if question not in asked:
                empty = [""] * (len(rows[0]) - 3)
                rows.append([question.ask, compared(question), *empty, "none: a method cannot work on this data"])
        blocks += [f"## {title_of(table, split)}", pipe_table(rows)]
    if plan.study.open:
        rows = [["question", "why not"], *([one.ask, one.because] for one in plan.study.open)]
        blocks += ["## Not answered", pipe_table(rows)]
    return "\n\n".join(blocks) + "\n"


def compared(question: Question) -> str:
    return f"{question.of} - {question.against}"


def pipe_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(field.replace('|', '&#124;') for field in row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def as_csv(judged: Judged, split: str) -> str:
    """All figures, as fractions; a row for each result of the tables."""
    of_runs = [of_run for _, verdicts in judged for verdict in verdicts for of_run in verdict.result.figures]
    figures = list(dict.fromkeys(name for of_run in of_runs for name in of_run))
    over = ["images", "classes", "groups"]
    head = ["encoder", "regime", "split", "method", "control", "runs"]
    head += [f"{name} {what}" for name in figures for what in ("mean", "deviation")]
    head += ["difference", *(f"{unit} {end}" for unit in over for end in ("low", "high")), "p", "p_holm", "verdict"]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for table, verdicts in judged:
        for verdict in verdicts:
            result, paired = verdict.result, verdict.paired
            fields: dict[str, Any] = {
                "encoder": table.encoder,
                "regime": table.regime.label,
                "split": split,
                "method": result.method,
                "control": result.control.label,
                "runs": len(result.correct),
                "p_holm": verdict.p,
                "verdict": verdict.words,
            }
            for name in figures:
                if values := [of_run[name] for of_run in result.figures if name in of_run]:
                    fields[f"{name} mean"], fields[f"{name} deviation"] = mean_and_deviation(values)
            if paired is not None:
                fields |= {"difference": paired.difference, "p": paired.p}
                for unit in over:
                    if (ends := getattr(paired, unit)) is not None:
                        fields[f"{unit} low"], fields[f"{unit} high"] = ends
            writer.writerow(fields)
    return text.getvalue()


# What is read, and when.


def read_groups(data: Path) -> dict[str, str] | None:
    """By path, the group of each usable image: its track, camera or site, or the image itself where it names none.

    None where no image names a group.
    """
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    index = index.filter(pc.equal(index["status"], "ok"))
    if index["group"].null_count == len(index):
        return None
    rows = zip(index["path"].to_pylist(), index["group"].to_pylist(), strict=True)
    return {path: f"image {path}" if group is None else f"group {group}" for path, group in rows}


def group_numbers(table: Table, groups: Mapping[str, str] | None) -> Ints | None:
    """(n,): which group each image of a table is of."""
    return None if groups is None else np.unique([groups[path] for path in table.paths], return_inverse=True)[1]


def declare_test(plan: Plan) -> None:
    """Write down what test is read for, once. Raises UserError where it was read for another list."""
    path = plan.folder / MARKER
    declared = {
        "encoders": list(plan.encoders),
        "methods": plan.study.methods,
        "variants": list(plan.study.variants),
        "controls": [control.label for control in plan.study.controls],
        "regimes": [regime.label for regime in plan.study.regimes],
        "seeds": plan.study.seeds,
        "questions": [compared(question) for question in plan.study.questions],
    }
    if not path.is_file():
        write_json(path, declared)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in declared.items():
        then = before.get(key, [])  # there were studies before there were variants and questions
        if then != value:
            raise UserError(
                f"studies/{plan.name}.yaml: {key}: test was read for {then} already ({path}), and now it is {value};"
                " go back to that list, or choose on val (declared_test: false)"
            )


def contamination_note(plan: Plan) -> list[str]:
    """A line about test images that train or val give away, as the report has it; no line where there are none."""
    index = read_table(plan.data / "index/images.parquet", "index.images/1", ["split", "status"])
    splits = index.filter(pc.equal(index["status"], "ok"))["split"].to_pylist()
    counts = {split: splits.count(split) for split in SPLITS}
    found = contamination(read_health(plan.data / "index/metrics.json", counts), counts["test"])
    if found is None:
        return []
    reasons = "; ".join(f"{count} {reason}" for count, reason in found["reasons"])
    return [f"warning: {found['images']} of {found['of']} test images are contaminated: {reasons}"]


def describe_commit() -> str:
    """The commit of this code, marked where it has been edited; empty where there is no git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def footnotes(plan: Plan, split: str, groups: bool) -> list[str]:
    """The notes under the tables."""
    over = "images, classes and groups" if groups else "images and classes"
    return [
        "accuracies and ECE in %, mean +- standard deviation over runs; scaled: after a temperature fitted on val",
        f"- probe: difference to {REFERENCE} in points, 95 % bootstrap intervals over {over}, with the runs' spread",
        "p: two-sided, over images, Holm-corrected for the methods of the table; of controls, for the controls",
        *split_notes(plan, split),
    ]


def answer_notes(plan: Plan, split: str, groups: bool) -> list[str]:
    """The notes above the answers."""
    over = "images, classes and groups" if groups else "images and classes"
    return [
        f"difference: in points of accuracy, paired, 95 % bootstrap intervals over {over}, with the runs' spread",
        "p: two-sided, over images, Holm-corrected for the questions of the table; an answer is yes or no under"
        f" {LEVEL:g}, and without a difference shown there may still be one: as large as the interval allows",
        *split_notes(plan, split),
    ]


def split_notes(plan: Plan, split: str) -> list[str]:
    """What part the split that is read had in the fits."""
    notes = []
    by_val = [regime.label for regime in plan.study.regimes if not isinstance(regime, Shots | Folds)]
    if by_val and split == "val":
        notes.append(f"the other half of val chose settings and epochs under {', '.join(by_val)}; it is in no figure")
    if any(isinstance(regime, Shots) for regime in plan.study.regimes):
        left_out = f", {len(plan.left_out)} more are left out" if plan.left_out else ""
        notes.append(
            f"few-shot: settings were chosen on {len(plan.development)} other classes{left_out}; val had no part in the"
            " fits; each run is a draw of shots"
        )
    if plan.clean is not None:
        clean = [plan.study.clean] if isinstance(plan.study.clean, str) else plan.study.clean
        notes.append(f"judged on clean images alone: {', '.join(clean or [])}")
    notes += idle_notes(plan)
    return notes + (contamination_note(plan) if split == "test" else [])


def idle_notes(plan: Plan) -> list[str]:
    """A line for each control that changes nothing that some methods compute, which so have no run under it."""
    return [
        f"left out: {control} changes nothing that is computed by {', '.join(methods)}: the plain run stands for it"
        for control, methods in plan.idle().items()
    ]


def read_not_possible(plan: Plan, grid: Sequence[Cell]) -> dict[RowKey, str]:
    """The rows that the tables do without, a run of which could not be made: why its method cannot work on this data.

    Raises UserError for the probe.
    """
    found: dict[RowKey, str] = {}
    for cell in grid:
        config = json.loads((plan.folder / cell.run / "config.json").read_text(encoding="utf-8"))
        if "not_possible" in config:
            if cell.method == REFERENCE:
                raise UserError(f"{plan.folder}: {REFERENCE} cannot work on this data: {config['not_possible']}")
            found.setdefault(cell.row, config["not_possible"])
    return found


def not_possible_notes(left_out: Mapping[RowKey, str]) -> list[str]:
    """A line for each row that the tables do without."""
    return [
        f"left out: {method} on {encoder}, {control.label}, {regime.label}: {reason}"
        for (encoder, control, regime, method), reason in left_out.items()
    ]


def compare(plan: Plan, grid: Sequence[Cell]) -> str:
    """Write the tables of a study; returns them as text. Raises UserError where a run is missing or stale."""
    if REFERENCE not in plan.study.methods or Control() not in plan.study.controls:
        raise UserError(f"studies/{plan.name}.yaml: lacks {REFERENCE} or control none, to compare with; add it")
    stale = [cell.run for cell in grid if not is_made(plan.folder / cell.run, plan.mark(cell))]
    if stale:
        raise UserError(f"{plan.folder}: lacks {len(stale)} of {len(grid)} runs (first {stale[0]}); {again(plan)}")
    split = "test" if plan.study.declared_test else "val"
    if plan.study.declared_test:
        declare_test(plan)
    groups = read_groups(plan.data)
    left_out = read_not_possible(plan, grid)
    judged = []
    for encoder in plan.encoders:
        for regime in plan.study.regimes:
            rows = [*grid, *rival_cells(plan, grid)]
            of_table = [cell for cell in rows if (cell.encoder, cell.regime) == (encoder, regime)]
            of_table = [cell for cell in of_table if cell.row not in left_out]
            table = read_results(plan, of_table, split)
            judged.append((table, judge(table, group_numbers(table, groups))))
    commit = describe_commit()
    heading = f"study {plan.name}, read on {split}" + (f", code {commit}" if commit else "")
    foot = [*footnotes(plan, split, groups is not None), *choice_notes(plan, grid), *not_possible_notes(left_out)]
    text = as_text(judged, split, groups, heading, foot)
    if plan.study.questions:
        tables = [table for table, _ in judged]
        write_text(plan.folder / "answers.md", as_markdown(tables, plan, split, groups, commit))
    write_text(plan.folder / "tables.txt", text)
    write_text(plan.folder / "tables.csv", as_csv(judged, split))
    write_text(plan.folder / "tables.tex", as_latex(judged, split, groups, heading, foot))
    return text


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    parser.add_argument("--name", required=True, help="a file of studies/, without .yaml")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    plan = make_plan(arguments.params, params, arguments.name, Path(arguments.data))
    print(compare(plan, cells(plan, params.train.seed)), end="")


if __name__ == "__main__":
    run(main)
