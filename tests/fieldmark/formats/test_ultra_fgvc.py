from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import index, listed, make_cultivars, read, write

EXPECTED = [
    ("images/001/leaf_1.png", "9", "train", None),
    ("images/001/leaf_2.png", "9", "train", None),
    ("images/002/leaf_4.png", "10", "train", None),
    ("images/002/leaf_5.png", "10", "train", None),
    ("images/003/leaf_7.png", "11", "train", None),
    ("images/003/leaf_8.png", "11", "train", None),
    ("images/001/leaf_3.png", "9", "test", None),
    ("images/002/leaf_6.png", "10", "test", None),
    ("images/003/leaf_9.png", "11", "test", None),
]


def test_the_layout(tmp_path: Path) -> None:
    make_cultivars(tmp_path)
    listing = read("ultra_fgvc", tmp_path)
    assert listed(listing) == EXPECTED
    assert listing.classes == [{"class_id": str(number), "name": f"cultivar {number}"} for number in (9, 10, 11)]
    [warned] = listing.warnings
    assert "lists 3 classes; the data sets of this layout have 80, 200, 1110, 198, 1938" in warned


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_cultivars(project / "COTTON")
    images, ranks, parts = index("ultra_fgvc", project / "COTTON", set_params, run_stage)
    assert images == sorted((path, f"cultivar {name}", split, None) for path, name, split, _ in EXPECTED)
    assert ranks == {f"cultivar {number}": (None, None) for number in (9, 10, 11)}
    assert parts == []


def test_cotton_is_known_by_its_80_classes(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        lines = [f"{split}/{number}_{n}.jpg {number}" for number in range(1, 81) for n in range(count)]
        write(tmp_path / f"anno/{split}.txt", *lines)
    counts, gone = read("ultra_fgvc", tmp_path).warnings
    assert "lists 160 of 240 test that the data set was published with" in counts
    assert "400 of 400 images that are listed are not there: images/train/1_0.jpg" in gone


def test_val_of_its_own_is_read_and_taken_out_of_train(tmp_path: Path) -> None:
    make_cultivars(tmp_path)
    write(tmp_path / "anno/val.txt", "001/leaf_2.png 9", "002/leaf_5.png 10")
    assert {row["path"]: row["split"] for row in read("ultra_fgvc", tmp_path).images} == {
        path: "val" if path in ("images/001/leaf_2.png", "images/002/leaf_5.png") else split
        for path, _, split, _ in EXPECTED
    }


def test_val_that_is_test_is_warned_of(tmp_path: Path) -> None:
    make_cultivars(tmp_path)
    (tmp_path / "anno/val.txt").write_text((tmp_path / "anno/test.txt").read_text())
    listing = read("ultra_fgvc", tmp_path)
    assert listed(listing) == EXPECTED
    assert "val.txt: names 3 test images; it is not read" in listing.warnings[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "train.txt: cannot be read"),
        (["a.png"], "train.txt: 'a.png' is no path in images/ and class from 1"),
        (["a.png 0"], "'a.png 0' is no path"),
        (["a.png x"], "'a.png x' is no path"),
        (["../a.png 1"], "is no path"),
        (["/a.png 1"], "is no path"),
        (["a.png 1", "a.png 2"], "the image 'images/a.png' is listed twice"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, lines: list[str] | None, words: str) -> None:
    make_cultivars(tmp_path)
    if lines is None:
        (tmp_path / "anno/train.txt").unlink()
    else:
        write(tmp_path / "anno/train.txt", *lines)
    with pytest.raises(UserError, match=words) as error:
        read("ultra_fgvc", tmp_path)
    assert "\n" not in str(error.value)
