"""Put a study's runs into tables: what each method reaches, and whether it beats the tuned probe and its own controls.

Reads   studies.NAME of params.yaml; data/studies/NAME/RUN/ of every run; data/index/images.parquet; where test is
        declared, data/index/metrics.json.
Writes  data/studies/NAME/tables.txt, tables.csv and tables.tex: a table for each encoder and regime, a row for each
        method and control; where the study asks questions, answers.md; where test is declared, test_was_read.json.
Costs   seconds; memory for the logits of one run at a time.

All figures are of val, unless the study declares test. Then test is read for the methods, variants, controls, regimes,
seeds and questions that the study names at that moment: test_was_read.json remembers them, and another list is refused
from then on.

A difference is accuracy minus that of linear_probe under the same encoder, regime and draw, image by image
(evaluation.statistics.paired_differences: intervals are over images, classes and groups, and hold what other seeds or
draws would change). p is two-sided, over images, and corrected by Holm for the methods of a table. Where a study has
controls, each method is compared with itself under each of them that changes what it reads; these p are corrected for
their own number, and those of a table's questions for theirs.

    python -m evaluation.compare --study baselines
"""

import csv
import io
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.report import contamination, read_health
from evaluation.statistics import Paired, holm, paired_differences
from evaluation.study import FEWER_CONCEPTS, Cell, Plan, Question, cells, is_made, make_plan
from evaluation.words import lay_out, on_these_classes, percent_of_runs, points, points_range, written_p
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import load_params
from fieldmark.store import read_table, vectors_of, write_text
from training.controls import Control
from training.data import SPLITS
from training.metrics import (
    Bools,
    Floats,
    Ints,
    accuracy,
    calibration_error,
    fit_temperature,
    macro_accuracy,
    mean_and_deviation,
    tier_accuracy,
    tiers,
    top_k_accuracy,
)
from training.regimes import LongTail, Regime, Shots, Unseen, harmonic_mean
from training.train import SCHEMA, write_json

REFERENCE = "linear_probe"
LEVEL = 0.05  # of corrected p
MARKER = "test_was_read.json"
# What a control takes away, as the verdict words it.
SUBJECT = {
    "edges_removed": "the edges do",
    "edges_rewired": "which nodes an edge links does",
    "random_vectors": "the texts do",
    "unrelated_texts": "what the texts say does",
    "random_descriptors": "what the texts say does",
    "owners_permuted": "which class owns a text does",
}


class Line(NamedTuple):
    """One method under one control: S runs on the same n images."""

    method: str
    control: Control
    plain: Control  # what the control stands against: none, with as many concepts where the method reads concepts
    correct: Bools  # (S, n)
    figures: list[dict[str, float]]  # of each run, by name


class Table(NamedTuple):
    encoder: str
    regime: Regime
    paths: list[str]  # n
    y: Ints  # (n,) positions in the classes
    lines: list[Line]


class Row(NamedTuple):
    """A line, judged. `paired` is to the probe, None for the probe itself; `p` only where there is no control."""

    line: Line
    paired: Paired | None
    p: float | None
    verdict: str


def read_line(plan: Plan, runs: Sequence[Cell], split: str) -> tuple[list[str], Ints, Line]:
    """Paths and classes of a split's images, and what the runs of one method and control reach on them."""
    paths: list[str] = []
    y: Ints = np.zeros(0, np.int64)
    correct, figures = [], []
    for cell in runs:
        table = read_table(plan.folder / cell.run / "predictions.parquet", SCHEMA).sort_by("path")
        classes = json.loads(table.schema.metadata[b"params"])["classes"]
        labels = pc.index_in(table["class_id"], value_set=pa.array(classes)).to_numpy().astype(np.int64)
        splits = np.array(table["split"].to_pylist(), dtype=str)
        logits, of_split = vectors_of(table, "logits"), splits == split
        if isinstance(cell.regime, Unseen):
            logits, found = measure_unseen(logits, labels, splits, split)
        else:
            found = {}
        figures.append(found | measure(logits, labels, splits, split))
        own_paths = [path for path, chosen in zip(table["path"].to_pylist(), of_split, strict=True) if chosen]
        if cell is not runs[0] and own_paths != paths:
            raise UserError(f"{plan.folder / cell.run}: is of other images than {runs[0].run}; {again(plan)}")
        paths, y = own_paths, labels[of_split]
        correct.append(logits[of_split].argmax(1) == y)
    method, control = runs[0].method, runs[0].control
    plain = Control(concepts=control.concepts if plan.reads(runs[0], FEWER_CONCEPTS) else None)
    return paths, y, Line(method, control, plain, np.stack(correct), figures)


