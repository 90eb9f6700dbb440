"""FathomNet 2025: a train file written by hand as the publisher's test file is, and that file itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.formats.fathomnet2025 import dive_of
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from tests.project import ROOT, draw

EXCERPT = ROOT.parent / "shared/data/layouts/fathomnet_2025/dataset_test.excerpt.json"
URL = "https://database.fathomnet.org/static/m3/framegrabs/Doc%20Ricketts/images/0296"


def table(labels: list[int | None]) -> dict[str, Any]:
    urls = [f"{URL}/00_00_22_14.png", f"{URL}/00_01_00_00.png", "https://fathomnet.org/static/photos/x.jpeg"]
    images = [
        {"id": number, "width": 80, "height": 60, "file_name": f"uuid-{number}.png", "license": 0,
         "flickr_url": url, "coco_url": url, "date_captured": "2011-09-23 14:04:40" if number == 1 else None}
        for number, url in enumerate(urls, start=1)
    ]  # fmt: skip
    annotations = [
        {"id": number, "image_id": (number - 1) % 3 + 1, "category_id": label, "segmentation": [], "area": 800.0,
         "bbox": [8.0 * number, 6.0, 40.0, 30.0], "iscrowd": 0}
        for number, label in enumerate(labels, start=1)
    ]  # fmt: skip
    names = ["Abyssocucumis abyssorum", "Acanthascinae"]
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in enumerate(names, start=1)]
    licences = [{"id": 0, "name": "FathomNet", "url": "http://fathomnet.org"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories, "licenses": licences}


def write(root: Path, folder: str | None, **tables: dict[str, Any]) -> Path:
    root.mkdir(exist_ok=True)
    for name, content in tables.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    if folder is not None:
        for number, suffix in ((1, "png"), (2, "png"), (3, "jpeg")):
            draw(root / folder / f"{number}.{suffix}", number)
    return root


def read(root: Path, **settings: Any) -> Listing:
    return read_listing(Dataset(format="fathomnet2025", root=str(root), **settings))


@pytest.mark.parametrize("folder", ["images", "train/images"])
def test_regions_are_rows_and_dives_groups(tmp_path: Path, folder: str) -> None:
    write(tmp_path, folder, dataset_train=table([1, 2, 1, 2]), dataset_test=table([None, None]))
    listing = read(tmp_path)
    dive = "static/m3/framegrabs/Doc Ricketts/images/0296"
    assert [(row["path"], row["name"], row["group"], row["box"]) for row in listing.images] == [
        (f"{folder}/1.png#1", "Abyssocucumis abyssorum", dive, [0.1, 0.1, 0.6, 0.6]),
        (f"{folder}/1.png#4", "Acanthascinae", dive, [0.4, 0.1, 0.9, 0.6]),
        (f"{folder}/2.png#2", "Acanthascinae", dive, [0.2, 0.1, 0.7, 0.6]),
        (f"{folder}/3.jpeg#3", "Abyssocucumis abyssorum", f"{folder}/3.jpeg", [0.3, 0.1, 0.8, 0.6]),
    ]
    assert {row["split"] for row in listing.images} == {None}
    assert (listing.images[0]["captured_at"], listing.images[0]["licence"]) == ("2011-09-23 14:04:40", "FathomNet")
    assert "captured_at" not in listing.images[2]
    assert listing.classes[1] == {
        "class_id": "Acanthascinae", "superclass": None, "scientific_name": "Acanthascinae",
    }  # fmt: skip
    assert listing.warnings == [
        f"{tmp_path / 'dataset_test.json'}: labels nothing and is passed over",
        f"{tmp_path}: lists 2 of 79 categories that were published",
    ]


def test_ranks_come_from_a_class_table(tmp_path: Path) -> None:
    write(tmp_path, "images", dataset_train=table([1, 2]))
    (tmp_path / "classes.csv").write_text("class_id,lineage\nAcanthascinae,Animalia > Porifera > Hexactinellida\n")
    assert read(tmp_path).classes[1]["lineage"] == ["Animalia", "Porifera", "Hexactinellida"]


def test_pictures_may_have_their_own_names(tmp_path: Path) -> None:
    write(tmp_path / "tables", None, dataset_train=table([1, 2]))
    draw(tmp_path / "frames/uuid-1.png", 0)
    listing = read(tmp_path / "tables", images=str(tmp_path / "frames"))
    assert [row["path"] for row in listing.images] == ["uuid-1.png#1", "uuid-2.png#2"]
    assert "1 of 2 pictures that are listed are not there: uuid-2.png" in listing.warnings[1]


def test_test_alone_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path, "images", dataset_test=table([None, None]))
    with pytest.raises(UserError, match=r"dataset_test\.json: labels no picture; take the file with labels"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("url", "dive"),
    [
        (f"{URL}/a.png", "static/m3/framegrabs/Doc Ricketts/images/0296"),
        ("https://x.org/stills/2002/140/a.png", "stills/2002/140"),
        ("https://x.org/photos/a.png", None),
        ("a.png", None),
        (None, None),
    ],
)
def test_which_dive(url: str | None, dive: str | None) -> None:
    assert dive_of({"coco_url": url}) == dive


@pytest.mark.skipif(not EXCERPT.is_file(), reason=f"{EXCERPT} is no part of this project")
def test_the_publishers_file(tmp_path: Path) -> None:
    """The test file as it is, with the category of each region filled in: train is taken to be alike."""
    content = json.loads(EXCERPT.read_text())
    for place, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = place % 79 + 1
    (tmp_path / "dataset_train.json").write_text(json.dumps(content))
    for image in content["images"]:
        draw(tmp_path / f"images/{image['id']}.png", image["id"], (image["width"] // 40, image["height"] // 40))
    listing = read(tmp_path)
    assert len(listing.images) == len(content["annotations"]) == 34
    first = next(row for row in listing.images if row["path"] == "images/1.png#1")
    assert first["box"] == [1001 / 1920, 424 / 1080, 1069 / 1920, 468 / 1080]
    assert {row["group"] for row in listing.images if row["path"].startswith("images/1.")} == {
        "static/m3/framegrabs/Doc Ricketts/images/772"
    }
    assert len(listing.classes) == 79
    assert listing.warnings == []
