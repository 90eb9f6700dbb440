"""A checkout of this working tree with a few images of one's own, which DVC tracks, and a tiny encoder."""

import json
from pathlib import Path
from typing import Any

from tests.checkout import checkout, command, commit, edit_params
from tests.project import VIT, draw, save_model

TEXTS = {name: [f"a fish with {mark} {part}" for part in ("fins", "bars")] for name, mark in zip(
    ("blenny", "goby", "wrasse"), ("red", "blue", "yellow"), strict=True,
)}  # fmt: skip


def make_own(params: Any) -> None:
    params["demo"] = {}
    params["dataset"].update(root="data/images", buckets=2, test_fraction=0.25, val_fraction=0.4)
    params["llm"].update(mode="import", recordings="data/none")
    params["concepts"]["import"] = "data/concepts.json"
    params["encoders"] = {"tiny": {"model": "local-dir:encoder"}}
    params["embed"].update(views=0, grids=[])
    params["moments"] = {}
    names = ("zero_shot", "linear_probe", "attention_pool")
    params["train"].update(seeds=2, runs={name: {"method": name, "encoder": "tiny"} for name in names})
    params["train"]["runs"]["attention_pool"]["settings"] = {"epochs": 2}


def own_checkout(target: Path) -> Path:
    """A checkout in which nothing ran yet; all is committed, and data/images is tracked by `dvc add`."""
    folder = checkout(target)
    edit_params(folder, make_own)
    save_model(folder / "encoder", VIT)
    (folder / "data/concepts.json").write_text(json.dumps(TEXTS))
    for seed, (name, number) in enumerate((name, number) for name in TEXTS for number in range(12)):
        draw(folder / f"data/images/{name}/{number}.png", seed)
    command("dvc", "add", "--quiet", "data/images", cwd=folder)
    commit(folder)
    return folder
