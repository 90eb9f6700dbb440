from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.annotations import read_voc
from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import SHARES, cells, excerpt, index, listed, make_dogs, read, save_mat, voc, write

BOX = [8, 6, 40, 30]  # of two, the larger one
EXPECTED = [
    ("Images/n02085620-Chihuahua/n02085620_1.jpg", "Chihuahua", "train", BOX),
    ("Images/n02085620-Chihuahua/n02085620_2.jpg", "Chihuahua", "train", BOX),
    ("Images/n02105855-Shetland_sheepdog/n02105855_4.jpg", "Shetland_sheepdog", "train", BOX),
    ("Images/n02105855-Shetland_sheepdog/n02105855_5.jpg", "Shetland_sheepdog", "train", BOX),
    ("Images/n02106550-black-and-tan_hound/n02106550_7.jpg", "black-and-tan_hound", "train", BOX),
    ("Images/n02106550-black-and-tan_hound/n02106550_8.jpg", "black-and-tan_hound", "train", BOX),
    ("Images/n02085620-Chihuahua/n02085620_3.jpg", "Chihuahua", "test", BOX),
    ("Images/n02105855-Shetland_sheepdog/n02105855_6.jpg", "Shetland_sheepdog", "test", BOX),
    ("Images/n02106550-black-and-tan_hound/n02106550_9.jpg", "black-and-tan_hound", "test", BOX),
]


def test_the_layout(tmp_path: Path) -> None:
    make_dogs(tmp_path)
    listing = read("stanford_dogs", tmp_path)
    assert listed(listing) == EXPECTED
    assert listing.in_pixels
    [warned] = listing.warnings
    assert "lists 3 of 120 classes, 6 of 12000 train, 3 of 8580 test" in warned


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_dogs(project / "dogs")
    (project / "dogs/classes.csv").write_text("class_id,superclass\nShetland_sheepdog,herding dogs\n")
    images, ranks, parts = index("stanford_dogs", project / "dogs", set_params, run_stage)
    assert images == sorted((path, name.replace("_", " "), split, SHARES) for path, name, split, _ in EXPECTED)
    assert ranks == {
        "Chihuahua": (None, None), "Shetland sheepdog": ("herding dogs", None), "black-and-tan hound": (None, None),
    }  # fmt: skip
    assert parts == []


def test_images_without_an_xml_are_named(tmp_path: Path) -> None:
    make_dogs(tmp_path)
    (tmp_path / "Annotation/n02085620-Chihuahua/n02085620_2").unlink()
    listing = read("stanford_dogs", tmp_path)
    assert listing.images[1].get("box") is None
    said = "1 of 9 images have no box, since these are not there: Annotation/n02085620-Chihuahua/n02085620_2; unpack"
    assert said in listing.warnings[0]


XML = "Annotation/n02085620-Chihuahua/n02085620_1"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train_list.mat", None, "train_list.mat: cannot be read"),
        (XML, "<annotation><object>", "n02085620_1: is not XML"),
        (XML, "", "n02085620_1: is not XML"),
        (XML, "<annotation><object><name>dog</name></object></annotation>", "n02085620_1: an object has no xmin; take"),
        (XML, voc(("dog", [1, 2, 3, 4])).replace("<ymax>4", "<ymax>x"), "n02085620_1: '1 2 3 x': could not"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    make_dogs(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as error:
        read("stanford_dogs", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "Chihuahua/a.jpg", "../n1-a/b.jpg", "n1-/b.jpg"])
def test_a_list_of_other_paths(tmp_path: Path, name: str) -> None:
    make_dogs(tmp_path)
    save_mat(tmp_path / "test_list.mat", file_list=cells([name], (1, 1)))
    with pytest.raises(UserError, match=r"test_list\.mat: .* is not NUMBER-BREED/IMAGE"):
        read("stanford_dogs", tmp_path)


def test_the_publisher_s_own_boxes() -> None:
    folder = excerpt("stanford_dogs") / "Annotation"
    assert read_voc(folder / "n02085620-Chihuahua/n02085620_2650") == [("Chihuahua", [108, 87, 405, 303])]
    assert read_voc(folder / "n02085782-Japanese_spaniel/n02085782_23") == [("Japanese_spaniel", [73, 24, 255, 255])]
