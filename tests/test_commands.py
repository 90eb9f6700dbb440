"""What every command promises of its command line."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark import command
from fieldmark.command import UserError
from tests.checkout import command as shell
from tests.project import PARAMS, ROOT

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


def test_a_stage_has_its_encoder_from_dvc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stage"])
    for stage, key in (("embed_text@conv", "conv"), ("../a@b/dvc.yaml:embed_text@conv", "conv"), ("x@a; b", "a; b")):
        monkeypatch.setenv("DVC_STAGE", stage)
        assert command.encoder_parser("doc").parse_args([]).encoder == key
        assert command.encoder_parser("doc").parse_args(["--encoder", "vit"]).encoder == "vit"
    monkeypatch.setenv("DVC_STAGE", "report")
    with pytest.raises(SystemExit):
        command.encoder_parser("doc").parse_args([])
    assert "--encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hostile_name_runs_no_command(tmp_path: Path) -> None:
    """The same way of DVC's, on one stage: a name that a shell would obey is an encoder that is not there."""
    stage = {"foreach": "${encoders}", "do": {"cmd": f"{sys.executable} -m stages.embed_text", "outs": ["out/${key}"]}}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"embed_text": stage}}))
    hostile = "a; touch ran #$(touch ran)`touch ran`"
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS | {"encoders": {hostile: {"model": "none"}}}))
    shell("dvc", "init", "-q", "--no-scm", cwd=tmp_path)
    done = shell("dvc", "repro", cwd=tmp_path, check=False, PYTHONPATH=str(ROOT))
    assert f"error: params.yaml: encoders.{hostile}: is used as a folder name" in done.stderr
    assert not (tmp_path / "ran").exists()
