"""Tests train as training.train does, deterministic, and on one thread: faster for small tensors than two that wait."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fieldmark.devices import set_up_torch
from tests.training.cache import ALL, ENCODER, Plan, write_cache
from training.data import CPU, Cache, read_cache

# Before any product on a GPU: cuBLAS reads it once, and fixtures of a module come before those of a test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _deterministic_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    set_up_torch()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is here: the CPU, and a GPU."""
    found: torch.device = request.param
    return found


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan], Cache]:
    """A plan's cache, written and read back; one for equal plans."""
    made: dict[Plan, Cache] = {}

    def make(plan: Plan) -> Cache:
        if plan not in made:
            folder: Path = tmp_path_factory.mktemp("data")
            write_cache(folder, plan)
            made[plan] = read_cache(folder, ENCODER, plan.buckets, ALL)
        return made[plan]

    return make