def measure(logits: Floats, y: Ints, splits: np.ndarray, split: str) -> dict[str, float]:
    """The figures of one run on a split, by name. The temperature comes from val, where there is any."""
    z, truth, val = logits[splits == split], y[splits == split], splits == "val"
    figures = {
        "accuracy": accuracy(z, truth),
        "macro": macro_accuracy(z, truth),
        "top-5": top_k_accuracy(z, truth, 5),
        "ECE": calibration_error(z, truth),
    }
    if val.any() and np.isfinite(logits).all():
        figures["ECE, scaled"] = calibration_error(z / fit_temperature(logits[val], y[val]), truth)
    counts = np.bincount(y[splits == "train"], minlength=logits.shape[1])
    return figures | tier_accuracy(z, truth, tiers(counts, limits=None))


def measure_unseen(logits: Floats, y: Ints, splits: np.ndarray, split: str) -> tuple[Floats, dict[str, float]]:
    """Logits with -inf for classes neither trained on nor in the split, and the figures of both label spaces.

    seen and unseen: accuracy among the seen and among the other classes alone; harmonic: the mean of the accuracies of
    both kinds of images where all classes compete.
    """
    seen, present = (np.isin(np.arange(logits.shape[1]), y[splits == name]) for name in ("train", split))
    unseen = present & ~seen
    joint = np.where(seen | unseen, logits, -np.inf).astype(np.float32)
    figures, competing = {}, []
    for name, space in (("seen", seen), ("unseen", unseen)):
        images = (splits == split) & space[y]
        figures[name] = accuracy(np.where(space, logits, -np.inf)[images], y[images])
        competing.append(accuracy(joint[images], y[images]))
    return joint, figures | {"harmonic": harmonic_mean(*competing)}


def read_lines(plan: Plan, grid: Sequence[Cell], split: str) -> Table:
    """The lines of one encoder and regime. Raises UserError where runs are of different images."""
    y: Ints = np.zeros(0, np.int64)
    lines: list[Line] = []
    paths: list[str] | None = None
    for _, runs in groupby(sorted(grid, key=line_order(plan)), line_order(plan)):
        own_paths, y, line = read_line(plan, list(runs), split)
        paths = own_paths if paths is None else paths
        if own_paths != paths:
            raise UserError(f"{plan.folder}: its runs are of different images; {again(plan)}")
        lines.append(line)
    assert paths is not None
    if not paths:
        raise UserError(f"{plan.folder}: regime {grid[0].regime.label} leaves no {split} image to compare on")
    return Table(grid[0].encoder, grid[0].regime, paths, y, lines)


def line_order(plan: Plan) -> Callable[[Cell], tuple[int, int]]:
    """Methods and variants, and within them controls, as the study lists them."""
    return lambda cell: (list(plan.entries).index(cell.method), plan.study.controls.index(cell.control))


