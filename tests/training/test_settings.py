from pathlib import Path

import pytest

from fieldmark.params import load_params
from training.train import plan_run

ROOT = Path(__file__).parents[2]


def test_the_demo_s_runs_take_every_method_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load_params()
    assert {"zero_shot", "linear_probe", "attention_pool", "concept_graph"} <= params.train.runs.keys()
    for name, run in params.train.runs.items():
        planned = plan_run("params.yaml", params, name)
        assert planned.settings == type(planned.settings)()
        assert run.method == ("probes" if name == "moments" else name)


def test_every_line_of_the_parameters_has_a_comment() -> None:
    text = (ROOT / "params.yaml").read_text()
    explained = text.index("also: []")  # the first run explains what the others say again
    lines = text[:explained].splitlines()[:-1]
    assert [line for line in lines if line.strip() and "#" not in line] == []
    said = [line.split("#", 1)[1].strip() for line in text.splitlines() if "#" in line]
    assert not [comment for comment in said if comment in ("as above", "or not") or len(comment) < 5]
