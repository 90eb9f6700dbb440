"""Drawings: repeatable, varied, and with boxes that hold what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmark.reef.drawing import draw_fish
from fieldmark.reef.species import VOCABULARY, complete

PLAIN = {
    "body_shape": "oval",
    "tail_shape": "forked",
    "dorsal_fin": "low",
    "body_colour": "orange",
    "fin_colour": "red",
}
MARKS = ("bars", "stripes", "spots", "eye_mask", "tail_spot", "cheek")
combinations = st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in VOCABULARY.items()})


def pixels(attributes, seed, size=96):
    return np.asarray(draw_fish(attributes, np.random.default_rng(seed), size).image).astype(int)


@settings(max_examples=25)
@given(combinations, st.integers(0, 2**32))
def test_every_combination_draws_and_boxes_lie_in_the_picture(attributes, seed):
    drawing = draw_fish(attributes, np.random.default_rng(seed), 64)
    assert drawing.image.size == (64, 64)
    assert drawing.image.mode == "RGB"
    drawn = {box.part for box in drawing.parts}
    marks = {name for name in MARKS if attributes[name] != "none"}
    assert drawn == {"body", "tail", "dorsal_fin", "head", "eye"} | marks
    for box in drawing.parts:
        assert 0 <= box.x0 <= box.x1 <= 1
        assert 0 <= box.y0 <= box.y1 <= 1
        assert not box.visible or (box.x0 < box.x1 and box.y0 < box.y1)


def test_the_same_generator_draws_the_same_picture_and_another_draws_another():
    attributes = complete(PLAIN, "test")
    assert np.array_equal(pixels(attributes, 3), pixels(attributes, 3))
    assert not np.array_equal(pixels(attributes, 3), pixels(attributes, 4))


@pytest.mark.parametrize("seed", range(5))
def test_the_eye_lies_in_the_head_and_the_head_in_the_body(seed):
    boxes = {b.part: b for b in draw_fish(complete(PLAIN, "test"), np.random.default_rng(seed), 160).parts}
    for inner, outer in (("eye", "head"), ("head", "body")):
        a, b = boxes[inner], boxes[outer]
        assert b.x0 <= a.x0 and a.x1 <= b.x1 and b.y0 <= a.y0 and a.y1 <= b.y1  # noqa: PT018


@pytest.mark.parametrize(("attribute", "value"), [("cheek", "patch"), ("tail_spot", "spot"), ("eye_mask", "mask")])
def test_a_mark_changes_the_picture_in_its_box(attribute, value):
    """The same fish with and without the mark differs inside the mark's box far more than elsewhere."""
    inside, outside = [], []
    for seed in range(12):
        marked = complete(PLAIN | {attribute: value}, "test")
        drawing = draw_fish(marked, np.random.default_rng(seed), 160)
        box = next(box for box in drawing.parts if box.part == attribute)
        change = np.abs(pixels(marked, seed, 160) - pixels(complete(PLAIN, "test"), seed, 160)).mean(axis=2)
        mask = np.zeros((160, 160), bool)
        mask[round(box.y0 * 160) : round(box.y1 * 160), round(box.x0 * 160) : round(box.x1 * 160)] = True
        if mask.any():
            inside.append(change[mask].mean())
            outside.append(change[~mask].mean())
    assert np.mean(inside) > 2 * np.mean(outside)