def judge(table: Table, groups: Ints | None) -> list[Row]:
    """Every line against the probe, and every method against itself under its controls."""
    seeds = max(len(line.correct) for line in table.lines)
    images = len(table.paths)
    correct = np.stack([np.broadcast_to(line.correct, (seeds, images)) for line in table.lines])
    plain = {(line.method, line.plain): n for n, line in enumerate(table.lines) if line.control == line.plain}
    reference = plain[REFERENCE, Control()]
    paired = paired_differences(correct, correct[reference], table.y, groups)
    rivals = [number for number in plain.values() if number != reference]
    p = dict(zip(rivals, holm([paired[number].p for number in rivals]), strict=True))

    own = {
        number: plain[line.method, line.plain]
        for number, line in enumerate(table.lines)
        if line.control != line.plain and (line.method, line.plain) in plain
    }
    gains: dict[int, tuple[Paired, float]] = {}
    if own:
        found = paired_differences(correct[list(own.values())], correct[list(own)], table.y, groups)
        gains = dict(zip(own, zip(found, holm([gain.p for gain in found]), strict=True), strict=True))

    rows = []
    for number, line in enumerate(table.lines):
        if number == reference:
            verdicts = ["the probe"]
        elif line.control == line.plain:
            verdicts = [probe_verdict(paired[number], p[number])]
        elif number in gains:
            verdicts = [control_verdict(*gains[number])]
        else:
            verdicts = [f"control of {line.plain.label}, which the study does not have"]
        for other, (gain, corrected) in gains.items():
            control = table.lines[other].control
            if own[other] == number and not is_ahead(gain, corrected):
                verdicts.append(f"does not beat its control {control.label}: {SUBJECT[control.name]} nothing here")
        rows.append(Row(line, None if number == reference else paired[number], p.get(number), "; ".join(verdicts)))
    return rows


def is_ahead(paired: Paired, p: float) -> bool:
    """Whether a difference is above 0 by its corrected p."""
    return p < LEVEL and paired.difference > 0


def probe_verdict(paired: Paired, p: float) -> str:
    """In plain words; a gain that may be due to the choice of classes is said to be of these."""
    if p >= LEVEL:
        return "no difference shown"
    return ("beats the probe" if paired.difference > 0 else "worse than the probe") + on_these_classes(paired.classes)


def control_verdict(gain: Paired, p: float) -> str:
    """What the method itself, without the control, is ahead by."""
    words = f"control: the method is {points(gain.difference)} {points_range(gain.images)} ahead, p {written_p(p)}"
    return words if is_ahead(gain, p) else f"{words}: not shown to be"


class Answer(NamedTuple):
    """What a table says of a question; `paired` is `of` minus `against`, p corrected for the table's questions."""

    question: Question
    paired: Paired
    p: float

    @property
    def words(self) -> str:
        if self.p >= LEVEL:
            return f"no difference shown: the interval holds {points_range(self.paired.images)}"
        found = "yes" if self.paired.difference > 0 else "no: the other way round"
        return found + on_these_classes(self.paired.classes)


def answer(table: Table, questions: Sequence[Question], groups: Ints | None) -> list[Answer]:
    """Every question's methods, as they are, against each other."""
    correct = {line.method: line.correct for line in table.lines if line.control == Control()}
    shape = max(len(runs) for runs in correct.values()), len(table.paths)
    of, against = (
        np.stack([np.broadcast_to(correct[name], shape) for name in names])
        for names in ([question.of for question in questions], [question.against for question in questions])
    )
    paired = paired_differences(of, against, table.y, groups)
    return [Answer(*found) for found in zip(questions, paired, holm([one.p for one in paired]), strict=True)]


# Words and files.


def shown_figures(regime: Regime) -> list[str]:
    """The figures that the text and LaTeX tables of a regime have; tables.csv has all."""
    more = {LongTail: ["few", "medium", "many"], Unseen: ["seen", "unseen", "harmonic"]}
    return ["accuracy", "macro", "top-5", "ECE", "ECE, scaled", *more.get(type(regime), [])]


def columns_of(table: Table, groups: Ints | None) -> list[str]:
    over = intervals_over(groups is not None)
    return ["method", "control", *shown_figures(table.regime), "- probe", *over, "p (Holm)", "verdict"]


def intervals_over(groups: bool) -> list[str]:
    return ["over images", "over classes", *(["over groups"] if groups else [])]


def paired_fields(paired: Paired) -> list[str]:
    """A difference and its intervals, in points."""
    ends = [paired.images, paired.classes, *([paired.groups] if paired.groups else [])]
    return [points(paired.difference), *map(points_range, ends)]


