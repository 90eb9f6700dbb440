"""Try what the pipeline needs, a line each, before anything runs; `make doctor PROFILE=NAME` lays a profile over first.

Reads   params.yaml and what it names: packages, pictures, encoders' weights, the server that is asked, the remote.
Writes  nothing here. Weights that are not on this machine are fetched from the model hub, as the first run would.
Costs   about a minute: each encoder and tower is loaded and embeds a few pictures of the data set. Where a model is
        asked (llm.mode live or batch) one call about a class, and one about a picture where describe.enabled is true,
        within llm.max_calls and llm.max_usd: what it costs at most is said before, what it did cost after. Its answer
        is not kept, and the run asks again. --no-call (or --dry-run) asks nobody.

What is tried: the environment (packages, threads, GPU), the data set (preflight, layout, one picture decoded), the
runs, each encoder and tower (weights, a batch, its rate), the disk (for the pictures that there are, without `tokens`),
the model that is asked (key, response format, price), the prompts of `ask`, and DVC's remote where one is set. Ends
with 1 if any fails.

    python -m tools.doctor
    python -m tools.doctor --no-call
"""

import contextlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from fieldmark import store
from fieldmark.command import PROJECT, UserError, counted, explain, run, stage_parser
from fieldmark.devices import choose_device
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import LoadedEncoder
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import Clock, forward_sources
from fieldmark.encoders.texts import embed_texts
from fieldmark.formats import read_listing
from fieldmark.graphs.patches import MAX_NODES
from fieldmark.informative import budget
from fieldmark.listing import Row, list_classes
from fieldmark.llm.answers import Item, PlannedCalls, check_limits, cost, estimate, price_of
from fieldmark.llm.client import Client, public_url, server_of
from fieldmark.llm.imported import read_own
from fieldmark.llm.pictures import as_sent
from fieldmark.llm.prompts import Message, load_prompt
from fieldmark.llm.questions import Question
from fieldmark.params import Params, load_params, places_of
from fieldmark.pictures.cuts import Place, file_of
from fieldmark.pictures.decode import BadImage, hash_file, open_file, open_rgb
from fieldmark.pictures.views import Source
from stages import ask, describe_images, generate_concepts
from stages.index_images import leave_out_imageless
from stages.pool_tokens import find_asked, length_of, measure
from tools import preflight
from tools.share import dvc
from training.train import plan_run

# The rate is measured on so many batches, after a first one.
TIMED_BATCHES = 2
# A thumbnail and the rows of index, graphs and labels of one picture: about so many bytes.
BESIDES = 20_000
# DVC's cache holds a copy of every output, where the file system makes no light ones.
COPIES = 2
NAME = re.compile(r"[A-Za-z0-9._-]+")


