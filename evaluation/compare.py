"""Put a study's runs into tables: what each method reaches, and whether it beats the tuned probe and its own controls.

Reads   studies/NAME.yaml; data/studies/NAME/RUN/ of every run; data/index/images.parquet; where test is
        declared, data/index/metrics.json and data/studies/test_was_read.json.
Writes  data/studies/NAME/tables.txt, tables.csv and tables.tex: a table for each encoder and regime, a row for each
        method and control; where the study asks questions, answers.md; where methods have epochs, seconds.txt, what
        their fits took; where test is declared, test_was_read.json.
Costs   seconds; memory for the logits of one run at a time.

All figures are of val, unless the study declares test. Then test is read, once: test_was_read.json holds the study's
name and list, the fingerprint of each run (its settings, inputs and code) and the test images. Whatever would read any
of these images again for something else, a changed study or another one, is refused from then on.

A difference is a method's accuracy minus that of linear_probe under the same encoder, regime and draw, image by image.
Its intervals are over images, classes and groups, and they are wide enough for what other seeds or draws would change.
The coarsest unit decides: groups where images name them, else images; with few shots and for unseen classes the class.
Over it are p and the verdict (evaluation.statistics.paired_differences), which takes 20 of them. For unseen classes
the accuracy on these and the harmonic mean are judged, each in a table. Where a study has controls, each method is also
compared with itself under each control that changes something it reads. p is corrected by Holm for all comparisons
that the study publishes: of methods with the probe, of methods with their controls, of questions.

    python -m evaluation.compare --name baselines
"""

import csv
import io
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from evaluation import opened
from evaluation.choices import choice_notes
from evaluation.effort import seconds_of_fits
from evaluation.health import contamination, read_health
from evaluation.plan import (
    REFERENCE,
    Cell,
    Plan,
    Question,
    RowKey,
    again,
    cells,
    check_comparable,
    make_plan,
    read_config,
    rival_cells,
)
from evaluation.runs import group_numbers, groups_of, read_json
from evaluation.statistics import LEVEL, Paired
from evaluation.study import is_made
from evaluation.verdicts import WITHIN, Table, Verdict, answer, judge, read_results, too_few
from evaluation.words import lay_out, percent, percent_of_runs, points, points_range, written_p
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import load_params
from fieldmark.store import read_table, write_text
from training.data import SPLITS
from training.inputs import ROOT
from training.links import TRANSDUCTIVE, named
from training.metrics import mean_and_deviation
from training.regimes import Folds, LongTail, Partial, Shots, Unseen
from training.runs import write_json

MARKER = "studies/test_was_read.json"  # under data/: what is read of test binds all studies
Judged = Sequence[tuple[Table, list[Verdict]]]


# Words and files.


def shown_figures(table: Table) -> list[str]:
    """The figures that the text and LaTeX tables have; tables.csv has all."""
    if table.measure == "unseen":
        return ["unseen"]
    more = {LongTail: ["few", "medium", "many"], Unseen: ["seen", "harmonic"], Partial: ["disambiguated"]}
    return ["accuracy", "macro", "top-5", "ECE", "ECE, scaled", *more.get(type(table.regime), [])]


def columns_of(table: Table) -> list[str]:
    """The head of the text and LaTeX tables."""
    over, rising = intervals_over(table.groups is not None), ["still rising"] if has_epochs(table) else []
    return ["method", "control", *shown_figures(table), *rising, "- probe", *over, "p (Holm)", "verdict"]


def has_epochs(table: Table) -> bool:
    """Whether any of its methods has epochs: then a column says in how many runs the last one was the best."""
    return any(result.rising for result in table.results)


def intervals_over(groups: bool) -> list[str]:
    return ["over images", "over classes", *(["over groups"] if groups else []), "could show"]


def paired_fields(paired: Paired) -> list[str]:
    """A difference, its intervals and what it could have been shown to be, in points."""
    ends = [paired.images, paired.classes, *([paired.groups] if paired.groups else [])]
    return [points(paired.difference), *map(points_range, ends), percent(paired.half_width)]


def fields_of(verdict: Verdict, table: Table) -> list[str]:
    """A row of the text and LaTeX tables."""
    result, paired, figures = verdict.result, verdict.paired, []
    for name in shown_figures(table):
        values = [of_run[name] for of_run in result.figures if name in of_run]
        figures.append(percent_of_runs(values) if values else "")
    if has_epochs(table):
        figures.append(result.rising)
    intervals = [""] * (1 + len(intervals_over(table.groups is not None)))
    intervals = intervals if paired is None else paired_fields(paired)
    p = "" if verdict.p is None or verdict.gain is not None else written_p(verdict.p)
    return [named(result.method, result.transductive), result.control.label, *figures, *intervals, p, verdict.words]


