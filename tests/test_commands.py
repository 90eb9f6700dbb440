"""What every command promises of its command line."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from fieldmark import command
from fieldmark.command import UserError
from tests.project import ROOT

# Every module that runs: what dvc.yaml runs and what people run beside it.
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("fieldmark", "stages", "training", "evaluation", "tools")
    for file in (ROOT / package).rglob("*.py")
    if "\ndef main() -> None:\n" in file.read_text()
)


def test_what_dvc_runs_is_there() -> None:
    assert set(re.findall(r"cmd: .*python -m ([\w.]+)", (ROOT / "dvc.yaml").read_text())) <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_help_says_what_it_reads_writes_and_costs(
    name: str, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage(name, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("\nReads ", "\nWrites ", "\nCosts "):
        assert word in said


@pytest.mark.parametrize("name", MODULES)
def test_an_unknown_option_is_refused(
    name: str, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage(name, "--frobnicate")
    assert stop.value.code == 2


@pytest.mark.parametrize("name", MODULES)
def test_a_module_runs_through_the_one_way_out(name: str) -> None:
    text = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text()
    assert text.endswith('if __name__ == "__main__":\n    run(main)\n')
    importlib.import_module(name)


def run(main: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as stop:
        command.run(main)
    return int(str(stop.value.code))


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("params.yaml: a: is wrong; mend it")

    def stop() -> None:
        raise KeyboardInterrupt

    assert run(lambda: None) == 0
    assert capsys.readouterr() == ("", "")
    assert run(fail) == 1
    assert capsys.readouterr() == ("", "error: params.yaml: a: is wrong; mend it\n")
    assert run(stop) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_stage_runs_as_a_command(project: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.preflight", "--params", "none.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: none.yaml: cannot be read")
    assert done.stderr.count("\n") == 1
