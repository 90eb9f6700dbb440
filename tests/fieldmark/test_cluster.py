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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fieldmark import store
from fieldmark.cluster import Share, share_of
from fieldmark.command import UserError
from tests.project import ROOT, run_ray

RunStage = Callable[..., None]
SetParams = Callable[..., Any]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_workers_write_the_bytes_of_one_process(set_params: SetParams, dataset: list[str], run_stage: RunStage) -> None:
    """Nodes by a worker a processor, graphs by one. What is finished is kept, and what is missing is made."""
    set_params()
    run_stage("index_images")
    for stage, folder, cpus in (
        ("embed_images", "data/embed/vit/images", 1), ("build_graphs", "data/graphs/vit", os.cpu_count()),
    ):  # fmt: skip
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
    draw_images({f"{('train', 'test')[seed % 2]}/a/{seed}.png": seed for seed in range(720)})
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
            if kills == 5 and not head_killed and len(finished) > at_start:
                everyone = process.children(recursive=True)
                running.kill()
                head_killed = True
                assert not psutil.wait_procs(everyone, timeout=60)[1]
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
    assert "0 images done, 720 kept" in done.stdout
