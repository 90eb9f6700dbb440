"""generate_concepts attacked where it pays: signals, kills, two at once, a full disk, servers that lie about usage."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.journal import journal_path, read_journal
from stages.generate_concepts import ANSWERS, main
from tests.fieldmark.llm.workspace import REPOSITORY, Workspace, answers, journal_lines, row_with
from tests.openai_server import Handler, OpenAIServer, Turn, body, completion

GOOD = '{"concepts":[{"text":"a fish with a fin","kind":"visual","part":null}]}'


def rays(count: int, kind: str = "ray") -> list[str]:
    return [f"{kind} {number}" for number in range(count)]


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_keeps_what_is_in_flight(
    number: signal.Signals, code: int, server: OpenAIServer, workspace: Workspace
) -> None:
    server.latency = 0.3
    workspace.write_classes(*rays(16))
    process = workspace.start("generate_concepts")
    until(lambda: len(server.calls) >= 4)
    process.send_signal(number)
    time.sleep(0.1)
    # What is impatient changes nothing.
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, "Traceback" in said) == (code, False)
    assert len(journal_lines()) == len(server.calls) < 16
    server.latency = 0.0
    workspace.run(main)
    assert len(server.calls) == 16


def drip(handler: Handler, request: dict[str, Any]) -> None:
    """An answer that comes byte by byte and has no end."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.1)


def test_one_press_of_ctrl_c_ends_what_a_server_would_not(server: OpenAIServer, workspace: Workspace) -> None:
    server.script += [drip] * 16
    workspace.write(timeout_s=2.0)
    workspace.write_classes(*rays(16))
    process = workspace.start("generate_concepts")
    until(lambda: len(server.calls) >= 4)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert (process.returncode, len(server.calls)) == (130, 4)
    assert time.monotonic() - begin < 6


# Starts a stage as DVC does, says its number, and waits for it.
DVC = """
import os, subprocess, sys
stage = subprocess.Popen(sys.argv[1:], env=os.environ | {"DVC_STAGE": "generate_concepts"})
print(stage.pid, flush=True)
stage.wait()
"""


@pytest.mark.parametrize(
    ("number", "shell"),
    [
        (signal.SIGKILL, ["sh", "-c", '"$@"; true', "sh"]),
        pytest.param(signal.SIGKILL, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, [], marks=pytest.mark.slow),
    ],
)
def test_a_stage_ends_with_its_dvc(
    number: signal.Signals, shell: list[str], server: OpenAIServer, workspace: Workspace
) -> None:
    server.latency = 0.2
    workspace.write_classes(*rays(200))
    command = [sys.executable, "-c", DVC, *shell, sys.executable, "-m", "stages.generate_concepts"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    dvc = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert dvc.stdout
    dvc.stdout.readline()
    until(lambda: len(server.calls) >= 4)
    dvc.send_signal(number)
    dvc.wait()
    # The end of its output is the end of the stage: no process holds the pipe any more.
    dvc.stdout.read()
    assert len(journal_lines()) == len(server.calls) < 60


@pytest.mark.slow
def test_without_dvc_a_stage_outlives_its_parent(server: OpenAIServer, workspace: Workspace) -> None:
    server.latency = 0.3
    workspace.write_classes(*rays(16))
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    command = f"nohup {sys.executable} -m stages.generate_concepts 2> log & sleep 1; kill -HUP $!"
    subprocess.run(["bash", "-c", command], env=environment | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    until(ANSWERS.exists)
    assert len(server.calls) == 16


def finish(*processes: subprocess.Popen[str], code: int = 0) -> list[str]:
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert {process.returncode for process in processes} == {code}, said
    return said


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_two_at_once_pay_once(times: int, server: OpenAIServer, workspace: Workspace) -> None:
    server.latency = 0.05
    for attempt in range(1, times + 1):
        workspace.write_classes(*rays(40, f"ray {attempt}"))
        finish(workspace.start("generate_concepts"), workspace.start("generate_concepts"))
        assert len(server.calls) == 40 * attempt
        assert len(answers()) == 40


def clone(name: str) -> Path:
    shutil.copytree(".", name, ignore=shutil.ignore_patterns("clone*", ".cache", "shared"))
    return Path(name).resolve()


def start_in(folder: Path, workspace: Workspace) -> subprocess.Popen[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return workspace.start("generate_concepts")


@pytest.mark.slow
def test_clones_that_share_a_cache_pay_once(server: OpenAIServer, workspace: Workspace, tmp_path: Path) -> None:
    server.latency = 0.05
    workspace.write_classes(*rays(40))
    workspace.monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "shared"))
    finish(*[start_in(clone(name), workspace) for name in ("clone-1", "clone-2")])
    assert len(server.calls) == 40
    made = [Path(name, ANSWERS).read_bytes() for name in ("clone-1", "clone-2")]
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"max_calls": 30}, {"max_usd": 0.1}])
def test_limits_are_of_all_who_share_the_journal(
    limit: dict[str, Any], server: OpenAIServer, workspace: Workspace, tmp_path: Path
) -> None:
    # 20 calls of at most 2,000 tokens at $2 a million: $0.08 and a little before they are made, $0.06 after.
    server.latency = 0.3
    workspace.monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "shared"))
    usage = {"prompt_tokens": 1_000, "completion_tokens": 1_000}
    server.script += [spending(**usage)] * 40
    workspace.write(**limit, concurrency=1)
    workspace.write_classes(*rays(20))
    first = start_in(clone("clone-1"), workspace)
    until(lambda: bool(server.calls))
    workspace.write_classes(*rays(20, "skate"))
    second = start_in(clone("clone-2"), workspace)
    finish(first)
    [said] = finish(second, code=1)
    assert "another process asks" in said
    assert re.search(rf"error: params\.yaml: llm\.{next(iter(limit))}: 20 calls .* beside ", said)
    assert len(server.calls) == 20
    # Nobody else is at it any more.
    finish(start_in(Path("clone-2").resolve(), workspace))
    assert len(server.calls) == 40


