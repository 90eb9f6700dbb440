"""Which part of a picture an encoder sees."""

import pytest

from fieldmark.pictures.boxes import visible_box


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("shortest", (80, 80), (0, 0, 1, 1)),
        ("shortest", (80, 60), (0.125, 0, 0.875, 1)),
        ("shortest", (10, 40), (0, 0.375, 1, 0.625)),
        ("squash", (80, 60), (0, 0, 1, 1)),
        ("longest", (80, 60), (0, -1 / 6, 1, 7 / 6)),
        ("longest", (40, 40), (0, 0, 1, 1)),
    ],
)
def test_what_an_encoder_sees_of_a_picture(mode: str, size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert visible_box(*size, {"resize_mode": mode}) == pytest.approx(box)
