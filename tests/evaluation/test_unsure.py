"""How the page draws what a calibration is worth."""

import numpy as np

from evaluation.unsure import reliability, risk_curve


def test_bins_say_how_sure_and_how_often_right() -> None:
    confidence, right = np.array([0.95, 0.97, 0.55, 1.0]), np.array([True, False, True, True])
    low, high = reliability(confidence, right)
    assert (low["images"], low["sure"], low["right"], low["x"], low["y"]) == (1, 0.55, 1.0, 66.0, 0.0)
    assert high["images"] == 3
    assert high["sure"] == np.mean([0.95, 0.97, 1.0])
    assert high["right"] == 2 / 3


def test_a_risk_curve_is_drawn_up_to_its_most_errors() -> None:
    drawn = risk_curve([(0.5, 0.0), (1.0, 0.2)])
    assert drawn == {"points": "60.0,120.0 120.0,0.0", "most": 0.2, "all": 0.2}
