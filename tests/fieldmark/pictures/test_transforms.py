import numpy as np
import pytest
from PIL import Image

from fieldmark.pictures.transforms import (
    UNCHANGED,
    Motion,
    Transform,
    edge_colour,
    motion_of,
    moved_box,
    stays,
    transformed,
)

IDS = [f"{seed:064x}" for seed in range(12)]
ALL = [
    Transform("shift", shift=0.25), Transform("turn", degrees=30), Transform("quarter", degrees=90),
    Transform("smaller", scale=0.8), Transform("larger", scale=1.25), Transform("crop", crop=0.75),
    Transform("flip", flip=True), Transform("both", degrees=15, scale=1.2, shift=0.1),
]  # fmt: skip


def noise(width: int = 24, height: int = 16) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ways(transform: Transform, size: tuple[int, int]) -> dict[str, Motion]:
    return {image_id: motion_of(transform, image_id, size) for image_id in IDS}


def test_nothing_is_done_to_a_picture_that_stays() -> None:
    assert transformed(noise(), UNCHANGED, IDS[0]) == noise()


def test_a_flip_and_a_quarter_turn_are_exact() -> None:
    assert transformed(noise(), Transform("flip", flip=True), "a") == noise().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turns = {Image.Transpose.ROTATE_90: 0, Image.Transpose.ROTATE_270: 0}
    for image_id in IDS:
        found = transformed(noise(), Transform("turn", degrees=90), image_id)
        [turn] = [turn for turn in turns if noise().transpose(turn) == found]
        turns[turn] += 1
    assert min(turns.values()) > 0


def test_a_shift_moves_pixels_four_ways_and_fills_the_rest() -> None:
    source, seen = np.asarray(noise()), set()
    for image_id, motion in ways(Transform("shift", shift=0.25), (24, 16)).items():
        found = np.asarray(transformed(noise(), Transform("shift", shift=0.25), image_id))
        x, y = map(int, motion.offset)
        assert (x, y) in {(6, 0), (-6, 0), (0, 4), (0, -4)}
        seen.add((x, y))
        expected = np.full_like(source, edge_colour(noise()))
        for row in range(16):
            for column in range(24):
                if 0 <= row - y < 16 and 0 <= column - x < 24:
                    expected[row, column] = source[row - y, column - x]
        assert np.array_equal(found, expected)
    assert len(seen) == 4


def test_a_crop_keeps_the_middle() -> None:
    found = transformed(noise(), Transform("crop", crop=0.75), "a")
    assert found == noise().crop((3, 2, 21, 14))


@pytest.mark.parametrize("transform", ALL, ids=lambda each: each.name)
def test_a_mark_comes_to_lie_where_the_motion_says(transform: Transform) -> None:
    """A blob is drawn off the middle; the transformed picture has it at its place."""
    pixels = np.zeros((80, 120, 3), dtype=np.uint8)
    pixels[46:52, 66:72] = 255
    for image_id in IDS[:4]:
        found = np.asarray(transformed(Image.fromarray(pixels), transform, image_id), dtype=float)[..., 0]
        motion = motion_of(transform, image_id, (120, 80))
        assert found.shape == motion.size[::-1]
        y, x = (np.indices(found.shape) + 0.5).reshape(2, -1) @ found.reshape(-1) / found.sum()
        place = motion.places(np.array([69 / 120, 49 / 80]))
        assert (x / motion.size[0], y / motion.size[1]) == pytest.approx(tuple(place), abs=0.004)
        assert motion.origins(place) == pytest.approx([69 / 120, 49 / 80])


def test_in_place_loses_what_leaves_and_nothing_more() -> None:
    shift, source = Transform("shift", shift=0.25, in_place=True), np.asarray(noise())
    found = np.asarray(transformed(noise(), shift, IDS[0]))
    kept = stays(motion_of(shift, IDS[0], (24, 16)))
    assert kept.sum() == 24 * 16 * 3 / 4
    assert np.array_equal(found[kept], source[kept])
    assert (found[~kept] == edge_colour(noise())).all()
    for each in ALL:
        assert each.loses == (not stays(motion_of(each, IDS[0], (24, 16))).all())


def test_darkening_multiplies_values() -> None:
    found = np.asarray(transformed(noise(), Transform("darken", light=0.5), "a"), dtype=float)
    assert np.abs(found - np.asarray(noise()) / 2).max() <= 0.5


def test_a_box_moves_with_its_picture_and_is_cut_at_the_frame() -> None:
    flip = motion_of(Transform("flip", flip=True), "a", (40, 20))
    assert moved_box((0.1, 0.2, 0.4, 0.6), flip) == pytest.approx((0.6, 0.2, 0.9, 0.6))
    crop = motion_of(Transform("crop", crop=0.5), "a", (40, 20))
    assert moved_box((0.1, 0.3, 0.5, 0.5), crop) == pytest.approx((0.0, 0.1, 0.5, 0.5))


def test_what_is_left_needs_more_pixels() -> None:
    assert [UNCHANGED.zoom, Transform("", scale=0.8).zoom, Transform("", scale=1.25).zoom] == [1, 1, 1.25]
    assert Transform("", crop=0.75).zoom == pytest.approx(4 / 3)
