"""Put accuracy, confusion, explained test images and the health of the data set on one page.

Reads   data/runs/RUN/{config.json,metrics.json,predictions.parquet} of every run in train.runs;
        data/index/{images,classes,near_duplicates}.parquet, data/index/metrics.json, data/thumbs/,
        data/concepts/concepts.parquet, data/{concepts,descriptions}/answers.parquet (what they cost); for each encoder
        that a run stands on data/bank/E.parquet (a tower has no texts, and so no bank and no labels), and for that of
        the run that is shown also data/labels/E/ and the boxes in data/embed/E/images/.
Writes  data/report/index.html (one page that loads nothing else), data/report/summary.txt (its table as text) and
        data/report/state.json, what `python -m tools.changes` compares; that one also in .cache/states.
Costs   seconds; memory for the logits of one run at a time.

Every accuracy is computed from predictions.parquet and has to agree with metrics.json. Differences are paired, image
by image, with the intervals of evaluation.statistics.paired_difference over the coarsest unit there is: groups where
images name them, else images. They stand on val first; on test they are a single reading, not corrected for the number
of runs, and no verdict (evaluation.compare gives those). The run shown in detail, and its seed, are those that are best
on the half of val that chooses. What the page calls a patch or a concept comes from label_patches: it says what the
encoder sees in the picture, not why a method decided as it did. A run whose method cannot work on this data is a row
that says why. Where test images have a near duplicate, or other images of their group, in train or val, the page and
its summary warn.

    python -m evaluation.report
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evaluation.changes import dump, remember, take_state
from evaluation.examples import make_examples, name_concept
from evaluation.health import HEALTH, contamination, near_pairs, read_health
from evaluation.runs import (
    SPLITS,
    NotMade,
    Row,
    Run,
    check_marks,
    check_same_images,
    group_numbers,
    groups_of,
    query,
    read_marks,
    read_run,
)
from evaluation.statistics import UNITS, Paired, paired_difference
from evaluation.words import lay_out, percent, percent_and_deviation, points, points_range
from fieldmark import store
from fieldmark.command import UserError, printable, run, stage_parser
from fieldmark.params import Params, load_params
from training.metrics import Ints

MATRIX_CLASSES = 60  # a confusion matrix of more classes is not readable
PAIRS = 15  # most confused pairs listed
TELLING = 10  # concepts listed
REASONS = 20  # kinds of unused files listed
COMPARED = ("val", "test")  # where runs are held against the reference


def count_dataset(index: pa.Table, classes: pa.Table) -> Row:
    """Classes, usable images by split, and the unused files by reason."""
    per_split = dict(query("SELECT split, count(*) FROM t WHERE status = 'ok' GROUP BY split", t=index))
    unused = query(
        """SELECT status, count(*) AS files, min(path), CASE
                   WHEN error IS NOT NULL THEN error
                   WHEN duplicate_of IS NOT NULL THEN 'the same bytes as a file that is used'
                   ELSE 'no reason given' END AS reason
            FROM t WHERE status <> 'ok' GROUP BY status, reason ORDER BY files DESC, status, reason""",
        t=index,
    )
    return {
        "classes": len(classes),
        "images": {split: per_split.get(split, 0) for split in SPLITS},
        "unused": unused[:REASONS],
        "unused_files": sum(files for _, files, _, _ in unused),
        "unused_more": sum(files for _, files, _, _ in unused[REASONS:]),
    }


def confused_pairs(matrix: Ints) -> list[tuple[int, int, int, int]]:
    """Pairs of classes by how often one is taken for the other: (a, b, a taken for b, b taken for a)."""
    true, predicted = np.nonzero(matrix * (1 - np.eye(len(matrix), dtype=int)))
    table = pa.table({"true": true, "predicted": predicted, "images": matrix[true, predicted]})
    return query(
        f"""SELECT least("true", predicted) AS a, greatest("true", predicted) AS b,
                   sum(CASE WHEN "true" < predicted THEN images ELSE 0 END)::BIGINT AS ab,
                   sum(CASE WHEN "true" > predicted THEN images ELSE 0 END)::BIGINT AS ba
            FROM t GROUP BY a, b ORDER BY ab + ba DESC, a, b LIMIT {PAIRS}""",
        t=table,
    )


def order_classes(classes: pa.Table, chosen: Sequence[str]) -> list[int]:
    """Positions in `chosen`, such that classes of one superclass stand together."""
    row = {row["class_id"]: row for row in classes.to_pylist()}

    def place(position: int) -> tuple[str, str, str]:
        class_id = chosen[position]
        return row[class_id]["superclass"] or "", row[class_id]["name"], class_id

    return sorted(range(len(chosen)), key=place)


def count_concepts(concepts: pa.Table, bank: pa.Table, names: Mapping[str, str]) -> Row:
    """How many concepts were written and are kept, why the others were dropped, and which tell most of a class.

    Concepts that are class names are not counted.
    """
    count = "SELECT count(*), count(*) FILTER (kept) FROM t WHERE kind <> 'name'"
    [(written, clean)] = query(count, t=concepts)
    [(candidates, kept)] = query(count, t=bank)
    # A reason may name the concept that was preferred behind a colon: "near duplicate of: a fish with ..."
    dropped = query(
        """SELECT stage, count(*) AS n,
                  regexp_replace(split_part(coalesce(drop_reason, 'no reason given'), ':', 1), ' of$', ' of another')
                  AS reason
           FROM (
             SELECT 'clean_concepts' AS stage, drop_reason FROM concepts WHERE NOT kept AND kind <> 'name'
             UNION ALL
             SELECT 'select_concepts', drop_reason FROM bank WHERE NOT kept AND kind <> 'name'
           ) GROUP BY stage, reason ORDER BY stage, n DESC, reason""",
        concepts=concepts,
        bank=bank,
    )
    best = sorted(
        (row for row in bank.to_pylist() if row["kept"] and row["discriminability"] is not None),
        key=lambda row: (-row["discriminability"], row["concept_idx"]),
    )
    telling = [
        {
            "text": name_concept(row, names),
            "classes": [names[class_id] for class_id in row["class_ids"]],
            "kind": row["kind"],
            "nats": row["discriminability"],
        }
        for row in best[:TELLING]
    ]
    counts = {"written": written, "clean": clean, "candidates": candidates, "kept": kept}
    return {**counts, "dropped": dropped, "telling": telling}


def accuracy_rows(runs: Sequence[Run], reference: Run, groups: Mapping[str, str] | None) -> list[Row]:
    """A row for each run: its accuracies by split and, on val and test, its differences to the reference (`paired`).

    The reference itself has none. `groups` says which group each image is of.
    """
    rows = []
    for found in runs:
        paired: dict[str, Paired] = {}
        for split in COMPARED if found is not reference else ():
            of_split = found.split == split
            numbers = group_numbers([path for path, own in zip(found.paths, of_split, strict=True) if own], groups)
            right = found.on(split), reference.on(split)
            paired[split] = paired_difference(*right, found.y[of_split], numbers, by_class=found.by_class)
        splits = {split: found.accuracy(split) for split in SPLITS}
        row = {"name": found.name, "encoder": found.encoder, "seeds": len(found.seeds), "paired": paired}
        rows.append({**row, **splits})
    return rows


def units_of(rows: Sequence[Row]) -> str:
    """What the intervals on val and test are over, in words; empty where nothing is compared."""
    paired = next((row["paired"] for row in rows if row["paired"]), None)
    if paired is None:
        return ""
    said = " and ".join(f"{paired[split].units} {paired[split].unit} of {split}" for split in COMPARED)
    few = not all(paired[split].judged for split in COMPARED)
    return said + (f": fewer than {UNITS} say nothing of others" if few else "")


def number(value: float | None) -> str:
    """A count or a median: without decimals where it is whole, a dash where it is None."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def summarise(rows: Sequence[Row], not_made: Sequence[NotMade], reference: str, warning: Row | None, page: Path) -> str:
    """summary.txt: the table in % and points, and the notes that it must not be read without."""
    lines = [["run", *(head for split in COMPARED for head in (split, f"{split} - {reference} [95 %]")), "train"]]
    for row in rows:
        fields = [row["name"]]
        for split in COMPARED:
            paired = row["paired"].get(split)
            difference = f"{points(paired.difference)} {points_range(paired.over)}" if paired else "reference"
            fields += [percent_and_deviation(*row[split]), difference]
        lines.append([*fields, percent_and_deviation(*row["train"])])
    counts = sorted({row["seeds"] for row in rows})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"accuracy in %, mean +- standard deviation over seeds ({seeds}); paired difference in points"
    missing = [f"{one.name}: cannot work on this data: {one.reason}" for one in not_made]
    over = units_of(rows)
    lasts = [
        note,
        *([f"95 % intervals over {over}"] if over else []),
        "val: the half of it that chose no setting and no epoch",
        "test: a single, uncorrected reading of every run here; verdicts are a study's (docs/studies.md)",
        *missing,
        f"report: {page.as_posix()}",
    ]
    if warning is not None:
        reasons = ", ".join(f"{images} {reason}" for images, reason in warning["reasons"])
        counts_of = f"{warning['images']} of {warning['of']} images ({reasons})"
        lasts.insert(-1, f"warning: test is contaminated: {counts_of}; test accuracy is optimistic")
    return printable("\n".join([lay_out(lines), "", *lasts])) + "\n"


