"""What the console says while DVC works: lines as DVC prints them, and a real `dvc repro` of stages that do nothing."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkout import BIN, NOT_A_SHELLS, command
from tests.project import ROOT
from tools.repro import Progress, describe_stages, lasting, relay

STAGES = {"a": "Do a", "b@x": "Do b with x", "c": "Do c", "d": "Do d"}
DVC = """'data/images.dvc' didn't change, skipping
Stage 'a' didn't change, skipping
Running stage 'b@x':
> python -m stages.b
b: 3 files
the same line
Updating lock file 'dvc.lock'

Running stage 'c':
> python -m stages.c
the same line
Generating lock file 'dvc.lock'
Stage 'd' is cached - skipping run, checking out outputs
To track the changes with git, run:

	git add dvc.lock

To enable auto staging, run:

	dvc config core.autostage true
Use `dvc push` to send your updates to remote storage."""


def read(progress: Progress) -> list[str]:
    return [said for line in DVC.splitlines() for said in progress.read(line)]


def test_each_stage_that_runs_is_named_and_each_line_said_once() -> None:
    progress = Progress(STAGES, {}, lambda name: set())
    assert read(progress) == [
        "stage 2 of 4, b@x: Do b with x",
        "b: 3 files",
        "the same line",
        "stage 3 of 4, c: Do c",
        "stage 4 of 4, d: as it was made before",
    ]
    assert set(progress.seconds) == {"b@x", "c"}


def test_what_was_measured_is_told_once_for_a_stage_and_those_behind_it() -> None:
    took = {"b@x": 60.2, "c": 9.0, "d": 1.0}
    said = read(Progress(STAGES, dict(took), {"b@x": {"c", "d"}, "c": {"d"}}.__getitem__))
    assert [line for line in said if "took" in line] == [
        "  it and the 2 stages behind it took 1 min 10 s, each the last time it ran here"
    ]
    # c depends on nothing that ran: its own line. Nothing is said of b, behind which d has not run yet.
    said = read(Progress(STAGES, {"b@x": 60.0, "c": 9.0}, {"b@x": {"d"}, "c": set[str]()}.__getitem__))
    assert [line for line in said if "took" in line] == ["  it took 9 s, each the last time it ran here"]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (7265, "2 h 1 min")])
def test_times_in_words(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_bars_pass_as_they_are_and_a_warning_once(tmp_path: Path) -> None:
    progress, target = Progress({}, {}, lambda name: set()), io.BytesIO()
    source = tmp_path / "source"
    bar = b"\rembed:  50%|#\rembed: 100%|##\n"
    source.write_bytes(b"warning: x\nWARNING: 'data/none' is empty.\n" + bar + b"warning: x\n" + bar + b"last")
    with source.open("rb") as file:
        relay(file, target, progress.is_news)
    assert target.getvalue() == b"warning: x\n" + bar + bar + b"last"


def test_every_stage_has_words() -> None:
    stages = describe_stages()
    assert stages["train@linear_probe"] == "Train and evaluate run linear_probe"
    assert not [name for name, said in stages.items() if "$" in said or not said]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A DVC project of two stages, the first of which waits where a file `wait` is there."""
    first = "while [ -e wait ]; do sleep 0.1; done; cat in > one; echo first; echo same >&2"
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  first:\n    desc: Go first\n    cmd: '{first}'\n    deps: [in]\n    outs: [one]\n"
        "  then:\n    foreach: ${keys}\n    do:\n      desc: Go then to ${key}\n"
        "      cmd: cat one > ${key}; echo same >&2; test ! -e fail\n      deps: [one]\n      outs: ['${key}']\n"
    )
    (tmp_path / "params.yaml").write_text("keys: {two: 2}\n")
    (tmp_path / "in").write_text("1")
    command("dvc", "init", "--quiet", "--no-scm", cwd=tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_real_repro_is_told_and_ends_as_dvc_does(toy: Path) -> None:
    repro = (sys.executable, "-m", "tools.repro")
    done = command(*repro, cwd=toy, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == [
        "stage 1 of 2, first: Go first", "first", "stage 2 of 2, then@two: Go then to two"
    ]  # fmt: skip
    assert done.stderr == "same\n"
    assert set(json.loads((toy / ".cache/times/stages.json").read_text())) == {"first", "then@two"}
    assert command(*repro, cwd=toy, PYTHONPATH=str(ROOT)).stdout == ""
    (toy / "in").write_text("2")
    (toy / "fail").touch()
    done = command(*repro, cwd=toy, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode not in (0, None)
    assert "it and the 1 stage behind it took" in done.stdout
    assert "ERROR: failed to reproduce 'then@two'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_dvc_and_its_stage(toy: Path, number: signal.Signals) -> None:
    (toy / "wait").touch()
    environment = {key: value for key, value in os.environ.items() if key not in NOT_A_SHELLS}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tools.repro"]
    with subprocess.Popen(words, cwd=toy, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stage 1 of 2, first: Go first\n"
        time.sleep(0.5)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
            # A stage of ours ends with DVC (fieldmark/command.py); this one is told.
            (toy / "wait").unlink()
        process.stdout.read()
        assert process.wait() not in (0, None)
    assert not (toy / "dvc.lock").exists()
