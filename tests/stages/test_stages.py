"""What every stage promises of its command line."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from stages import command
from stages.command import UserError
from tests.stages.project import ROOT

# What dvc.yaml runs of stages/, and what people run beside it.
STAGES = re.findall(r"cmd: python -m stages\.(\w+)", (ROOT / "dvc.yaml").read_text())
MODULES = sorted({*STAGES, "params", "preflight", "profiles", "export_embeddings", "shards", "longclip"})


def test_there_are_stages() -> None:
    assert {
        "index_images",
        "embed_images",
        "embed_text",
        "select_concepts",
        "label_patches",
        "build_graphs",
    } <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_help_says_what_it_reads_writes_and_costs(
    name: str, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage(name, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("\nReads ", "\nWrites ", "\nCosts ", "--params"):
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
    text = (ROOT / "stages" / f"{name}.py").read_text()
    assert text.endswith('if __name__ == "__main__":\n    run(main)\n')
    importlib.import_module(f"stages.{name}")


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
        [sys.executable, "-m", "stages.params", "--params", "none.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: none.yaml: cannot be read")
    assert done.stderr.count("\n") == 1