MEASURES = {
    "accuracy": "",
    "unseen": ", accuracy on unseen classes, among these",
    "harmonic": ", harmonic mean of the accuracies on seen and on unseen classes, among all",
}


def title_of(table: Table, split: str) -> str:
    split = "out of fold" if isinstance(table.regime, Folds) else split
    counted = np.full(len(table.y), True) if table.part is None else (table.part >= 0).any(0)
    classes, runs = len(np.unique(table.y[counted])), max(len(result.correct) for result in table.results)
    images = f"{counted.sum()} images of {classes} classes"
    of = f"{table.encoder}, {table.regime.label}{MEASURES[table.measure]}"
    return f"{of}: {split}, {images}, {runs} run{'s' * (runs > 1)}"


class Families(NamedTuple):
    """How many comparisons stand in all tables of a study together: what p is corrected for."""

    methods: int
    controls: int


def families_of(judged: Judged) -> Families:
    """Comparisons with too few units have no p, and count for none."""
    corrected = [verdict for _, verdicts in judged for verdict in verdicts if verdict.p is not None]
    controls = sum(verdict.gain is not None for verdict in corrected)
    return Families(len(corrected) - controls, controls)


def foot_of(table: Table, verdicts: list[Verdict], study: Families) -> str:
    """The line under a table: the unit that decides, and what p is corrected for."""
    paired = next((verdict.paired for verdict in verdicts if verdict.paired is not None), None)
    if paired is None:
        return "nothing to compare with the probe"
    if not paired.judged:
        return f"{too_few(paired)}: intervals alone"
    own = families_of([(table, verdicts)])
    families = [f"for the {study.methods} comparisons with the probe in this study ({own.methods} here)"]
    if study.controls:
        families.append(f"for the {study.controls} with controls ({own.controls} here)")
    return f"decided over {paired.units} {paired.unit}; p corrected (Holm) {' and, apart, '.join(families)}"


def as_text(judged: Judged, split: str, heading: str, foot: Sequence[str]) -> str:
    """The tables as columns of text, under a heading and with notes at the foot."""
    blocks, study = [heading], families_of(judged)
    for table, verdicts in judged:
        lines = [columns_of(table), *(fields_of(verdict, table) for verdict in verdicts)]
        blocks.append(f"{title_of(table, split)}\n{lay_out(lines)}\n{foot_of(table, verdicts, study)}")
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


def as_latex(judged: Judged, split: str, heading: str, foot: Sequence[str]) -> str:
    """The same tables in LaTeX, each a tabular that needs the package booktabs."""
    blocks, study = [f"% {heading}"], families_of(judged)
    for table, verdicts in judged:
        head, *body = [columns_of(table), *(fields_of(verdict, table) for verdict in verdicts)]
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
                    f"% {foot_of(table, verdicts, study)}",
                ]
            )
        )
    return "\n\n".join([*blocks, "\n".join(f"% {line}" for line in foot)]) + "\n"


def escape_latex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    return escaped.replace("+-", r"$\pm$")


