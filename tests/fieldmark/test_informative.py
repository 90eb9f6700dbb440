"""Which pictures tell most, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmark.informative import budget, cluster_count, densities, most_informative, order_by_quota
from fieldmark.store import sha256


def cloud(sizes: list[int], dimension: int = 8, seed: int = 0) -> torch.Tensor:
    """Vectors around far centres, so many around each."""
    rng = np.random.default_rng(seed)
    centres = 20 * rng.standard_normal((len(sizes), dimension))
    rows = [centre + rng.standard_normal((size, dimension)) for centre, size in zip(centres, sizes, strict=True)]
    return torch.from_numpy(np.concatenate(rows)).float()


def names_of(count: int) -> list[str]:
    return [sha256(f"picture {number}") for number in range(count)]


def test_phi_is_1_at_a_centre_falls_with_distance_and_turns_with_the_space() -> None:
    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    vectors = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [9, 0, 3]])
    phi, number = densities(vectors, centres)
    assert phi.tolist() == [1.0, 1 / 2, pytest.approx(1 / 3), 1 / 4]
    assert number.tolist() == [0, 0, 0, 1]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned, same = densities(vectors @ turn, centres @ turn)
    torch.testing.assert_close(turned, phi)
    assert torch.equal(same, number)


def test_one_cluster_gives_its_highest_phi() -> None:
    phi = torch.rand(50, generator=torch.Generator().manual_seed(0))
    wanted = phi.argsort(descending=True)
    assert torch.equal(order_by_quota(phi, torch.zeros(50, dtype=torch.int64)), wanted)


def by_loop(phi: list[float], number: list[int], count: int) -> list[int]:
    """Sainte-Lague: the next place goes to the cluster with the most pictures for each half place, then by phi."""
    left = {c: sorted((p for p in range(len(phi)) if number[p] == c), key=lambda p: (-phi[p], p)) for c in set(number)}
    sizes, chosen = {c: len(members) for c, members in left.items()}, []
    for _ in range(count):
        turn = {c: (sizes[c] - len(members) + 0.5) / sizes[c] for c, members in left.items() if members}
        best = min(turn, key=lambda c: (turn[c], -phi[left[c][0]], left[c][0]))
        chosen.append(left[best].pop(0))
    return chosen


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.integers(0, 4)), min_size=1, max_size=40))
@settings(max_examples=60)
def test_each_cluster_gives_its_share_and_a_larger_number_takes_all_of_a_smaller(rows: list[tuple[float, int]]) -> None:
    phi, number = [row[0] for row in rows], [row[1] for row in rows]
    order = order_by_quota(torch.tensor(phi, dtype=torch.float64), torch.tensor(number))
    assert order.tolist() == by_loop(phi, number, len(rows))


def test_clusters_give_as_many_as_they_are_large() -> None:
    sizes = [100, 50, 50, 200]
    vectors = cloud(sizes)
    chosen = most_informative(vectors, names_of(400), 40, clusters=4)
    of = np.repeat(np.arange(4), sizes)
    assert np.bincount(of[chosen.numpy()]).tolist() == [10, 5, 5, 20]
    # Without quotas the four clusters, drawn alike, would not give exactly their shares.
    phi, _ = densities(vectors, torch.stack([vectors[of == c].mean(0) for c in range(4)]))
    assert np.bincount(of[phi.topk(40).indices.numpy()], minlength=4).tolist() != [10, 5, 5, 20]


def test_the_order_of_rows_does_not_matter_and_equal_pictures_are_no_trouble() -> None:
    vectors, names = cloud([30, 20, 10]), names_of(60)
    chosen = most_informative(vectors, names, 12, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    again = most_informative(vectors[order], [names[place] for place in order.tolist()], 12, 4)
    assert [names[order[place]] for place in again.tolist()] == [names[place] for place in chosen.tolist()]
    same = most_informative(torch.ones(9, 3), names[:9], 3, 4)
    assert len(set(same.tolist())) == 3


def test_a_picture_that_is_not_drawn_for_the_centres_moves_one_other_at_most() -> None:
    vectors, names = cloud([400, 300, 300], seed=1), names_of(1000)
    last = max(range(1000), key=names.__getitem__)  # of 1,000 pictures 64 are drawn, and not this one
    rest = [place for place in range(1000) if place != last]
    before = {rest[place] for place in most_informative(vectors[rest], [names[p] for p in rest], 100, 4).tolist()}
    after = set(most_informative(vectors, names, 100, 4).tolist())
    assert len(after - before) <= 1


def test_a_budget_is_a_share_and_at_least_one() -> None:
    assert [budget(count, 0.05) for count in (0, 1, 9, 100, 1000)] == [0, 1, 1, 5, 50]
    assert budget(7, 1.0) == 7
    assert [cluster_count(count) for count in (1, 100, 1000, 5000, 100_000)] == [1, 8, 32, 64, 256]
    assert math.log2(cluster_count(12345)).is_integer()