def fields_of(row: Row, regime: Regime, groups: Ints | None) -> list[str]:
    """A row of the text and LaTeX tables."""
    figures = []
    for name in shown_figures(regime):
        values = [found[name] for found in row.line.figures if name in found]
        figures.append(percent_of_runs(values) if values else "")
    intervals = [""] * (3 if groups is None else 4) if row.paired is None else paired_fields(row.paired)
    p = "" if row.p is None else written_p(row.p)
    return [row.line.method, row.line.control.label, *figures, *intervals, p, row.verdict]


def title_of(table: Table, split: str) -> str:
    classes, runs = len(np.unique(table.y)), max(len(line.correct) for line in table.lines)
    images = f"{len(table.paths)} images of {classes} classes"
    return f"{table.encoder}, {table.regime.label}: {split}, {images}, {runs} run{'s' * (runs > 1)}"


Judged = Sequence[tuple[Table, list[Row]]]


def as_text(judged: Judged, split: str, groups: Mapping[str, str] | None, heading: str, foot: Sequence[str]) -> str:
    blocks = [heading]
    for table, rows in judged:
        own = group_numbers(table, groups)
        lines = [columns_of(table, own), *(fields_of(row, table.regime, own) for row in rows)]
        blocks.append(f"{title_of(table, split)}\n{lay_out(lines)}")
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


def as_latex(judged: Judged, split: str, groups: Mapping[str, str] | None, heading: str, foot: Sequence[str]) -> str:
    """One tabular a table, for the package booktabs."""
    blocks = [f"% {heading}"]
    for table, rows in judged:
        own = group_numbers(table, groups)
        head, *body = [columns_of(table, own), *(fields_of(row, table.regime, own) for row in rows)]
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
        f"Read on {split}" + (f", code {commit}" if commit else "") + f"; made by `make compare STUDY={plan.name}`.",
        "\n".join(f"- {note}" for note in answer_notes(plan, split, groups is not None)),
    ]
    for table in tables:
        own = group_numbers(table, groups)
        rows = [["question", "compared", "difference", *intervals_over(groups is not None), "p (Holm)", "answer"]]
        for found in answer(table, plan.study.questions, own):
            asked, paired = found.question, found.paired
            compared = f"{asked.of} - {asked.against}"
            rows.append([asked.ask, compared, *paired_fields(paired), written_p(found.p), found.words])
        blocks += [f"## {title_of(table, split)}", pipe_table(rows)]
    if plan.study.open:
        rows = [["question", "why not"], *([one.ask, one.because] for one in plan.study.open)]
        blocks += ["## Not answered", pipe_table(rows)]
    return "\n\n".join(blocks) + "\n"


def pipe_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(field.replace('|', '&#124;') for field in row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def as_csv(judged: Judged, split: str) -> str:
    """All figures, as fractions: a row a line of the tables."""
    runs = [run for _, rows in judged for row in rows for run in row.line.figures]
    figures = list(dict.fromkeys(name for run in runs for name in run))
    over = ["images", "classes", "groups"]
    head = ["encoder", "regime", "split", "method", "control", "runs"]
    head += [f"{name} {what}" for name in figures for what in ("mean", "deviation")]
    head += ["difference", *(f"{unit} {end}" for unit in over for end in ("low", "high")), "p", "p_holm", "verdict"]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for table, rows in judged:
        for row in rows:
            line = row.line
            fields: dict[str, Any] = {
                "encoder": table.encoder,
                "regime": table.regime.label,
                "split": split,
                "method": line.method,
                "control": line.control.label,
                "runs": len(line.correct),
                "p_holm": row.p,
                "verdict": row.verdict,
            }
            for name in figures:
                if values := [run[name] for run in line.figures if name in run]:
                    fields[f"{name} mean"], fields[f"{name} deviation"] = mean_and_deviation(values)
            if row.paired is not None:
                fields |= {"difference": row.paired.difference, "p": row.paired.p}
                for unit in over:
                    if (ends := getattr(row.paired, unit)) is not None:
                        fields[f"{unit} low"], fields[f"{unit} high"] = ends
            writer.writerow(fields)
    return text.getvalue()


# What is read, and when.


def read_groups(data: Path) -> dict[str, str] | None:
    """The track, camera or site of each path, an image without one being its own; None where no image has one."""
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
        "encoders": plan.study.encoders,
        "methods": plan.study.methods,
        "variants": list(plan.study.variants),
        "controls": [control.label for control in plan.study.controls],
        "regimes": [regime.label for regime in plan.study.regimes],
        "seeds": plan.study.seeds,
        "questions": [f"{question.of} - {question.against}" for question in plan.study.questions],
    }
    if not path.is_file():
        write_json(path, declared)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in declared.items():
        then = before.get(key, [])  # there were studies before there were variants and questions
        if then != value:
            raise UserError(
                f"studies.{plan.name}.{key}: test was read for {then} already ({path}), and now it is {value};"
                " go back to that list, or choose on val (declared_test: false)"
            )


