from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import SHARES, excerpt, index, listed, make_pets, read, write

EXPECTED = [
    ("images/Abyssinian_1.jpg", "Abyssinian", "train", None),
    ("images/Abyssinian_2.jpg", "Abyssinian", "train", None),
    ("images/american_bulldog_4.jpg", "american_bulldog", "train", None),
    ("images/american_bulldog_5.jpg", "american_bulldog", "train", None),
    ("images/Bengal_7.jpg", "Bengal", "train", None),
    ("images/Bengal_8.jpg", "Bengal", "train", None),
    ("images/Abyssinian_3.jpg", "Abyssinian", "test", None),
    ("images/american_bulldog_6.jpg", "american_bulldog", "test", None),
    ("images/Bengal_9.jpg", "Bengal", "test", None),
]
HEADS = [path for path, _, split, _ in EXPECTED if split == "train"][1:]  # the first has no XML


def test_the_layout(tmp_path: Path) -> None:
    make_pets(tmp_path)
    listing = read("oxford_pets", tmp_path)
    assert listed(listing) == EXPECTED
    assert [part["path"] for part in listing.parts] == HEADS
    head = {"part": "head", "visible": True, "box": [8, 6, 40, 30], "x": 24, "y": 18}
    assert listing.parts[0] == {"path": HEADS[0], **head}
    [warned] = listing.warnings
    assert "lists 3 of 37 classes, 6 of 3680 train, 3 of 3669 test" in warned


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_pets(project / "pets")
    images, ranks, parts = index("oxford_pets", project / "pets", set_params, run_stage)
    assert images == sorted((path, name.replace("_", " "), split, None) for path, name, split, _ in EXPECTED)
    assert ranks == {
        "Abyssinian": ("cat", ["cat"]), "Bengal": ("cat", ["cat"]), "american bulldog": ("dog", ["dog"]),
    }  # fmt: skip
    assert [(part["path"], part["part"], part["visible"]) for part in parts] == [
        (path, "head", True) for path in sorted(HEADS)
    ]
    for part in parts:
        assert part["box"] == pytest.approx(SHARES)
        assert (part["x"], part["y"]) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("trainval.txt", None, "trainval.txt: cannot be read"),
        ("test.txt", "Abyssinian_3 1 1", "test.txt: line 1 has not 4 fields"),
        ("test.txt", "Abyssinian_3 1 3 1", "'Abyssinian_3' '3' is no BREED_NUMBER with species 1 or 2"),
        ("test.txt", "Abyssinian 1 1 1", "'Abyssinian' '1' is no BREED_NUMBER"),
        ("test.txt", "../a_3 1 1 1", "is no BREED_NUMBER"),
        ("test.txt", "Abyssinian_3 1 2 1", "Abyssinian is a cat and a dog"),
        ("test.txt", "Abyssinian_2 1 1 1", "the image 'images/Abyssinian_2.jpg' is listed twice"),
        ("xmls/Bengal_7.xml", "no", "Bengal_7.xml: is not XML"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, line: str | None, words: str) -> None:
    make_pets(tmp_path)
    if line is None:
        (tmp_path / "annotations" / name).unlink()
    else:
        write(tmp_path / "annotations" / name, line)
    with pytest.raises(UserError, match=words) as error:
        read("oxford_pets", tmp_path)
    assert "\n" not in str(error.value)


def test_the_publisher_s_own_lines() -> None:
    """Some lines of both lists, and two of the files of boxes."""
    listing = read("oxford_pets", excerpt("oxford_pets"))
    assert listing.classes[0] == {"class_id": "Abyssinian", "superclass": "cat", "lineage": ["cat"]}
    assert {row["split"] for row in listing.images} == {"train", "test"}
    [head] = listing.parts
    assert (head["path"], head["box"]) == ("images/Abyssinian_100.jpg", head["box"])
    assert head["x"] == (head["box"][0] + head["box"][2]) / 2
