"""The command line of tools.export: which options go with which format."""

from collections.abc import Callable

import pytest

from fieldmark.command import UserError
from fieldmark.params import Params
from tools.export import EXPORTS, NEEDS, TAKES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["safetensors"], "--to safetensors needs --encoder"),
        (["coco"], "--to coco needs --run"),
        (["card", "--run", "x", "--encoder", "conv"], "--to card takes no --encoder"),
        (["dataset", "--run", "x"], "--to dataset takes no --run"),
        (["coco", "--run", "x", "--view", "0"], "--view goes with --to safetensors or webdataset or pyg"),
        (["card", "--run", "x", "--split", "test"], "--split goes with --to coco or darwin-core"),
        (["coco", "--run", "x", "--with-images"], "--with-images goes with --to dataset"),
        (["coco", "--run", "x", "--media-url", "https://x/"], "--media-url goes with --to darwin-core"),
    ],
)
def test_an_option_that_does_nothing_is_refused(
    words: list[str], said: str, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage("tools.export", "--to", *words, "out")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_every_format_is_known_to_all_tables() -> None:
    assert set(NEEDS) == set(EXPORTS)
    assert {name for formats in TAKES.values() for name in formats} <= set(NEEDS)


def test_a_run_that_is_not_there_is_one_line(set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    set_params()
    with pytest.raises(UserError, match=r"train\.runs: has no x; choose one of: zero_shot"):
        run_stage("tools.export", "--to", "card", "--run", "x", "out")
    with pytest.raises(UserError, match=r"config\.json: is missing; run `python -m training\.train --run zero_shot`"):
        run_stage("tools.export", "--to", "card", "--run", "zero_shot", "out")
