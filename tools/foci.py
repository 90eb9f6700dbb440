"""Multiple choice after FOCI: four classes a picture, the true one and the wrong ones that a miner likes best.

Reads   predictions of runs of train.runs, or of the rows of a study in folds (--study); data/index/. Of an encoder that
        mines (--encoder) its vectors of pictures and class names, of a run that mines (--run) its predictions, of
        options that were mined elsewhere (--options) that file.
Writes  data/studies/foci/NAME/{options.parquet (options/1), siblings.json, tables.txt, tables.json}, NAME after the
        miner, what is judged, and the seed. With --open-test also data/studies/test_was_opened.json.
Costs   seconds; memory for what one run predicted with all its seeds, one run at a time.

Judged is the half of val that chose nothing; with --study each image of train and val by the fit that never saw it;
test with --open-test alone, which is written down as the report writes it down, for the miner as for who is judged.
options.parquet is for others too: a model that is asked in words is given `names` in their order, and is right where it
names number `answer` (from 0). siblings.json names for each class the wrong options of its pictures, those of most of
them first: `concepts.siblings` of params.yaml takes it, so that a model is asked what tells a class from these.

What the figures mean, and why options are against their own miner, stands in evaluation/multiple_choice.py.

    python -m tools.foci                                  # mined by the first encoder, by names; every run is judged
    python -m tools.foci --encoder clip --judge linear_probe --judge zero_shot
    python -m tools.foci --run moments                    # mined by a run
    python -m tools.foci --study baselines                # out of fold: more images than val has
    python -m tools.foci --options theirs.parquet
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from evaluation import opened
from evaluation.compare import describe_commit
from evaluation.multiple_choice import OPTIONS, Judge, answer, as_json, as_text, mine, mix, most_named, score
from evaluation.out_of_fold import FOLD, read_row, rows_in_folds
from evaluation.runs import NotMade, Run, check_same_images, group_numbers, groups_of, read_json, read_logits, read_run
from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.concepts.siblings import MOST
from fieldmark.params import Params, load_params
from fieldmark.store import Header, fingerprint, make_table, read_header, read_table, write_table, write_text
from tools.predict import DATA, say
from training.data import read_cache
from training.layers.texts import class_text
from training.metrics import Floats, Ints
from training.runs import write_json

FOLDER = DATA / "studies/foci"
SCHEMA = "options/1"
INDEX_CLASSES = DATA / "index/classes.parquet"
KNOWN = {"miner": str, "stands_on": list, "split": str, "seed": int}  # what the header of options says


class Asked(NamedTuple):
    """The n pictures that are judged, in the order of their paths."""

    split: str
    paths: list[str]
    image_ids: list[str]
    y: Ints  # (n,) positions in classes
    classes: list[str]  # class_ids
    names: dict[str, str]  # by class_id


class Mined(NamedTuple):
    """A question about each of them."""

    miner: str  # who mined, for people
    stands_on: list[str]  # its encoder and those beside it
    split: str
    seed: int
    options: Ints  # (n, OPTIONS), classes in the order in which they are shown
    says: Ints  # (n,): the miner's own answer, a class
    mark: str

    @property
    def header(self) -> dict[str, Any]:
        """What decides the content of the file beside what it was made from."""
        return {"miner": self.miner, "stands_on": self.stands_on, "split": self.split, "seed": self.seed}


def read_asked(index: pa.Table, classes: pa.Table, split: str, judged: Run) -> Asked:
    """The pictures of a run that stand in a split."""
    of_split = judged.split == split
    known = dict(zip(index["path"].to_pylist(), index["image_id"].to_pylist(), strict=True))
    paths = [path for path, own in zip(judged.paths, of_split, strict=True) if own]
    names = dict(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True))
    return Asked(split, paths, [known[path] for path in paths], judged.y[of_split], judged.classes, names)


def siblings_of(mined: Mined, asked: Asked) -> dict[str, list[str]]:
    """By class_id, the names of the classes that its pictures' options hold beside it."""
    named = most_named(mined.options, asked.y)
    ids = asked.classes
    return {ids[own]: [asked.names[ids[other]] for other in others[:MOST]] for own, others in named.items()}


class Miner(NamedTuple):
    """Who mines, before any answer about the pictures is read."""

    name: str
    mark: str  # the fingerprint of what it answers from
    ask: Callable[[], Mined]


