"""What tests share: a local server, a temporary project, two tiny encoders, and stages run in this process."""

import copy
import fcntl
import gc
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from fieldmark.params import Params, load_params
from tests.checkout import make_reef
from tests.openai_server import OpenAIServer
from tests.project import CONV, PARAMS, VIT, draw, save_model

# A shell that starts a job in the background has it ignore Ctrl-C, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# An example that takes long says that the machine is busy, and nothing of the code.
settings.register_profile("fieldmark", deadline=None)
settings.load_profile("fieldmark")
# Tests run in as many processes as there are cores: more threads than that only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then whole pipelines: begun last, one would leave the other core without work.

    One of them makes the small reef; what takes a copy of it waits for it, and comes after the others of this folder.
    """
    here = Path(__file__).parent
    turns = {here / "test_pipeline.py": 0, here / "training/methods/test_universal.py": 1, here / "test_sharing.py": 3}
    items.sort(key=lambda item: turns.get(item.path, 2 if item.path.parent == here else 4))


def pytest_collection_finish() -> None:
    """What the modules of the tests and PyTorch hold is never garbage: nobody looks through it again for any."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _disk() -> Iterator[None]:
    """No test pulls the plug: nobody waits for the disk. Tests of what is synced put a function of their own here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _vocabulary() -> Iterator[None]:
    """open_clip's vocabulary is read once in a process of the tests: of a tiny encoder it is most of the loading."""
    tokenizer = sys.modules.get("open_clip.tokenizer")
    if tokenizer is None:
        yield
        return
    build, read = tokenizer.SimpleTokenizer.__init__, {}

    def once(self: Any, *arguments: Any, **settings: Any) -> None:
        key = repr((arguments, settings))
        if key not in read:
            build(self, *arguments, **settings)
            read[key] = vars(self).copy()
        vars(self).update(read[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.SimpleTokenizer, "__init__", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _arrays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Arrays of what tests read lie in a folder of the tests, and not in `.cache` of this checkout."""
    folder = tmp_path_factory.mktemp("cache") / "arrays"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.arrays.arrays_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def small_reef(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the pipeline ran on a small reef, once for all processes of the tests. For copies only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, whole = base / "small_reef/fieldmark", base / "small_reef/whole"
    folder.parent.mkdir(exist_ok=True)
    with (base / "small_reef/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_reef(folder)
            whole.touch()
    return folder


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A server that speaks OpenAI's protocol, on this machine."""
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two tiny encoders: `conv` (timm, average pooling, 2 x 2 tokens) and `vit` (4 x 4)."""
    base = tmp_path_factory.mktemp("models")
    return {name: save_model(base / name, config) for name, config in (("conv", CONV), ("vit", VIT))}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, the working directory of the test."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/none").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def set_params(project: Path, models: dict[str, Path]) -> Callable[..., Params]:
    """Write params.yaml: tiny defaults, changed by blocks given as keywords."""

    def write(**blocks: dict[str, Any]) -> Params:
        content = copy.deepcopy(PARAMS)
        content["encoders"] = {
            name: {"model": f"local-dir:{folder}", "batch_size": 4} for name, folder in models.items()
        }
        for block, values in blocks.items():
            content.setdefault(block, {}).update(values)
        (project / "params.yaml").write_text(json.dumps(content))
        return load_params("params.yaml")

    return write


@pytest.fixture
def run_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the main() of a stage, or of a module by its whole name, in this process: importing torch costs seconds."""

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name if "." in name else f"stages.{name}").main()

    return run


@pytest.fixture
def draw_images(project: Path) -> Callable[[dict[str, int]], None]:
    """Draw pictures under images/: {path: seed}."""

    def draw_all(paths: dict[str, int]) -> None:
        for path, seed in paths.items():
            draw(project / "images" / path, seed)

    return draw_all


@pytest.fixture
def dataset(draw_images: Callable[[dict[str, int]], None]) -> list[str]:
    """Twelve pictures of two classes under images/; their paths."""
    paths = [
        f"{split}/{name}/{n}.png"
        for split, count in (("train", 4), ("test", 2))
        for name in "ab"
        for n in range(count)
    ]
    draw_images({path: seed for seed, path in enumerate(paths)})
    return paths
