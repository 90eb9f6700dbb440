"""iNaturalist 2021: JSON files written by hand, and the publisher's own where the excerpts are there."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset, Params
from tests.project import ROOT, draw

EXCERPT = ROOT.parent / "shared/data/layouts/inat_2021/val.excerpt.json"


def category(number: int, common: str, *ranks: str) -> dict[str, Any]:
    names = dict(zip(("kingdom", "phylum", "class", "order", "family", "genus"), ranks, strict=True))
    name = f"{ranks[-1]} {'abcdef'[number]}"
    return {
        "id": number, "name": name, "common_name": common, "supercategory": "Animalia", **names,
        "specific_epithet": name.split()[1], "image_dir_name": f"{number:05d}_{'_'.join(ranks)}",
    }  # fmt: skip


WORMS = ("Animalia", "Annelida", "Clitellata", "Haplotaxida", "Lumbricidae", "Lumbricus")
FERNS = ("Plantae", "Tracheophyta", "Polypodiopsida", "Schizaeales", "Lygodiaceae", "Lygodium")
CATEGORIES = [category(0, "Earthworm", *WORMS), category(1, "Fern", *FERNS), category(2, "Fern", *FERNS)]


def table(split: str, first: int, labels: list[int | None]) -> dict[str, Any]:
    images = [
        {
            "id": first + place, "width": 80, "height": 60, "license": 1, "rights_holder": "me", "longitude": 114.1,
            "file_name": f"{split}/{label:05d}_x/{place}.jpg" if label is not None else f"{split}/{place}.jpg",
            "date": "2018-09-18 10:52:00+00:00", "latitude": -21.9, "location_uncertainty": None,
        }
        for place, label in enumerate(labels)
    ]  # fmt: skip
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": label}
        for image, label in zip(images, labels, strict=True)
        if label is not None
    ]
    licences = [{"id": 1, "name": "CC BY-NC 4.0", "url": ""}]
    content = {"info": {}, "images": images, "categories": CATEGORIES, "licenses": licences}
    return content | ({"annotations": annotations} if annotations else {})


def write(root: Path, **tables: dict[str, Any]) -> Path:
    root.mkdir(exist_ok=True)
    for name, content in tables.items():
        (root / f"{name}.json").write_text(json.dumps(content))
        for image in content["images"]:
            draw(root / image["file_name"], image["id"])
    return root


def read(root: Path, **settings: Any) -> Listing:
    return read_listing(Dataset(format="inat2021", root=str(root), **settings))


def test_the_official_layout(tmp_path: Path) -> None:
    root = write(
        tmp_path, train_mini=table("train_mini", 100, [0, 0, 1, 2]), val=table("val", 500, [0, 1, 2]),
        public_test=table("public_test", 900, [None]),
    )  # fmt: skip
    listing = read(root)
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("train_mini/00000_x/0.jpg", "Lumbricus a", "train"),
        ("train_mini/00000_x/1.jpg", "Lumbricus a", "train"),
        ("train_mini/00001_x/2.jpg", "Lygodium b", "train"),
        ("train_mini/00002_x/3.jpg", "Lygodium c", "train"),
        ("val/00000_x/0.jpg", "Lumbricus a", "test"),
        ("val/00001_x/1.jpg", "Lygodium b", "test"),
        ("val/00002_x/2.jpg", "Lygodium c", "test"),
    ]
    assert {key: value for key, value in listing.images[0].items() if key not in ("path", "name", "split")} == {
        "captured_at": "2018-09-18 10:52:00+00:00", "licence": "CC BY-NC 4.0", "latitude": -21.9, "longitude": 114.1,
    }  # fmt: skip
    assert listing.classes == [
        {"class_id": "Lumbricus a", "scientific_name": "Lumbricus a", "name": "Earthworm", "lineage": list(WORMS),
         "superclass": "Lumbricidae"},
        {"class_id": "Lygodium b", "scientific_name": "Lygodium b", "name": "Fern (Lygodium b)",
         "lineage": list(FERNS), "superclass": "Lygodiaceae"},
        {"class_id": "Lygodium c", "scientific_name": "Lygodium c", "name": "Fern (Lygodium c)",
         "lineage": list(FERNS), "superclass": "Lygodiaceae"},
    ]  # fmt: skip
    said = "lists 3 of 10000 classes, 4 of 500000 train, 3 of 100000 test that the data set was published with"
    assert listing.warnings == [f"{tmp_path}: {said}"]


def test_pictures_stand_elsewhere_and_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "pictures", train=table("train", 0, [0, 1]))
    write(tmp_path / "tables")
    (tmp_path / "pictures/train.json").rename(tmp_path / "tables/train.json")
    (tmp_path / "pictures/train/00001_x/1.jpg").unlink()
    listing = read(tmp_path / "tables", images=str(tmp_path / "pictures"))
    assert [row["split"] for row in listing.images] == [None, None]
    assert "1 of 2 images that are listed are not there: train/00001_x/1.jpg" in listing.warnings[1]


def test_a_bogus_place_is_left_out_and_a_missing_common_name_is_the_scientific_one(tmp_path: Path) -> None:
    content = copy.deepcopy(table("val", 0, [0, 1]))
    content["images"][0] |= {"latitude": -95.0}
    content["images"][1] |= {"latitude": None, "longitude": None, "license": 7, "date": None}
    content["categories"][0]["common_name"] = ""
    listing = read(write(tmp_path, val=content))
    assert all("latitude" not in row for row in listing.images)
    assert set(listing.images[1]) == {"path", "name", "split"}
    assert listing.classes[0]["name"] == "Lumbricus a"
    assert listing.warnings[0] == (
        f"{tmp_path}: 1 pictures have a latitude and longitude that are none; these are left out: val/00000_x/0.jpg"
    )


def test_what_cannot_stand(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of train\.json, train_mini\.json, val\.json"):
        read(tmp_path)
    write(tmp_path, train=table("train", 0, [0]), train_mini=table("train_mini", 0, [0]))
    with pytest.raises(UserError, match=r"holds both train\.json and train_mini\.json; put one of them") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "train_mini.json").unlink()
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(UserError, match=r"train\.json: is not JSON"):
        read(tmp_path)


def test_the_index(project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    write(
        project / "images", train_mini=table("train_mini", 100, [0, 0, 0, 1, 1, 1]), val=table("val", 500, [0, 1, 1])
    )
    set_params(dataset={"format": "inat2021", "root": "images", "val_fraction": 0.4})
    run_stage("index_images")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 9
    assert sorted(row["split"] for row in rows) == ["test"] * 3 + ["train"] * 4 + ["val"] * 2
    classes = store.read_table("data/index/classes.parquet", "index.classes/2").to_pylist()
    assert [(row["name"], row["lineage"][-1]) for row in classes] == [
        ("Earthworm", "Lumbricus"), ("Fern (Lygodium b)", "Lygodium"),
    ]  # fmt: skip


@pytest.mark.skipif(not EXCERPT.is_file(), reason=f"{EXCERPT} is no part of this project")
def test_the_publishers_file(tmp_path: Path) -> None:
    """Two categories of its pictures are not in the excerpt; they are added as it has the others."""
    content = json.loads(EXCERPT.read_text())
    labels = {annotation["category_id"] for annotation in content["annotations"]}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        _, *ranks, epithet = image["file_name"].split("/")[1].split("_")
        names = dict(zip(("kingdom", "phylum", "class", "order", "family", "genus"), ranks, strict=True))
        content["categories"].append({"id": annotation["category_id"], "name": f"{ranks[-1]} {epithet}", **names})
    (tmp_path / "val.json").write_text(json.dumps(content))
    draw(tmp_path / content["images"][0]["file_name"], 0, (284, 222))
    listing = read(tmp_path)
    assert len(labels) == len(listing.images) == 2
    assert [(row["name"], row["latitude"], row["captured_at"][:10]) for row in listing.images] == [
        ("Psaltriparus minimus", 37.8651, "2018-09-18"), ("Ptilotula penicillata", -21.93073, "2007-10-31"),
    ]  # fmt: skip
    by_name = {row["class_id"]: row for row in listing.classes}
    assert by_name["Lumbricus terrestris"]["name"] == "Common Earthworm"
    assert by_name["Ptilotula penicillata"]["superclass"] == "Meliphagidae"
    assert "1 of 2 images that are listed are not there" in listing.warnings[-1]
