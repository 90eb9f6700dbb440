"""Items of work on the workers of a Ray cluster: buckets of a stage, or chunks of pictures (docs/cluster.md).

Ray Data hands out items; an actor on each worker opens the job once (loads the encoder), and does item after item. What
comes back is small: counts, or answers. So the process that drives (the head) holds no image, whatever their number. A
bucket is written by the stage's own code, whole or not at all, under the same name and with the same bytes as without a
cluster; the item of an actor that is lost is done again by another one.

The cluster is that of RAY_ADDRESS, or one that is started on this machine and ends with the command. All nodes see the
same folder at the same path: this code, params.yaml, data/index, and the images.
"""

import importlib
import importlib.util
import io
import logging
import os
import pickle
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any, NamedTuple

from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError, explain, redact, say_once
from fieldmark.params import Params

ENGINES = ("plain", "ray")
# So that `dvc repro`, whose commands have no options, runs its stages on a cluster.
ENGINE_VARIABLE = "FIELDMARK_ENGINE"
INDEX = Path("data/index/images.parquet")
# What a cluster on this machine shares between its processes: items and counts.
OBJECT_STORE_BYTES = 200_000_000
# One item waits at a worker while it does another.
IN_FLIGHT = 2
# How often a cluster of this machine is started before that is given up.
STARTS = 3
# How often an item is done again whose worker was lost; Ray would go on for ever where the item itself kills workers.
RETRIES = 5
# A bucket at an address, or half of one.
BUCKET_NAME = re.compile(r"b\d+\.parquet(\..*\.partial)?")
# Keys that no worker needs, beside llm.api_key_env. Those of the address of --out stay.
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
HOW_TO_INSTALL = 'pip install -c constraints.txt "ray[data]"'


class Job(NamedTuple):
    """What workers do: `opener` of `module`, called once a worker with arguments and parameters, gives a function of an
    item."""

    module: str
    opener: str
    arguments: Namespace
    params: Params


class Bucket(NamedTuple):
    """What the function of a stage's job says of a bucket."""

    made: int  # images that rows were made for
    images: int  # all that it holds


class Done(NamedTuple):
    """What a worker says of an item."""

    result: Any = None
    seconds: float = 0.0  # without opening the job
    warnings: tuple[str, ...] = ()
    error: str | None = None  # one line for people


class Shelf(NamedTuple):
    """Where finished buckets of some folders go, if not into these: an address that fsspec knows."""

    url: str
    folders: list[Path]

    def open(self) -> tuple[Any, str]:
        """The file system, and the folder in it. Raises UserError for an address that cannot be used."""
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            said = redact(" ".join(str(error).split()))
            raise UserError(f"--out {redact(self.url)}: cannot be used ({said}); see docs/cluster.md") from None
        return files, root.rstrip("/")

    def bring(self, bucket: int, do: Callable[[int], Bucket]) -> Bucket:
        """Do a bucket, going on from what the address has of it, and put there what is new."""
        files, root = self.open()
        paths = [store.bucket_path(folder, bucket) for folder in self.folders]
        own = [path for path in paths if not path.exists()]  # those that lie here only while this runs
        fetched = {}
        for path in own:
            target = f"{root}/{path.as_posix()}"
            if files.exists(target):
                store.write_atomic(path, partial(fetch, files, target))
                fetched[path] = state_of(path)
        try:
            done = do(bucket)
            # What lay here before is sent even if it is up to date: a worker that was lost may have left it, unsent.
            for path in paths:
                if state_of(path) != fetched.get(path):
                    put(files, path, f"{root}/{path.as_posix()}")
        finally:
            for path in own:
                path.unlink(missing_ok=True)
        return done

    def remove_strays(self, buckets: int) -> None:
        """store.remove_strays of the folders at the address. What else people keep there stays."""
        files, root = self.open()
        wanted = {store.bucket_path("", bucket).name for bucket in range(buckets)}
        for folder in self.folders:
            with suppress(FileNotFoundError):
                for found in files.ls(f"{root}/{folder.as_posix()}", detail=False):
                    name = found.rsplit("/", 1)[-1]
                    if BUCKET_NAME.fullmatch(name) and name not in wanted and not store.in_use(
                        name, partial(written_at, files, found)
                    ):
                        files.rm_file(found)


