"""Entropy of pixels under boxes, on pictures whose histograms are known."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels.pixels import pixel_density, pixel_entropy, pixel_ranges, read_grey
from tests.project import image_id, webp_of

WHOLE = [0.0, 0.0, 1.0, 1.0]
share = st.floats(0, 1, width=32)


def halves() -> np.ndarray:
    """4 x 8 pixels, the left half black, the right one white."""
    return np.repeat(np.array([[0, 255]], dtype=np.uint8), 4, axis=1).repeat(4, axis=0)


def test_one_value_is_no_entropy_and_two_alike_are_one_bit() -> None:
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], WHOLE, [0.25, 0, 0.75, 0.5], [0, 0, 0.75, 1]], dtype=np.float32)
    third = -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    assert pixel_entropy(halves(), boxes).tolist() == [0, 0, 1, 1, pytest.approx(third)]


def test_all_values_alike_are_eight_bits() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    whole, quarter = pixel_entropy(np.tile(grey, (2, 2)), np.array([WHOLE, [0.5, 0.5, 1, 1]]))
    assert whole == quarter == 8
    assert pixel_entropy(grey, np.array([[0.0, 0.0, 0.5, 0.5]])).tolist() == [6]  # 64 pixels hold no more


def test_boxes_are_rounded_outward_and_hold_one_pixel() -> None:
    boxes = np.array([[0.3, 0.1, 0.6, 0.2], [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=np.float32)
    assert pixel_ranges(boxes, 8, 4).tolist() == [[2, 0, 5, 1], [4, 2, 5, 3], [7, 3, 8, 4], [0, 0, 1, 1]]


@pytest.mark.parametrize("parts", [3, 6, 7])
@pytest.mark.parametrize("pixels", [1, 5, 27])
def test_neighbours_in_a_grid_share_no_pixel(parts: int, pixels: int) -> None:
    edges = np.arange(parts + 1, dtype=np.float32) / np.float32(parts)
    boxes = np.stack([edges[:-1], edges[:-1], edges[1:], edges[1:]], axis=1)
    ranges = pixel_ranges(boxes, parts * pixels, parts * pixels)
    assert ranges[:, 0].tolist() == [pixels * part for part in range(parts)]
    assert ranges[:, 2].tolist() == [pixels * (part + 1) for part in range(parts)]


@given(st.tuples(share, share), st.tuples(share, share), st.integers(1, 192), st.integers(1, 192))
def test_every_box_covers_pixels_of_the_picture(
    xs: tuple[float, float], ys: tuple[float, float], width: int, height: int
) -> None:
    boxes = np.array([[min(xs), min(ys), max(xs), max(ys)]], dtype=np.float32)
    [[left, top, right, bottom]] = pixel_ranges(boxes, width, height).tolist()
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    x0, y0, x1, y1 = boxes[0].tolist()
    assert left <= x0 * width + 2e-3
    assert top <= y0 * height + 2e-3
    assert right >= x1 * width - 2e-3
    assert bottom >= y1 * height - 2e-3


def test_grey_is_pillows() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "WEBP", lossless=True)
    np.testing.assert_array_equal(read_grey(buffer.getvalue()), expected)


def thumbs_of(pictures: dict[str, np.ndarray]) -> pa.Table:
    return store.make_table(
        "thumbs/1", [{"image_id": each, "webp": webp_of(grey)} for each, grey in pictures.items()]
    )


def test_views_find_their_pictures() -> None:
    thumbs = thumbs_of({image_id(0): halves(), image_id(1): np.arange(256, dtype=np.uint8).reshape(16, 16)})
    boxes = np.array([[WHOLE, [0, 0, 0.5, 0.5]], [WHOLE, WHOLE], [[0.5, 0, 1, 1], WHOLE]], dtype=np.float32)
    found = pixel_density(thumbs, [image_id(1), image_id(0), image_id(1)], boxes)
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 6 / 8], [1 / 8, 1 / 8], [7 / 8, 1]]


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(UserError, match=rf"data/thumbs: lacks image {image_id(1)}; run index_images again"):
        pixel_density(thumbs_of({image_id(0): halves()}), [image_id(0), image_id(1)], np.tile(WHOLE, (2, 1, 1)))
