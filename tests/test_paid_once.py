"""Real `dvc repro` and `dvc exp run` against a counting server: killed at random moments, in workspaces that vanish.

Slow: a start of DVC and a stage takes seconds, and each signal has twenty.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import BIN, NOT_A_SHELLS, checkout, command, commit, edit_params
from tests.openai_server import Course, OpenAIServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds DVC among a process's children by /proc"),
]
CLASSES, MOMENTS, IN_FLIGHT = 24, 20, 4


@pytest.fixture
def folder(server: OpenAIServer, tmp_path: Path) -> Path:
    """A checkout with a few drawings of the demo; `make repro` there runs generate_concepts, which asks the server."""
    folder = checkout(tmp_path / "checkout")

    def edit(params: Any) -> None:
        params["demo"]["reef"] |= {"size": 32, "train_per_class": 4, "test_per_class": 1}
        params["llm"] |= {"mode": "live", "base_url": server.base_url, "model": "tiny", "concurrency": IN_FLIGHT}

    edit_params(folder, edit)
    (folder / "Makefile").write_text("SHELL := /bin/bash\nrepro:\n\t@dvc repro --quiet generate_concepts\n")
    command("dvc", "repro", "--quiet", "index_images", cwd=folder)
    commit(folder)
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in NOT_A_SHELLS}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OPENAI_API_KEY": "none"}
    return subprocess.Popen(
        ["make", "repro"],
        cwd=folder,
        env=environment,
        stderr=(folder.parent / "said").open("ab"),
        start_new_session=True,
    )


def child_of(process: int) -> int:
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def send(make: subprocess.Popen[bytes], number: signal.Signals, target: str) -> None:
    try:
        if target == "group":
            os.killpg(make.pid, number)
        else:
            os.kill(make.pid if target == "make" else child_of(make.pid), number)
    except (OSError, IndexError):
        pass  # it ended before


def members(group: int) -> list[int]:
    """The processes of a group that are still there."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in found.splitlines()]
    return [int(pid) for pid, pgid, state in fields if int(pgid) == group and not state.startswith("Z")]


# Killed alone, make leaves DVC running; and Ctrl-C goes to the whole group, DVC itself does not heed it.
TARGETS = {
    signal.SIGTERM: ["group", "dvc", "make"],
    signal.SIGINT: ["group"],
    signal.SIGKILL: ["group", "dvc"],
}


@pytest.mark.parametrize("number", TARGETS, ids=lambda number: number.name)
def test_no_moment_of_a_signal_costs_an_answer(number: signal.Signals, server: OpenAIServer, folder: Path) -> None:
    draw = random.Random(number)
    server.latency = 0.1
    samples = 100
    edit_params(folder, lambda params: params["concepts"].update(samples=samples))
    items = CLASSES * samples
    for moment in range(MOMENTS):
        make = start(folder)
        if draw.random() < 0.75:
            wait_for_calls(server, len(server.calls), make)
            time.sleep(draw.uniform(0, 0.8))
        else:
            time.sleep(draw.uniform(0, 4))
        send(make, number, TARGETS[number][moment % len(TARGETS[number])])
        make.wait()
        # Half of the time the next one starts while this one winds up.
        if draw.random() < 0.5:
            wait_for_end(make)
    # There was something to interrupt until the last moment.
    assert len(server.calls) < items
    server.latency = 0.0
    wait_for_end(make)
    command("dvc", "repro", "--quiet", "generate_concepts", cwd=folder, OPENAI_API_KEY="none")
    # Of one class all samples are one question to the server.
    asked = Counter(call["messages"][-1]["content"] for call in server.calls)
    assert len(asked) == CLASSES
    # What was delivered is journalled, and what is journalled is not asked again.
    lines = (folder / ".cache/generate_concepts.jsonl").read_bytes().splitlines()
    assert len({json.loads(line)["row"]["item_key"] for line in lines}) == len(lines) == items
    if number == signal.SIGTERM:
        assert "Traceback" not in (folder.parent / "said").read_text()
    if number == signal.SIGKILL:
        assert items <= len(server.calls) <= items + MOMENTS * IN_FLIGHT
    else:
        assert len(server.calls) == items


def wait_for_calls(server: OpenAIServer, before: int, make: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: len(server.calls) > before or make.poll() is not None)


def wait_for_end(make: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: not members(make.pid))


def wait_until(reached: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_experiment_pays_for_no_answer_that_is_here_and_leaves_its_own(server: OpenAIServer, folder: Path) -> None:
    run = ("dvc", "exp", "run", "--quiet", "--temp", "generate_concepts", "-S")
    command(*run, "concepts.per_class=7", cwd=folder, OPENAI_API_KEY="none")
    assert len(server.calls) == CLASSES
    assert len((folder / ".cache/generate_concepts.jsonl").read_bytes().splitlines()) == CLASSES
    command(*run, "concepts.per_class=7", "-S", "clean.max_words=20", cwd=folder, OPENAI_API_KEY="none")
    command("dvc", "exp", "run", "--quiet", "--queue", "generate_concepts", "-S", "concepts.per_class=7", cwd=folder)
    command("dvc", "exp", "run", "--quiet", "--run-all", cwd=folder, OPENAI_API_KEY="none")
    edit_params(folder, lambda params: params["concepts"].update(per_class=7))
    command("dvc", "repro", "--quiet", "generate_concepts", cwd=folder, OPENAI_API_KEY="none")
    assert len(server.calls) == CLASSES


def test_a_batch_of_an_experiment_is_read_by_the_next(server: OpenAIServer, folder: Path) -> None:
    edit_params(folder, lambda params: params["llm"].update(mode="batch", batch_poll_s=0.05))
    commit(folder)
    server.courses.append(Course(looks=10**6))
    environment = {key: value for key, value in os.environ.items() if key not in NOT_A_SHELLS}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OPENAI_API_KEY": "none"}
    words = ["dvc", "exp", "run", "--quiet", "--temp", "generate_concepts", "-S", "clean.max_words=20"]
    first = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True)
    wait_until(lambda: server.kinds.count("retrieve") > 2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    server.course_of["batch-0"].looks = 0
    command("dvc", "repro", "--quiet", "generate_concepts", cwd=folder, OPENAI_API_KEY="none")
    assert (len(server.batches), len(server.batched)) == (1, CLASSES)
