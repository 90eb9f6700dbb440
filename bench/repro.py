"""CPU seconds of `dvc repro` where little or nothing is to do: what a stage costs is then what it imports.

A clone of this repository, as committed, in which the pipeline ran on a small reef. Then, one after the other: nothing
changed (twice: DVC remembers what it hashed); the data folder has another name; one image more. Seconds are those of
all processors, of DVC and of every stage; beside them the time that it took, and which stages ran. Where no
stage runs, that is DVC alone. Another commit is what it is compared with, in a run of its own.

    python -m bench.repro
    python -m bench.repro --commit HEAD~3
"""

import argparse
import platform
import re
import resource
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.checkout import ROOT, command, edit_params, git

PER_CLASS = {"train_per_class": 5, "test_per_class": 2}


def spent() -> float:
    """CPU seconds of the processes that this one has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, what: str) -> None:
    """Run `dvc repro` and print a line of the table."""
    before, started = spent(), perf_counter()
    said = command("dvc", "repro", cwd=folder).stdout
    cpu, seconds = spent() - before, perf_counter() - started
    stages = re.findall(r"Running stage '(.+)'", said)
    print(f"{what:20} {cpu:6.1f} {seconds:6.1f} {len(stages):6} {', '.join(stages)}", flush=True)


def make_small(params: Any) -> None:
    params["demo"]["reef"].update(PER_CLASS)
    params["train"]["seeds"] = 1
    for method in ("attention_pool", "concept_graph"):
        params["train"]["runs"][method]["settings"] = {"epochs": 3, "weight_decay": [0.01]}


def own_pictures(params: Any) -> None:
    """The demo is drawn by a stage; images of one's own are not."""
    params["demo"] = {}


def other_folder(params: Any) -> None:
    params["dataset"]["root"] = "data/fish"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD", help="of this repository (default: HEAD)")
    arguments = parser.parse_args()
    of_clone = f"{arguments.commit}, 24 species of {sum(PER_CLASS.values())} pictures"
    print(f"{platform.processor() or platform.machine()}, {platform.python_version()}; {of_clone}")
    print(f"{'dvc repro':20} {'CPU s':>6} {'s':>6} {'stages':>6} which")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "fieldmark"
        git("clone", "-q", str(ROOT), str(folder), cwd=ROOT)
        git("checkout", "-q", "-B", "main", arguments.commit, cwd=folder)
        edit_params(folder, make_small)
        measure(folder, "from nothing")
        edit_params(folder, own_pictures)
        for what in ("nothing to do", "and again"):
            measure(folder, what)
        (folder / "data/reef").rename(folder / "data/fish")
        edit_params(folder, other_folder)
        measure(folder, "another folder name")
        picture = min((folder / "data/fish/train").glob("*/*.jpg"))
        picture.with_name("extra.jpg").write_bytes(picture.read_bytes() + b"\0")
        measure(folder, "one image more")


if __name__ == "__main__":
    main()
