"""Ask a trained run about pictures: which class each shows, how sure that is, and which training pictures it is like.

Reads   IMAGE, FILM, FOLDER or MANIFEST; data/runs/RUN/{config.json,model.safetensors,predictions.parquet};
        data/index/{images,classes}.parquet. Of what the stages made for the run's encoder E: data/bank/E.parquet,
        data/embed/E/text.parquet and data/embed/E/moments/NAME/basis.safetensors, as far as the run reads what is made
        with them; data/embed/E/images or moments/NAME, to name pictures that are alike; for --html data/thumbs/.
Writes  to stdout, or to --out; a page to --html. Nothing else: what the stages made stays as it is.
Costs   loading the encoder, and a forward pass a picture; --explain as many passes of the run's own model as a picture
        has patches. Memory for a few hundred pictures, however many there are. A picture that the run knows, byte by
        byte, needs no encoder.

A picture is decoded, cut and embedded as the stages do it. Where weights or parameters are no longer those that the run
was trained on, that is an error. FOLDER is all pictures in it and below. MANIFEST is a .csv or .parquet with a column
path, from its own folder on, and, where known, group (a track, an event) and box (of the object). Of a film the frames
are asked about, `dataset.frames_per_second` of them, and --by group gives one answer a film; a .parquet with pictures
in it (as on Hugging Face's hub) is its rows.

Probabilities, and all that is said of how sure they are, are calibrated on the half of val that chose nothing
(evaluation/calibration.py). A file that is no picture is a row with its reason; where all are, the exit code is 1.

    python -m tools.predict photo.jpg
    python -m tools.predict --run concept_graph survey/ --format jsonl --out answers.jsonl
    python -m tools.predict survey.csv --by group --classes north-sea.txt --format csv
    python -m tools.predict archive/ --engine ray --format parquet --out answers.parquet
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import IO, TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from evaluation.calibration import SETS
from evaluation.words import percent
from fieldmark import cluster
from fieldmark.command import UserError, counted, name_some, run, stage_parser
from fieldmark.devices import choose_device
from fieldmark.memory import keep_memory
from fieldmark.params import Params, load_params
from fieldmark.pictures.decode import open_reduced
from fieldmark.pictures.views import Source, count_passes
from tools.prediction.answers import Judge, Votes, best_run, read_judge
from tools.prediction.output import FORMATS, Row, Writer, write_rows
from tools.prediction.page import SHOWN, Page
from tools.prediction.pictures import Picture, Question, Views, look, read_question
from tools.prediction.reasons import runs_that_say_why
from training.explain import can_say_why, reads_of
from training.restore import Restored, restore

if TYPE_CHECKING:
    from tools.prediction.features import Features

DATA = Path("data")
# Pictures whose features are held at once; fewer where a picture is shown in several passes.
CHUNK = 256
Made = TypeVar("Made")
# The folder that paths start from, pictures, and whether what is said of them is explained.
Chunk = tuple[Path, list[Picture], bool]


class Once(Generic[Made]):
    """Makes something when it is first asked for, whichever thread asks."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self.make, self.lock, self.seconds = make, Lock(), 0.0
        self.made: list[Made] = []

    def __call__(self) -> Made:
        with self.lock:
            if not self.made:
                started = perf_counter()
                self.made.append(self.make())
                self.seconds = perf_counter() - started
            return self.made[0]


def open_judge(
    params: Params, path: str, name: str, candidates: Path | None, device: torch.device
) -> tuple[Judge, Once["Features"]]:
    """A run, and what loads its encoders; `path` is the parameters' file, for messages."""
    asked = restore(params, path, name, DATA)
    asked.model.to(device)

    def load() -> "Features":
        # It brings the libraries of encoders, which takes seconds: what a run knows is told without them.
        from tools.prediction.features import Features

        reads = {asked.encoder: reads_of(asked)} | dict.fromkeys(asked.also, asked.also_reads)
        return Features(params, reads, asked.config["fingerprints"], asked.classes, device)

    features = Once(load)
    return read_judge(params, DATA, asked, candidates, features, device), features


def choose_run(params: Params, name: str | None) -> str:
    """The run that is asked: the one that is named, or the best."""
    if name is not None:
        return name
    best, accuracy = best_run(params, DATA)
    say(f"run: {best}, the best on the half of val that chooses ({percent(accuracy)} %); --run NAME asks another")
    return best


