"""Work on a Ray cluster gives the files that one process gives, and what is lost is one item."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from fieldmark import store
from fieldmark.cluster import RETRIES, Bucket, Job, Share, Shelf, map_chunks, share_of, without_keys
from fieldmark.command import UserError
from fieldmark.params import Params, load_params
from tests.project import ROOT, run_ray

RunStage = Callable[..., None]
SetParams = Callable[..., Any]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "folder", "cpus"),
    [
        ("build_graphs", "data/graphs/vit", os.cpu_count()),
        ("embed_images", "data/embed/vit/images", 1),
    ],
)
def test_workers_write_the_bytes_of_one_process(
    stage: str, folder: str, cpus: int, set_params: SetParams, dataset: list[str], run_stage: RunStage
) -> None:
    """Graphs by one worker, nodes by a worker a processor. What is finished is kept, and what is missing is made."""
    set_params()
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    if stage != "embed_images":
        run_stage(stage, "--encoder", "vit")
    plain = contents(folder)
    kept, *lost = map(Path, plain)
    for path in lost:
        path.unlink()
    before = kept.stat()
    done = run_ray(f"stages.{stage}", "--encoder", "vit", "--cpus", str(cpus))
    assert done.returncode == 0, done.stderr
    assert contents(folder) == plain
    assert kept.stat() == before
    there = len(store.held_ids(kept))
    assert f"{folder}: {len(dataset) - there} images done, {there} kept" in done.stdout


def test_a_worker_has_a_gpu_or_processors() -> None:
    gpus, cpus, head = {"CPU": 32.0, "GPU": 4.0}, {"CPU": 12.0}, {"memory": 1.0}
    assert share_of([gpus, cpus, head], None, "auto") == Share(8, 1, 4)
    assert share_of([gpus, cpus, head], None, "cpu") == Share(12, 0, 3)
    assert share_of([gpus, gpus], 16, "cuda") == Share(16, 1, 4)
    assert share_of([cpus, head], 5, "auto") == Share(5, 0, 2)
    with pytest.raises(UserError, match="no node of the cluster has a GPU"):
        share_of([cpus], None, "cuda")
    with pytest.raises(UserError, match="--cpus 13: no node of the cluster has so many processors \\(at most 12\\)"):
        share_of([cpus, head], 13, "auto")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--cpus", "2"], {}, "--cpus: is for --engine ray"),
        (["--out", "memory://x"], {}, "--out: is for --engine ray"),
        ([], {"FIELDMARK_ENGINE": "spark"}, "FIELDMARK_ENGINE=spark: is no engine; set it to plain or ray"),
        (["--shard", "0/2"], {"FIELDMARK_ENGINE": "ray"}, "--shard: splits buckets between machines by hand"),
        (["--device", "cuda:1"], {"FIELDMARK_ENGINE": "ray"}, "--device cuda:1: with --engine ray auto, cpu or cuda"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], variables: dict[str, str], said: str, set_params: SetParams, run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_params()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        run_stage("embed_images", "--encoder", "vit", *arguments)


def test_a_bucket_that_was_made_and_not_sent_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed between the two leaves it here; what was fetched and did not change is not sent."""
    monkeypatch.chdir(tmp_path)
    shelf = Shelf(f"file://{tmp_path}/shelf", [Path("data/x")])
    here = store.bucket_path("data/x", 3)
    there = tmp_path / "shelf" / here

    def make(content: str, bucket: int) -> Bucket:
        if not here.exists() or here.read_text() != content:
            store.write_text(here, content)
        return Bucket(1, 1)

    shelf.bring(3, partial(make, "old"))
    assert there.read_text() == "old"
    assert not here.exists()
    sent = there.stat()
    shelf.bring(3, partial(make, "old"))
    assert there.stat() == sent
    store.write_text(here, "new")
    shelf.bring(3, partial(make, "new"))
    assert there.read_text() == here.read_text() == "new"
    assert [path.name for path in there.parent.iterdir()] == [there.name]


def test_only_strays_are_removed_from_an_address(tmp_path: Path) -> None:
    folder, host = tmp_path / "data/x", os.uname().nodename
    gone = subprocess.Popen(["true"])
    gone.wait()
    stay = {
        "b000.parquet", "notes.parquet", "b.pdf", "a.partial", "b000.parquet.1@far.partial",
        f"b001.parquet.{os.getpid()}@{host}.partial",
    }  # fmt: skip
    folder.mkdir(parents=True)
    for name in {*stay, "b004.parquet", f"b000.parquet.{gone.pid}@{host}.partial", "b002.parquet.2@far.partial"}:
        (folder / name).write_text("")
    os.utime(folder / "b002.parquet.2@far.partial", (0, 0))
    Shelf(f"file://{tmp_path}", [Path("data/x"), Path("data/none")]).remove_strays(4)
    assert {path.name for path in folder.iterdir()} == stay