def ask(said_as: str, stands_on: list[str], mark: str, logits: Floats, asked: Asked, seed: int) -> Mined:
    """Questions by what a miner says of the n pictures: logits (n, C)."""
    options = mix(mine(logits, asked.y), asked.image_ids, asked.classes, seed)
    mined = Mined(said_as, stands_on, asked.split, seed, options, answer(logits, options), "")
    return mined._replace(mark=fingerprint(SCHEMA, mined.header, [mark]))


def by_names(encoder: str, buckets: int, asked: Asked, seed: int) -> Miner:
    """By the cosines of pictures with the names of classes."""
    cache = read_cache(DATA, encoder, buckets, frozenset({"globals", "names", "owners"}))
    if cache.classes != asked.classes:
        raise UserError(f"{DATA / 'index'}: holds other classes than runs answer; run them again (dvc repro)")
    name, mark = f"{encoder} by class names", fingerprint(SCHEMA, {}, sorted(cache.fingerprints.values()))

    def mined() -> Mined:
        place = {path: number for number, path in enumerate(cache.paths)}
        images = torch.tensor([place[path] for path in asked.paths])
        logits = cache.globals(images) @ class_text(cache).T
        return ask(name, [encoder], mark, logits.numpy(), asked, seed)

    return Miner(name, mark, mined)


def write_options(path: Path, mined: Mined, asked: Asked) -> None:
    ids = np.array(asked.classes)
    rows = [
        {
            "image_id": image_id,
            "path": at,
            "options": ids[options].tolist(),
            "names": [asked.names[class_id] for class_id in ids[options]],
            "answer": int(np.flatnonzero(options == own)[0]),
            "miner_says": ids[says],
        }
        for image_id, at, options, own, says in zip(
            asked.image_ids, asked.paths, mined.options, asked.y, mined.says, strict=True
        )
    ]
    write_table(make_table(SCHEMA, rows), path, SCHEMA, mined.header, mined.mark)


def read_known(path: Path, split: str) -> Header:
    """What a file of options says of itself. Raises UserError where that is not KNOWN, or it is of another split."""
    header = read_header(path, SCHEMA)
    known = header.params
    if {name: type(value) for name, value in known.items()} != KNOWN:
        raise UserError(
            f"{path}: params in its header are not {', '.join(KNOWN)}; take a file that tools.foci wrote, or write"
            " these"
        )
    if known["split"] != split:
        raise UserError(
            f"{path}: has options of {known['split']}, and {split} is judged; {FOLD} goes with --study, test with"
            " --open-test, val with neither"
        )
    return header


def read_options(path: Path, header: Header, asked: Asked) -> Mined:
    """Options that were mined before, of the pictures that are asked about; `header` is that of read_known.

    Raises UserError where a picture or a class is not there, or its true class is not the one that the file has.
    """
    table = read_table(path, SCHEMA)
    place = {class_id: number for number, class_id in enumerate(asked.classes)}
    rows = {row["image_id"]: row for row in table.to_pylist()}
    options, says = [], []
    for at, image_id, own in zip(asked.paths, asked.image_ids, asked.y.tolist(), strict=True):
        row = rows.get(image_id)
        if row is None:
            raise UserError(f"{path}: has no options for {at} ({asked.split}); mine them: leave --options out")
        shown = [place.get(class_id, -1) for class_id in (*row["options"], row["miner_says"])]
        at_answer = shown[:-1][row["answer"] : row["answer"] + 1] if row["answer"] >= 0 else []
        if not len(shown[:-1]) == len(set(shown[:-1])) == OPTIONS or -1 in shown or at_answer != [own]:
            raise UserError(
                f"{path}: {at}: its options are not {OPTIONS} classes of {INDEX_CLASSES} with its own at `answer`; the"
                " file is of other data, or was changed"
            )
        options.append(shown[:-1])
        says.append(shown[-1])
    return Mined(**header.params, options=np.array(options), says=np.array(says), mark=header.fingerprint)


class Judged(NamedTuple):
    """A run, or a row of a study in folds, and what it stands on."""

    run: Run
    stands_on: list[str]
    folds: list[Path]  # of a row

    def logits(self, study: str | None, index: pa.Table) -> Iterator[Floats]:
        """(n, C) of each seed, of all its pictures."""
        if study is not None:
            run = self.run
            yield read_row(DATA, study, run.name, run.encoder, self.folds, run.classes, index)[1]
            return
        for seed in self.run.seeds:
            yield read_logits(DATA, self.run._replace(model_seed=seed))


