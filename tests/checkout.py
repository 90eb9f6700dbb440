"""A checkout of this working tree in a temporary folder, and commands run in it as a user's shell would run them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BUCKETS = 4  # of the small reef
# What the test run has and a user's shell has not; the last are of `make test`.
NOT_A_SHELLS = {"PYTHONDONTWRITEBYTECODE", "OPENAI_API_KEY", "MAKELEVEL", "MAKEFLAGS", "MFLAGS"}


def command(*words: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run as a user's shell would: no key, no leave to skip compiled files, which once made every clone start anew."""
    env = {key: value for key, value in os.environ.items() if key not in NOT_A_SHELLS}
    env |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def git(*words: str, cwd: Path) -> None:
    command("git", "-c", "user.name=test", "-c", "user.email=test@example.org", *words, cwd=cwd)


def edit_params(folder: Path, edit: Callable[[Any], object], name: str = "params.yaml") -> None:
    yaml = YAML()
    yaml.preserve_quotes = True
    path = folder / name
    params = yaml.load(path.read_text())
    edit(params)
    with open(path, "w") as file:
        yaml.dump(params, file)


def checkout(target: Path) -> Path:
    """This working tree as a fresh clone would have it, in a repository of its own."""
    made_here = shutil.ignore_patterns(".git", ".venv", "*cache*", "tmp", "config.local", "dvc.lock")

    def ignored(folder: str, names: list[str]) -> set[str]:
        tracked = {ROOT / "data": {"adapted", "asked", "demo", "controls", "links", "none"}}
        tracked |= {ROOT / "data" / name: {"README.md"} for name in ("adapted", "asked", "links")}
        outputs = set(names) - tracked.get(Path(folder), set(names))
        return {*made_here(folder, names), *outputs} - {"cache.py"}

    shutil.copytree(ROOT, target, ignore=ignored)
    commit(target, "init", "-q", "-b", "main")
    return target


def commit(folder: Path, *first: str) -> None:
    """Commit all of a repository, after a first git command where one is given."""
    if first:
        git(*first, cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-q", "-m", "change", cwd=folder)


def make_reef(folder: Path) -> None:
    """A checkout of its own in which the whole pipeline runs, on a few drawings of each species."""

    def make_small(params: Any) -> None:
        params["demo"]["reef"].update(train_per_class=4, test_per_class=1)
        params["dataset"]["buckets"] = BUCKETS
        params["train"]["seeds"] = 1
        params["moments"]["reef"]["isqrt"]["directions"] = 32
        # The demo stores none.
        params["tokens"] = {"reef": {"layers": [-1]}}
        runs = params["train"]["runs"]
        del runs["attention_pool"], runs["description_zero_shot"]
        runs["concept_graph"]["settings"] = {"epochs": 3, "weight_decay": [0.01]}

    checkout(folder)
    edit_params(folder, make_small)
    commit(folder)
    command("dvc", "repro", cwd=folder)
