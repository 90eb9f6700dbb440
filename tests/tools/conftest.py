"""What tests of tools share: a small project whose runs are trained, made once for all that ask them."""

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fieldmark.params import Params, load_params
from tests.project import PARAMS, ROOT, draw

TEXTS = {
    "a": ["fish with yellow tails", "fish with blue bars"],
    "b": ["fish with black masks", "fish with white spots"],
    "c": ["fish with red fins", "fish with orange saddles"],
}
LINEAGES = "class_id,name,lineage\na,Angel,Reef > Flat\nb,Butterfly,Reef > Flat\nc,Cardinal,Reef > Long\n"
FAST = {"epochs": 1, "lr": [0.01], "weight_decay": [0.1]}
RUNS: dict[str, Any] = {
    "zero_shot": {"method": "zero_shot", "encoder": "vit"},
    "linear_probe": {"method": "linear_probe", "encoder": "vit", "settings": {"l2": [1.0]}},
    "moments": {"method": "probes", "encoder": "vit", "settings": {"candidates": [{"method": "ridge"}]}},
    "attention_pool": {"method": "attention_pool", "encoder": "vit", "settings": FAST},
    "concept_graph": {"method": "concept_graph", "encoder": "vit", "settings": FAST | {"hidden": 8, "heads": 2}},
    "two_encoders": {
        "method": "linear_probe",
        "encoder": "vit",
        "also": ["twin"],
        "settings": {"l2": [1.0], "features": ["global"]},
    },
}
BLOCKS: dict[str, Any] = {
    "dataset": {"root": "images", "buckets": 2, "val_fraction": 0.5},
    "llm": {"model": "none", "mode": "import"},
    "concepts": {"import": "texts.json"},
    "embed": {"views": 1, "tokens": True, "grids": [2]},
    "moments": {"vit": {"pooled": {"kind": "pooled"}, "isqrt": {"directions": 4}}},
    "tokens": {"vit": {"layers": [0, -1]}},
    "train": {"seeds": 1, "runs": RUNS},
    "report": {"reference": "linear_probe"},
}
Write = Callable[..., Params]


def run_module(name: str, *arguments: str) -> None:
    """The main() of a module, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """Eight pictures of each of three classes; `vit` has everything that a run may read, `twin`, the same, nodes."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in range(24):
            draw(Path(f"images/{'train' if seed < 18 else 'test'}/{'abc'[seed % 3]}/{seed}.png"), seed)
        Path("images/classes.csv").write_text(LINEAGES)
        Path("texts.json").write_text(json.dumps(TEXTS))
        Path("prompts").symlink_to(ROOT / "prompts")
        Path("data").mkdir()
        Path("data/none").touch()
        write_params(models)
        for stage in ("index_images", "generate_concepts", "describe_images", "clean_concepts"):
            run_module(f"stages.{stage}")
        run_module("stages.embed_images", "--encoder", "twin")
        for stage in (
            "embed_images", "embed_tokens", "pool_tokens", "build_graphs", "embed_text", "select_concepts",
            "label_patches",
        ):  # fmt: skip
            run_module(f"stages.{stage}", "--encoder", "vit")
        for name in RUNS:
            run_module("training.train", "--run", name)
    return folder


def write_params(models: dict[str, Path], name: str = "params.yaml", **blocks: Any) -> Params:
    """A file of the project's parameters, changed by whole blocks, and read."""
    content = copy.deepcopy(PARAMS) | copy.deepcopy(BLOCKS)
    encoder = {"model": f"local-dir:{models['vit']}", "batch_size": 4}
    content["encoders"] = {"vit": encoder, "twin": encoder}
    Path(name).write_text(json.dumps(content | blocks))
    return load_params(name)


@pytest.fixture
def asked(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project, the working directory of the test. A test leaves it as it was, but for files beside data/."""
    monkeypatch.chdir(trained)
    before = contents(trained / "data")
    yield trained
    assert contents(trained / "data") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def write_other(asked: Path, models: dict[str, Path]) -> Write:
    """write_params into a file of its own, other.yaml."""

    def write(**blocks: Any) -> Params:
        return write_params(models, "other.yaml", **blocks)

    return write
