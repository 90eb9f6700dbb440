"""The k nearest against brute force: a loop over pairs, float64, one cosine at a time."""

import subprocess
import sys

import numpy as np
import pytest

from fieldmark import nearest as module
from fieldmark.nearest import Floats, Ints, nearest, unit_rows
from tests.project import ROOT

Found = list[tuple[int, int, float]]


def brute_force(vectors: Floats, rows: Ints, among: Ints, k: int) -> Found:
    found = []
    for row in rows.tolist():
        scored = []
        for other in among.tolist():
            cosine = np.float32((vectors[row].astype(np.float64) * vectors[other].astype(np.float64)).sum())
            if other != row and vectors[row].any() and vectors[other].any():
                scored.append((-cosine, other))
        found += [(row, other, float(-cosine)) for cosine, other in sorted(scored)[:k]]
    return found


def listed(vectors: Floats, rows: Ints, among: Ints, k: int) -> Found:
    found = nearest(vectors, rows, among, k)
    return list(zip(found.row.tolist(), found.near.tolist(), found.cosine.tolist(), strict=True))


def set_blocks(patch: pytest.MonkeyPatch, rows: int, columns: int, spare: int, group: int) -> None:
    for name, value in (("ROWS", rows), ("COLUMNS", columns), ("SPARE", spare), ("GROUP", group)):
        patch.setattr(module, name, value)


@pytest.mark.parametrize(
    "blocks", [(512, 32_768, 16, 64), (3, 5, 0, 2), (7, 8, 2, 4), (1, 1, 1, 1), (5, 40, 1, 2)], ids=str
)
def test_equals_brute_force(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int, int, int]) -> None:
    """Small whole numbers: vectors that are equal, opposite or 0 abound, and with them ties."""
    set_blocks(monkeypatch, *blocks)
    draw = np.random.default_rng(0)
    for _ in range(20):
        count, dimension, k = (int(draw.integers(1, most)) for most in (60, 9, 8))
        vectors = unit_rows([
            draw.integers(-1, 2, (count, dimension)).astype(np.float32),
            draw.integers(-1, 2, (count, 2)).astype(np.float16),
        ])
        rows, among = (np.sort(draw.permutation(count)[: draw.integers(0, count + 1)]) for _ in range(2))
        assert listed(vectors, rows, among, k) == brute_force(vectors, rows, among, k)


def test_bits_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_rows([np.random.default_rng(1).standard_normal((700, 96)).astype(np.float16)])
    everyone = np.arange(700)
    found = nearest(vectors, everyone, everyone, 10)
    for blocks in ((512, 256, 16, 8), (64, 640, 3, 4), (699, 13, 16, 64)):
        set_blocks(monkeypatch, *blocks)
        again = nearest(vectors, everyone, everyone, 10)
        assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_product_that_errs_within_its_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many cosines within 2 D u of each other: what float32 says of their order is noise, and is made so."""
    draw = np.random.default_rng(2)
    vectors = unit_rows([np.ones((90, 64)) + 3e-4 * draw.standard_normal((90, 64))])
    everyone = np.arange(90)
    true = listed(vectors, everyone, everyone, 5)
    assert true == brute_force(vectors, everyone, everyone, 5)
    exact = module.cosines

    def noisy(queries, keys, own):  # type: ignore[no-untyped-def]
        for start, cosine in exact(queries, keys, own):
            noise = draw.uniform(-1, 1, cosine.shape) * 64 * module.UNIT
            yield start, cosine + cosine.new_tensor(noise)

    monkeypatch.setattr(module, "cosines", noisy)
    for spare in (0, 3, 16):
        monkeypatch.setattr(module, "SPARE", spare)
        assert listed(vectors, everyone, everyone, 5) == true


def test_vectors_side_by_side_count_alike() -> None:
    """The cosine of two rows is the mean of those of the blocks, however long the vectors of a block are."""
    draw = np.random.default_rng(3)
    one, other = draw.standard_normal((5, 4)), draw.standard_normal((5, 7)) * 100
    side = unit_rows([one, other]).astype(np.float64)
    each = [block / np.linalg.norm(block, axis=1, keepdims=True) for block in (one, other)]
    expected = sum(block @ block.T for block in each) / 2
    assert np.abs(side @ side.T - expected).max() < 1e-6


def test_memory_is_that_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of cosines is larger than ROWS x COLUMNS."""
    set_blocks(monkeypatch, 32, 64, 4, 4)
    sizes = []
    exact = module.largest

    def watched(cosine, count):  # type: ignore[no-untyped-def]
        sizes.append(tuple(cosine.shape))
        return exact(cosine, count)

    monkeypatch.setattr(module, "largest", watched)
    vectors = unit_rows([np.random.default_rng(4).standard_normal((150, 8))])
    nearest(vectors, np.arange(150), np.arange(150), 3)
    assert len(sizes) == 5 * 3
    assert max(sizes) == (32, 64)


ON_A_DEVICE = """
import numpy as np
from fieldmark import nearest as module
from tests.training.elsewhere import ELSEWHERE, ElsewhereMode

module.ROWS, module.COLUMNS, module.SPARE, module.GROUP = 16, 40, 2, 2
vectors = module.unit_rows([np.random.default_rng(0).integers(-2, 3, (90, 6))])
everyone = np.arange(90)
with ElsewhereMode():
    here, there = (module.nearest(vectors, everyone, everyone, 5, device) for device in (None, ELSEWHERE))
assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))
"""


@pytest.mark.slow
def test_a_device_is_not_mixed_with_the_cpu() -> None:
    """In a process of its own, on a device that computes on the CPU and refuses its tensors."""
    subprocess.run([sys.executable, "-c", ON_A_DEVICE], cwd=ROOT, check=True)