def read_runs(params: Params, path: str, names: Sequence[str], index: pa.Table) -> list[Judged]:
    """These runs of train.runs, or all that are trained. Raises UserError for one that is not there."""
    if unknown := [name for name in names if name not in params.train.runs]:
        known = ", ".join(params.train.runs)
        raise UserError(f"{unknown[0]}: is no run of train.runs in {path}; name one of {known}")
    planned = params.train.runs
    chosen = names or [name for name in planned if (DATA / "runs" / name / "predictions.parquet").is_file()]
    found = [read_run(DATA, name, planned[name].encoder) for name in chosen]
    for one in found:
        if isinstance(one, NotMade):
            if names:
                raise UserError(f"{one.name}: is not trained: {one.reason}; name another run")
            say(f"{one.name}: is left out: {one.reason}")
    runs = [one for one in found if isinstance(one, Run)]
    if not runs:
        raise UserError(f"{DATA / 'runs'}: no run is trained; run `make repro` (dvc repro train@RUN)")
    check_same_images(DATA, runs, index)
    return [Judged(one, [one.encoder, *planned[one.name].also], []) for one in runs]


def read_rows(study: str, names: Sequence[str], index: pa.Table, classes: list[str]) -> list[Judged]:
    """Rows of a study in folds, all or those of these names, each as ENCODER.NAME where there are several encoders."""
    rows = rows_in_folds(DATA, study)
    known = sorted({name for _, name in rows})
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--judge {unknown[0]}: is no row of study {study} in folds; name one of {', '.join(known)}")
    if not rows:
        raise UserError(f"{DATA / 'studies' / study}: has no row in folds; give it `folds` and run make study")
    return [
        Judged(read_row(DATA, study, name, encoder, folds, classes, index)[0], stands_on(folds[0], encoder), folds)
        for (encoder, name), folds in rows.items()
        if not names or name in names
    ]


def stands_on(run: Path, encoder: str) -> list[str]:
    """The encoders of a run of a study."""
    return [encoder, *read_json(run / "config.json", "run make study again").get("also", [])]


def judge_all(
    judged: Sequence[Judged], mined: Mined, asked: Asked, study: str | None, index: pa.Table, several: bool
) -> Iterator[Judge]:
    """What each says, as ENCODER.NAME where `several` encoders have rows of the same names."""
    for one in judged:
        of_split = one.run.split == asked.split
        said = [
            (answer(logits[of_split], mined.options) == asked.y, logits[of_split].argmax(axis=1) == asked.y)
            for logits in one.logits(study, index)
        ]
        right, top1 = (np.stack(each) for each in zip(*said, strict=True))
        yield Judge(
            f"{one.run.encoder}.{one.run.name}" if several else one.run.name,
            one.run.encoder,
            bool(set(one.stands_on) & set(mined.stands_on)),
            right,
            top1,
            one.run.by_class,
        )


def find_miner(
    params: Params, arguments: argparse.Namespace, judged: Sequence[Judged], asked: Asked, index: pa.Table
) -> Miner:
    seed = arguments.seed or 0
    if arguments.options is not None:
        path = Path(arguments.options)
        header = read_known(path, asked.split)
        return Miner(header.params["miner"], header.fingerprint, lambda: read_options(path, header, asked))
    if arguments.run is not None:
        one = find_run(params, arguments, judged, index)
        run, best = one.run, one._replace(run=one.run._replace(seeds=[one.run.model_seed]))

        def mined() -> Mined:
            logits = next(best.logits(arguments.study, index))[run.split == asked.split]
            return ask(f"run {run.name}", one.stands_on, run.mark, logits, asked, seed)

        return Miner(run.name, run.mark, mined)
    encoder = arguments.encoder or next(iter(params.encoders), None)
    if encoder not in params.encoders:
        known = ", ".join(params.encoders) or "none is there; name a run by --run"
        raise UserError(f"--encoder {encoder}: is no encoder with texts in {arguments.params}; name one of {known}")
    return by_names(encoder, params.dataset.buckets, asked, seed)


def find_run(params: Params, arguments: argparse.Namespace, judged: Sequence[Judged], index: pa.Table) -> Judged:
    """The run that mines, or the row of the study; of a row's name on several encoders --encoder says which."""
    if arguments.study is None:
        return read_runs(params, arguments.params, [arguments.run], index)[0]
    rows = read_rows(arguments.study, [arguments.run], index, judged[0].run.classes)
    rows = [one for one in rows if arguments.encoder in (None, one.run.encoder)]
    if len(rows) != 1:
        on = ", ".join(one.run.encoder for one in rows) or "no such encoder"
        raise UserError(f"--run {arguments.run}: the study has it on {on}; say which by --encoder")
    return rows[0]


