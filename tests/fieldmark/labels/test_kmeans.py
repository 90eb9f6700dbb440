import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.labels import kmeans
from fieldmark.labels.kmeans import find_centres, nearest_centres


def blobs() -> torch.Tensor:
    """Three far groups of 30 points."""
    chance = np.random.default_rng(0)
    middles = np.array([[0, 0], [10, 0], [0, 10]]).repeat(30, axis=0)
    return torch.from_numpy((middles + 0.1 * chance.standard_normal((90, 2))).astype(np.float32))


def test_groups_are_found() -> None:
    vectors = blobs()
    number = nearest_centres(vectors, find_centres(vectors, 3))
    assert [len(set(number[start : start + 30].tolist())) for start in (0, 30, 60)] == [1, 1, 1]
    assert len(set(number.tolist())) == 3
    assert torch.equal(find_centres(vectors, 3), find_centres(vectors, 3))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_no_vector_is_nearer_to_another_centre(count: int, centres: int, seed: int) -> None:
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    found = find_centres(vectors, centres, seed)
    assert found.shape == (min(centres, count), 3)
    assert found.isfinite().all()
    distance = torch.cdist(vectors, found)
    number = nearest_centres(vectors, found)
    torch.testing.assert_close(distance.gather(1, number[:, None])[:, 0], distance.amin(dim=1), atol=1e-3, rtol=0)


def test_as_many_centres_as_vectors() -> None:
    vectors = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert {tuple(row) for row in find_centres(vectors, 9).tolist()} == {tuple(row) for row in vectors.tolist()}


def test_copies_of_one_vector() -> None:
    found = find_centres(torch.ones(5, 2), 3)
    assert found.shape == (3, 2)
    assert torch.equal(found, torch.ones(3, 2))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_centres(blobs(), 3)
    monkeypatch.setattr(kmeans, "PRODUCTS", 1)
    torch.testing.assert_close(find_centres(blobs(), 3), expected)
