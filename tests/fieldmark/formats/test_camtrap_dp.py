"""Camtrap DP: a package written by hand, and the example of the standard where it is there."""

import json
import shutil
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

EXAMPLE = ROOT.parent / "shared/data/layouts/camtrap_dp/example"
PACKAGE: dict[str, Any] = {
    "profile": "https://raw.githubusercontent.com/tdwg/camtrap-dp/1.0.2/camtrap-dp-profile.json",
    "resources": [{"name": name, "path": f"{name}.csv"} for name in ("deployments", "media", "observations")],
    "licenses": [{"name": "CC0-1.0", "scope": "data"}, {"path": "https://x.org/by/4.0/", "scope": "media"}],
    "taxonomic": [
        {"scientificName": "Vulpes vulpes", "taxonRank": "species", "vernacularNames": {"eng": "red fox", "nld": "vos"},
         "kingdom": "Animalia", "family": "Canidae", "genus": "Vulpes"},
        {"scientificName": "Ardea", "taxonRank": "genus", "vernacularNames": {"eng": "great herons"}},
    ],
}  # fmt: skip
DEPLOYMENTS = """deploymentID,latitude,longitude,deploymentStart,deploymentEnd,cameraDepth
d1,51.5,4.75,2020-05-30T04:57:37+02:00,2020-07-01T11:41:41+02:00,
d2,50.7,4.0,2021-03-27T21:38:18+01:00,2021-04-18T22:25:00+01:00,12.5
"""
MEDIA = """mediaID,deploymentID,timestamp,filePath,filePublic,fileMediatype,fileName
m1,d1,2020-05-30T05:00:00+02:00,d1/1.png,true,image/png,1.png
m2,d1,2020-05-30T05:00:01+02:00,d1/2.png,true,image/png,2.png
m3,d1,2020-06-01T05:00:00+02:00,https://x.org/assets/3/file,true,image/png,IMG_3.PNG
m4,d1,2020-06-02T05:00:00+02:00,d1/4.png,true,image/png,4.png
m5,d2,2021-04-01T05:00:00+02:00,d2/5.mp4,true,video/mp4,5.mp4
m6,d2,2021-04-01T05:00:02+02:00,d2/6.png,true,image/png,6.png
m7,d2,2021-04-02T05:00:00+02:00,d2/7.png,true,image/png,7.png
m8,d2,2021-04-03T05:00:00+02:00,d2/8.png,true,image/png,8.png
"""
HEAD = (
    "observationID,deploymentID,mediaID,eventStart,eventEnd,observationLevel,observationType,scientificName,"
    "bboxX,bboxY,bboxWidth,bboxHeight,classificationMethod\n"
)
OBSERVATIONS = [
    "o1,d1,m1,,,media,animal,Vulpes vulpes,0.25,0.25,0.5,0.5,human\n",
    "o2,d1,m2,,,media,animal,Vulpes vulpes,0.1,0.1,0.2,0.2,human\n",
    "o3,d1,m2,,,media,animal,Ardea,0.5,0.5,0.75,0.5,machine\n",
    "e1,d1,,2020-06-01T03:00:00Z,2020-06-01T03:00:05Z,event,animal,Ardea cinerea,,,,,human\n",
    "o4,d1,m4,,,media,blank,,,,,,human\n",
    "e2,d1,,2020-06-02T03:00:00Z,2020-06-02T03:00:05Z,event,animal,Ardea,,,,,human\n",
    "o6,d2,m6,,,media,animal,Vulpes vulpes,,,,,human\n",
    "o6b,d2,m6,,,media,animal,Vulpes vulpes,0.1,0.1,0.2,0.2,human\n",
    "o7,d2,m7,,,media,animal,Vulpes vulpes,0.1,0.1,0.2,0.2,human\n",
    "o7b,d2,m7,,,media,animal,Ardea,,,,,human\n",
    "o8,d2,m8,,,media,animal,,,,,,human\n",
]


@pytest.fixture
def root(project: Path) -> Path:
    folder = project / "images"
    for seed, path in enumerate(("d1/1", "d1/2", "media/m3", "d1/4", "d2/6", "d2/7")):
        draw(folder / f"{path}.png", seed)
    (folder / "datapackage.json").write_text(json.dumps(PACKAGE))
    (folder / "deployments.csv").write_text(DEPLOYMENTS)
    (folder / "media.csv").write_text(MEDIA)
    (folder / "observations.csv").write_text(HEAD + "".join(OBSERVATIONS))
    return folder


