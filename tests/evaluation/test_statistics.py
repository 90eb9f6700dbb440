from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import bootstrap, holm, paired_difference, paired_differences


def test_difference_is_paired_and_antisymmetric() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(20), 30)
    a = rng.random(600) < 0.8
    b = a & (rng.random(600) < 0.95)
    forward, backward = paired_difference(a, b, classes), paired_difference(b, a, classes)
    assert forward.difference == pytest.approx(a.mean() - b.mean()) == -backward.difference
    assert forward.images == pytest.approx((-backward.images[1], -backward.images[0]))
    assert 0 < forward.images[0] < forward.difference < forward.images[1]
    # Paired: far narrower than the two accuracies would be apart.
    assert forward.images[1] - forward.images[0] < 0.03
    assert paired_difference(a, a, classes).images == (0, 0) == paired_difference(a, a, classes).classes


def test_interval_over_images_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    gain = rng.random(2000) < 0.1
    low, high = paired_difference(gain, np.zeros_like(gain), np.zeros(2000, int)).images
    error = gain.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((gain.mean() - 1.96 * error, gain.mean() + 1.96 * error), abs=0.25 * error)


def test_classes_that_differ_widen_the_interval_over_classes() -> None:
    classes = np.repeat(np.arange(10), 50)
    a, b = classes < 5, classes >= 8
    images, whole = paired_difference(a, b, classes)[1:3]
    assert whole[1] - whole[0] > 3 * (images[1] - images[0])


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    inside, draws = 0, 200
    for seed in range(draws):
        a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
        low, high = paired_difference(a, b, np.zeros(300, int), draws=500, seed=seed).images
        inside += low <= 0.1 <= high
    assert 0.90 <= inside / draws <= 0.99


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same images"):
        paired_difference(np.ones(3, bool), np.ones(4, bool), np.zeros(3, int))


def test_every_row_is_compared_as_if_alone() -> None:
    rng = np.random.default_rng(3)
    rows, reference = rng.random((4, 3, 80)) < 0.7, rng.random((3, 80)) < 0.6
    classes, groups = np.repeat(np.arange(8), 10), np.arange(80) // 4
    together = paired_differences(rows, reference, classes, groups)
    for row, found in zip(rows, together, strict=True):
        alone = paired_difference(row, reference, classes, groups)
        assert found.difference == pytest.approx(alone.difference)
        for one, other in zip(found[1:4], alone[1:4], strict=True):
            assert one == pytest.approx(other, abs=0.01)  # a row's seeds have draws of their own
    # One seed stands for all, and a pair of rows for a reference each.
    once = paired_differences(rows[:, :1], reference, classes)
    assert [p.difference for p in once] == pytest.approx((rows[:, 0].mean(1) - reference.mean()).tolist())
    twice = paired_differences(rows, np.broadcast_to(reference, rows.shape), classes)
    assert [p.images for p in twice] == [p.images for p in together]


@pytest.mark.parametrize(
    ("images", "seeds", "spread", "most"),
    [
        (100, 1, 0.0, 0.97),
        (300, 1, 0.0, 0.97),
        (300, 5, 0.0, 0.98),  # an effect of seeds is allowed for that is not there
        (300, 5, 0.1, 0.97),
        (300, 20, 0.1, 0.97),
        (300, 5, 1.0, 0.97),
    ],
)
def test_the_interval_covers_the_truth_in_95_percent(images: int, seeds: int, spread: float, most: float) -> None:
    """1,000 simulated pairs of methods on images of varying difficulty; `spread` is what a seed does to a method."""
    rng = np.random.default_rng(4)
    ability = {"a": 1.3, "b": 1.0}
    difficulty = 1.5 * rng.standard_normal((1000, 1, images))
    right = {}
    for method, mean in ability.items():
        own = mean + spread * rng.standard_normal((1000, seeds, 1)) + 0.7 * rng.standard_normal((1000, seeds, images))
        right[method] = own > difficulty
    scale = np.sqrt(1.5**2 + spread**2 + 0.7**2)
    truth = NormalDist().cdf(ability["a"] / scale) - NormalDist().cdf(ability["b"] / scale)
    gain = right["a"].astype(np.float32) - right["b"]
    low, high = np.quantile(bootstrap(gain, np.arange(images), draws=1000, seed=0), [0.025, 0.975], axis=0)
    assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= most


def test_seeds_that_differ_widen_every_interval() -> None:
    rng = np.random.default_rng(5)
    classes = np.repeat(np.arange(30), 20)
    b = rng.random((5, 600)) < 0.6
    a = b.copy()
    for seed, more in enumerate((0.0, 0.05, 0.1, 0.15, 0.2)):
        a[seed] |= rng.random(600) < more
    with_seeds, pooled = paired_difference(a, b, classes), paired_difference(a.mean(0), b.mean(0), classes)
    for one, other in zip(with_seeds[1:3], pooled[1:3], strict=True):
        assert one[1] - one[0] > 2 * (other[1] - other[0])


def test_p_and_interval_agree() -> None:
    rng = np.random.default_rng(6)
    for gained in range(0, 30, 3):
        a, b = np.zeros(200, bool), np.zeros(200, bool)
        a[:gained], b[185:] = True, True
        found = paired_difference(a, b, rng.integers(9, size=200))
        assert (found.p < 0.05) == (found.images[0] > 0 or found.images[1] < 0) or min(map(abs, found.images)) < 1e-6
    assert paired_difference(a, a, np.zeros(200, int)).p == 1
    assert paired_difference(np.ones(50, bool), np.zeros(50, bool), np.zeros(50, int)).p == pytest.approx(2 / 10_001)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@settings(max_examples=100)
@given(st.lists(st.sampled_from([0.0, 1e-3, 0.01, 0.0125, 0.02, 0.025, 0.04, 0.05, 0.3, 1.0]), max_size=7))
def test_holm_rejects_what_its_definition_rejects(p: list[float]) -> None:
    """The step-down test itself, at levels in between: reject the smallest while p <= level / (m - rank)."""
    corrected = holm(p)
    for level in (0.0501, 0.0999, 0.2503, 0.0123):
        rejected: set[int] = set()
        for rank, position in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[position] > level / (len(p) - rank):
                break
            rejected.add(position)
        assert {i for i, value in enumerate(corrected) if value <= level} == rejected