def fetch(files: Any, source: str, path: Path) -> None:
    files.get_file(source, str(path))


def put(files: Any, path: Path, target: str) -> None:
    """Send a file. It has its name once it is whole: a worker may be lost on the way."""
    files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    half = store.partial_name(target)
    files.put_file(str(path), half)
    files.mv(half, target)


def written_at(files: Any, path: str) -> float:
    """When a file was written, in seconds since 1970; now, where its file system does not tell."""
    try:
        return float(files.modified(path).timestamp())
    except NotImplementedError:
        return time()


def state_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def add_engine(parser: ArgumentParser, default: str = "plain") -> ArgumentParser:
    """The options that choose what runs a command."""
    said = f"plain: this process; ray: the workers of a Ray cluster, see docs/cluster.md (default: {default})"
    parser.add_argument("--engine", choices=ENGINES, default=default, help=said)
    share = "with --engine ray: processors of a worker (default: a GPU's share of them, or all of a node)"
    parser.add_argument("--cpus", type=int, metavar="N", help=share)
    return parser


def add_bucket_engine(parser: ArgumentParser) -> ArgumentParser:
    """The same for a stage that makes buckets."""
    add_engine(parser, os.environ.get(ENGINE_VARIABLE) or "plain")
    there = "with --engine ray: finished buckets go there, below their own paths, instead of into this folder"
    parser.add_argument("--out", dest="url", metavar="URL", help=there)
    return parser


def on_cluster(arguments: Namespace) -> bool:
    """Whether workers do what was asked. Raises UserError for options that do not go together."""
    if arguments.engine not in ENGINES:
        raise UserError(f"{ENGINE_VARIABLE}={arguments.engine}: is no engine; set it to {' or '.join(ENGINES)}")
    wanted = arguments.engine == "ray"
    if not wanted:
        for option, value in (("--cpus", arguments.cpus), ("--out", getattr(arguments, "url", None))):
            if value is not None:
                raise UserError(f"{option}: is for --engine ray; leave it out, or add that")
        return False
    if arguments.cpus is not None and arguments.cpus < 1:
        raise UserError(f"--cpus {arguments.cpus}: a worker takes at least 1")
    if getattr(arguments, "shard", None) is not None:
        raise UserError("--shard: splits buckets between machines by hand, and --engine ray does that; leave one out")
    if getattr(arguments, "device", "auto") not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {arguments.device}: with --engine ray auto, cpu or cuda; Ray hands out the GPUs")
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"--engine ray: Ray is not installed; {HOW_TO_INSTALL}")
    # What only looks and writes nothing stays on this machine.
    return not (getattr(arguments, "dry_run", False) or getattr(arguments, "find_batch_size", False))


class Worker:
    """The actor: it opens the job with its first item. Ray calls it with batches of one item."""

    def __init__(self, job: Job, folder: Path, cpus: int) -> None:
        self.job, self.folder, self.cpus = job, folder, cpus
        self.do: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        said, done = io.StringIO(), Done()
        try:
            # What stages print of a bucket is not for people: the head says it of all of them.
            with redirect_stdout(said), redirect_stderr(said):
                self.do = self.do or self.open()
                started = perf_counter()
                result = self.do(pickle.loads(batch["item"][0]))
                done = Done(result, perf_counter() - started)
        except Exception as error:
            done = Done(error=redact(str(error) if isinstance(error, UserError) else explain(error)))
        warned = tuple(line for line in said.getvalue().splitlines() if line.startswith("warning: "))
        return {"done": [pickle.dumps(done._replace(warnings=warned))]}

    def open(self) -> Callable[[Any], Any]:
        import torch

        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: is not on the node {os.uname().nodename}; all nodes need it at this path")
        os.chdir(self.folder)
        torch.set_num_threads(self.cpus)
        os.environ["FIELDMARK_PROCESSORS"] = str(self.cpus)  # for threads that decode
        opener = getattr(importlib.import_module(self.job.module), self.job.opener)
        do: Callable[[Any], Any] = opener(self.job.arguments, self.job.params)
        return do