def as_markdown(tables: Sequence[Table], plan: Plan, split: str, commit: str) -> str:
    """answers.md: a table of answers for each encoder and regime, and what the study leaves open."""
    found = answer(tables, plan.study.questions)
    groups = any(table.groups is not None for table in tables)
    count = sum(one.p is not None for of_table in found for one in of_table)
    blocks = [
        f"# What study {plan.name} answers",
        f"Read on {split}" + (f", code {commit}" if commit else "") + f"; made by `make compare NAME={plan.name}`.",
        "\n".join(f"- {note}" for note in answer_notes(plan, split, groups, count)),
    ]
    for table, answers in zip(tables, found, strict=True):
        rows = [["question", "compared", "difference", *intervals_over(groups), "p (Holm)", "answer"]]
        for one in answers:
            fields = [*paired_fields(one.paired), "" if one.p is None else written_p(one.p), one.words]
            rows.append([one.question.ask, compared(one.question), *fields])
        asked = [one.question for one in answers]
        for question in plan.study.questions:
            if question not in asked:
                empty = [""] * (len(rows[0]) - 3)
                rows.append([question.ask, compared(question), *empty, "none: a method cannot work on this data"])
        decided = [f"Decided over {one.paired.units} {one.paired.unit}." for one in answers[:1] if one.paired.judged]
        blocks += [f"## {title_of(table, split)}", *decided, pipe_table(rows)]
    if plan.study.published:
        rows = [["row", "published", "with frozen features"]]
        rows += [[row, said.figure, said.carries_over] for row, said in plan.study.published.items()]
        blocks += ["## What is published", pipe_table(rows)]
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
    over = ["images", "classes", "groups", "narrow"]
    head = ["encoder", "regime", "measure", "split", "method", TRANSDUCTIVE, "control", "runs"]
    head += [f"{name} {what}" for name in figures for what in ("mean", "deviation")]
    head += ["unit", "units", "difference", *(f"{unit} {end}" for unit in over for end in ("low", "high"))]
    head += ["could show", "p", "p_holm", "ahead of control", "ahead low", "ahead high"]
    head += ["ahead p", "ahead p_holm", "verdict"]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for table, verdicts in judged:
        for verdict in verdicts:
            result, paired, gain = verdict.result, verdict.paired, verdict.gain
            fields: dict[str, Any] = {
                "encoder": table.encoder,
                "regime": table.regime.label,
                "measure": table.measure,
                "split": split,
                "method": result.method,
                TRANSDUCTIVE: "yes" if result.transductive else "no",
                "control": result.control.label,
                "runs": len(result.correct),
                "p_holm" if gain is None else "ahead p_holm": verdict.p,
                "verdict": verdict.words,
            }
            for name in figures:
                if values := [of_run[name] for of_run in result.figures if name in of_run]:
                    fields[f"{name} mean"], fields[f"{name} deviation"] = mean_and_deviation(values)
            if paired is not None:
                fields |= {"unit": paired.unit, "units": paired.units, "difference": paired.difference, "p": paired.p}
                fields["could show"] = paired.half_width
                for unit in over:
                    if (ends := getattr(paired, unit)) is not None:
                        fields[f"{unit} low"], fields[f"{unit} high"] = ends
            if gain is not None:
                fields |= {"ahead of control": gain.difference, "ahead p": gain.p}
                fields["ahead low"], fields["ahead high"] = gain.over
            writer.writerow(fields)
    return text.getvalue()


# What is read, and when.


def declared(plan: Plan) -> dict[str, Any]:
    """What a study asks of test, by the keys of its file."""
    return {
        "encoders": list(plan.encoders),
        "methods": plan.study.methods,
        "variants": list(plan.study.variants),
        "controls": [control.label for control in plan.study.controls],
        "regimes": [regime.label for regime in plan.study.regimes],
        "seeds": plan.study.seeds,
        "questions": [compared(question) for question in plan.study.questions],
    }


def read_test_images(data: Path) -> set[str]:
    """The first 16 digits of image_id of each usable test image."""
    index = read_table(data / "index/images.parquet", "index.images/1", ["image_id", "split", "status"]).to_pylist()
    return {row["image_id"][:16] for row in index if (row["status"], row["split"]) == ("ok", "test")}


def check_test(plan: Plan, grid: Sequence[Cell]) -> dict[str, Any] | None:
    """What is to be written down before test is read for these runs, or None where it is written down already.

    A reading is the same where the study's name and list and every run's fingerprint are. Another one of the same
    images, or of some of them, is refused: UserError says what differs, and what to do.
    """
    path, file, images = plan.data / MARKER, f"studies/{plan.name}.yaml", read_test_images(plan.data)
    reading = {"study": plan.name, **declared(plan), "runs": {cell.run: plan.mark(cell) for cell in grid}}
    choose = "or choose on val (declared_test: false)"
    for then in read_readings(plan.data):
        if images.isdisjoint(then["images"].split()):
            continue
        if then["study"] != plan.name:
            raise UserError(
                f"{file}: declared_test: these test images were read already, for study {then['study']} ({path}), whose"
                f" tables lie in {plan.folder.with_name(then['study'])}; go back to that name, {choose}"
            )
        for key, value in declared(plan).items():
            if then[key] != value:
                raise UserError(
                    f"{file}: {key}: test was read for {then[key]} already ({path}), and now it is {value}; go back to"
                    f" that list, {choose}"
                )
        changed = [run for run, mark in reading["runs"].items() if then["runs"].get(run) != mark]
        if changed:
            was = f", which was {then['code']}" if then["code"] else ""
            raise UserError(
                f"{file}: declared_test: test was read already ({path}), and since then the settings, the inputs or the"
                f" code{was} of {len(changed)} of {len(grid)} runs have changed (first {changed[0]}); go back to"
                f" those, {choose}"
            )
        return None
    return reading | {"code": describe_commit(), "images": " ".join(sorted(images))}


def read_readings(data: Path) -> list[dict[str, Any]]:
    """What test was read for so far."""
    path = data / MARKER
    found: list[dict[str, Any]] = read_json(path, "it says what test was read for: restore it") if path.exists() else []
    return found


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


