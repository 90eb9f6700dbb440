"""How figures are written: in percent and points, rounded, signed, and never as a negative zero."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evaluation.words import (
    lay_out,
    on_these_classes,
    percent,
    percent_and_deviation,
    percent_of_runs,
    points,
    points_range,
    written_p,
)

FRACTIONS = st.floats(-1, 1)
NEARLY_ZERO = st.floats(-0.00049, 0.00049)  # rounds to 0.0


def test_no_negative_zero() -> None:
    assert [points(value) for value in (-0.0001, 0.0, -0.1, 0.123)] == ["+0.0", "+0.0", "-10.0", "+12.3"]


@given(FRACTIONS | NEARLY_ZERO, FRACTIONS | NEARLY_ZERO)
@example(-0.0, -0.0004999)
def test_nothing_is_written_as_a_negative_zero(low: float, high: float) -> None:
    texts = [percent(low), points(low), points_range((low, high)), percent_and_deviation(low, abs(high))]
    texts += [percent_of_runs([low]), percent_of_runs([low, high])]
    for text in texts:
        assert not re.search(r"-0\.0(?!\d)", text)


@given(NEARLY_ZERO)
def test_what_rounds_to_zero_is_zero(value: float) -> None:
    assert (percent(value), points(value), points_range((value, value))) == ("0.0", "+0.0", "[+0.0, +0.0]")


@given(FRACTIONS)
def test_one_decimal_is_within_half_of_one(value: float) -> None:
    assert float(percent(value)) == pytest.approx(100 * value, abs=0.05 + 1e-9)
    assert float(points(value)) == float(percent(value))
    assert points(value)[0] == ("-" if float(points(value)) < 0 else "+")
    assert not percent(value).startswith("+")


@example(0.0075)
@given(FRACTIONS | NEARLY_ZERO)
def test_numpy_writes_as_python_does(value: float) -> None:
    single = np.float32(value)
    assert (percent(np.float64(value)), points(np.float64(value))) == (percent(value), points(value))
    assert (percent(single), points(single)) == (percent(float(single)), points(float(single)))


def test_one_run_has_no_deviation() -> None:
    assert percent_of_runs([0.5]) == "50.0"
    assert percent_of_runs([0.25, 0.75]) == "50.0 +- 35.4"
    assert percent_and_deviation(0.5, 0.0) == "50.0 +- 0.0"


def test_a_small_p_is_said_to_be_small() -> None:
    assert [written_p(p) for p in (1.0, 0.0304, 0.001, 0.00099, 0.0)] == ["1.000", "0.030", "0.001", "<0.001", "<0.001"]


def test_an_interval_over_classes_that_holds_zero_binds_a_verdict_to_them() -> None:
    held, not_held = [(-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0)], [(0.1, 0.2), (-0.2, -0.1)]
    assert {on_these_classes(ends) for ends in held} == {" on these classes"}
    assert {on_these_classes(ends) for ends in not_held} == {""}


def test_columns_are_aligned() -> None:
    assert lay_out([["method", "val", ""], ["a", "50.0", "last"], ["longest one", "", ""]]) == (
        "method       val\na            50.0  last\nlongest one"
    )


def test_lines_of_other_lengths_are_no_table() -> None:
    with pytest.raises(ValueError, match="shorter"):
        lay_out([["a", "b"], ["c"]])
