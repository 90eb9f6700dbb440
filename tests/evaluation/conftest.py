"""What judges is tested on the trainer's planted caches, and on one thread as the trainer is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation.reported import PLAN, write_health, write_rest, write_run
from tests.training.cache import Plan, write_cache
from tests.training.conftest import _deterministic_on_one_thread, planted
from training.data import Cache

__all__ = ["_deterministic_on_one_thread", "planted"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 images a split; on test zero_shot is 9/12 and 8/12 right, linear_probe 11/12 in both its seeds."""
    folder = tmp_path / "data"  # of a project of its own: what was seen before lies beside it
    folder.mkdir()
    write_cache(folder, PLAN)
    write_rest(folder)
    write_health(folder)
    first, second, third = ([f"test/class-{label:02d}/{number:04d}.png" for number in range(4)] for label in range(3))
    a, b, c = (f"class-{label:02d}" for label in range(3))
    seed_0 = {first[0]: b, first[1]: b, second[0]: a, "val/class-00/0000.png": b}
    seed_1 = {first[0]: b, first[1]: b, second[0]: a, third[3]: a, "train/class-00/0000.png": c}
    write_run(folder, "zero_shot", [seed_0, seed_1])
    write_run(folder, "linear_probe", [{first[0]: b}, {first[0]: c}], model_seed=1)
    return folder


@pytest.fixture
def cue(planted: Callable[[Plan], Cache]) -> Cache:
    """A class shows in one patch, and in nothing else."""
    return planted(Plan(cue="local", noise=0.3, val=40))