def contamination_note(plan: Plan) -> list[str]:
    """What the report says of test images that train or val give away, in a line."""
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
    over = "images, classes and groups" if groups else "images and classes"
    return [
        "accuracies and ECE in %, mean +- standard deviation over runs; scaled: after a temperature fitted on val",
        f"- probe: difference to {REFERENCE} in points, 95 % bootstrap intervals over {over}, with the runs' spread",
        "p: two-sided, over images, Holm-corrected for the methods of the table; of controls, for the controls",
        *split_notes(plan, split),
    ]


def answer_notes(plan: Plan, split: str, groups: bool) -> list[str]:
    over = "images, classes and groups" if groups else "images and classes"
    return [
        f"difference: in points of accuracy, paired, 95 % bootstrap intervals over {over}, with the runs' spread",
        "p: two-sided, over images, Holm-corrected for the questions of the table; an answer is yes or no under"
        f" {LEVEL:g}, and without a difference shown there may still be one: as large as the interval allows",
        *split_notes(plan, split),
    ]


def split_notes(plan: Plan, split: str) -> list[str]:
    """What the split that is read had to do with the fits."""
    notes = []
    by_val = [regime.label for regime in plan.study.regimes if not isinstance(regime, Shots)]
    if by_val and split == "val":
        notes.append(f"val also chose settings and epochs under {', '.join(by_val)}: there its figures are too high")
    if any(isinstance(regime, Shots) for regime in plan.study.regimes):
        left_out = f", {len(plan.left_out)} more are left out" if plan.left_out else ""
        notes.append(
            f"few-shot: settings were chosen on {len(plan.development)} other classes{left_out}; val had no part in the"
            " fits; each run is a draw of shots"
        )
    return notes + (contamination_note(plan) if split == "test" else [])


def again(plan: Plan) -> str:
    return f"run `make study NAME={plan.name}`"


def compare(plan: Plan, grid: Sequence[Cell]) -> str:
    """Write the tables of a study; returns them as text. Raises UserError where a run is missing or stale."""
    if REFERENCE not in plan.study.methods or Control() not in plan.study.controls:
        raise UserError(f"studies.{plan.name}: lacks {REFERENCE} or control none, to compare with; add it")
    stale = [cell.run for cell in grid if not is_made(plan.folder / cell.run, plan.mark(cell))]
    if stale:
        raise UserError(f"{plan.folder}: lacks {len(stale)} of {len(grid)} runs (first {stale[0]}); {again(plan)}")
    split = "test" if plan.study.declared_test else "val"
    if plan.study.declared_test:
        declare_test(plan)
    groups = read_groups(plan.data)
    judged = []
    for encoder in plan.study.encoders:
        for regime in plan.study.regimes:
            of_table = [cell for cell in grid if (cell.encoder, cell.regime) == (encoder, regime)]
            table = read_lines(plan, of_table, split)
            judged.append((table, judge(table, group_numbers(table, groups))))
    commit = describe_commit()
    heading = f"study {plan.name}, read on {split}" + (f", code {commit}" if commit else "")
    foot = footnotes(plan, split, groups is not None)
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
    parser.add_argument("--study", required=True, help="a name under `studies` in params.yaml")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    plan = make_plan(arguments.params, params, arguments.study, Path(arguments.data))
    print(compare(plan, cells(plan, params.train.seed)), end="")


if __name__ == "__main__":
    run(main)
