"""Ask a trained run about pictures: which class each shows, how sure that is, and which training pictures it is like.

Reads   IMAGE, FOLDER or MANIFEST; data/runs/RUN/{config.json,model.safetensors,predictions.parquet};
        data/index/{images,classes}.parquet. Of what the stages made for the run's encoder E: data/bank/E.parquet,
        data/embed/E/text.parquet and data/embed/E/moments/NAME/basis.safetensors, as far as the run reads what is made
        with them; data/embed/E/images or moments/NAME, to name pictures that are alike; for --html data/thumbs/.
Writes  to stdout, or to --out; a page to --html. Nothing else: what the stages made stays as it is.
Costs   loading the encoder, and a forward pass a picture; --explain as many passes of the run's own model as a picture
        has patches. Memory for a few hundred pictures, however many there are. A picture that the run knows, byte by
        byte, needs no encoder.

A picture is decoded, cut and embedded as the stages do it. Where weights or parameters are no longer those that the run
was trained on, that is an error. FOLDER is all pictures in it and below. MANIFEST is a .csv or .parquet with a column
path, from its own folder on, and, where known, group (a track, an event) and box (of the object).

Probabilities, and all that is said of how sure they are, are calibrated on the half of val that chose nothing
(evaluation/calibration.py). A file that is no picture is a row with its reason.

    python -m tools.predict photo.jpg
    python -m tools.predict --run concept_graph survey/ --format jsonl --out answers.jsonl
    python -m tools.predict survey.csv --by group --classes north-sea.txt --format csv
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from tqdm import tqdm

from evaluation.calibration import SETS
from evaluation.words import percent
from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.memory import keep_memory
from fieldmark.params import Params, load_params
from fieldmark.pictures.views import count_passes
from tools.prediction.answers import Judge, Votes, best_run, read_judge
from tools.prediction.output import FORMATS, Writer, write_rows
from tools.prediction.page import Page
from tools.prediction.pictures import Question, look, read_question
from tools.prediction.reasons import nothing_to_say, reads_of
from training.loop import choose_device
from training.restore import Restored, restore

if TYPE_CHECKING:
    from tools.prediction.features import Features

DATA = Path("data")
# Pictures whose features are held at once; fewer where a picture is shown in several passes.
CHUNK = 256
Made = TypeVar("Made")


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


def how_sure(judge: Judge, by_group: bool = False) -> str:
    """What the figures of an answer promise, in words."""
    of_groups = judge.of_groups if by_group else None
    found = of_groups or judge.calibration
    one, many = ("group", "groups") if of_groups else ("picture", "pictures")
    of = counted(found.images, one, many)
    said = f"probabilities are calibrated on {of} of val (temperature {found.temperature:.2f})"
    if found.limits[SETS] is not None:
        said += f"; a set holds the class of {percent(1 - found.alpha)} % of {many} like these"
    if found.backoff is not None:
        said += f"; of answers that are sure enough at most {percent(found.error)} % are wrong"
    if by_group and of_groups is None:
        said += "; val names no group, so that of groups neither sets nor sure answers are known"
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


def ask(
    judge: Judge, question: Question, size: int, by_group: bool, explained: bool, page: Page | None, writer: Writer
) -> int:
    """Write what is said of every picture, `size` at a time as they come, or of every group at the end.

    Returns how many pictures cannot be read. What stands on the page is explained in any case.
    """
    total, broken = len(question.pictures), 0
    looked = look(question, judge.stored.place, lambda *opened: judge.features().prepare(*opened), ahead=size // 4)
    votes = Votes()
    with tqdm(total=total, desc=f"ask {judge.run.name}", unit="img", disable=total == 1) as progress:
        while chunk := list(islice(looked, size)):
            rows, logits = judge.rows(chunk, question, explained or (page is not None and page.has_room))
            broken += sum(row["error"] is not None for row in rows)
            if by_group:
                votes.add([row["group"] or row["path"] for row in rows if row["error"] is None], logits)
            with progress.external_write_mode(file=sys.stdout):
                writer.write([row for row in rows if not by_group or row["error"] is not None])
            if page is not None:
                page.add(chunk, rows)
            progress.update(len(chunk))
    writer.write(votes.rows(judge))
    return broken


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("asked", metavar="IMAGE|FOLDER|MANIFEST", help="a picture, a folder of them, or a table")
    parser.add_argument("--run", metavar="NAME", help="a run of train.runs (default: the best where val chooses)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="only these classes: a class_id or name a line")
    said = "table, a line a picture; text, all that is said of it (default of one picture); for programs the others"
    parser.add_argument("--format", choices=FORMATS, help=said)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where it is written (default: stdout)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures, too")
    why = "name the patches and concepts that speak for the first class against the second (text and --html do)"
    parser.add_argument("--explain", action="store_true", help=why)
    parser.add_argument("--by", choices=["group"], help="an answer a group of the manifest, by votes of its pictures")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    arguments = parser.parse_args()
    keep_memory()
    params = load_params(arguments.params)
    if params.dataset.format == "text_graph":
        what = "runs on documents of a text graph, and only pictures are asked about here"
        remedy = "write new documents into nodes.csv, and run `dvc repro`"
        raise UserError(f"{arguments.params}: dataset.format: this project {what}; {remedy}")
    question = read_question(arguments.asked)
    if question.passed_over:
        files = counted(question.passed_over, "file is", "files are")
        say(f"{arguments.asked}: {files} passed over, no pictures by their names")
    if arguments.by and not any(picture.group for picture in question.pictures):
        raise UserError(f"{arguments.asked}: names no group; --by group needs a manifest with a column group")
    form = arguments.format or ("text" if len(question.pictures) == 1 else "table")
    name, device = choose_run(params, arguments.run), choose_device("--device", arguments.device)
    explained = arguments.explain or form == "text"
    judge, features = open_judge(params, arguments.params, name, arguments.classes, device)
    say(how_sure(judge, arguments.by is not None))
    if {"descriptions", "cell_descriptions"} & judge.run.reads:
        say(f"{name}: reads descriptions, and new pictures have none: no model is asked to write some")
    if (explained or arguments.html is not None) and nothing_to_say(judge.run):
        say(f"{name}: reads whole pictures and no texts, so that it has no patches and no concepts to name")
    if judge.whole is None:
        say(f"{name}: no pictures alike are named: it reads no vector of a whole picture, or data/embed is not here")
    page = Page(question, DATA, params.dataset.buckets) if arguments.html else None
    answer = partial(ask, judge, question, chunk_of(params, judge.run), arguments.by is not None, explained, page)
    started = perf_counter()
    broken = write_rows(form, arguments.out, judge.names.values(), answer)
    seconds, total = perf_counter() - started - features.seconds, len(question.pictures)
    unread = f", {broken} cannot be read" if broken else ""
    loaded = f" after {features.seconds:.1f} s to load the encoder" if features.seconds else ""
    say(f"{counted(total, 'picture', 'pictures')}{unread}: {seconds:.1f} s{loaded}, {total / seconds:.1f} a second")
    if page is not None:
        page.write(arguments.html, name, how_sure(judge), judge.names)
        say(f"{arguments.html}: written")


if __name__ == "__main__":
    run(main)
