from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.formats.fgvc_aircraft import BANNER, add_boxes
from tests.fieldmark.formats.layouts import SHARES, excerpt, index, listed, make_aircraft, read, write

BOX = [8, 6, 40, 30]
EXPECTED = [
    ("data/images/0000002.jpg", "F-16A/B", "train", BOX),
    ("data/images/0000005.jpg", "737-200", "train", BOX),
    ("data/images/0000008.jpg", "MD-11", "train", BOX),
    ("data/images/0000001.jpg", "F-16A/B", "val", [-1, 6, 40, 30]),
    ("data/images/0000004.jpg", "737-200", "val", BOX),
    ("data/images/0000007.jpg", "MD-11", "val", BOX),
    ("data/images/0000003.jpg", "F-16A/B", "test", BOX),
    ("data/images/0000006.jpg", "737-200", "test", BOX),
    ("data/images/0000009.jpg", "MD-11", "test", BOX),
]


def test_the_layout(tmp_path: Path) -> None:
    make_aircraft(tmp_path)
    listing = read("fgvc_aircraft", tmp_path)
    assert listed(listing) == EXPECTED
    assert [row["number"] for row in listing.images[:2]] == ["0000002", "0000005"]
    counts, banner = listing.warnings
    assert "lists 3 of 100 classes, 3 of 3334 train, 3 of 3333 val, 3 of 3333 test" in counts
    assert "banner" in banner
    (tmp_path / BANNER).write_text("20\n")
    assert read("fgvc_aircraft", tmp_path).warnings == [counts]


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_aircraft(project / "aircraft")
    images, ranks, parts = index("fgvc_aircraft", project / "aircraft", set_params, run_stage)
    boxes = {path: [0, *SHARES[1:]] if path.endswith("0000001.jpg") else SHARES for path, *_ in EXPECTED}
    assert images == sorted((path, name, split, boxes[path]) for path, name, split, _ in EXPECTED)
    assert ranks == {
        "F-16A/B": ("F-16", ["Lockheed Martin", "F-16"]),
        "737-200": ("Boeing 737", ["Boeing", "Boeing 737"]),
        "MD-11": ("Boeing", ["Boeing", "MD-11"]),
    }
    assert parts == []


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("images_variant_val.txt", None, "images_variant_val.txt: cannot be read"),
        ("images_family_test.txt", None, "images_family_test.txt: cannot be read"),
        ("images_family_test.txt", ["0000003 F-16"], "images_family_test.txt: has no line for 0000006"),
        ("images_family_test.txt", ["0000003 F-15", "0000006 F-16", "0000009 MD-11"], "F-16A/B lies in .* and"),
        ("images_variant_test.txt", ["0000003"], "images_variant_test.txt: line 1 has not 2 fields"),
        ("images_variant_test.txt", ["0000003 a", "0000003 b"], "0000003 is 'a' and 'b'"),
        ("images_variant_test.txt", ["0000002 F-16A/B"], "has no line for 0000002"),
        ("images_box.txt", ["0000003 1 2 3"], "images_box.txt: line 1 has not 5 fields"),
        ("images_box.txt", ["0000003 1 2 3 x"], "images_box.txt: '1 2 3 x': .*'x'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, lines: list[str] | None, words: str) -> None:
    make_aircraft(tmp_path)
    if lines is None:
        (tmp_path / "data" / name).unlink()
    else:
        write(tmp_path / "data" / name, *lines)
    with pytest.raises(UserError, match=words) as error:
        read("fgvc_aircraft", tmp_path)
    assert "\n" not in str(error.value)


def test_an_image_of_two_splits_is_refused(tmp_path: Path) -> None:
    make_aircraft(tmp_path)
    for rank, label in (("variant", "F-16A/B"), ("family", "F-16"), ("manufacturer", "Lockheed Martin")):
        write(tmp_path / f"data/images_{rank}_test.txt", f"0000002 {label}")
    with pytest.raises(UserError, match=r"the image 'data/images/0000002.jpg' is listed twice"):
        read("fgvc_aircraft", tmp_path)


def test_a_root_one_above_is_told_which_is_meant(tmp_path: Path) -> None:
    make_aircraft(tmp_path / "fgvc-aircraft-2013b")
    with pytest.raises(UserError, match=r"holds no data; name .*fgvc-aircraft-2013b"):
        read("fgvc_aircraft", tmp_path)


def test_the_publisher_s_own_lines(tmp_path: Path) -> None:
    """Of the excerpt the lists of training images and all lines of boxes; one box begins at 0."""
    folder = excerpt("fgvc_aircraft") / "fgvc-aircraft-2013b/data"
    names = (folder / "images_train.txt").read_text().split()
    rows: list[dict[str, Any]] = [{"number": name} for name in [*names, "0864665"]]
    add_boxes(folder / "images_box.txt", rows)
    assert rows[0] == {"number": "1025794", "box": [2, 143, 998, 431]}
    assert rows[-1]["box"] == [-1, 245, 676, 461]
    assert all(row["box"] for row in rows)
