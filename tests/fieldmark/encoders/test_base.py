"""What all families of encoders share."""

import pytest

from fieldmark.command import UserError
from fieldmark.encoders.base import check_size


@pytest.mark.parametrize("size", [None, 64, 96, 224])
def test_sizes_of_whole_cells(size: int | None) -> None:
    check_size(size, 64, 32, "key")


def test_a_size_that_leaves_part_of_a_cell() -> None:
    with pytest.raises(UserError, match=r"^key\.image_size: 80 pixels are .* cells, 32 pixels each; use 96$"):
        check_size(80, 64, 32, "key")
    # EfficientNet-Lite2 pads its own 260 pixels to nine cells of 32: no other size may fill them less.
    for size in (260, 288, 384, 390):
        check_size(size, 260, 32, "key")
    with pytest.raises(UserError, match=r"^key\.image_size: 225 .*; use 256$"):
        check_size(225, 260, 32, "key")