def how_sure(judge: Judge, by_group: bool = False, limits: bool = True) -> str:
    """What the figures of an answer promise, in words; `limits` where sets and answers that are sure enough show."""
    of_groups = judge.of_groups if by_group else None
    found = of_groups or judge.calibration
    one, many = ("group", "groups") if of_groups else ("picture", "pictures")
    of = counted(found.images, one, many)
    said = f"probabilities are calibrated on {of} of val (temperature {found.temperature:.2f})"
    if not limits:
        return said
    if by_group and of_groups is None:
        return f"{said}; val names no group, so that of groups neither sets nor sure answers are known"
    if found.limits[SETS] is not None:
        said += f"; a set holds the class of {percent(1 - found.alpha)} % of {many} like these"
    else:
        units, least = many if found.units == found.images else "groups", ceil(1 / found.alpha) - 1
        said += f"; there are no sets: they take {least} {units} of val that show these classes, not {found.units}"
    if found.backoff is not None:
        said += f"; of answers that are sure enough at most {percent(found.error)} % are wrong"
    else:
        said += "; no answer is called sure enough: too few of val are, or too many of these are wrong"
    return said


def say(line: str) -> None:
    """A line for people; answers go to stdout."""
    print(line, file=sys.stderr, flush=True)


def chunk_of(params: Params, asked: Restored) -> int:
    """How many pictures are judged together: whole batches of the encoders, so that none is filled up but the last."""
    names = [asked.encoder, *asked.also]
    passes = len(names) * count_passes(params.embed.model_copy(update={"views": 0}))
    batch = max(params.image_encoder(name).batch_size for name in names)
    return max(1, round(CHUNK / passes / batch)) * batch


# Pictures, a row of what is said of each, and the logits (n, K) of those that can be read.
Answered = tuple[Sequence[Picture], list[Row], np.ndarray]


def prepare_with(features: Callable[[], "Features"]) -> Callable[[IO[bytes], Source], Views]:
    """Features.prepare, whose encoders are loaded for the first picture that can be decoded, and for no other file."""
    decoded: list[Path] = []

    def prepare(file: IO[bytes], source: Source) -> Views:
        if not decoded:
            open_reduced(source.path, side=1)
            decoded.append(Path(source.path))
        return features().prepare(file, source)

    return prepare


