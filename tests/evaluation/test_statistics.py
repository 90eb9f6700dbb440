from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from evaluation.statistics import (
    bootstrap,
    flip_p,
    holm,
    paired_difference,
    paired_differences,
)


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
    same = paired_difference(a, a, classes)
    assert (same.difference, same.p) == (0, 1)


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
        (20, 1, 0.0, 1.0),  # four or five images differ
        (30, 1, 0.0, 0.98),
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
        assert (found.p < 0.05) == (found.images[0] > 0 or found.images[1] < 0) or 0.05 < found.p < 0.1
    assert paired_difference(a, a, np.zeros(200, int)).p == 1


@pytest.mark.parametrize(("gained", "lost"), [(4, 0), (5, 0), (6, 0), (3, 9), (40, 22), (150, 100), (1, 1), (0, 0)])
def test_p_of_one_run_is_mcnemars_exact_one(gained: int, lost: int) -> None:
    a, b = np.zeros(400, bool), np.zeros(400, bool)
    a[:gained], b[400 - lost :] = True, True
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1
    assert paired_difference(a, b, np.zeros(400, int)).p == pytest.approx(expected, rel=1e-9)


def test_p_over_groups_goes_through_all_signs() -> None:
    """A loop over all signs of the groups' sums, with groups of many sizes; two of them undecided."""
    rng = np.random.default_rng(8)
    groups = np.repeat(np.arange(12), rng.integers(1, 30, 12))
    a, b = rng.random(len(groups)) < 0.6, rng.random(len(groups)) < 0.5
    a[groups > 9] = b[groups > 9]
    gain = np.bincount(groups, a.astype(int) - b.astype(int)).astype(int)
    reached = [
        abs(sum(sign * one for sign, one in zip(signs, gain, strict=True))) for signs in product((1, -1), repeat=12)
    ]
    expected = np.mean(np.array(reached) >= abs(gain.sum()))
    found = paired_difference(a, b, np.zeros(len(groups), int), groups)
    assert (found.unit, found.units) == ("groups", 12)
    assert found.p == pytest.approx(expected)


def test_p_of_several_runs_is_as_good_as_all_signs() -> None:
    """Drawn signs against SciPy's permutation test of the images' means; the seeds are equally good."""
    rng = np.random.default_rng(9)
    a, b = (np.stack([rng.permutation(60) < right for _ in range(5)]) for right in (45, 40))
    gain = (a.astype(np.float32) - b)[None]
    expected = permutation_test(
        (gain[0].mean(0),), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng, vectorized=True
    )
    assert 0.01 < expected.pvalue < 0.1
    assert flip_p(gain, np.arange(60), 20_000, 0) == pytest.approx([expected.pvalue], abs=0.01)


def test_signs_of_many_unequal_images_are_drawn_and_nothing_overflows() -> None:
    """3,000 images that each differ by another amount have 2 ** 3,000 signs: more than a float64 holds."""
    gain = np.random.default_rng(0).standard_normal((1, 1, 3000))
    with np.errstate(all="raise"):
        (p,) = flip_p(gain, np.arange(3000), 1000, 0)
    assert p == pytest.approx(2 * NormalDist().cdf(-abs(gain.sum()) / np.sqrt(np.square(gain).sum())), abs=0.05)


def test_seeds_that_differ_raise_p() -> None:
    """Five seeds of which each beats all of b's on other images, by 0 to 8 points."""
    rng = np.random.default_rng(5)
    b = np.tile(rng.random(600) < 0.6, (5, 1))
    a = b.copy()
    for seed, more in enumerate((0.0, 0.0, 0.02, 0.06, 0.2)):
        a[seed] |= rng.random(600) < more
    classes = np.zeros(600, int)
    assert paired_difference(a, b, classes).p > 0.05
    assert paired_difference(a.mean(0), b.mean(0), classes).p < 0.001