def test_no_key_reaches_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MY_KEY": "1", "OPENAI_API_KEY": "2", "HF_TOKEN": "3", "AWS_SECRET_ACCESS_KEY": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with without_keys("MY_KEY"):
        assert variables.keys() & os.environ.keys() == {"AWS_SECRET_ACCESS_KEY"}
    assert {name: os.environ[name] for name in variables} == variables


def test_messages_hold_no_password() -> None:
    with pytest.raises(UserError) as error:
        Shelf("nosuch://me:secret@host/x?token=secret", []).open()
    assert "secret" not in str(error.value)


def open_deadly(arguments: Namespace, params: Params) -> Callable[[int], int]:
    """A job whose second item kills the worker, as one does that takes too much memory; each try is noted."""

    def do(item: int) -> int:
        with open("tries", "a") as tries:
            tries.write(f"{item}\n")
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return do


def ask_deadly() -> None:
    arguments = Namespace(cpus=os.cpu_count(), device="cpu")
    job = Job("tests.fieldmark.test_cluster", "open_deadly", arguments, load_params())
    print(list(map_chunks(job, range(3))))


@pytest.mark.slow
def test_an_item_that_kills_its_workers_ends_the_command(set_params: SetParams) -> None:
    set_params()
    code = "from fieldmark.command import run; from tests.fieldmark.test_cluster import ask_deadly; run(ask_deadly)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --engine ray: the cluster gave up (")
    assert "Traceback" not in done.stderr
    assert "Deprecat" not in done.stderr
    assert Path("tries").read_text().split().count("1") == RETRIES + 1


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(set_params: SetParams, dataset: list[str], run_stage: RunStage) -> None:
    set_params()
    run_stage("index_images")
    changed = Path("images") / dataset[0]
    changed.write_bytes((Path("images") / dataset[1]).read_bytes())
    done = run_ray("stages.embed_images", "--encoder", "vit", "--cpus", "1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert str(changed) in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_buckets_go_to_an_address_and_are_kept_there(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, tmp_path: Path
) -> None:
    set_params()
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    folder = Path("data/embed/vit/images")
    plain = contents(folder)
    shutil.rmtree(folder)
    shelf = tmp_path / "shelf"
    there = shelf / folder
    arguments = ["stages.embed_images", "--encoder", "vit", "--cpus", "1", "--out", f"file://{shelf}"]
    for lost in (list(plain), list(plain)[:1], []):
        for name in lost:
            (shelf / name).unlink(missing_ok=True)
        before = {path: path.stat() for path in there.glob("*")}
        done = run_ray(*arguments)
        assert done.returncode == 0, done.stderr
        assert {name.removeprefix(f"{shelf}/"): content for name, content in contents(there).items()} == plain
        assert not contents(folder)
        assert {path: path.stat() for path in before} == before


def workers_of(command: psutil.Process) -> list[psutil.Process]:
    """The actors of a command that runs; Ray names their processes after what they do."""
    found = []
    for process in command.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::") and "Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_killed_workers_and_a_killed_head_lose_a_bucket_each(
    set_params: SetParams, draw_images: Callable[[dict[str, int]], None], run_stage: RunStage
) -> None:
    """Ten workers are killed at moments of a seed, and the head after five of them. What is finished is not made again,
    nothing is lost, and the files are those of one process."""
    set_params(dataset={"buckets": 24}, embed={"views": 3})
    draw_images({f"{('train', 'test')[seed % 2]}/a/{seed}.png": seed for seed in range(360)})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    folder = Path("data/embed/vit/images")
    plain = contents(folder)
    shutil.rmtree(folder)

    chance = random.Random(0)
    command = [sys.executable, "-m", "stages.embed_images", "--encoder", "vit", "--engine", "ray", "--cpus", "1"]
    finished: dict[Path, tuple[int, int]] = {}
    kills, head_killed = 0, False
    while kills < 10 or len(finished) < 24:
        # Where a run ended before ten were killed, half of its buckets are to be made again.
        if len(finished) == 24:
            for path in chance.sample(sorted(finished), 12):
                path.unlink()
                del finished[path]
        with open("log", "w") as log:
            running = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
        process, at_start, moment = psutil.Process(running.pid), len(finished), 0.0
        while running.poll() is None:
            time.sleep(0.02)
            for path in folder.glob("b*"):
                stat = path.stat()
                state = stat.st_ino, stat.st_mtime_ns
                assert finished.setdefault(path, state) == state
            if kills == 5 and not head_killed:
                if len(finished) > at_start:
                    workers = workers_of(process)
                    running.kill()
                    head_killed = True
                    assert not psutil.wait_procs(workers, timeout=60)[1]
            elif kills < 10 and time.monotonic() > moment and (workers := workers_of(process)):
                if moment:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        chance.choice(workers).kill()
                        kills += 1
                moment = time.monotonic() + chance.uniform(0, 2)
        assert running.returncode in (0, -signal.SIGKILL), Path("log").read_text()
        finished |= {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("b*")}
    assert head_killed
    assert contents(folder) == plain
    done = run_ray("stages.embed_images", "--encoder", "vit", "--cpus", "1")
    assert done.returncode == 0, done.stderr
    assert "0 images done, 360 kept" in done.stdout