def answer_here(judge: Judge, question: Question, size: int, explained: int) -> Iterator[Answered]:
    """What is said of every picture, `size` at a time; chunks that begin before `explained` are explained."""
    looked = look(question, judge.stored.place, prepare_with(judge.features), ahead=size // 4)
    done = 0
    while chunk := list(islice(looked, size)):
        yield [each.picture for each in chunk], *judge.rows(chunk, question, done < explained)
        done += len(chunk)


def answer_on_cluster(job: cluster.Job, question: Question, size: int, explained: int) -> Iterator[Answered]:
    """The same of the workers of a cluster, who have a chunk each."""
    starts = range(0, len(question.pictures), size)
    chunks = [(question.folder, question.pictures[start : start + size], start < explained) for start in starts]
    for (_, pictures, _), (rows, logits) in zip(chunks, cluster.map_chunks(job, chunks), strict=True):
        yield pictures, rows, logits


def open_chunks(arguments: Namespace, params: Params) -> Callable[[Chunk], tuple[list[Row], np.ndarray]]:
    """What a worker of a cluster does with a chunk."""
    keep_memory()
    device = choose_device(arguments.device)
    judge, _ = open_judge(params, arguments.params, arguments.run, arguments.classes, device)
    size = chunk_of(params, judge.run)

    def answer(chunk: Chunk) -> tuple[list[Row], np.ndarray]:
        folder, pictures, explained = chunk
        ((_, rows, logits),) = answer_here(judge, Question(folder, pictures), size, len(pictures) if explained else 0)
        return rows, logits

    return answer


def ask(
    judge: Judge, answered: Iterator[Answered], total: int, by_group: bool, page: Page | None, writer: Writer
) -> Counter[str]:
    """Write what is said of every picture, chunk by chunk as they come, or of every group at the end.

    Returns why pictures cannot be read, and of how many each reason holds.
    """
    broken, votes = Counter[str](), Votes()
    with tqdm(total=total, desc=f"ask {judge.run.name}", unit="img", disable=total == 1) as progress:
        for pictures, rows, logits in answered:
            broken.update(row["error"] for row in rows if row["error"] is not None)
            if by_group:
                votes.add([row["group"] or row["path"] for row in rows if row["error"] is None], logits)
            with progress.external_write_mode(file=sys.stdout):
                writer.write([row for row in rows if not by_group or row["error"] is not None])
            if page is not None:
                page.add(pictures, rows)
            progress.update(len(pictures))
    writer.write(votes.rows(judge))
    return broken


def explain_unread(asked: str, broken: Counter[str], total: int) -> str:
    """Which pictures cannot be read, why, and what to do."""
    unread = "" if total == 1 else f"{broken.total()} of {total} pictures cannot be read, the reasons: "
    remedy = "correct the path, save the picture anew as JPEG or PNG, or leave it out"
    return f"{asked}: {unread}{name_some(list(broken), 3)}; {remedy}"


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("asked", metavar="IMAGE|FILM|FOLDER|MANIFEST", help="a picture, a film, a folder, a table")
    parser.add_argument("--run", metavar="NAME", help="a run of train.runs (default: the best where val chooses)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="only these classes: a class_id or name a line")
    said = "table, a line a picture; text, all that is said of it (default of one picture); for programs the others"
    parser.add_argument("--format", choices=FORMATS, help=said)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where it is written (default: stdout)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures, too")
    why = "name the patches and concepts that speak for the first class against the second (text and --html do)"
    parser.add_argument("--explain", action="store_true", help=why)
    parser.add_argument("--by", choices=["group"], help="an answer a film, or a group of the manifest, by votes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    arguments = cluster.add_engine(parser).parse_args()
    on_cluster = cluster.on_cluster(arguments)
    keep_memory()
    params = load_params(arguments.params)
    if params.dataset.format == "text_graph":
        what = "runs on documents of a text graph, and only pictures are asked about here"
        remedy = "write new documents into nodes.csv, and run `dvc repro`"
        raise UserError(f"{arguments.params}: dataset.format: this project {what}; {remedy}")
    question = read_question(arguments.asked, params.dataset.frames_per_second)
    if question.passed_over:
        files = counted(question.passed_over, "file is", "files are")
        say(f"{arguments.asked}: {files} passed over, no pictures by their names")
    if arguments.by and not any(picture.group for picture in question.pictures):
        raise UserError(f"{arguments.asked}: names no group; --by group needs films, or a manifest with a column group")
    form = arguments.format or ("text" if len(question.pictures) == 1 else "table")
    name, device = choose_run(params, arguments.run), choose_device(arguments.device)
    explained = arguments.explain or form == "text"
    judge, features = open_judge(params, arguments.params, name, arguments.classes, device)
    say(how_sure(judge, arguments.by is not None, limits=form != "table"))
    if {"descriptions", "cell_descriptions"} & judge.run.reads:
        say(f"{name}: reads descriptions, and new pictures have none: no model is asked to write some")
    if (explained or arguments.html is not None) and not can_say_why(judge.run.method, judge.run.reads):
        others = runs_that_say_why(params, arguments.params, DATA)
        remedy = f"; ask one that has: --run {' or '.join(others)}" if others else ""
        say(f"{name}: reads whole pictures and no texts, so that it has no patches and no concepts to name{remedy}")
    if judge.whole is None:
        say(f"{name}: no pictures alike are named: it reads no vector of a whole picture, or data/embed is not here")
    page = Page(question, DATA, params.dataset.buckets) if arguments.html else None
    # What stands on the page is explained in any case.
    size, total = chunk_of(params, judge.run), len(question.pictures)
    most = total if explained else SHOWN if page is not None else 0
    if on_cluster:
        job = cluster.Job("tools.predict", "open_chunks", Namespace(**{**vars(arguments), "run": name}), params)
        answered = answer_on_cluster(job, question, size, most)
    else:
        answered = answer_here(judge, question, size, most)
    answer = partial(ask, judge, answered, total, arguments.by is not None, page)
    started = perf_counter()
    broken = write_rows(form, arguments.out, judge.names, answer)
    seconds = perf_counter() - started - features.seconds
    loaded = f" after {features.seconds:.1f} s to load the encoder" if features.seconds else ""
    say(f"{counted(total, 'picture', 'pictures')}: {seconds:.1f} s{loaded}, {total / seconds:.1f} a second")
    if page is not None:
        page.write(arguments.html, name, how_sure(judge), judge.names)
        say(f"{arguments.html}: written")
    if broken.total() == total:
        raise UserError(explain_unread(arguments.asked, broken, total))
    if broken:
        say(explain_unread(arguments.asked, broken, total))


if __name__ == "__main__":
    run(main)
