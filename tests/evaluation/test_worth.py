"""What texts are worth in images, against figures by hand."""

import numpy as np
import pytest

from evaluation.referee import Answers
from evaluation.referee_tables import in_words
from evaluation.worth import Worth, images_for, lead, worth

KS = (0.0, 1.0, 2.0, 4.0)
CURVE = np.array([0.1, 0.5, 0.7, 0.8])


@pytest.mark.parametrize(
    ("reached", "images"),
    [
        (0.05, 0.0),  # under a guess
        (0.1, 0.0),
        (0.3, 0.5),  # half of the way from none to one: less than one image
        (0.5, 1.0),
        (0.6, 1.5),
        (0.75, 3.0),
        (0.8, 4.0),
        (0.81, np.inf),
    ],
)
def test_images_are_read_off_straight_lines(reached: float, images: float) -> None:
    assert images_for(KS, CURVE[None], np.array([reached]))[0] == pytest.approx(images)


def test_where_more_images_did_worse_the_curve_stays() -> None:
    falling = np.array([[0.1, 0.6, 0.5, 0.7], [0.1, 0.5, 0.7, 0.8]])
    np.testing.assert_allclose(images_for(KS, falling, np.array([0.65, 0.6])), [3.0, 1.5])


def planted(rate: float, rng: np.random.Generator, classes: int = 60, images: int = 20) -> Answers:
    right = rng.permutation(classes * images)[None] < rate * classes * images
    return Answers(right.astype(np.float32), np.array([rate]))


def test_worth_is_by_how_many_images_the_curve_lags_behind() -> None:
    rng = np.random.default_rng(0)
    arms = {
        "none": [planted(rate, rng) for rate in CURVE],
        "texts": [planted(rate, rng) for rate in (0.3, 0.6, 0.75, 0.8)],
        "shuffled": [planted(rate, rng) for rate in (0.1, 0.4, 0.7, 0.8)],
    }
    y, part = np.repeat(np.arange(60), 20), np.zeros((1, 1200), np.int64)
    rows = worth(KS, arms, y, part)
    by_hand = [0.5, 0.5, 1.0]
    for row, wanted in zip(rows, by_hand, strict=False):
        low, high = row.interval
        assert low < wanted < high
        assert row.images == pytest.approx(wanted, abs=0.35)
    assert rows[0].interval[1] < 1  # less than one image
    assert rows[1].shuffled_images == pytest.approx(-0.25, abs=0.1)  # texts of others cost a quarter of an image
    assert rows[0].shuffled_images == pytest.approx(0.0, abs=0.1)
    for row in rows[:3]:
        assert row.over == pytest.approx(row.images - row.shuffled_images)
        assert row.over_interval[0] < row.over < row.over_interval[1]


def test_the_lead_over_shuffled_texts_where_the_curve_ends() -> None:
    found = lead(np.array([2.0, np.inf, 1.0, np.inf]), np.array([0.5, 1.0, np.inf, np.inf]))
    np.testing.assert_array_equal(found, [1.5, np.inf, -np.inf, 0.0])


@pytest.mark.parametrize(
    ("images", "interval", "said"),
    [
        (0.27, (0.18, 0.37), "less than one image (0.27 [0.18, 0.37])"),
        (1.5, (0.9, np.inf), "1.50 images [0.90, more]"),
        (np.inf, (3.2, np.inf), "more images than the 15, 3.20 at the least (95 %)"),
        (np.inf, (np.inf, np.inf), "more images than the 15"),
    ],
)
def test_worth_in_words(images: float, interval: tuple[float, float], said: str) -> None:
    assert in_words(Worth(0.0, 0.9, 0.1, 0.1, images, interval, 0.0, images, interval), 15.0) == said
