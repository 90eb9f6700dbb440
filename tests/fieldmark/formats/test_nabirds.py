from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import SHARES, excerpt, index, listed, make_nabirds, read, write

BOX = [8, 6, 40, 30]
GOOSE, MALE, FEMALE = "Snow Goose", "Common Eider (Adult male)", "Common Eider (Female/juvenile)"
STEM = "0000139e21dc4d0cbfe100000000000"
EXPECTED = [
    (f"images/0295/{STEM}1.jpg", GOOSE, "train", BOX),
    (f"images/0295/{STEM}2.jpg", GOOSE, "train", BOX),
    (f"images/0295/{STEM}3.jpg", GOOSE, "test", BOX),
    (f"images/0296/{STEM}4.jpg", MALE, "train", BOX),
    (f"images/0296/{STEM}5.jpg", MALE, "train", BOX),
    (f"images/0296/{STEM}6.jpg", MALE, "test", BOX),
    (f"images/0700/{STEM}7.jpg", FEMALE, "train", BOX),
    (f"images/0700/{STEM}8.jpg", FEMALE, "train", BOX),
    (f"images/0700/{STEM}9.jpg", FEMALE, "test", BOX),
]


def test_the_layout(tmp_path: Path) -> None:
    make_nabirds(tmp_path)
    listing = read("nabirds", tmp_path)
    assert listed(listing) == EXPECTED
    assert listing.parts[0] == {"path": EXPECTED[0][0], "part": "bill", "visible": True, "x": 40, "y": 30}
    [warned] = listing.warnings
    assert "lists 3 of 555 classes, 6 of 23929 train, 3 of 24633 test" in warned


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_nabirds(project / "nabirds")
    images, ranks, parts = index("nabirds", project / "nabirds", set_params, run_stage)
    assert images == [(path, name, split, SHARES) for path, name, split, _ in EXPECTED]
    above = "Ducks, Geese, and Swans"
    assert ranks == {
        GOOSE: (above, ["Birds", above, GOOSE]), MALE: (above, ["Birds", above]), FEMALE: (above, ["Birds", above]),
    }  # fmt: skip
    assert [(part["path"], part["part"], part["x"], part["y"]) for part in parts] == [
        (path, "bill", 0.5, 0.5) for path, *_ in EXPECTED
    ]


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("hierarchy.txt", None, "hierarchy.txt: is not there; without it each of 1,011 nodes"),
        ("hierarchy.txt", "1 2", "classes.txt: has no line for 2"),
        ("images.txt", "0000139e", "images.txt: line 1 has not 2 fields"),
        ("train_test_split.txt", "0000139e 1", "train_test_split.txt: has no line for"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, line: str | None, words: str) -> None:
    make_nabirds(tmp_path)
    if line is None:
        (tmp_path / name).unlink()
    else:
        write(tmp_path / name, line)
    with pytest.raises(UserError, match=words) as error:
        read("nabirds", tmp_path)
    assert "\n" not in str(error.value)


def test_the_publisher_s_own_files() -> None:
    """All classes and the whole tree, with the lines of thirty images."""
    root = excerpt("nabirds") / "nabirds"
    listing = read("nabirds", root)
    assert len(listing.classes) == 555
    first = next(row for row in listing.images if row["number"] == "0000139e-21dc-4d0c-bfe1-4cae3c85c829")
    assert first["path"] == "images/0817/0000139e21dc4d0cbfe14cae3c85c829.jpg"
    assert (first["split"], first["box"]) == ("test", [83, 59, 211, 287])
    assert len(listing.images) == 30
    counts, gone = listing.warnings
    assert "of 555 classes" in counts
    assert "30 of 30 images that are listed are not there: images/0349/0015c3c30eac4e9e823a6b1c120e565f.jpg" in gone