def render(content: Row) -> str:
    """The page. Everything that comes from data is escaped, and so are characters that change how a text is read."""
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # What is not a plain text was made by the template itself, or is a number.
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, points=points, points_range=points_range, number=number)
    return environment.get_template("report.html.jinja").render(content)


def find_reference(data: Path, found: Sequence[Run | NotMade], name: str) -> Run:
    """The run that the others are compared with. Raises UserError where its method cannot work on this data."""
    reference = next(one for one in found if one.name == name)
    if isinstance(reference, NotMade):
        raise UserError(
            f"{data}/runs/{name}: cannot work on this data ({reference.reason}), and the others would be compared with"
            " it; name another run in report.reference"
        )
    return reference


def report(params: Params, data: Path) -> str:
    """Write data/report/ and return the summary."""
    buckets = params.dataset.buckets
    index = store.read_table(data / "index/images.parquet", "index.images/1")
    classes = store.read_table(data / "index/classes.parquet", "index.classes/1")
    names = dict(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True))
    found = [read_run(data, name, planned.encoder) for name, planned in params.train.runs.items()]
    runs, not_made = [one for one in found if isinstance(one, Run)], [one for one in found if isinstance(one, NotMade)]
    reference = find_reference(data, found, params.report.reference)
    check_same_images(data, runs, index)
    dataset = count_dataset(index, classes)
    health = read_health(data / "index/metrics.json", dataset["images"])
    warning = contamination(health, dataset["images"]["test"])

    # Of equals, the first in params.yaml.
    shown = max(runs, key=lambda one: one.accuracy("choose")[0])
    has_texts = shown.encoder in params.encoders
    marks = read_marks(data, shown.encoder, buckets, has_texts)
    check_marks(data, shown, marks)
    bank: pa.Table | None = None
    if has_texts:
        columns = ["concept_idx", "text", "class_ids", "kind", "discriminability", "kept", "drop_reason"]
        bank = store.read_table(data / f"bank/{shown.encoder}.parquet", "bank/1", columns)
    concepts = store.read_table(data / "concepts/concepts.parquet", "concepts/1", ["kind", "kept", "drop_reason"])
    rows = accuracy_rows(runs, reference, groups_of(index))

    test = shown.split == "test"
    guesses = shown.predicted[shown.seeds.index(shown.model_seed), test]
    matrix = np.zeros((len(shown.classes), len(shown.classes)), dtype=np.int64)  # rows: the true classes
    np.add.at(matrix, (shown.y[test], guesses), 1)
    order = order_classes(classes, shown.classes)
    content = {
        "domain": params.domain,
        "dataset": dataset,
        "health_table": HEALTH,
        "health": health,
        "warning": warning,
        "near": near_pairs(data, index, buckets),
        "rows": rows,
        "not_made": not_made,
        "reference": reference.name,
        "reach": max([0.01, *(abs(end) for row in rows if row["paired"] for end in row["paired"]["val"].over)]),
        "units": units_of(rows),
        "shown": shown,
        "names": names,
        "test_images": int(test.sum()),
        "wrong": int((guesses != shown.y[test]).sum()),
        "pairs": confused_pairs(matrix),
        "totals": matrix.sum(axis=1).tolist(),
        "order": order if len(order) <= MATRIX_CLASSES else [],
        "matrix": matrix.tolist(),
        "examples": make_examples(data, shown, index, bank, names, buckets=buckets, count=params.report.examples),
        "concepts": None if bank is None else count_concepts(concepts, bank, names),
        "marks": {**marks, **{f"runs/{one.name}/predictions.parquet": one.mark for one in runs}},
    }
    page = data / "report/index.html"
    html, summary = render(content), summarise(rows, not_made, reference.name, warning, page)
    store.write_text(page, html)
    store.write_text(page.with_name("summary.txt"), summary)
    used = {encoder for planned in params.train.runs.values() for encoder in (planned.encoder, *planned.also)}
    state = take_state(data, runs, [encoder for encoder in params.encoders if encoder in used])
    store.write_text(page.with_name("state.json"), dump(state))
    remember(state, data)
    return summary


def main() -> None:
    parser = stage_parser(__doc__)
    where = "where the stages wrote (default: data)"
    parser.add_argument("--data", default="data", metavar="DIR", help=where)
    arguments = parser.parse_args()
    report(load_params(arguments.params), Path(arguments.data))
    print(f"{Path(arguments.data) / 'report'}: index.html and summary.txt are written")


if __name__ == "__main__":
    run(main)
