"""Every benchmark that makes its own data runs to its end, on little of it. What it measured is nothing to assert."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "embed_memory": "--images 20 40",
    "graphs": "--images 200",
    "heads": "--images 32 --epochs 1",
    "index_json": "--rows 200",
    "link_epochs": "--images 300 --epochs 1 --batch 64",
    "links": "--images 200 400",
    "llm": "--calls 50",
    "llm_batch": "--sizes 20 --pictures 0",
    "load": "--repeats 1",
    "pool": "--images 20 40",
    "probe": "--streamed 500",
    "scale": "--sizes 4000",
    "scale_training": "--sizes 300 --classes 5 --dimension 16",
    "splice": "--nodes 200",
    "train": "--images 200 --epochs 1",
}
# Of pictures and runs that make repro or ../shared has; a Ray cluster's time is that of starting it.
NOT_HERE = {"cluster", "drop_reasons", "embed", "leaks", "pointing", "predict", "regions", "repro"}


def test_each_is_known_here() -> None:
    assert {path.stem for path in (ROOT / "bench").glob("[a-z]*.py")} == SMALL.keys() | NOT_HERE


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"FIELDMARK_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", f"bench.{name}", *SMALL[name].split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