def describe_commit(root: Path = ROOT) -> str:
    """The commit of the checkout at `root`, `-dirty` where files were edited since; empty where there is no git.

    params.yaml may differ, as a profile leaves it: a run's identity has its settings.
    """
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
        edited = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)params.yaml"]
        clean = subprocess.run(edited, cwd=root, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return ""
    return commit.stdout.strip() + ("" if clean or commit.returncode else "-dirty")


def footnotes(plan: Plan, split: str, groups: bool) -> list[str]:
    """The notes under the tables."""
    over = "images, classes and groups" if groups else "images and classes"
    partial = any(isinstance(regime, Partial) for regime in plan.study.regimes)
    return [
        "accuracies and ECE in %, mean +- standard deviation over runs; scaled: after a temperature fitted on val",
        f"- probe: difference to {REFERENCE} in points, 95 % bootstrap intervals over {over}, with the runs' spread",
        "still rising: of methods with epochs, the runs whose last epoch was best: more might have gained more",
        *(["disambiguated: training images whose true class is the likeliest of their candidates, in %"] * partial),
        *verdict_notes(),
        *split_notes(plan, split),
    ]


def verdict_notes() -> list[str]:
    """What p, verdict and `could show` mean, under tables and above answers."""
    return [
        "p: two-sided, exact or by 10,000 random signs, over the coarsest unit there is, which decides",
        f"equivalent: the 90 % interval over that unit lies within {WITHIN} (two tests at 5 %, not corrected)",
        "could show: half the 95 % interval over that unit: about the smallest difference to be shown, before Holm",
    ]


def answer_notes(plan: Plan, split: str, groups: bool, count: int) -> list[str]:
    """The notes above the answers, of which `count` have a p."""
    over = "images, classes and groups" if groups else "images and classes"
    return [
        f"difference: in points of accuracy, paired, 95 % bootstrap intervals over {over}, with the runs' spread",
        *verdict_notes(),
        f"p is corrected (Holm) over the {count} answers on this page; an answer is yes or no under {LEVEL:g}, and"
        " where nothing is shown there may still be a difference: as large as the interval allows",
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
    notes += transductive_notes(plan) + idle_notes(plan)
    if split == "test":
        notes += ["test was read once, for these runs (data/studies/test_was_read.json)", *contamination_note(plan)]
        notes += opened_note(plan.data)
    return notes


def opened_note(data: Path) -> list[str]:
    """A line where some of these test images were looked at in the report; no line where none was."""
    images = read_test_images(data)
    if any(images & set(opening["images"].split()) for opening in opened.read(data)):
        return [f"warning: test pictures were looked at in the report (data/{opened.MARKER}), maybe before choices"]
    return []


def transductive_notes(plan: Plan) -> list[str]:
    """A line where images that are judged send to each other in some of the rows."""
    rows = [name for name in plan.entries if plan.is_transductive(name)]
    heard = "images that are judged send to each other (never their labels), in no other row"
    return [f"{TRANSDUCTIVE}: {', '.join(rows)}: {heard}"] if rows else []


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
        config = read_config(plan, cell.run)
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
    check_comparable(plan)
    split = "test" if plan.study.declared_test else "val"
    reading = check_test(plan, grid) if plan.study.declared_test else None
    stale = [cell.run for cell in grid if not is_made(plan.folder / cell.run, plan.mark(cell))]
    if stale:
        raise UserError(f"{plan.folder}: lacks {len(stale)} of {len(grid)} runs (first {stale[0]}); {again(plan)}")
    if reading is not None:
        write_json(plan.data / MARKER, [*read_readings(plan.data), reading])
    index = read_table(plan.data / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    groups = groups_of(index)
    left_out = read_not_possible(plan, grid)
    rows, tables = [cell for cell in (*grid, *rival_cells(plan, grid)) if cell.row not in left_out], []
    for encoder in plan.encoders:
        for regime in plan.study.regimes:
            of_table = [cell for cell in rows if (cell.encoder, cell.regime) == (encoder, regime)]
            found = read_results(plan, of_table, split)
            tables += [table._replace(groups=group_numbers(table.paths, groups)) for table in found]
    judged = list(zip(tables, judge(tables), strict=True))
    commit = describe_commit()
    heading = f"study {plan.name}, read on {split}" + (f", code {commit}" if commit else "")
    foot = [*footnotes(plan, split, groups is not None), *choice_notes(plan, grid), *not_possible_notes(left_out)]
    text = as_text(judged, split, heading, foot)
    if plan.study.questions or plan.study.published:
        write_text(plan.folder / "answers.md", as_markdown(tables, plan, split, commit))
    write_text(plan.folder / "tables.txt", text)
    if seconds := seconds_of_fits(plan, grid):
        write_text(plan.folder / "seconds.txt", seconds)
    write_text(plan.folder / "tables.csv", as_csv(judged, split))
    write_text(plan.folder / "tables.tex", as_latex(judged, split, heading, foot))
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