def check_together(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that another one makes idle."""
    if arguments.run is not None and arguments.study is None and arguments.encoder is not None:
        raise UserError(
            f"--encoder {arguments.encoder}: run {arguments.run} mines by what it predicted; leave --encoder or --run"
            " out"
        )
    for name in ("encoder", "seed"):
        if arguments.options is not None and getattr(arguments, name) is not None:
            raise UserError(f"--{name}: options of --options were mined before; leave --{name} or --options out")


def command_line(arguments: argparse.Namespace) -> str:
    """What was typed, for whoever reads the tables elsewhere: of files their names alone."""
    words = sys.argv[1:]
    for path in (arguments.params, arguments.options):
        if path is not None:
            words = [word.replace(path, Path(path).name) for word in words]
    return f"python -m tools.foci {shlex.join(words)}".rstrip()


def main() -> None:
    parser = stage_parser(__doc__)
    by = "mined by an encoder's class names (default: the first encoder); with --run and --study, the row's encoder"
    parser.add_argument("--encoder", metavar="NAME", help=by)
    mines = parser.add_mutually_exclusive_group()
    mines.add_argument("--run", metavar="NAME", help="mined by a run of train.runs, or a row of the study")
    mines.add_argument("--options", metavar="FILE", help="options that were mined before (options/1)")
    said = "a run that is judged, or a row of the study, as often as there are some (default: all)"
    parser.add_argument("--judge", action="append", default=[], metavar="NAME", help=said)
    parser.add_argument("--seed", type=int, help="draws the order of options (default: 0)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--study", metavar="NAME", help="judge the rows of a study in folds, out of fold")
    opens = "judge test pictures; data/studies/test_was_opened.json remembers it"
    where.add_argument("--open-test", action="store_true", help=opens)
    arguments = parser.parse_args()
    check_together(arguments)
    params = load_params(arguments.params)
    index = read_table(DATA / "index/images.parquet", "index.images/1")
    classes = read_table(INDEX_CLASSES, "index.classes/2")
    study = arguments.study
    if study is None:
        judged = read_runs(params, arguments.params, arguments.judge, index)
        split = "test" if arguments.open_test else "val"
    else:
        judged = read_rows(study, arguments.judge, index, sorted(classes["class_id"].to_pylist()))
        split = FOLD
    first = judged[0].run
    asked = read_asked(index, classes, split, first)
    miner = find_miner(params, arguments, judged, asked, index)
    if arguments.open_test:
        for name, mark in [(miner.name, miner.mark), *((one.run.name, one.run.mark) for one in judged)]:
            opened.record(DATA, index, name, mark)
    mined = miner.ask()

    several = len({one.run.encoder for one in judged}) > 1 and study is not None
    judges = list(judge_all(judged, mined, asked, study, index, several))
    right = (mined.says == asked.y)[None]
    named = params.report.reference
    reference = named if any(one.run.name == named for one in judged) else None
    groups = group_numbers(asked.paths, groups_of(index))
    [own] = score([Judge(mined.miner, "", True, right, right)], asked.y, groups, None)
    scores = score(judges, asked.y, groups, reference)

    said = re.sub(r"[^a-z0-9_.]+", "-", mined.miner.lower())
    folder = FOLDER / "-".join([said, *([study] if study else []), split, f"seed-{mined.seed}"])
    pictures, of = counted(len(asked.paths), "picture", "pictures"), len(set(asked.y.tolist()))
    where_judged = f"study {study}, out of fold" if study else split
    title = f"{command_line(arguments)}, code {describe_commit() or 'unknown'}"
    title += f": {where_judged}, {pictures} of {of} classes"
    text = as_text(title, mined.miner, own, scores, reference, mined.seed)
    write_options(folder / "options.parquet", mined, asked)
    write_json(folder / "siblings.json", siblings_of(mined, asked))
    write_json(folder / "tables.json", as_json(own, scores))
    write_text(folder / "tables.txt", text)
    print(text, end="")
    say(f"{folder}: options.parquet, siblings.json, tables.txt and tables.json are written")


if __name__ == "__main__":
    run(main)
