"""What git ignores: every output of dvc.yaml, of studies and of tools, and nothing that people keep under data/."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.checkout import checkout, command, commit, edit_params, git
from tests.project import ROOT, draw

# What studies, tools/train_reef_towers.py and the exports of docs/ write; none of it is an output of DVC's.
BESIDE = ["data/studies", "data/towers", "data/export", "data/export/answers.jsonl"]
KEPT = [
    "data/images.dvc", "data/images/train/a/1.jpg", "data/concepts.json", "data/concepts/mine.json", "data/photos.csv",
    "data/descriptions/mine.csv", "data/none", "data/demo/species.yaml", "data/controls/unrelated.txt",
    "data/.gitignore", "dvc.lock", "data/adapted/README.md", "data/asked/README.md", "data/links/README.md",
]  # fmt: skip


def outputs() -> list[str]:
    """The outputs of every stage, of the key `key` where there are several."""
    found = []
    for stage in YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"].values():
        stage = stage.get("do", stage)
        for kind in ("outs", "metrics", "plots"):
            for out in stage.get(kind, []):
                name: Any = next(iter(out)) if isinstance(out, dict) else out
                found.append(name.replace("${key}", "key"))
    return found


def entries() -> list[str]:
    return [line for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/data")]


def ignored(paths: list[str], folder: Path) -> set[str]:
    git("init", "-q", cwd=folder)
    shutil.copy(ROOT / ".gitignore", folder)
    return set(command("git", "check-ignore", *paths, cwd=folder, check=False).stdout.splitlines())


def test_outputs_are_ignored_and_what_people_keep_is_not(tmp_path: Path) -> None:
    assert len(outputs()) > 20
    assert ignored([*outputs(), *BESIDE, *KEPT], tmp_path) == {*outputs(), *BESIDE}


def test_nothing_is_ignored_that_no_stage_writes() -> None:
    for entry in entries():
        # What stands in data/adapted and data/asked, but not their READMEs.
        assert re.fullmatch(r"/data/[\w/.]+(/\*)?", entry), entry
        assert any(f"/{out}/".startswith(f"{entry.removesuffix('/*')}/") for out in [*outputs(), *BESIDE]), entry


@pytest.mark.slow
def test_experiments_have_images_that_dvc_tracks_and_delete_none(tmp_path: Path) -> None:
    """`dvc add data/images`, then an experiment here and one in a copy."""
    folder = checkout(tmp_path / "fieldmark")

    def change(params: Any) -> None:
        params["demo"] = {}
        params["dataset"].update(root="data/images", buckets=2)

    edit_params(folder, change)
    places = [folder / "data/images" / split / name for split in ("train", "test") for name in "ab"]
    paths = [place / f"{number}.png" for place in places for number in (0, 1)]
    for seed, path in enumerate(paths):
        draw(path, seed + 1)
    (folder / "data/concepts.json").write_text("{}")
    command("dvc", "add", "data/images", cwd=folder)
    commit(folder)
    assert command("git", "ls-files", "data/images.dvc", "data/concepts.json", cwd=folder).stdout.count("\n") == 2
    for words in (["-S", "dataset.val_fraction=0.3"], ["-S", "dataset.val_fraction=0.4", "--temp"]):
        done = command("dvc", "exp", "run", "index_images", *words, cwd=folder)
        assert "2 classes; images: " in done.stdout
        assert all(path.is_file() for path in paths)
    assert (folder / "data/concepts.json").is_file()