def spending(**usage: Any) -> Turn:
    answer = completion({"model": "tiny"}, GOOD)
    answer["usage"] = usage
    return body(answer)


def repr_of(value: object) -> str:
    return repr(value)[:12]


@pytest.mark.parametrize("count", [2**63, 10**400, -(10**9), 0, 1e9, 99.5, True, "many", None, {}], ids=repr_of)
def test_no_count_of_tokens_lifts_a_limit_or_blocks_the_stage(
    count: Any, server: OpenAIServer, workspace: Workspace
) -> None:
    lie = spending(prompt_tokens=count, completion_tokens=count)
    dear = spending(prompt_tokens=500_000, completion_tokens=0)
    workspace.write_classes(*rays(12))
    workspace.write(max_usd=1.0, concurrency=1)
    server.script += [lie, dear, lie, dear, lie, dear, lie]
    with pytest.raises(UserError, match=r"llm\.max_usd: \$1\.\d+ is spent, more than 1\.0"):
        workspace.run(main)
    # One more was under way.
    assert len(server.calls) <= 5
    workspace.write(max_usd=None)
    workspace.run(main)
    assert len(server.calls) == 12
    assert len(answers()) == 12


def test_a_journal_that_a_lie_blocked_goes_on(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_classes(*rays(3))
    workspace.run(main)
    path = journal_path("generate_concepts")
    path.write_text(path.read_text().replace('"input_tokens":100', '"input_tokens":9223372036854775808'))
    ANSWERS.unlink()
    workspace.run(main)
    assert len(server.calls) == 3
    assert [row["input_tokens"] for row in answers()] == [None] * 3


def test_a_full_disk_loses_no_answer(server: OpenAIServer, workspace: Workspace) -> None:
    server.latency = 0.1
    workspace.write_classes(*rays(17))
    process = workspace.start("generate_concepts")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    lines: list[str] = []
    assert process.stderr
    while not any("disk full" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert re.search(r"^error: \S+generate_concepts\.jsonl: disk full \(.*\); make room", said, re.MULTILINE)
    assert "Traceback" not in said
    assert len(journal_lines()) == len(server.calls) < 17
    workspace.run(main)
    assert len(server.calls) == 17


def test_a_good_copy_in_the_journal_wins_over_a_bad_one_in_the_output(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_classes(*rays(4))
    workspace.run(main)
    before, rows = ANSWERS.read_bytes(), answers()
    for number, damage in enumerate(['{"concepts"', "{}", '{"concepts": [{"text": 1}]}']):
        rows[number]["response_json"] = damage
    table = store.make_table("llm.answers/1", rows)
    header = store.read_header(ANSWERS, "llm.answers/1")
    store.write_table(table, ANSWERS, "llm.answers/1", header.params, header.fingerprint)
    capsys.readouterr()
    workspace.run(main)
    assert f"{ANSWERS}: 1 line is set aside and not read: row 1 (response_json is not JSON)" in capsys.readouterr().err
    assert ANSWERS.read_bytes() == before
    table = store.read_table(ANSWERS, "llm.answers/1").drop_columns(["attempts"])
    path = Path(ANSWERS)
    store.write_atomic(path, lambda partial: store.write_parquet([table], partial, table.schema))
    workspace.run(main)
    assert "4 lines are set aside" in capsys.readouterr().err
    assert ANSWERS.read_bytes() == before
    assert len(server.calls) == 4


def mutated(line: bytes, draw: random.Random) -> bytes:
    """A line with something wrong: bytes changed, cut, doubled, or a value of another kind in its place."""
    kind = draw.randrange(6)
    if kind == 0:
        spot = draw.randrange(len(line))
        return line[:spot] + bytes([draw.randrange(256)]) + line[spot + 1 :]
    if kind == 1:
        return line[: draw.randrange(len(line))]
    if kind == 2:
        spot = draw.randrange(len(line))
        return line[:spot] + line[spot:][: draw.randrange(40)] * draw.randrange(4) + line[spot:]
    content = json.loads(line)
    odd = [None, True, -1, 1e308, 2**63, 10**400, "", "\ud800", "x" * 10_000, [], {}, [[[]]], {"a": {}}, "ok", "live"]
    target = content.get("row", content) if kind < 5 else content
    target[draw.choice(sorted(target))] = draw.choice(odd)
    try:
        return json.dumps(content).encode()
    except ValueError:
        return b"[" * draw.randrange(10**5)


@pytest.mark.slow
@pytest.mark.parametrize("record", ["generate_concepts", "batches-generate_concepts"])
def test_no_mutated_line_ends_in_a_traceback(record: str, server: OpenAIServer, workspace: Workspace) -> None:
    """2,000 lines one by one under a good one, then all at once. No good line is lost to a bad one."""
    draw = random.Random(0)
    workspace.write_classes(*rays(2))
    workspace.write(mode="batch" if record.startswith("batches") else "live", batch_poll_s=0.01)
    workspace.run(main)
    paid = len(server.calls) + len(server.batched)
    path = journal_path(record)
    good = path.read_bytes()
    sample = good.splitlines()
    wrong = [mutated(draw.choice(sample), draw).replace(b"\n", b"") for _ in range(2_000)]
    for line in wrong:
        path.write_bytes(good + line + b"\n")
        workspace.run(main, "--dry-run")
    path.write_bytes(b"".join(line + b"\n" for line in wrong) + good)
    ANSWERS.unlink()
    workspace.run(main)
    assert len(answers()) == 2
    assert len(server.calls) + len(server.batched) == paid


@pytest.mark.slow
def test_no_mutated_row_of_the_journal_costs_anything_downstream(server: OpenAIServer, workspace: Workspace) -> None:
    """Whatever row is read is one that the output can hold."""
    draw = random.Random(1)
    line = json.dumps({"base_url": "http://x", "charged": 0.1, "row": row_with(response_json=GOOD)}).encode()
    for _ in range(2_000):
        Path("journal.jsonl").write_bytes(mutated(line, draw).replace(b"\n", b"") + b"\n")
        rows = [entry.row for entry in read_journal(Path("journal.jsonl"), Anything()).values()]
        store.make_table("llm.answers/1", rows)


class Anything:
    def __contains__(self, key: object) -> bool:
        return True