class Share(NamedTuple):
    """What a worker takes of its node, and how many workers there are."""

    cpus: int
    gpus: int
    workers: int


def share_of(nodes: Sequence[dict[str, float]], cpus: int | None, device: str) -> Share:
    """The share of a worker: one GPU where there are any, and processors. Raises UserError where no node has that.

    `nodes` are the resources of each, as Ray names them.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not with_gpu:
        raise UserError("--device cuda: no node of the cluster has a GPU; leave it out, or add such nodes")
    gpus = 1 if with_gpu and device != "cpu" else 0
    able = with_gpu if gpus else [node for node in nodes if node.get("CPU", 0) >= 1]
    if cpus is None:
        cpus = max(1, int(min((node.get("CPU", 0) / (node["GPU"] if gpus else 1) for node in able), default=1)))
    room = [int(node.get("CPU", 0) // cpus) for node in able]
    workers = sum(min(each, int(node["GPU"])) if gpus else each for each, node in zip(room, able, strict=True))
    if not workers:
        most = int(max((node.get("CPU", 0) for node in able), default=0))
        raise UserError(f"--cpus {cpus}: no node of the cluster has so many processors (at most {most}); ask for fewer")
    return Share(cpus, gpus, workers)


@contextmanager
def connected(params: Params) -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS, or to one on this machine that ends with the block."""
    # Set before Ray is imported. Nothing is reported to its makers, and its core writes no lines of its own.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    folder = None
    if not address:
        # Other users of this machine cannot use it: only this command and its workers know the token.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        folder = tempfile.mkdtemp(prefix="ray-")
        local = {"include_dashboard": False, "_temp_dir": folder, "object_store_memory": OBJECT_STORE_BYTES}
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Workers inherit this process's environment.
        with without_keys(params.llm.api_key_env):
            start(ray, address, {"log_to_driver": False, "logging_level": logging.ERROR, **local})
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            # What Ray says of lost workers goes to stdout, where answers may go.
            with redirect_stdout(sys.stderr):
                yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def without_keys(name: str) -> Iterator[None]:
    """The environment without the key of that name and without KEYS, while the block runs."""
    held = {each: os.environ.pop(each) for each in {name, *KEYS} if each in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def start(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    """ray.init. Raises UserError where no cluster answers."""
    # Ray gives its processes 30 s to start, which is not enough on a machine that is busy.
    for left in reversed(range(1 if address else STARTS)):
        try:
            ray.init(address or "local", **options)
            return
        except Exception as error:  # Ray says some failures by no class of its own
            ray.shutdown()
            if not left:
                said = redact(" ".join(str(error).split()))[:300]
                where = f"the cluster of RAY_ADDRESS={redact(address)}" if address else "a Ray cluster of this machine"
                raise UserError(f"--engine ray: {where} does not answer ({said}); see docs/cluster.md") from None


def map_items(ray: Any, job: Job, items: Sequence[Any], share: Share, ordered: bool = False) -> Iterator[Done]:
    """What workers say of each item, as they come or in order. Raises UserError where an item fails.

    Items of a worker or a node that is lost are done again, by another worker or on another node, RETRIES times. All
    items are pickled at once, so that the head's memory grows with them: they should be small.
    """
    data = importlib.import_module("ray.data")
    logging.getLogger("ray").setLevel(logging.ERROR)
    # What it says of a failure, with a traceback, is one line in rows_of.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = ordered
    rows = [{"item": pickle.dumps(item)} for item in items]
    with warnings.catch_warnings():
        # Ray 2.60 warns of max_task_retries, which it will name another way in 2.64; it has no other way yet.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        # A block an item: what is handed out, and what is lost.
        found = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            batch_size=1,
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            fn_constructor_args=(job, Path.cwd(), share.cpus),
            max_task_retries=RETRIES,
            compute=data.ActorPoolStrategy(
                min_size=1, max_size=share.workers, initial_size=min(share.workers, len(rows)),
                max_tasks_in_flight_per_actor=IN_FLIGHT,
            ),
        )  # fmt: skip
    for row in rows_of(ray, found):
        done: Done = pickle.loads(row["done"])
        for warning in done.warnings:
            say_once(warning)
        if done.error is not None:
            raise UserError(done.error)
        yield done


def rows_of(ray: Any, found: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set that is worked on. Raises UserError where Ray itself gives up."""
    try:
        yield from found.iter_rows()
    except ray.exceptions.RayError as error:
        said = redact(" ".join(str(error).split()))[:300]
        remedy = "what is finished is kept, run again; where workers end again and again, they often lack memory"
        raise UserError(f"--engine ray: the cluster gave up ({said}); {remedy}") from None


def for_worker(job: Job, share: Share) -> Job:
    """The job as workers get it: each has one device."""
    return job._replace(arguments=Namespace(**{**vars(job.arguments), "device": "cuda" if share.gpus else "cpu"}))


def find_share(ray: Any, job: Job) -> Share:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_of(nodes, job.arguments.cpus, getattr(job.arguments, "device", "cpu"))


def map_chunks(job: Job, chunks: Sequence[Any]) -> Iterator[Any]:
    """What workers give for each of some chunks, in order. All chunks are held here, pickled, while it runs."""
    with connected(job.params) as ray:
        share = find_share(ray, job)
        for done in map_items(ray, for_worker(job, share), chunks, share, ordered=True):
            yield done.result


def run_buckets(job: Job, folders: Sequence[Path], first: str | None = None) -> int:
    """Bring buckets of folders up to date; returns for how many images rows were made.

    The job's opener gives a function that takes a bucket's number and returns a Bucket. What all buckets need is made
    by one worker before: `first` is its opener, whose function is called once, with None.
    """
    buckets, name = job.params.dataset.buckets, job.arguments.encoder
    total = count_images()
    for folder in folders:
        store.remove_strays(folder, buckets)
    shelf = Shelf(job.arguments.url, list(folders)) if job.arguments.url else None
    if shelf is not None:
        shelf.remove_strays(buckets)
    made = images = 0
    with connected(job.params) as ray:
        share = find_share(ray, job)
        job = for_worker(job, share)
        if first is not None:
            list(map_items(ray, job._replace(opener=first), [None], share))
        if shelf is not None:
            wrapped = Namespace(shelf=shelf, job=job)
            job = Job("fieldmark.cluster", "open_shelved", wrapped, job.params)
        began: float | None = None  # when the first worker had opened the job
        with tqdm(total=total, desc=f"{name} on {share.workers} workers", unit="img") as progress:
            for done in map_items(ray, job, range(buckets), share):
                began = began or perf_counter() - done.seconds
                made, images = made + done.result.made, images + done.result.images
                progress.update(done.result.images)
        seconds = perf_counter() - (began or 0)
    # What lost workers had begun.
    for folder in folders:
        store.remove_strays(folder, buckets)
    if shelf is not None:
        shelf.remove_strays(buckets)
    if made:
        workers = f"{share.workers} workers of {share.gpus} GPUs and {share.cpus} processors"
        print(f"{name}: {made} images in {seconds:.2f} s, {made / seconds:.1f} images/s, {workers}", file=sys.stderr)
    where = ", ".join(map(str, folders)) if shelf is None else redact(shelf.url)
    print(f"{where}: {made} images done, {images - made} kept")
    return made


def open_shelved(arguments: Namespace, params: Params) -> Callable[[int], Bucket]:
    """The opener of a job whose buckets go to a shelf."""
    job, shelf = arguments.job, arguments.shelf
    return partial(shelf.bring, do=getattr(importlib.import_module(job.module), job.opener)(job.arguments, params))


def count_images() -> int:
    """How many usable images the index has."""
    groups = store.iterate_groups(INDEX, "index.images/1", ["status"])
    return sum(group.column("status").to_pylist().count("ok") for group in groups)