class Doctor:
    """What is found on the way: the pictures that there will be and some of them, the classes, bytes a picture."""

    def __init__(self, file: str, params: Params, calls: bool) -> None:
        self.file, self.params, self.calls = file, params, calls
        self.documents = params.dataset.format == "text_graph"
        self.count = 0
        self.sources: list[Source] = []
        self.classes: list[Row] = []
        self.bytes = float(BESIDES)

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """The checks by name, in order: later ones use what earlier ones found."""
        yield "environment", self.environment
        yield "data set", self.data_set
        yield "runs", self.runs
        for name in self.params.image_encoders:
            kind = "tower" if name in self.params.towers else "encoder"
            yield f"{kind} {name}", lambda name=name: self.encoder(name)  # type: ignore[misc]
        yield "disk", self.disk
        yield "concepts", self.concepts
        if self.params.describe.enabled:
            yield "descriptions", self.descriptions
        for name in self.params.ask:
            yield f"question {name}", lambda name=name: self.question(name)  # type: ignore[misc]
        yield "remote", self.remote

    def environment(self) -> str:
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = dict(line.split("==") for line in lines if "==" in line)
        names = [found[0] for found in map(NAME.match, project["dependencies"]) if found]
        for name in names:
            try:
                version = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                raise UserError(f"{name} is not installed; run `make setup`, or activate .venv") from None
            wanted = pinned.get(name, version)
            if version != wanted:
                raise UserError(f"{name} {version} is installed, and constraints.txt names {wanted}; run `make setup`")
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        choose_device(self.params.train.device, f"{self.file}: train.device:")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        python = ".".join(map(str, sys.version_info[:3]))
        threads = counted(torch.get_num_threads(), "thread", "threads")
        return f"Python {python}, {len(names)} packages, {threads} on {cores} cores, GPU: {', '.join(gpus) or 'none'}"

    def data_set(self) -> str:
        params, dataset = self.params, self.params.dataset
        preflight.check(self.file, params)
        if "reef" in params.demo and not os.path.lexists(dataset.root):
            reef = params.demo["reef"]
            self.count = 24 * (reef.train_per_class + reef.test_per_class)
            return f"{dataset.root} is drawn by the first run: {self.count} pictures of 24 classes"
        preflight.check_texts(params)
        listing = read_listing(dataset)
        self.count = 0 if listing.documents else len(listing.images)
        self.classes = leave_out_imageless(list_classes(listing), dataset)
        what = "documents" if listing.documents else "pictures"
        if not listing.documents:
            self.sources = self.look(dataset.folder, [row["path"] for row in listing.images])
        sizes = Counter(row["name"] for row in listing.images)
        fewest = min(sizes, key=lambda name: sizes[name])
        named = len({row["split"] for row in listing.images} - {None})
        splits = f"the data name {counted(named, 'split', 'splits')}" if named else "splits are drawn"
        return f"{len(listing.images):,} {what} of {len(sizes)} classes, {sizes[fewest]} at least ({fewest}); {splits}"

    def look(self, folder: Path, paths: list[str]) -> list[Source]:
        """Some of the pictures. Raises UserError where the first cannot be opened."""
        path = folder / file_of(paths[0])
        try:
            open_rgb(path)
        except BadImage as error:
            raise UserError(f"{path}: {error}; look at it: most pictures should be good") from None
        # Evenly from all of them: the first may be of one size.
        few = (TIMED_BATCHES + 1) * max(each.batch_size for each in self.params.image_encoders.values())
        some = dict.fromkeys(file_of(path) for path in paths[:: max(1, len(paths) // few)])
        return usable([folder / file for file in some])

    def runs(self) -> str:
        for name in self.params.train.runs:
            plan_run(self.file, self.params, name)
        return f"{counted(len(self.params.train.runs), 'run', 'runs')} can stand: {', '.join(self.params.train.runs)}"

    def encoder(self, name: str) -> str:
        settings, started = self.params.image_encoder(name), perf_counter()
        if self.params.makes(settings) and not any(place.exists() for place in places_of(settings)):
            return "is tuned by the first run, and not tried before"
        encoder = load_image_encoder(name, settings, choose_device("auto"), self.params.towers)
        loaded = perf_counter() - started
        if isinstance(encoder, LoadedEncoder):
            with contextlib.redirect_stderr(io.StringIO()):
                embed_texts({f"a photo of a {self.params.domain.noun}": "name"}, encoder)
        if self.documents:
            return f"loaded in {loaded:.1f} s on {encoder.device}; documents have no picture to embed"
        with tempfile.TemporaryDirectory() as folder:
            rate, nodes, size = self.time(encoder, self.sources or draw_noise(Path(folder), encoder.batch_size))
        self.bytes += size
        vectors = 0
        if name in self.params.moments:
            asked = find_asked(encoder, self.params.moments[name])
            widths = measure(encoder, asked)
            vectors = sum(length_of(each.kind, widths[each.layer], each.directions) for each in asked)
            self.bytes += 2 * vectors * (self.params.embed.views + 1)
        time = timedelta(seconds=round(self.count / rate))
        more = ", and as long again for `moments`" if vectors else ""
        return (
            f"loaded in {loaded:.1f} s on {encoder.device}; {nodes} nodes of {encoder.dimension} numbers a view;"
            f" {rate:.1f} pictures/s: about {time} for {self.count:,}{more}"
        )

    def time(self, encoder: ImageEncoder, sources: list[Source]) -> tuple[float, int, float]:
        """Pictures a second, nodes a view and bytes a picture. Raises UserError for more nodes than a graph holds."""
        product = nodes_of(encoder, self.params.embed)
        batch = encoder.batch_size
        # A first pass is slower than those that follow.
        [rows] = next(forward_sources(sources[:1], [product], Clock()))
        timed = sources[:TIMED_BATCHES * batch]
        started = perf_counter()
        for _ in forward_sources(timed, [product], Clock()):
            pass
        rate = len(timed) / (perf_counter() - started)
        kinds = rows["kind"].to_pylist()[:len(rows) // (self.params.embed.views + 1)]
        linked = sum(kind in self.params.graphs.nodes for kind in kinds)
        if linked > MAX_NODES:
            remedy = "take a kind out of graphs.nodes, or make embed.grids coarser"
            raise UserError(f"{self.file}: graphs.nodes: {linked} nodes a view, a graph holds {MAX_NODES}; {remedy}")
        file = io.BytesIO()
        store.write_parquet([rows], file, rows.schema)
        return rate, len(kinds), float(file.tell())

    def disk(self) -> str:
        needed = COPIES * self.bytes * self.count
        free = shutil.disk_usage(".").free
        said = f"about {needed / 1e9:.2f} GB for {self.count:,} pictures, DVC's copy included; {free / 1e9:.1f} GB free"
        if needed > free:
            remedy = "make room, or ask for less (`embed.tokens: false`, coarser embed.grids, fewer moments)"
            raise UserError(f"{said}; {remedy}")
        return said

    def concepts(self) -> str:
        params, llm = self.params, self.params.llm
        if self.documents:
            return generate_concepts.NOT_OF_DOCUMENTS
        if llm.mode == "replay":
            return f"llm.mode replay: answers come from {llm.recordings}, nobody is asked"
        if not self.classes:
            raise UserError("there are no classes to ask about or to have texts for; see `data set` above")
        own = read_own(params.concepts, self.classes)
        if llm.mode == "import":
            generate_concepts.check_imported(self.classes, own, params)
            count = sum(len(each.texts) for each in own)
            return f"llm.mode import: {count} of {len(self.classes)} classes have texts of your own, nobody is asked"
        questions = generate_concepts.questions_of(self.classes, own, params)
        if not questions:
            return "all classes have texts of your own, nobody is asked"
        return self.ask("generate_concepts", list(questions.values()), lambda item: item.messages)

    def descriptions(self) -> str:
        params = self.params
        if params.llm.mode not in ("live", "batch"):
            return f"llm.mode {params.llm.mode}: nobody is asked"
        if not self.sources:
            raise UserError("there is no picture to ask about; see `data set` above")
        prompt = load_prompt(params.describe.prompt)
        places = {source.image_id: Place(source.path) for source in self.sources}
        [item] = describe_images.items_of([self.sources[0].image_id], prompt, params)
        count = budget(self.count, params.describe.share)
        questions = [Question(prompt, [item] * count)]
        if cells := describe_images.cells_of([self.sources[0].image_id], params.describe.nodes):
            of_cells = load_prompt(params.describe.cell_prompt)
            [first, *_] = describe_images.cell_items(cells, of_cells, params)
            questions.append(Question(of_cells, [first] * count * len(cells)))
        return self.ask("describe_images", questions, lambda item: as_sent(item, places))

    def question(self, name: str) -> str:
        """That a question of one's own fits its prompt; nobody is asked, for its subjects may not be there yet."""
        prompt = ask.load_question(name, self.params.ask[name], documents=self.documents)
        price = f"python -m stages.ask --ask {name} --dry-run"
        return f"{prompt.path} asks about each {prompt.subject}; what it costs: {price}, where the index is there"

    def ask(self, stage: str, questions: list[Question], attach: Callable[[Item], list[Message]]) -> str:
        """Ask the first question of a stage, if calls are allowed; say what it cost, and what all cost at most.

        Raises UserError where a limit forbids the call, where it fails, and where its answer does not fit.
        """
        llm = self.params.llm
        where = f"{llm.model} at {public_url(server_of(llm))}"
        every = [(question.prompt, item) for question in questions for item in question.items]
        calls, _, _, usd = estimate(plan_of([item for _, item in every]), llm)
        total = f"{stage}: {calls:,} calls where no answer is held, {at_most(usd)}"
        # In mode batch, too, one call is made: a batch may take a day. A bad answer is not asked for again.
        once = llm.model_copy(update={"mode": "live", "max_attempts": 1})
        prompt, item = every[0]
        plan = plan_of([item])
        check_limits(plan, once)
        client = Client(prompt, once)
        if not self.calls:
            return f"{where} is not asked (--no-call); {total}"
        print(f"asking {where} one question of {stage}, {at_most(estimate(plan, once).usd)}", flush=True)
        return f"{where}: {self.answer(client, attach(item))}; {total}"

    def answer(self, client: Client, messages: list[Message]) -> str:
        """What came of a call. Raises UserError where no usable answer did."""
        llm, started = client.llm, perf_counter()
        reply = client.ask(messages)
        if reply.status == "error":
            # Nothing was answered, so that nothing is billed: the server may call the limit on an answer's length by
            # its other name, which the client has taken now.
            reply = client.ask(messages)
        took = perf_counter() - started
        if reply.status != "ok":
            remedy = {
                "truncated": "raise llm.max_output_tokens",
                "invalid": "try another llm.response_format or llm.model",
                "refused": f"change {client.prompt.path} or the domain card, or take another llm.model",
            }.get(reply.status, "check llm.base_url and llm.model, and try again")
            raise UserError(f"{client.base_url}: {reply.status}: {reply.response_json[:300]}; {remedy}")
        spent = cost(reply.input_tokens, reply.output_tokens, price_of(llm))
        paid = "an unknown sum" if spent is None else f"${spent:.4f}"
        counts = [reply.input_tokens, reply.output_tokens]
        tokens = "tokens not counted" if None in counts else "{} tokens in, {} out".format(*counts)
        key = llm.api_key_env if os.environ.get(llm.api_key_env) else "no key"
        return f"answered in {took:.1f} s with {key}, {llm.response_format} accepted, {tokens}, {paid}"

    def remote(self) -> str:
        done = subprocess.run(["dvc", "remote", "default"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return "none is set, and nothing is shared (make share REMOTE=...)"
        name = done.stdout.strip()
        url = dvc("config", f"remote.{name}.url").strip()
        if "://" in url:
            dvc("ls-url", f"remote://{name}")
            return f"{name} ({url}) can be read"
        folder = Path(".dvc", url)
        there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"remote {name}: {there} may not be written by you; change that, or take another remote")
        return f"{name} ({url}) can be written"


def usable(paths: list[Path]) -> list[Source]:
    """Pictures that can be read, with their image_id."""
    sources = []
    for path in paths:
        with contextlib.suppress(BadImage):
            open_rgb(path)
            with open_file(path) as file:
                sources.append(Source(hash_file(file), path))
    return sources


def draw_noise(folder: Path, count: int) -> list[Source]:
    """Pictures to try an encoder with where the data set has none yet."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return usable(paths)


def at_most(usd: float | None) -> str:
    return "at an unknown price (llm.prices has none)" if usd is None else f"at most ${usd:.4f}"


def plan_of(items: list[Item]) -> PlannedCalls:
    """Calls of which none is held, each with a key of its own: as many as there are items."""
    keys = [str(number) for number in range(len(items))]
    return PlannedCalls(keys, {}, dict(zip(keys, items, strict=True)), set())


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--no-call", "--dry-run", dest="calls", action="store_false", help="ask no model")
    args = parser.parse_args()
    doctor = Doctor(args.params, load_params(args.params), args.calls)
    failed = []
    for name, check in doctor.checks():
        try:
            said = check()
        except Exception as error:
            failed.append(name)
            print(f"problem  {name}: {explain(error)}", flush=True)
        else:
            print(f"ok       {name}: {said}", flush=True)
    if failed:
        problems = counted(len(failed), "problem", "problems")
        raise UserError(f"{problems} ({', '.join(failed)}); the line of each says what to do")


if __name__ == "__main__":
    run(main)
