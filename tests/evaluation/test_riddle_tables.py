"""The table of faults, of answers whose figures are known."""

import numpy as np

from evaluation.riddle_tables import Told, as_json, as_text, joined, rows_of


def told() -> tuple[list[Told], np.ndarray]:
    """100 images: without faults 60 are right; with one 80 in class order and 50 shuffled."""
    first = np.arange(100) < np.array([[60], [80], [50]])
    plain = Told("m", "none", 0.9, first[:1], first[:1])
    return [plain, Told("m", "fault", 1.0, first[1:2], first[2:])], np.arange(100) % 5


def test_rows_hold_gap_order_and_difference() -> None:
    some, y = told()
    plain, fault = rows_of(some, y, None)
    assert (plain.paired, plain.p, plain.order.difference) == (None, None, 0)
    assert np.isclose(plain.gap, 0.3)
    assert np.isclose(fault.gap, 0.2)
    assert np.isclose(fault.order.difference, 0.3)
    assert fault.paired is not None
    assert np.isclose(fault.paired.difference, 0.2)
    assert fault.p is not None
    assert fault.p < 0.001
    assert fault.order.over[0] > 0.2


def test_p_is_corrected_for_all_methods() -> None:
    some, y = told()
    rows = rows_of([*some, *(each._replace(method="n") for each in some)], y, None)
    assert [row.p is None for row in rows] == [True, False, True, False]
    assert rows[1].paired is not None
    assert rows[1].p == 2 * rows[1].paired.p


def test_the_text_has_a_line_for_each_and_says_what_is_left_out() -> None:
    some, y = told()
    text = as_text("title", rows_of(some, y, None), ["m: other is left out: why"])
    lines = text.splitlines()
    assert lines[0] == "title"
    assert lines[3].split()[:6] == ["m", "none", "90.0", "60.0", "60.0", "+0.0"]
    assert lines[4].split()[:6] == ["m", "fault", "100.0", "80.0", "50.0", "+30.0"]
    assert "corrected (Holm) for 1 comparison" in text
    assert lines[-1] == "m: other is left out: why"
    [_, row] = as_json(rows_of(some, y, None))["rows"]
    assert np.isclose(row["paired"]["difference"], 0.2)
    assert np.isclose(row["gap"], 0.2)


def test_folds_are_put_together_image_by_image() -> None:
    assert joined([([3, 0], [7, 8]), ([1, 2], [5, 6])], 4).tolist() == [8, 5, 6, 7]