def test_the_p_of_noise_is_under_its_level_as_often_as_that() -> None:
    """Methods of five seeds each, and one fit against five; images of varying difficulty."""
    rng = np.random.default_rng(10)
    for seeds, spread in ((5, 0.1), (1, 0.0)):
        difficulty = 1.5 * rng.standard_normal((500, 1, 200))
        a, b = (
            1 + spread * rng.standard_normal((500, of, 1)) + 0.7 * rng.standard_normal((500, of, 200)) > difficulty
            for of in (seeds, 5)
        )
        p = flip_p(a.astype(np.float32) - b, np.arange(200), 1000, 0)
        assert (p < 0.05).mean() <= 0.08  # a spread that five seeds tell is not exact


def test_no_image_on_which_two_methods_differ_is_no_proof_that_there_is_none() -> None:
    """Bonett and Price's adjusted Wald interval: an image is added in favour of each method."""
    for n, each, equivalent in ((144, 0, False), (400, 0, True), (400, 3, False), (2000, 30, True)):
        a, b = np.zeros(n, bool), np.zeros(n, bool)
        a[:each], b[n - each :] = True, True
        found = paired_difference(a, b, np.zeros(n, int))
        expected = 1.96 * np.sqrt(2 * each + 2) / n
        assert found.half_width == pytest.approx(expected, rel=0.15)
        assert found.equivalent == equivalent


def test_harmonic_means_are_compared_as_they_are() -> None:
    rng = np.random.default_rng(11)
    part = np.repeat([0, 1, -1], [200, 60, 40])
    classes = np.arange(300) % 30
    a, b = rng.random((4, 3, 300)) < 0.6, rng.random((3, 300)) < 0.5
    b[:, part == 1] &= rng.random((3, 60)) < 0.3

    def harmonic(right: np.ndarray, gone: int = -1) -> float:
        one, two = (right[:, (part == of) & (classes != gone)].mean() for of in (0, 1))
        return float(2 * one * two / (one + two))

    found = paired_differences(a, b, classes, part=part)
    assert [one.difference for one in found] == pytest.approx([harmonic(row) - harmonic(b) for row in a], abs=1e-6)
    assert {(one.unit, one.units) for one in found} == {("images", 60)}
    # A method that knows no unseen class, and one that knows nothing.
    nothing = np.zeros((3, 300), bool)
    blind = np.where(part == 1, False, b)
    # The delta method against a jackknife over classes, of one run each: other seeds are no part of it.
    for other in (b, blind):
        left = [harmonic(a[0, :1], gone) - harmonic(other[:1], gone) for gone in range(30)]
        error = np.sqrt(29 / 30 * np.square(np.array(left) - np.mean(left)).sum())
        low, high = paired_difference(a[0, :1], other[:1], classes, part=part, by_class=True).classes
        assert (high - low) / 2 == pytest.approx(2.05 * error, rel=0.2)
    assert paired_difference(a[0], blind, classes, part=part).difference == pytest.approx(harmonic(a[0]))
    assert paired_difference(nothing, b, classes, part=part).difference == pytest.approx(-harmonic(b), abs=1e-6)


def test_groups_that_never_differ_may_differ_as_a_whole() -> None:
    """Where frames are right or wrong together, 24 tracks without a difference are 24 observations, and not 1,200."""
    tracks, right = np.arange(1200) // 50, np.ones(1200, bool)
    found = paired_difference(right, right, tracks, tracks)
    assert (found.difference, found.p, found.equivalent) == (0, 1, False)
    assert found.half_width > 0.1
    by_class = paired_difference(right, right, tracks, by_class=True)
    assert (by_class.unit, by_class.equivalent) == ("classes", True)


def test_a_part_may_differ_from_run_to_run() -> None:
    """Unseen classes of three splits: a class counts where it is unseen, and all splits are pooled."""
    rng = np.random.default_rng(12)
    classes = np.arange(240) % 24
    part = np.stack([np.where(classes % 3 == split, 0, -1) for split in range(3)])
    a, b = rng.random((3, 240)) < 0.6, rng.random((3, 240)) < 0.4
    found = paired_difference(a, b, classes, part=part, by_class=True)
    assert found.difference == pytest.approx(a[part == 0].mean() - b[part == 0].mean())
    assert (found.unit, found.units) == ("classes", 24)


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