def read(root: Path, **settings: Any) -> Listing:
    return read_listing(Dataset(format="camtrap_dp", root=str(root), **settings))


def test_pictures_of_animals_are_rows(root: Path) -> None:
    listing = read(root)
    one = {"split": None, "group": "d1", "licence": "https://x.org/by/4.0/", "latitude": 51.5, "longitude": 4.75,
           "depth_m": None}  # fmt: skip
    two = one | {"group": "d2", "latitude": 50.7, "longitude": 4.0, "depth_m": 12.5}
    assert listing.images == [
        {"path": "d1/1.png", "name": "Vulpes vulpes", "box": [0.25, 0.25, 0.75, 0.75],
         "captured_at": "2020-05-30T05:00:00+02:00", **one},
        {"path": "d1/2.png#o2", "name": "Vulpes vulpes", "box": [0.1, 0.1, pytest.approx(0.3), pytest.approx(0.3)],
         "captured_at": "2020-05-30T05:00:01+02:00", **one},
        {"path": "d1/2.png#o3", "name": "Ardea", "box": [0.5, 0.5, 1.0, 1.0],
         "captured_at": "2020-05-30T05:00:01+02:00", **one},
        {"path": "d2/6.png", "name": "Vulpes vulpes", "captured_at": "2021-04-01T05:00:02+02:00", **two},
        {"path": "media/m3.png", "name": "Ardea cinerea", "captured_at": "2020-06-01T05:00:00+02:00", **one},
    ]  # fmt: skip
    assert listing.warnings == [
        f"{root}: 1 observations are of type blank, and are left out: o4",
        f"{root}: 1 animals have no name, and are left out: o8",
        f"{root}: 2 pictures show no animal that is named, and are left out: m4, m8",
        f"{root}: 1 media are no pictures, and are left out: m5",
        f"{root}: 1 pictures show several taxa, and not every animal has a box, and are left out: m7",
        f"{root}: the labels of 1 pictures were given by a machine (classificationMethod), and are learned and judged"
        " by like all others",
    ]


def test_taxa_are_classes_with_names_and_ranks(root: Path) -> None:
    rows = {row["class_id"]: row for row in read(root).classes}
    assert rows["Vulpes vulpes"] == {
        "class_id": "Vulpes vulpes", "scientific_name": "Vulpes vulpes", "name": "red fox", "superclass": "Vulpes",
        "lineage": ["Animalia", "Canidae", "Vulpes"],
    }  # fmt: skip
    assert (rows["Ardea"]["name"], rows["Ardea"]["superclass"]) == ("great herons", None)
    heron = rows["Ardea cinerea"]
    assert (heron["name"], heron["superclass"], heron["lineage"]) == ("Ardea cinerea", "great herons", ["Ardea"])


def test_an_event_that_names_two_taxa_labels_no_picture(root: Path) -> None:
    more = "e3,d1,,2020-06-01T03:00:00Z,2020-06-01T03:00:00Z,event,animal,Vulpes vulpes,,,,,human\n"
    (root / "observations.csv").write_text(HEAD + "".join([*OBSERVATIONS, more]))
    assert "media/m3.png" not in {row["path"] for row in read(root).images}
    after = more.replace("03:00:00Z,2020", "03:00:01Z,2020").replace("03:00:00Z,event", "03:00:02Z,event")
    (root / "observations.csv").write_text(HEAD + "".join([*OBSERVATIONS, after]))
    assert "media/m3.png" in {row["path"] for row in read(root).images}


def test_the_package_may_be_named_and_pictures_stand_elsewhere(root: Path, project: Path) -> None:
    elsewhere = project / "pictures"
    elsewhere.mkdir()
    for name in ("d1", "d2", "media"):
        (root / name).rename(elsewhere / name)
    listing = read(root / "datapackage.json", images=str(elsewhere))
    assert len(listing.images) == 5
    (elsewhere / "media/m3.png").unlink()
    warning = read(root / "datapackage.json", images=str(elsewhere)).warnings[-1]
    said = "1 of 4 pictures that are listed are not there: media/m3.png; download them under these names"
    assert warning == f"{elsewhere}: {said}"


