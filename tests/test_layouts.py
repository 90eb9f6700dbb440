"""Each layout from its files to the report, by the profiles that the project has for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from fieldmark import store
from tests.fieldmark.formats.layouts import LAYOUTS
from tests.openai_server import OpenAIServer
from tests.project import ROOT
from tools.profiles import lay_over

CASES = [(name, profile) for name, (_, profiles) in LAYOUTS.items() for profile in profiles]


def small_params(profile: str, root: Path, server: OpenAIServer) -> dict[str, Any]:
    """params.yaml with a profile laid over it, for a small data set and in little time: encoders are the demo's under
    the profile's names, every text comes from a server on this machine, and a run makes one fit."""
    yaml = YAML(typ="safe", pure=True)
    content: dict[str, Any] = yaml.load(lay_over((ROOT / "params.yaml").read_text(), ROOT / f"profiles/{profile}.yaml"))
    demo = yaml.load((ROOT / "params.yaml").read_text())["encoders"]["reef"]
    demo |= {"model": f"local-dir:{ROOT / demo['model'].removeprefix('local-dir:')}"}
    content["dataset"].update(root=str(root), buckets=2, val_fraction=0.34)
    content["llm"].update(mode="live", base_url=server.base_url, max_usd=None)
    content["concepts"]["import"] = "data/none"
    content["encoders"] = dict.fromkeys(content["encoders"], demo)
    content["train"]["seeds"] = 1
    return content


def run_all(
    params: dict[str, Any], project: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage of `dvc repro` in its order, from the data set's files to the report, in one process."""
    for name in ("dvc.yaml", "prompts"):
        (project / name).symlink_to(ROOT / name)
    (project / "params.yaml").write_text(json.dumps(params))
    for stage in nx.dfs_postorder_nodes(Repo.init(no_scm=True).index.graph):
        monkeypatch.setenv("DVC_STAGE", stage.addressing)
        run_stage(re.search(r"-m (\S+)$", stage.cmd)[1])
    page = Path("data/report/index.html").read_text()
    assert [run for run in params["train"]["runs"] if run not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "profile"), CASES)
def test_a_profile_goes_from_the_layout_to_the_report(
    name: str, profile: str, project: Path, run_stage: Callable[..., None], server: OpenAIServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, _ = LAYOUTS[name]
    make(project / "data/set", 6, 2)
    run_all(small_params(profile, project / "data/set", server), project, run_stage, monkeypatch)
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert [sum(row["split"] == split for row in rows) for split in ("train", "val", "test")] in (
        [12, 6, 6], [15, 3, 6],
    )  # fmt: skip
    metrics = json.loads(Path("data/runs/linear_probe/metrics.json").read_text())
    right = metrics["test"]["accuracy"] * 6
    assert right == pytest.approx(round(right)), "six test images were judged"
