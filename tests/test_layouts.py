"""Each layout from its files to a probe, by the profiles that the project has for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fieldmark import store
from tests.fieldmark.formats.layouts import LAYOUTS
from tests.project import ROOT
from tools.profiles import lay_over

CASES = [(name, profile) for name, (_, profiles) in LAYOUTS.items() for profile in profiles]


def small_params(profile: str, root: Path) -> dict[str, Any]:
    """params.yaml with a profile laid over it, but for its encoder, which is the demo's, and its runs: one probe."""
    yaml = YAML(typ="safe", pure=True)
    content: dict[str, Any] = yaml.load(lay_over((ROOT / "params.yaml").read_text(), ROOT / f"profiles/{profile}.yaml"))
    demo = yaml.load((ROOT / "params.yaml").read_text())["encoders"]["reef"]
    content["dataset"].update(root=str(root), buckets=2, val_fraction=0.34)
    content["encoders"] = {"reef": demo | {"model": f"local-dir:{ROOT / demo['model'].removeprefix('local-dir:')}"}}
    content["moments"] = {}
    content["train"].update(seeds=1, runs={"linear_probe": {"method": "linear_probe", "encoder": "reef"}})
    return content


@pytest.mark.slow
@pytest.mark.parametrize(("name", "profile"), CASES)
def test_a_profile_goes_from_the_layout_to_a_probe(
    name: str, profile: str, project: Path, run_stage: Callable[..., None]
) -> None:
    make, _ = LAYOUTS[name]
    make(project / "data/set", 6, 2)
    (project / "params.yaml").write_text(json.dumps(small_params(profile, project / "data/set")))
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "reef")
    run_stage("training.plan_runs")
    run_stage("training.train", "--run", "linear_probe")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert [sum(row["split"] == split for row in rows) for split in ("train", "val", "test")] in (
        [12, 6, 6], [15, 3, 6],
    )  # fmt: skip
    metrics = json.loads(Path("data/runs/linear_probe/metrics.json").read_text())
    right = metrics["test"]["accuracy"] * 6
    assert right == pytest.approx(round(right)), "six test images were judged"