def test_the_index(root: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    lines, media, places = [*OBSERVATIONS], MEDIA, DEPLOYMENTS
    for number in range(20, 28):
        draw(root / f"more/{number}.png", number)
        places += f"d{number},0,0,,,\n"
        media += f"m{number},d{number},2022-04-03T05:00:00Z,more/{number}.png,true,image/png,x\n"
        name = "Ardea" if number % 2 else "Vulpes vulpes"
        lines.append(f"o{number},d{number},m{number},,,media,animal,{name},0.5,0.5,0.5,0.5,human\n")
    (root / "deployments.csv").write_text(places)
    (root / "media.csv").write_text(media)
    (root / "observations.csv").write_text(HEAD + "".join(lines))
    set_params(dataset={"format": "camtrap_dp", "test_fraction": 0.3, "val_fraction": 0.3})
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert len(rows) == 13
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert (rows["d1/2.png#o3"]["width"], rows["d1/2.png#o3"]["height"]) == (40, 30)
    assert (rows["d1/1.png"]["width"], rows["d1/1.png"]["box"]) == (80, [0.25, 0.25, 0.75, 0.75])
    assert len({(row["group"], row["split"]) for row in rows.values()}) == 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("datapackage.json", None, r"datapackage\.json: cannot be read .*name the folder that holds datapackage\.json"),
        ("datapackage.json", "{", r"datapackage\.json: is not JSON"),
        ("datapackage.json", "{}", r"datapackage\.json: names no `resources`"),
        ("datapackage.json", '{"resources": []}', "does not name one file of `deployments`"),
        (
            "datapackage.json",
            json.dumps(PACKAGE | {"resources": [{"name": "deployments", "path": "a.csv.gz"}]}),
            r"deployments is a\.csv\.gz; download and unpack it",
        ),
        ("media.csv", None, r"media\.csv: cannot be read"),
        ("media.csv", "mediaID,deploymentID\n", r"media\.csv: has no column timestamp"),
        ("media.csv", MEDIA + "m1,d1,,a.png,,,\n", r"media\.csv: line 10: mediaID 'm1' is empty or stands there twice"),
        ("media.csv", MEDIA + "m9,d9,,a.png,,,\n", r"media\.csv: line 10: deployment 'd9' is not in deployments"),
        ("deployments.csv", DEPLOYMENTS + "d3,95,0,,,\n", r"deployments\.csv: line 4: latitude is '95'"),
        ("observations.csv", HEAD + "o1,d1,m99,,,media,animal,a,,,,,\n", "line 2: media 'm99' is not in media"),
        ("observations.csv", HEAD + "o1,d9,,,,event,animal,a,,,,,\n", "line 2: deployment 'd9' is not in deployments"),
        ("observations.csv", HEAD + "o1,d1,,x,,event,animal,a,,,,,\n", "line 2: eventStart is 'x'; write a time as"),
        ("observations.csv", HEAD + "o1,d1,m1,,,media,animal,a,10,10,20,20,\n", "are 10, 10, 20, 20; they are shares"),
        ("observations.csv", HEAD + "o1,d1,m1,,,media,animal,a,0.1,,0.2,0.2,\n", "only some of bboxX, .* are filled"),
        ("observations.csv", HEAD + "o1,d1,m1,,,media,blank,,,,,,\n", "no picture has an animal with a scientificName"),
    ],
)
def test_what_cannot_stand(root: Path, name: str, content: str | None, words: str) -> None:
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read(root)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason=f"{EXAMPLE} is no part of this project")
def test_the_example_of_the_standard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ducks, as five frames of media-level rows, and eight frames that a machine took for a heron, with boxes."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    listing = read(tmp_path)
    assert [(row["path"], row["name"], row["group"]) for row in listing.images[:3]] == [
        ("media/07840dcc.jpg", "Anas platyrhynchos", "00a2c20d"),
        ("media/0e98b93e.jpg", "Ardea", "62c200a9"),
        ("media/13b58ff5.jpg", "Ardea", "62c200a9"),
    ]
    assert len(listing.images) == 13
    assert listing.images[1]["box"] == [0.32325, 0.46962, pytest.approx(0.59765), pytest.approx(0.72151)]
    assert (listing.images[1]["latitude"], listing.images[1]["licence"]) == (50.699, "http://creativecommons.org/licenses/by/4.0/")
    assert [(row["class_id"], row["name"]) for row in listing.classes] == [
        ("Anas platyrhynchos", "mallard"), ("Ardea", "great herons"),
    ]  # fmt: skip
    assert "not read" not in capsys.readouterr().err
    said = "; ".join(listing.warnings)
    for words in ("5 observations are of type blank", "labels of 8 pictures were given by", "13 of 13 pictures"):
        assert words in said
