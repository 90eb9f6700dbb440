"""COCO's annotation files, written by hand, and what the index makes of them."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset, Params
from fieldmark.pictures.boxes import region_of
from tests.project import draw

# Two pictures of 80 x 60 pixels, three boxes; the last box reaches out of its picture.
TRAIN: dict[str, Any] = {
    "info": {"description": "mine"},
    "licenses": [{"id": 1, "name": "CC-BY", "url": ""}, {"id": 2, "url": "https://x.org"}],
    "images": [
        {"id": 7, "width": 80, "height": 60, "file_name": "a.png", "license": 1, "date_captured": "2024-05-01 10:00"},
        {"id": 9, "width": 80, "height": 60, "file_name": "b c.png", "license": 2, "date_captured": None},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [20, 15, 40, 30], "area": 1, "iscrowd": 0,
         "segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0.0, 0.0, 8.0, 6.0], "iscrowd": 0},
        {"id": 30, "image_id": 9, "category_id": 5, "bbox": [60, 30, 40, 60]},
    ],
    "categories": [
        {"id": 3, "name": "cod", "supercategory": "fish"},
        {"id": 5, "name": "kelp", "supercategory": "none"},
        {"id": 6, "name": "crab", "supercategory": "crab"},
    ],
}  # fmt: skip


def write(root: Path, **tables: Any) -> Path:
    """JSON files by their names, with __ for /, and the pictures of TRAIN."""
    for name, content in tables.items():
        path = root / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for seed, name in enumerate(("a.png", "b c.png")):
        draw(root / name, seed)
    return root


def other(split: str, first: int) -> dict[str, Any]:
    """TRAIN with other files and ids."""
    table = copy.deepcopy(TRAIN)
    for image in table["images"]:
        image["file_name"] = f"{split}/{image['file_name']}"
    for annotation in table["annotations"]:
        annotation["id"] += first
    return table


def read(root: Path, **settings: Any) -> Listing:
    return read_listing(Dataset(format="coco", root=str(root), **settings))


def test_a_row_a_box(tmp_path: Path) -> None:
    listing = read(write(tmp_path, mine=TRAIN))
    assert listing.images == [
        {
            "path": "a.png#1", "name": "cod", "split": None, "box": [0.25, 0.25, 0.75, 0.75], "stated": (80, 60),
            "captured_at": "2024-05-01 10:00", "licence": "CC-BY", "group": "a.png",
        },
        {
            "path": "a.png#2", "name": "kelp", "split": None, "box": [0, 0, 0.1, 0.1], "stated": (80, 60),
            "captured_at": "2024-05-01 10:00", "licence": "CC-BY", "group": "a.png",
        },
        {
            "path": "b c.png#30", "name": "kelp", "split": None, "box": [0.75, 0.5, 1.0, 1.0], "stated": (80, 60),
            "licence": "https://x.org", "group": "b c.png",
        },
    ]  # fmt: skip
    assert [(row["class_id"], row["superclass"]) for row in listing.classes] == [
        ("cod", "fish"), ("kelp", None), ("crab", None),
    ]  # fmt: skip
    assert not listing.in_pixels
    assert listing.warnings == []


def test_one_file_may_be_named_and_pictures_stand_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "pictures")
    write(tmp_path / "tables", mine=TRAIN, other=TRAIN)
    listing = read(tmp_path / "tables/mine.json", images=str(tmp_path / "pictures"))
    assert [row["path"] for row in listing.images] == ["a.png#1", "a.png#2", "b c.png#30"]
    for name in ("a.png", "b c.png"):
        (tmp_path / "pictures" / name).unlink()
    with pytest.raises(UserError, match=r"mine\.json: its pictures, a\.png among them, are in none of .*; set dataset"):
        read(tmp_path / "tables/mine.json", images=str(tmp_path / "pictures"))


@pytest.mark.parametrize(
    "folder", ["", "images/", "train2017/", "images/train2017/", "train/", "images/train/", "annotations/"]
)
def test_where_pictures_stand(tmp_path: Path, folder: str) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(TRAIN))
    (tmp_path / "annotations/captions_train2017.json").write_text("not read")
    draw(tmp_path / folder / "a.png", 0)
    listing = read(tmp_path)
    assert listing.images[0]["path"] == f"{folder}a.png#1"
    said = f"1 of 2 pictures that are listed are not there: {folder}b c.png; unpack the archive of images again"
    assert listing.warnings == [f"{tmp_path}: {said}"]


def test_splits_are_files_or_folders(tmp_path: Path) -> None:
    for root, names in (
        ("files", ("train", "val", "test")),
        ("folders", ("train___annotations_coco", "valid___annotations_coco", "test___annotations_coco")),
    ):
        tables = {name: other("xyz"[place], 100 * place) for place, name in enumerate(names)}
        for folder in "xyz":
            write(tmp_path / root / folder)
        write(tmp_path / root, **tables)
        listing = read(tmp_path / root)
        assert [(row["path"], row["split"]) for row in listing.images[::3]] == [
            ("x/a.png#1", "train"), ("y/a.png#101", "val"), ("z/a.png#201", "test"),
        ]  # fmt: skip
        assert listing.warnings == []


def test_val_is_test_where_nothing_else_is(tmp_path: Path) -> None:
    for folder in "xyz":
        write(tmp_path / folder)
    no_labels = other("z", 200)
    for annotation in no_labels["annotations"]:
        annotation["category_id"] = None
    write(tmp_path, train_mini=other("x", 0), val=other("y", 100), public_test=no_labels)
    listing = read(tmp_path)
    assert [row["split"] for row in listing.images] == ["train"] * 3 + ["test"] * 3
    assert listing.warnings == [
        f"{tmp_path / 'public_test.json'}: labels nothing and is passed over",
        "no labelled test file: the images of val are test, and val is drawn from train",
    ]
    (tmp_path / "val.json").unlink()
    assert {row["split"] for row in read(tmp_path).images} == {None}


def test_several_files_of_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, train_mini=TRAIN)
    with pytest.raises(UserError, match=r"several annotation files of one split: .*train\.json, .*train_mini\.json; "):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.json"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere is not there"):
        read(tmp_path / "nowhere")


def test_without_boxes_the_picture_is_whole(tmp_path: Path) -> None:
    table = copy.deepcopy(TRAIN)
    for annotation in table["annotations"]:
        annotation.pop("bbox")
    listing = read(write(tmp_path, mine=table))
    assert [(row["path"], row["name"], row.get("box"), row.get("group")) for row in listing.images] == [
        ("b c.png", "kelp", None, None)
    ]
    assert listing.warnings == [
        f"{tmp_path}: 1 pictures have several categories, no boxes, and are left out: a.png",
    ]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    table = copy.deepcopy(TRAIN)
    first, second, _ = table["annotations"]
    first["iscrowd"] = 1
    second["bbox"] = [90, 10, 5, 5]
    table["annotations"] += [
        {"id": 4, "image_id": 7, "category_id": None, "bbox": [0, 0, 5, 5]},
        {"id": 5, "image_id": 7, "category_id": 3, "bbox": [10, 10, 0, 5]},
    ]
    table["images"].append({"id": 10, "width": 80, "height": 60, "file_name": "d.png"})
    listing = read(write(tmp_path, mine=table))
    assert [row["path"] for row in listing.images] == ["b c.png#30"]
    assert listing.warnings == [
        f"{tmp_path}: 1 annotations are of crowds and left out: a.png 1",
        f"{tmp_path}: 2 boxes have no area in their picture and are left out: a.png 2, a.png 5",
        f"{tmp_path}: 1 annotations have no category and are left out: a.png 4",
        f"{tmp_path}: 1 pictures have no annotation and are left out: d.png",
    ]


def test_series_of_a_camera_are_groups_and_downloads_no_dates(tmp_path: Path) -> None:
    table = copy.deepcopy(TRAIN)
    table["images"][0] |= {"seq_id": "s1", "location": 12, "latitude": -8.5, "longitude": 115.25}
    table["images"][1] |= {"seq_id": "s1", "latitude": 200.0, "longitude": 0.0}
    listing = read(write(tmp_path, mine=table))
    assert [row["group"] for row in listing.images] == ["12", "12", "s1"]
    assert (listing.images[0]["latitude"], listing.images[0]["longitude"]) == (-8.5, 115.25)
    assert "latitude" not in listing.images[2]
    assert listing.warnings == [
        f"{tmp_path}: 1 pictures have a latitude and longitude that are none; these are left out: b c.png"
    ]
    table["info"] = {"url": "http://cocodataset.org"}
    assert "captured_at" not in read(write(tmp_path, mine=table)).images[0]


def test_a_class_table_adds_ranks(tmp_path: Path) -> None:
    write(tmp_path, mine=TRAIN)
    (tmp_path / "classes.csv").write_text("class_id,scientific_name,lineage\ncod,Gadus morhua,Gadidae > Gadus\n")
    cod = read(tmp_path).classes[0]
    assert (cod["scientific_name"], cod["lineage"], cod["superclass"]) == ("Gadus morhua", ["Gadidae", "Gadus"], "fish")


def broken(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(TRAIN) | changes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [', r"mine\.json: is not JSON .*cut off"),
        ("[]", "has no list `images`"),
        (broken(images={}), "has no list `images`"),
        (broken(categories=None), "has no list `categories`"),
        (broken(images=[{"id": 7}]), r"images\[0\] has no `file_name`"),
        (broken(images=[*TRAIN["images"], TRAIN["images"][0]]), r"images\[2\]: id 7 stands there twice"),
        (broken(images=[{"id": [], "file_name": "a"}]), r"images\[0\]: id \[\] .* is no id"),
        (broken(images=TRAIN["images"][1:]), "annotation 1: names image 7, which is not listed"),
        (broken(categories=TRAIN["categories"][1:]), "annotation 1: category 3 is not listed"),
        (broken(categories=[*TRAIN["categories"], {"id": 9, "name": "cod"}]), "categories 3 and 9 are both 'cod'"),
        (broken(annotations=[TRAIN["annotations"][0] | {"bbox": [1, 2, 3]}]), r"annotation 1: bbox is \[1, 2, 3\]"),
        (broken(annotations=[TRAIN["annotations"][0] | {"bbox": "x"}]), "annotation 1: bbox is 'x'"),
        (broken(annotations=[]), "labels no picture"),
        (broken(images=[image | {"width": 0} for image in TRAIN["images"]]), "image 7: width and height are 0 and 60"),
        (broken(images=[image | {"width": 0.5} for image in TRAIN["images"]]), "image 7: width and height are 0.5 and"),
        (broken(images=[image | {"width": math.inf} for image in TRAIN["images"]]), "width and height are inf and"),
        (broken(annotations=None), "`annotations` is no list; correct it"),
        (broken(annotations=[TRAIN["annotations"][0] | {"category_id": [3]}]), r"category \[3\] is not listed"),
        (broken(annotations=[TRAIN["annotations"][0] | {"image_id": {"7": 1}}]), r"names image \{'7': 1\}, which"),
        (broken(images=[image | {"file_name": "../a.png"} for image in TRAIN["images"]]), "leads out of the folder"),
    ],
)  # fmt: skip
def test_what_cannot_stand(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(write(tmp_path, mine=content))
    assert "\n" not in str(error.value)
    assert "mine.json" in str(error.value)


def test_a_licence_that_is_none_is_left_out(tmp_path: Path) -> None:
    table = copy.deepcopy(TRAIN)
    table["images"][0]["license"] = [1]
    table["licenses"].append({"id": {}, "name": "none"})
    assert [row.get("licence") for row in read(write(tmp_path, mine=table)).images] == [None, None, "https://x.org"]


def test_a_row_of_two_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'a\.png#1' is named 2 times, in one file or in two"):
        read(write(tmp_path, train=TRAIN, val=TRAIN))
    table = copy.deepcopy(TRAIN)
    table["categories"][0]["supercategory"] = "animal"
    with pytest.raises(UserError, match="category 'cod': another file says other things of it"):
        read(write(tmp_path, train=TRAIN, val=table))


def test_the_index_of_boxes(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    """Row by row, through index_images: pictures of other sizes than stated, and of another shape."""
    table = copy.deepcopy(TRAIN)
    number = 100
    for count in range(6):
        draw(project / f"images/c{count}.png", 10 + count, size=(160, 120) if count else (60, 80))
        table["images"].append({"id": count, "width": 80, "height": 60, "file_name": f"c{count}.png"})
        for category, box in ((3, [8, 6, 32, 30]), (5, [40, 30, 40, 30])):
            number += 1
            table["annotations"].append({"id": number, "image_id": count, "category_id": category, "bbox": box})
    draw(project / "images/odd.png", 50, size=(90, 60))
    table["images"].append({"id": 50, "width": 90, "height": 60, "file_name": "odd.png"})
    table["annotations"].append({"id": 200, "image_id": 50, "category_id": 3, "bbox": [4.5, 0, 40.5, 30]})
    write(project / "images", mine=table)
    set_params(dataset={"format": "coco", "root": "images", "test_fraction": 0.3, "val_fraction": 0.3})
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert len(rows) == 16
    first, turned, larger = rows["a.png#1"], rows["c0.png#101"], rows["c1.png#103"]
    assert (first["status"], first["width"], first["height"], first["group"]) == ("ok", 40, 30, "a.png")
    assert (turned["status"], turned["error"]) == ("broken", "is 60 x 80 pixels; the table of its boxes says 80 x 60")
    assert (larger["status"], larger["width"], larger["height"]) == ("ok", 64, 60)
    assert len({(row["group"], row["split"]) for row in rows.values()}) == len({row["group"] for row in rows.values()})
    assert len({row["image_id"] for row in rows.values()}) == 16
    # 0.05 of 90 pixels is 4.5, which float32 has a little above it: all cut by the box that is stored.
    odd, part = rows["odd.png#200"], rows["odd.png#200"]["box"]
    left, top, right, bottom = region_of((part[0], part[1], part[2], part[3]), (90, 60))
    assert (odd["width"], odd["height"]) == (right - left, bottom - top) == (40, 30)
    classes = store.read_table("data/index/classes.parquet", "index.classes/2").to_pylist()
    assert [(row["class_id"], row["superclass"]) for row in classes] == [("cod", "fish"), ("kelp", None)]
