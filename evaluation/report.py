"""Put accuracy, confusion, pictures, concepts and the health of the data set on one page, to look around in.

Reads   data/runs/RUN/{config.json,metrics.json,predictions.parquet,history.csv} of every run in train.runs;
        data/index/{images,classes,near_duplicates}.parquet, data/index/metrics.json, data/thumbs/;
        data/descriptions/descriptions.parquet and cells.parquet, and data/asked/NAME/texts.parquet that a run reads
        (what they give away of the classes: evaluation/leaks.py);
        data/concepts/concepts.parquet, every answers.parquet (what they cost); for each encoder
        that a run stands on data/bank/E.parquet (a tower has no texts, and so no bank and no labels), and for that of
        the run that is shown also data/bank/E.json, data/labels/E/ and the boxes in data/embed/E/images/; the last
        state that was another, in .cache/states, where there is one: what changed since.
Writes  data/report/index.html (one page that loads nothing else; above 20 MB its pictures lie beside it, in
        data/report/pictures/), data/report/summary.txt (its table as text) and data/report/state.json, what
        `python -m tools.changes` compares; that one also in .cache/states. With --open-test also
        data/studies/test_was_opened.json.
Costs   seconds to a minute; memory for what one run says of val and the weights of concepts in the pictures.

Every accuracy is computed from predictions.parquet and has to agree with metrics.json. Differences are paired, image
by image, with the intervals of evaluation.statistics.paired_difference over the coarsest unit there is: groups where
images name them, else images. They stand on val first; on test they are a single reading, not corrected for the number
of runs, and no verdict (evaluation.compare gives those). The run shown in detail is report.run, or the one that is best
on the half of val that chooses; its seed is the best one there. A run whose method cannot work on this data is a row
that says why. Where test images have a near duplicate, or other images of their group, in train or val, the page and
its summary warn; and where a run reads what a model said of the very pictures, with how far those words get alone.

Confusion is of the half of val that chose nothing. The pictures are those of val: of that half, and of the half that
chose, which is marked and on which a run does a little too well; of more than 5,000 so many are drawn. Whoever edits
concepts while looking at test pictures tunes on them: they are shown with --open-test alone, and that is written down,
on the page and in a file that no later run removes.

    python -m evaluation.report
    python -m evaluation.report --study NAME   # out-of-fold images of a study: many more than val has
    python -m evaluation.report --open-test    # test pictures too
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from evaluation import opened
from evaluation.accuracies import accuracy_rows, reach_of, summarise, units_of, vote_rows
from evaluation.calibration import read_half
from evaluation.changes import GENERIC, compare, dump, last_state, remember, take_state
from evaluation.classes import class_rows, confused_pairs, confusion, mean_doubt, order_classes
from evaluation.concept_bank import (
    CHANCE,
    add_patches,
    concept_rows,
    count_concepts,
    see,
    speaking,
    telling_apart,
    written_texts,
)
from evaluation.curves import read_curves
from evaluation.decisions import explain_runs, to_explain
from evaluation.gallery import draw_pictures, picture_rows, read_patches, read_thumbs
from evaluation.health import HEALTH, contamination, near_pairs, odd_sizes, read_health
from evaluation.leaks import read_leaks
from evaluation.out_of_fold import FOLD, half_of, read_out_of_fold
from evaluation.page import FILES, Page, render
from evaluation.runs import (
    SPLITS,
    NotMade,
    Row,
    Run,
    check_marks,
    check_same_images,
    groups_of,
    query,
    read_json,
    read_logits,
    read_marks,
    read_run,
)
from evaluation.unsure import answers, judge_half
from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.concepts import gate
from fieldmark.params import Params, load_params
from training.explain import LEAST_MOVE
from training.metrics import Floats, Ints

MATRIX_CLASSES = 60  # a confusion matrix of more classes is not readable
REASONS = 20  # kinds of unused files listed


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


def find_reference(data: Path, found: Sequence[Run | NotMade], name: str) -> Run:
    """The run that the others are compared with. Raises UserError where its method cannot work on this data."""
    reference = next(one for one in found if one.name == name)
    if isinstance(reference, NotMade):
        raise UserError(
            f"{data}/runs/{name}: cannot work on this data ({reference.reason}), and the others would be compared with"
            " it; name another run in report.reference"
        )
    return reference


def find_shown(data: Path, found: Sequence[Run | NotMade], name: str | None) -> Run:
    """The run shown in detail: `name`, or the one that is best where val chooses (Run.chosen_by), of equals the first.

    Raises UserError where its method cannot work on this data.
    """
    if name is None:
        return max((one for one in found if isinstance(one, Run)), key=lambda one: one.chosen_by)
    shown = next(one for one in found if one.name == name)
    if isinstance(shown, NotMade):
        raise UserError(
            f"{data}/runs/{name}: cannot work on this data ({shown.reason}); name another run in report.run, or null"
        )
    return shown


def explain(
    params: Params,
    data: Path,
    shown: Run,
    index: pa.Table,
    classes: Sequence[str],
    pictures: Sequence[tuple[str, Row]],
    pairs: Sequence[tuple[int, int, int, int]],
) -> Row:
    """What the page says with concepts; adds to each of `pictures` what the encoder sees in it.

    `classes` are class_ids, those of the run first.
    """
    buckets, encoder = params.dataset.buckets, shown.encoder
    label = {class_id: number for number, class_id in enumerate(classes)}
    columns = ["concept_idx", "text", "class_ids", "kind", "discriminability", "kept", "drop_reason"]
    table = store.read_table(data / f"bank/{encoder}.parquet", "bank/1", columns)
    bank = table.sort_by("concept_idx").to_pylist()
    concepts = store.read_table(data / "concepts/concepts.parquet", "concepts/1")
    place = {row["concept_idx"]: number for number, row in enumerate(bank)}

    ids = [image_id for image_id, _ in pictures]
    image_id = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    train = {image_id[shown.paths[at]]: int(shown.y[at]) for at in np.flatnonzero(shown.split == "train")}
    seen = see(data, encoder, buckets, ids, train, len(shown.classes), place)
    # Neither test pictures, where they are opened, nor training pictures, by which concepts were selected, have a say
    # in what a concept is worth.
    val = {path for path, split in zip(shown.paths, shown.split, strict=True) if split in ("val", "choose")}
    judged = [number for number, (_, picture) in enumerate(pictures) if picture["path"] in val]
    of_val = seen._replace(weight=seen.weight[judged], node=seen.node[judged])
    y: Ints = np.array([pictures[number][1]["y"] for number in judged])
    rows, patches = concept_rows(concepts, bank, of_val, y, ids, label)
    add_patches(rows, patches, data, encoder, buckets, [ids[number] for number in judged])

    seen_patches = read_patches(data, encoder, buckets, ids, place)
    owners = [row["owners"] if row["kept"] else [] for row in rows]
    for number, (one, picture) in enumerate(pictures):
        pair = guess_and_rival(picture)
        picture |= seen_patches[one] | {"speak": speaking(seen.weight[number], owners, *pair)}
    telling = []
    for a, b, *_ in pairs:
        allowed = [number for number, own in enumerate(owners) if (a in own) != (b in own)]
        telling.append(telling_apart(seen, a, b, allowed))
    judgement = read_json(data / f"bank/{encoder}.json", f"run select_concepts@{encoder} again (dvc repro)")["judged"]
    finds = [row["finds"] for row in rows if row["finds"] is not None]
    return {
        "counts": count_concepts(concepts, table),
        "gate": gate.say(judgement),
        "verdict": judgement["verdict"],
        "rows": rows,
        "telling": telling,
        "written": written_texts(concepts),
        "judged": len(finds),
        "useless": sum(value <= CHANCE for value in finds),
    }


def guess_and_rival(picture: Row) -> tuple[int, int]:
    """The class that is answered, and the one that it is held against: the truth where it is wrong, else the second."""
    first, second = (picture["top"] * 2)[0][0], (picture["top"] * 2)[1][0]  # twice: of one class there is no second
    return first, second if picture["y"] == first else picture["y"]


def report(
    params: Params, data: Path, path: str = "params.yaml", open_test: bool = False, study: str | None = None
) -> str:
    """Write data/report/ and return the summary. `path` is the parameters' file, for messages.

    `open_test`: show test pictures too, and write down that they were. `study`: show out-of-fold images of it instead.
    """
    buckets = params.dataset.buckets
    index = store.read_table(data / "index/images.parquet", "index.images/1")
    classes = store.read_table(data / "index/classes.parquet", "index.classes/2")
    names = dict(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True))
    found = [read_run(data, name, planned.encoder) for name, planned in params.train.runs.items()]
    runs, not_made = [one for one in found if isinstance(one, Run)], [one for one in found if isinstance(one, NotMade)]
    reference = find_reference(data, found, params.report.reference)
    check_same_images(data, runs, index)
    dataset = count_dataset(index, classes)
    health = read_health(data / "index/metrics.json", dataset["images"])
    warning = contamination(health, dataset["images"]["test"])
    # Of documents there is nothing to look at, no patch in which a concept could be seen, and no answer of a model.
    documents = store.are_documents(data / "index/images.parquet")
    leaks = [] if documents else read_leaks(data, index, classes, params.domain, runs)

    shown = find_shown(data, found, params.report.run)
    has_texts = shown.encoder in params.encoders
    marks = read_marks(data, shown.encoder, buckets, has_texts)
    check_marks(data, shown, marks)
    groups = groups_of(index)
    rows, votes = accuracy_rows(runs, reference, groups), vote_rows(data, runs, groups)

    # What is looked at: the answers of a run, or of its folds in a study; `judging` is the split that is counted.
    looked, others, judging = shown, runs, "val" if study is None else FOLD
    logits: Floats
    splits = [judging, "choose", *(["test"] if open_test else [])]
    if study is None:
        # Nothing of training images is shown, and they are most.
        half, logits = read_half(data, shown.name), read_logits(data, shown, splits).astype(np.float64)
    else:
        looked, others, logits = read_out_of_fold(data, study, shown, index)
        half = half_of(looked, logits, index, classes)
    calibration, unsure = judge_half(half)
    row = np.cumsum(np.isin(looked.split, splits)) - 1  # of an image, in the logits
    judged = looked.split == judging
    guesses = looked.predicted[looked.seeds.index(looked.model_seed), judged]
    matrix = confusion(looked.y[judged], guesses, len(shown.classes))
    doubt = mean_doubt(looked.y[judged], calibration.probabilities(logits[row[judged]]))
    order, pairs = order_classes(classes, shown.classes), confused_pairs(matrix, doubt)

    there = np.flatnonzero(np.isin(looked.split, [] if documents else splits))
    positions = draw_pictures(looked.paths, there)
    pictures = picture_rows(looked, others, positions, calibration.probabilities(logits[row[positions]]), index)
    for (_, picture), said in zip(pictures, answers(calibration, logits[row[positions]]), strict=True):
        picture |= said
    every = [*shown.classes, *(class_id for class_id in names if class_id not in shown.classes)]
    # The model of a run saw what is out of fold in a study: it is asked of its own val images alone.
    asked = to_explain(pictures) if study is None else []
    explained = explain_runs(params, path, data, runs, positions[asked], [pictures[number][1] for number in asked])
    with_concepts = has_texts and not documents
    concepts = explain(params, data, shown, index, every, pictures, pairs) if with_concepts else None
    owned = [owner for row in concepts["rows"] if row["kept"] for owner in row["owners"]] if concepts else []

    near, odd = near_pairs(data, index, open_test), odd_sizes(index, open_test)
    needed = {image_id for image_id, _ in pictures} | near.pop("image_ids") | odd.pop("image_ids")
    thumbs = read_thumbs(data, buckets, needed)
    opening = opened.record(data, index, shown.name, shown.mark) if open_test else None
    used = {encoder for planned in params.train.runs.values() for encoder in (planned.encoder, *planned.also)}
    state = take_state(data, runs, [encoder for encoder in params.encoders if encoder in used])
    before = last_state(state, data)
    content = {
        "domain": params.domain,
        "dataset": dataset,
        "health_table": HEALTH,
        "health": health,
        "warning": warning,
        "leaks": leaks,
        "changes": None if before is None else compare(before, state),
        "changed_names": {**(before.names if before else {}), **names},
        "generic": GENERIC,
        "near": near,
        "odd": odd,
        "rows": rows,
        "votes": votes,
        "not_made": not_made,
        "reference": reference.name,
        "reach": reach_of(rows),
        "units": units_of(rows),
        "shown": shown,
        "chosen": params.report.run is not None,
        "names": names,
        "study": study,
        "judged": "val" if study is None else "out-of-fold",
        "judged_images": int(judged.sum()),
        "wrong": int((guesses != looked.y[judged]).sum()),
        "counts": {split: int((looked.split[positions] == split).sum()) for split in ("val", "choose", "test", FOLD)},
        "not_shown": len(there) - len(positions),
        "pairs": pairs,
        "totals": matrix.sum(axis=1).tolist(),
        "order": order if len(order) <= MATRIX_CLASSES else [],
        "matrix": matrix.tolist(),
        "class_rows": class_rows(shown, matrix, doubt, order, {label: owned.count(label) for label in set(owned)}),
        "unsure": unsure,
        "explained": explained,
        "asked": len(asked),
        "concepts": concepts,
        "curves": [curves for one in runs if (curves := read_curves(data, one.name))],
        "opened": opened.read(data),
        "open_test": opening is not None,
        "documents": documents,
        "marks": {
            **marks,
            **{f"runs/{one.name}/predictions.parquet": one.mark for one in runs},
            **({} if study is None else {f"studies/{study}: {one.name}": one.mark for one in others}),
        },
    }
    numbers = {
        "noun": params.domain.noun,
        "classes": [{"id": class_id, "name": names[class_id]} for class_id in every],
        "order": order,
        "runs": [{"name": one.name, "encoder": one.encoder} for one in others],
        "shown": [one.name for one in others].index(shown.name),
        "pictures": [picture for _, picture in pictures],
        "concepts": concepts["rows"] if concepts else [],
        "chance": CHANCE,
        "held": round(100 * (1 - calibration.alpha)),
        "written": concepts["written"] if concepts else {},
        "explained": explained,
        "least_move": LEAST_MOVE,
        "judging": judging,
        "pairs": [
            {"a": a, "b": b, "telling": concepts["telling"][number] if concepts else [[], []]}
            for number, (a, b, *_) in enumerate(pairs)
        ],
    }
    page = data / "report/index.html"
    made = render(content, numbers, thumbs)
    summary = summarise(rows, votes, not_made, reference.name, warning, leaks, bool(content["opened"]), page)
    write_report(page, made, summary)
    store.write_text(page.with_name("state.json"), dump(state))
    remember(state, data)
    return summary


def write_report(page: Path, made: Page, summary: str) -> None:
    """Write the page, its pictures and the summary; pictures of a page before that one are removed."""
    shutil.rmtree(page.parent / FILES, ignore_errors=True)
    for name, content in made.files.items():
        store.write_bytes(page.parent / name, content)
    store.write_text(page, made.html)
    store.write_text(page.with_name("summary.txt"), summary)


def main() -> None:
    parser = stage_parser(__doc__)
    where = "where the stages wrote (default: data)"
    parser.add_argument("--data", default="data", metavar="DIR", help=where)
    opens = "show test pictures too; data/studies/test_was_opened.json remembers it"
    shows = "show out-of-fold images of a study in folds instead of val; its row of the shown run's name"
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--open-test", action="store_true", help=opens)
    either.add_argument("--study", metavar="NAME", help=shows)
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    report(params, Path(arguments.data), arguments.params, arguments.open_test, arguments.study)
    print(f"{Path(arguments.data) / 'report'}: index.html and summary.txt are written")


if __name__ == "__main__":
    run(main)
