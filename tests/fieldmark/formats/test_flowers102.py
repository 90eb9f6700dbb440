from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import excerpt, index, listed, make_flowers, read, save_mat

PRIMROSE, DAHLIA, LILY = "pink primrose", "pink-yellow dahlia", "blackberry lily"  # labels 1, 60 and 102
EXPECTED = [
    ("jpg/image_00002.jpg", PRIMROSE, "train", None),
    ("jpg/image_00005.jpg", DAHLIA, "train", None),
    ("jpg/image_00008.jpg", LILY, "train", None),
    ("jpg/image_00001.jpg", PRIMROSE, "val", None),
    ("jpg/image_00004.jpg", DAHLIA, "val", None),
    ("jpg/image_00007.jpg", LILY, "val", None),
    ("jpg/image_00003.jpg", PRIMROSE, "test", None),
    ("jpg/image_00006.jpg", DAHLIA, "test", None),
    ("jpg/image_00009.jpg", LILY, "test", None),
]


def test_the_layout(tmp_path: Path) -> None:
    make_flowers(tmp_path)
    listing = read("flowers102", tmp_path)
    assert listed(listing) == EXPECTED
    [warned] = listing.warnings
    assert "lists 3 of 102 classes, 3 of 1020 train, 3 of 1020 val, 3 of 6149 test" in warned


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_flowers(project / "flowers")
    (project / "flowers/classes.csv").write_text(f"class_id,scientific_name\n{LILY},Iris domestica\n")
    images, ranks, parts = index("flowers102", project / "flowers", set_params, run_stage)
    assert images == sorted(EXPECTED)
    assert ranks == dict.fromkeys((PRIMROSE, DAHLIA, LILY), (None, None))
    assert parts == []


@pytest.mark.parametrize(
    ("name", "variables", "words"),
    [
        ("setid.mat", {}, "setid.mat: cannot be read"),
        ("setid.mat", {"trnid": [1]}, "setid.mat: has no variable valid"),
        ("setid.mat", {"trnid": [1], "valid": [1], "tstid": [2]}, "picture 1 is in train and in val"),
        ("setid.mat", {"trnid": [10], "valid": [1], "tstid": [2]}, "trnid has picture 10; .* labels 1 to 9"),
        ("setid.mat", {"trnid": [0], "valid": [1], "tstid": [2]}, "trnid has picture 0"),
        ("imagelabels.mat", {"labels": [1, 103]}, "has the label 103; labels are 1 to 102"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, variables: dict[str, list[int]], words: str) -> None:
    make_flowers(tmp_path)
    (tmp_path / name).unlink()
    if variables:
        save_mat(tmp_path / name, **variables)
    with pytest.raises(UserError, match=words) as error:
        read("flowers102", tmp_path)
    assert "\n" not in str(error.value)


def test_the_publisher_s_own_files(tmp_path: Path) -> None:
    for name in ("imagelabels.mat", "setid.mat"):
        (tmp_path / name).symlink_to(excerpt("oxford_flowers102") / name)
    (tmp_path / "jpg").mkdir()
    listing = read("flowers102", tmp_path)
    assert len(listing.images) == 8189
    assert {row["name"] for row in listing.images if row["split"] == "train"} == {row["name"] for row in listing.images}
    # The counts are those that were published: all that is wrong is that no picture is there.
    [gone] = listing.warnings
    assert "8189 of 8189 images that are listed are not there" in gone
    by_path = {row["path"]: row["name"] for row in listing.images}
    assert by_path["jpg/image_00001.jpg"] == "passion flower"
