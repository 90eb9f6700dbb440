from pathlib import Path
from typing import Any

import pytest

from fieldmark.params import Block, load_params
from training.methods import read_settings

ROOT = Path(__file__).parents[2]


def unset(block: Block, key: str) -> list[str]:
    """Dotted names of what a block, or a block in it, left to its default."""
    left_out = [f"{key}.{name}" for name in type(block).model_fields if name not in block.model_fields_set]
    for name in type(block).model_fields:
        value: Any = getattr(block, name)
        if isinstance(value, Block):
            left_out += unset(value, f"{key}.{name}")
    return left_out


def test_the_repository_states_every_knob_of_every_method_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load_params()
    for name in params.train.methods:
        settings = read_settings("params.yaml", params, name)
        assert unset(settings, name) == []
        assert settings == type(settings)()


def test_every_line_of_the_parameters_has_a_comment() -> None:
    lines = (ROOT / "params.yaml").read_text().splitlines()
    assert [line for line in lines if line.strip() and "#" not in line] == []
