"""Where an object is found, and which crops of it are taken, against loops and maps that are known."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from fieldmark.params import Regions
from fieldmark.pictures.boxes import Box
from fieldmark.pictures.regions import (
    MAX_OVERLAP,
    WHOLE,
    activation,
    best_windows,
    blind_windows,
    find_object,
    grow_square,
    keep_best,
    largest_patch,
    overlap,
    score,
    slide,
)

SIDES = st.integers(1, 12)
MAPS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.float64, shape, elements=st.floats(0, 100, width=16)))
MASKS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.bool_, shape))
EXTENT = st.floats(0.1, 1)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    across, down = draw(EXTENT), draw(EXTENT)
    x, y = draw(st.floats(0, 1)) * (1 - across), draw(st.floats(0, 1)) * (1 - down)
    return x, y, x + across, y + down


def iou(one: Box, other: Box) -> float:
    across, down = (max(0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return across * down / (areas - across * down)


def mirrored(box: Box) -> Box:
    return 1 - box[2], box[1], 1 - box[0], box[3]


@given(SIDES, SIDES, st.data())
def test_a_bright_rectangle_is_the_object(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    values = np.full((height, width), 0.1)
    values[top:bottom, left:right] = 1
    assert find_object(values) == pytest.approx((left / width, top / height, right / width, bottom / height))


def test_of_several_patches_the_largest_counts_and_corners_join() -> None:
    values = np.zeros((8, 8))
    values[0, :4] = 5  # brighter, and smaller
    values[3, 3] = values[4, 4] = values[5, 5] = values[6, 5] = values[6, 6] = 1
    assert find_object(values) == (3 / 8, 3 / 8, 7 / 8, 7 / 8)


@given(MASKS)
def test_the_largest_patch_is_that_of_scipy(mask: np.ndarray) -> None:
    numbers, count = label(mask, np.ones((3, 3)))
    patch = largest_patch(mask)
    assert patch.sum() == max((int((numbers == each).sum()) for each in range(1, count + 1)), default=0)
    assert not patch.any() or len(set(numbers[patch].tolist())) == 1
    assert (mask | ~patch).all()


@given(MAPS)
def test_the_object_lies_in_the_picture_and_a_mirrored_map_has_it_mirrored(values: np.ndarray) -> None:
    x0, y0, x1, y1 = found = find_object(values)
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1
    mask = values > values.mean()
    numbers, count = label(mask, np.ones((3, 3)))
    sizes = [int((numbers == each).sum()) for each in range(1, count + 1)]
    assume(sizes.count(max(sizes, default=0)) <= 1)
    assert find_object(values[:, ::-1]) == pytest.approx(mirrored(found))


@given(MASKS)
def test_the_brightest_cell_of_one_patch_lies_in_the_object(mask: np.ndarray) -> None:
    assume(label(mask, np.ones((3, 3)))[1] == 1)
    values = np.where(mask, 1.0, 0.0)
    values[np.unravel_index(values.argmax(), values.shape)] = 2
    row, column = np.unravel_index(values.argmax(), values.shape)
    x0, y0, x1, y1 = find_object(values)
    assert x0 - 1e-9 <= column / values.shape[1] < x1
    assert y0 - 1e-9 <= row / values.shape[0] < y1


@pytest.mark.parametrize("values", [np.zeros((3, 5)), np.full((2, 2), 7.0), np.ones((1, 1))])
def test_where_nothing_stands_out_the_object_is_all_that_is_seen(values: np.ndarray) -> None:
    assert find_object(values) == WHOLE
    assert find_object(values, (0.25, 0.0, 0.75, 1.0)) == (0.25, 0, 0.75, 1)


def test_padding_beside_the_picture_is_no_object() -> None:
    values = np.zeros((4, 4))
    values[0] = 9
    values[2, 1] = 1
    # The picture is twice as wide as high: the first and the last row show padding.
    assert find_object(values, (0.0, -0.5, 1.0, 1.5)) == (0.25, 0.5, 0.5, 1)


@given(boxes(), st.integers(1, 500), st.integers(1, 500))
def test_a_square_holds_the_box_where_it_fits(box: Box, width: int, height: int) -> None:
    x0, y0, x1, y1 = grow_square(box, width, height)
    assert (x1 - x0) * width == pytest.approx((y1 - y0) * height)
    assert min(x0, y0) >= 0
    assert max(x1, y1) <= 1 + 1e-9
    if max((box[2] - box[0]) * width, (box[3] - box[1]) * height) <= min(width, height):
        assert x0 <= box[0] + 1e-9
        assert y0 <= box[1] + 1e-9
        assert x1 >= box[2] - 1e-9
        assert y1 >= box[3] - 1e-9
    assert grow_square(mirrored(box), width, height) == pytest.approx(mirrored((x0, y0, x1, y1)))


@given(boxes(), st.sampled_from([2 / 7, 1 / 3, 0.5, 4 / 7, 1.0]), SIDES, SIDES)
def test_windows_lie_in_their_box(box: Box, side: float, height: int, width: int) -> None:
    windows = slide(box, side, height, width)
    assert len(windows) == (round((1 - side) * width) + 1) * (round((1 - side) * height) + 1)
    assert (windows[:, :2] >= np.array(box[:2]) - 1e-9).all()
    assert (windows[:, 2:] <= np.array(box[2:]) + 1e-9).all()
    extent = side * (box[2] - box[0]), side * (box[3] - box[1])
    np.testing.assert_allclose(windows[:, 2:] - windows[:, :2], np.tile(extent, (len(windows), 1)))


def test_windows_of_whole_cells_are_those_of_the_lattice() -> None:
    values = np.random.default_rng(0).random((7, 7))
    windows = slide(WHOLE, 3 / 7, 7, 7)
    means = [values[y : y + 3, x : x + 3].mean() for y in range(5) for x in range(5)]
    np.testing.assert_allclose(windows[:, 0] * 7, np.tile(np.arange(5), 5))
    np.testing.assert_allclose(windows[:, 1] * 7, np.repeat(np.arange(5), 5), atol=1e-12)
    np.testing.assert_allclose(score(windows, values, WHOLE), means)


@given(boxes(), arrays(np.float64, (3, 4), elements=st.floats(0, 1)))
def test_a_score_is_the_mean_over_the_area(box: Box, values: np.ndarray) -> None:
    fine = np.kron(values, np.ones((40, 40)))  # 120 x 160
    x = (np.arange(160) + 0.5) / 160
    y = (np.arange(120) + 0.5) / 120
    inside = np.outer((box[1] < y) & (y < box[3]), (box[0] < x) & (x < box[2]))
    assert score(np.array([box]), values, WHOLE)[0] == pytest.approx(fine[inside].mean(), abs=0.15)


def test_the_best_windows_that_overlap_too_much_make_way() -> None:
    windows = np.array([(0, 0, 0.5, 0.5), (0.1, 0, 0.6, 0.5), (0.5, 0.5, 1, 1), (0.3, 0, 0.8, 0.5), (0.5, 0, 1, 0.5)])
    scores = np.array([5.0, 4.0, 1.0, 3.0, 2.0])
    # IoU with the first: 0.67, 0, 0.25, 0.
    assert keep_best(windows, scores, 3).tolist() == [0, 3, 2]
    # The fourth overlaps one that is kept by 0.43, the second by 0.67; then all are taken, and the best comes again.
    assert keep_best(windows, scores, 6).tolist() == [0, 3, 2, 4, 1, 0]


@given(MAPS, boxes())
def test_crops_by_score(values: np.ndarray, base: Box) -> None:
    asked = Regions()
    found = best_windows(values, WHOLE, base, asked)
    assert len(found) == 7
    start = 0
    for side, count in asked.windows:
        of_size, start = found[start : start + count], start + count
        for x0, y0, x1, y1 in of_size:
            assert base[0] - 1e-9 <= x0 < x1 <= base[2] + 1e-9
            assert base[1] - 1e-9 <= y0 < y1 <= base[3] + 1e-9
        windows = slide(base, side, *values.shape)
        # The first is the best of all.
        assert score(np.array(of_size[:1]), values, WHOLE)[0] == pytest.approx(score(windows, values, WHOLE).max())
        # Where two overlap by more than the limit, no window was left that does not.
        for place, other in enumerate(of_size):
            before = of_size[:place]
            if any(iou(one, other) > MAX_OVERLAP + 1e-6 for one in before):
                free = [all(iou(tuple(window), one) <= MAX_OVERLAP for one in before) for window in windows]
                assert not any(free)


def test_crops_of_a_usual_map_overlap_little() -> None:
    values = np.random.default_rng(0).random((9, 9))
    found = best_windows(values, WHOLE, WHOLE, Regions())
    for start, count in ((0, 2), (2, 3), (5, 2)):
        for one, other in combinations(found[start : start + count], 2):
            assert iou(one, other) <= MAX_OVERLAP + 1e-9


@given(st.integers(0, 2**32 - 1))  # real numbers: windows over whole ones are often worth the same, and are passed over
def test_a_mirrored_map_has_the_mirrored_crops(seed: int) -> None:
    values = np.random.default_rng(seed).random((9, 9))
    asked = Regions(sides=[1 / 3], count=[3])
    windows = slide(WHOLE, 1 / 3, 9, 9)
    scores = np.sort(score(windows, values, WHOLE))
    assume((np.diff(scores) > 1e-6).all())
    found = best_windows(values, WHOLE, WHOLE, asked)
    other = best_windows(values[:, ::-1], WHOLE, WHOLE, asked)
    np.testing.assert_allclose([mirrored(box) for box in other], found, atol=1e-9)


@given(boxes(), boxes())
def test_overlap_is_intersection_over_union(one: Box, other: Box) -> None:
    assert overlap(np.array([one]), np.array(other))[0] == pytest.approx(iou(one, other))


@given(boxes())
def test_crops_that_look_at_no_map(base: Box) -> None:
    grid = blind_windows(base, Regions(crops="grid"), "")
    assert len(grid) == 9
    assert all(iou(one, other) < 1e-9 for one, other in combinations(grid, 2))
    assert sum((box[2] - box[0]) * (box[3] - box[1]) for box in grid) == pytest.approx(
        (base[2] - base[0]) * (base[3] - base[1])
    )
    asked = Regions(crops="random")
    drawn = blind_windows(base, asked, "an image")
    assert len(drawn) == 8
    assert drawn == blind_windows(base, asked, "an image")
    assert drawn != blind_windows(base, asked, "another")
    for x0, y0, x1, y1 in drawn:
        assert base[0] - 1e-9 <= x0 < x1 <= base[2] + 1e-9
        assert base[1] - 1e-9 <= y0 < y1 <= base[3] + 1e-9
        assert (x1 - x0, y1 - y0) == pytest.approx(((base[2] - base[0]) / 3, (base[3] - base[1]) / 3))


def test_what_a_map_is_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(5, generator=generator)
    tokens, rollout = torch.randn(2, 3, 5, generator=generator), torch.rand(4, 6, generator=generator)
    outputs = pooled, tokens, rollout
    for row in range(2):
        for column in range(3):
            cell = tokens[row, column]
            place = row, column
            assert activation("norm", outputs)[place] == pytest.approx(float(cell.abs().sum()), rel=1e-5)
            dot = max(0.0, float(cell @ pooled))
            assert activation("similarity", outputs)[place] == pytest.approx(dot, rel=1e-4, abs=1e-6)
            mean = float(rollout[:, 3 * row + column].mean())
            assert activation("attention", outputs)[place] == pytest.approx(mean, rel=1e-5)
    tokens[0, 0, 0] = torch.nan
    assert activation("norm", outputs)[0, 0] == 0
