from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import (
    CARS,
    EXCERPTS,
    SHARES,
    cells,
    excerpt,
    index,
    listed,
    make_cars,
    read,
    save_mat,
    structs,
)

BOX = [8, 6, 40, 30]  # MATLAB counts 9 7 40 30
EXPECTED = [
    ("cars_train/00001.jpg", CARS[0], "train", BOX),
    ("cars_train/00002.jpg", CARS[0], "train", BOX),
    ("cars_train/00003.jpg", CARS[1], "train", BOX),
    ("cars_train/00004.jpg", CARS[1], "train", BOX),
    ("cars_train/00005.jpg", CARS[2], "train", BOX),
    ("cars_train/00006.jpg", CARS[2], "train", BOX),
    ("cars_test/00001.jpg", CARS[0], "test", BOX),
    ("cars_test/00002.jpg", CARS[1], "test", BOX),
    ("cars_test/00003.jpg", CARS[2], "test", BOX),
]


def test_the_layout(tmp_path: Path) -> None:
    make_cars(tmp_path)
    listing = read("stanford_cars", tmp_path)
    assert listed(listing) == EXPECTED
    assert listing.in_pixels
    said = "lists 3 of 196 classes, 6 of 8144 train, 3 of 8041 test that the data set was published with"
    assert listing.warnings == [f"{tmp_path}: {said}"]


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_cars(project / "cars")
    images, ranks, parts = index("stanford_cars", project / "cars", set_params, run_stage)
    assert images == sorted((path, name, split, SHARES) for path, name, split, _ in EXPECTED)
    assert ranks == {
        CARS[0]: ("AM General", ["AM General"]), CARS[1]: ("Ram", ["Ram"]), CARS[2]: ("smart", ["smart"]),
    }  # fmt: skip
    assert parts == []


def test_test_labels_may_lie_in_the_devkit(tmp_path: Path) -> None:
    make_cars(tmp_path)
    (tmp_path / "cars_test_annos_withlabels.mat").rename(tmp_path / "devkit/cars_test_annos_withlabels.mat")
    assert listed(read("stanford_cars", tmp_path)) == EXPECTED


def test_pixels_of_small_types_do_not_overflow(tmp_path: Path) -> None:
    make_cars(tmp_path)
    row = {"bbox_x1": 1, "bbox_y1": 255, "bbox_x2": 255, "bbox_y2": 700, "class": 1, "fname": "00001.jpg"}
    save_mat(tmp_path / "devkit/cars_train_annos.mat", annotations=structs([row]))
    assert read("stanford_cars", tmp_path).images[0]["box"] == [0, 254, 255, 700]


def test_classes_csv_says_more(tmp_path: Path) -> None:
    make_cars(tmp_path)
    (tmp_path / "classes.csv").write_text(f"class_id,superclass\n{CARS[2]},convertible\n")
    classes = {row["class_id"]: row["superclass"] for row in read("stanford_cars", tmp_path).classes}
    assert classes == {CARS[0]: "AM General", CARS[1]: "Ram", CARS[2]: "convertible"}


def remove(root: Path) -> None:
    (root / "cars_test_annos_withlabels.mat").unlink()


def break_meta(root: Path) -> None:
    (root / "devkit/cars_meta.mat").write_bytes(b"<html>not found</html>")


def unlabelled(root: Path) -> None:
    (root / "devkit/cars_test_annos.mat").rename(root / "cars_test_annos_withlabels.mat")


def one_class(root: Path) -> None:
    save_mat(root / "devkit/cars_meta.mat", class_names=cells(CARS[:1], (1, 1)))


def other(root: Path) -> None:
    save_mat(root / "devkit/cars_meta.mat", names=cells(CARS, (1, 3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "cars_test_annos_withlabels.mat: is not there, .* no labels of test images; download it"),
        (lambda root: (root / "devkit/cars_train_annos.mat").unlink(), "cars_train_annos.mat: cannot be read"),
        (break_meta, "cars_meta.mat: is no MATLAB file of version 5"),
        (unlabelled, "cars_test_annos_withlabels.mat: has no field class"),
        (one_class, "annotation 3: class 2; .*cars_meta.mat has 1 to 1"),
        (other, "cars_meta.mat: has no variable class_names"),
        (lambda root: (root / "devkit").rename(root / "kit"), "holds no devkit"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    make_cars(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        read("stanford_cars", tmp_path)
    assert "\n" not in str(error.value)


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    make_cars(tmp_path)
    (tmp_path / "cars_test/00002.jpg").unlink()
    warned = read("stanford_cars", tmp_path).warnings[-1]
    assert "1 of 9 images that are listed are not there: cars_test/00002.jpg; unpack" in warned


def test_the_publisher_s_own_files(tmp_path: Path) -> None:
    """The devkit as it is shipped; the labels of test are another download, and here those of train."""
    (tmp_path / "devkit").symlink_to(excerpt("stanford_cars") / "devkit")
    (tmp_path / "cars_test_annos_withlabels.mat").symlink_to(EXCERPTS / "stanford_cars/devkit/cars_train_annos.mat")
    listing = read("stanford_cars", tmp_path)
    train = [row for row in listing.images if row["split"] == "train"]
    assert len(train) == 8144
    assert (train[0]["path"], train[0]["box"]) == ("cars_train/00001.jpg", [38, 115, 569, 375])
    assert len(listing.classes) == len({row["name"] for row in train}) == 196
    assert len({row["superclass"] for row in listing.classes}) == 49
    assert all(row["box"][0] < row["box"][2] and row["box"][1] < row["box"][3] for row in train)
    assert "16288 of 16288 images that are listed are not there: cars_train/00001.jpg" in listing.warnings[-1]
