"""The one way out: what a command prints, and how it ends when the surroundings fail."""

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import TRACE, UserError, explain, printable, redact
from tests.project import ROOT

SECRETS = [
    ("https://me:hunter22@host/v1 is gone", "https://***@host/v1 is gone"),
    ("https://hunter22@host/v1", "https://***@host/v1"),
    ("ssh://me:hunter22@host:22/data", "ssh://***@host:22/data"),
    ("s3://bucket/a?X-Amz-Signature=hunter22&x=1: no", "s3://bucket/a?*** no"),
    ("a https://host/a?hunter22 and http://b:hunter22@c", "a https://host/a?*** and http://***@c"),
    ("https://host/v1 is it?", "https://host/v1 is it?"),
    ("me@host and a?b", "me@host and a?b"),
]
HOSTILE = [
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("\x9b31m", r"\x9b31m"),
    ("a\u202egpj.exe", r"a\u202egpj.exe"),
    ("a\udce9b", r"a\udce9b"),
    ("a\rb\x00\x08\x7f", r"a\rb\x00\x08\x7f"),
    ("a\u2028b", r"a\u2028b"),
    *[(text, text) for text in ("Zackenbarsch, é, 石斑魚", "\u0647\u0627\u0645\u0648\u0631", "a\n\tb")],
]  # fmt: skip


def end_of(tmp_path: Path, body: str, **options: Any) -> Any:
    """Run `body` as a command's main in a process of its own, and say how it ended."""
    main = textwrap.indent(body, "    ")
    script = f"import os, sys\nfrom fieldmark.command import run\ndef main():\n{main}\nrun(main)\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    kind = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "check": False, **options}
    return subprocess.run([sys.executable, str(tmp_path / "script.py")], env=environment, **kind)


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_what_a_terminal_obeys_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_of_addresses_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_everything_that_a_command_prints_is_guarded(tmp_path: Path, stream: str) -> None:
    done = end_of(tmp_path, f"print('\\x1b[31mred\\udc80 http://a:hunter22@b', file=sys.{stream}, flush=True)")
    assert getattr(done, stream) == "\\x1b[31mred\\udc80 http://***@b\n"
    assert done.returncode == 0


def test_bars_still_move(tmp_path: Path) -> None:
    body = """\
from tqdm import tqdm
for _ in tqdm(range(2), desc="\\x1b[31mone", mininterval=0):
    for _ in tqdm(range(2), desc="two", leave=False, mininterval=0):
        tqdm.write("said \\x1b[2J", file=sys.stderr)
"""
    done = end_of(tmp_path, body, text=False)
    said = done.stderr.decode()
    assert done.returncode == 0
    assert "\r\\x1b[31mone: 100%" in said
    assert "said \\x1b[2J\n" in said
    assert "\x1b[31m" not in said.replace("\x1b[A", "")
    assert "\x1b[A" in said


FAILURES = [
    ("raise OSError(28, 'No space left on device', 'data/x')", ["data/x: the disk is full", "free some space"]),
    ("raise RuntimeError('write failed: No space left on device (os error 28)')", ["the disk is full"]),
    ("open('/dev/full', 'w').write('x' * 100_000)", ["the disk is full"]),
    ("raise OSError(30, 'Read-only file system', 'data')", ["data: may not be read or written", "permissions"]),
    ("raise OSError(24, 'Too many open files', 'data')", ["too many files are open", "ulimit -n"]),
    ("open('not/there')", ["not/there: No such file or directory; mend that"]),
    ("open(b'not/there\\xff')", ["not/there\\udcff: No such file"]),
    ("os.listdir('\\x00')", ["embedded null", "fault of the code"]),
    ("raise MemoryError", ["there is not enough memory (MemoryError); end other programs, or lower batch_size"]),
    ("x = 'x' * 10**18", ["not enough memory"]),
    ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", ["not enough memory"]),
    ("import httpx2\nhttpx2.Client(proxy='http://a:hunter22@b:c')", ["the network cannot be used", "HTTPS_PROXY"]),
    ("import ssl\nraise ssl.SSLError('bad certificate')", ["the network cannot be used (SSLError", "SSL_CERT_FILE"]),
    ("def f(): f()\nf()", ["nested too deeply"]),
    ("raise KeyError('\\x1b[2J\\nforged: line')", ["KeyError in script.py, line 4", "a fault of the code", TRACE]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), FAILURES)
def test_every_failure_is_one_line(tmp_path: Path, body: str, said: list[str]) -> None:
    done = end_of(tmp_path, body)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert "hunter22" not in done.stderr
    for words in said:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("message", "adds"),
    [
        ("params.yaml: dataset.root: 'x' is not there; correct it", True),
        ("params.yaml: dataset: is missing; add it", True),
        ("https://host answers 404; check llm.model and llm.base_url in params.yaml", True),
        ("params.yaml: has edits that are not committed, and profiles/own.yaml would replace them", False),
        ("params.yaml: line 3: is not YAML: no", False),
        ("params.yaml: dataset.root: DVC would stop at this:\n  'a': a named pipe; move or delete it", False),
        ("profiles/own.yaml: dataset.sed: unknown key", False),
        ("data/index: is of dataset.root data/reef, and params.yaml says data/images", False),
    ],
)
def test_a_value_of_a_profile_is_to_be_changed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, *, adds: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    error = UserError(message)
    assert explain(error) == message
    Path("params.yaml").write_text("domain:\n")
    assert explain(error) == message
    Path("params.yaml").write_text("# params.yaml with profiles/own.yaml laid over it; ...\ndomain:\n")
    assert explain(error) == message + " (in profiles/own.yaml, which params.yaml was made of)" * adds


def test_where_an_error_came_from_is_shown_on_request(tmp_path: Path) -> None:
    done = end_of(tmp_path, "{}[1]", env={TRACE: "1"})
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("error: KeyError in script.py")


def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = end_of(tmp_path, "print('a table')", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_one_line(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = end_of(tmp_path, "print('a table')", stdout=closed)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_of_two_paths_the_one_that_was_written_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert explain(error).startswith("to: the disk is full")


WRITERS = {
    "text": "from fieldmark import store\nstore.write_text('out', 'x' * 10**6)",
    "table": (
        "from fieldmark import store\nnew = lambda: os.urandom(400).hex()\n"
        "rows = [{'image_id': new(), 'rank': 0, 'text': new()} for _ in range(4000)]\n"
        "store.write_table(store.make_table('descriptions/1', rows), 'out', 'descriptions/1', {}, 'mark')"
    ),
    "weights": (
        "import torch\nfrom safetensors.torch import save_file\nfrom fieldmark import store\n"
        "store.write_atomic('out', lambda partial: save_file({'a': torch.randn(200_000)}, partial))"
    ),
    "query": "import duckdb\nduckdb.sql(\"copy (select random() a from range(1_000_000)) to 'out'\")",
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_or_may_not_be_written_is_said_as_such(writer: str, small_disk: Path) -> None:
    script = small_disk.parent
    done = end_of(script, WRITERS[writer], cwd=small_disk)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the disk is full" in done.stderr
    if writer != "query":
        assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = end_of(script, WRITERS[writer], cwd=small_disk)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "may not be read or written by you" in done.stderr
