"""FishNet: tables written by hand in the publisher's columns, and the publisher's own where the excerpts are there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.formats.fishnet import read_box
from fieldmark.listing import Listing
from fieldmark.params import Dataset, Params
from tests.project import ROOT, draw

EXCERPT = ROOT.parent / "shared/data/layouts/fishnet"
HEAD = (
    ",Unnamed: 0,species,image,SpecCode,Genus,Subfamily,Family,Order,Class,SuperClass,source,Folder,Troph,FeedingPath,"
    "Tropical,Temperate,Subtropical,Boreal,Polar,freshwater,saltwater,brackish,NewOrder,Frequency\n"
)
META_HEAD = ",Unnamed: 0,Family_cls,Family,Order,fam_info,ord_info,Order_cls,Order_new\n"


def line(image: str, family: str, order: str, name: str = "Actinopteri", folder: str | None = None) -> str:
    folder = family if folder is None else folder
    return f"7,7,,{image},,Genus,,{family},{order},{name},,inat,{folder},3.5,benthic,1,1,1,0,0,0,1,0,Other,0.28\n"


TRAIN = [
    line("https://www.fishbase.se/images/species/Nalit_ua.jpg", "Acanthuridae", "Acanthuriformes"),
    line("aa-1.jpg", "Acanthuridae", "Perciformes", "Actinopterygii"),
    line("aa-2.jpg", "Acanthuridae", "Perciformes", "Actinopterygii"),
    line("bb-1.jpg", "Moronidae", "Eupercaria/misc"),
]
TEST = [line("aa-3.jpg", "Acanthuridae", "Perciformes"), line("bb-2.jpg", "Moronidae", "Eupercaria/misc")]
META = [
    "0,0,0,Acanthuridae,Perciformes,0,0.0,27,Acanthuriformes\n",
    "1,1,1,Moronidae,Eupercaria/misc,1,,6,Eupercaria\n",
    "2,2,2,Gobiidae,Gobiiformes,1,1.0,7,Gobiiformes\n",
]


@pytest.fixture
def root(project: Path) -> Path:
    folder = project / "images"
    (folder / "anns").mkdir(parents=True)
    (folder / "anns/train.csv").write_text(HEAD + "".join(TRAIN))
    (folder / "anns/test.csv").write_text(HEAD + "".join(TEST))
    (folder / "anns/train_full_meta_new.csv").write_text(META_HEAD + "".join(META))
    for seed, name in enumerate(("Acanthuridae/Nalit_ua", "Acanthuridae/aa-1", "Acanthuridae/aa-2", "Acanthuridae/aa-3",
                                 "Moronidae/bb-1", "Moronidae/bb-2")):  # fmt: skip
        draw(folder / f"Images/{name}.jpg", seed)
    (folder / "Images/Acanthuridae/aa-1.txt").write_text("Acanthuridae 8 6 48 36 \n")
    (folder / "Images/Acanthuridae/aa-3.txt").write_text("Acanthuridae 0 0 8 6 \nAcanthuridae 40 30 80 60 \n")
    return folder


def read(root: Path) -> Listing:
    return read_listing(Dataset(format="fishnet", root=str(root)))


def test_the_official_layout(root: Path) -> None:
    listing = read(root)
    assert [(row["path"], row["name"], row["split"], row.get("box")) for row in listing.images] == [
        ("Images/Acanthuridae/Nalit_ua.jpg", "Acanthuridae", "train", None),
        ("Images/Acanthuridae/aa-1.jpg", "Acanthuridae", "train", [8, 6, 48, 36]),
        ("Images/Acanthuridae/aa-2.jpg", "Acanthuridae", "train", None),
        ("Images/Acanthuridae/aa-3.jpg", "Acanthuridae", "test", [40, 30, 80, 60]),
        ("Images/Moronidae/bb-1.jpg", "Moronidae", "train", None),
        ("Images/Moronidae/bb-2.jpg", "Moronidae", "test", None),
    ]
    assert listing.in_pixels
    assert [(row["class_id"], row["superclass"], row["lineage"]) for row in listing.classes] == [
        ("Acanthuridae", "Acanthuriformes", ["Actinopteri", "Acanthuriformes"]),
        ("Moronidae", "Eupercaria", ["Actinopteri", "Eupercaria"]),
    ]
    assert [row["scientific_name"] for row in listing.classes] == ["Acanthuridae", "Moronidae"]
    said = "lists 2 of 463 classes, 4 of 75631 train, 2 of 18901 test that the data set was published with"
    assert listing.warnings == [f"{root}: {said}"]


def test_the_order_is_what_most_rows_name_where_the_map_knows_it(root: Path) -> None:
    """Gobiiformes is an order of the map, and Perciformes, which most rows of the other family name, is none."""
    more = [line(f"bb-{number}.jpg", "Moronidae", "Gobiiformes/misc") for number in (3, 4, 5)]
    (root / "anns/train.csv").write_text(HEAD + "".join([*TRAIN, *more]))
    assert [(row["superclass"], row["lineage"]) for row in read(root).classes] == [
        ("Acanthuriformes", ["Actinopteri", "Acanthuriformes"]), ("Gobiiformes", ["Actinopteri", "Gobiiformes"]),
    ]  # fmt: skip


def test_the_index(root: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    (root / "anns/train.csv").write_text(HEAD + "".join([*TRAIN, line("gone.jpg", "Moronidae", "x")]))
    set_params(dataset={"format": "fishnet", "val_fraction": 0.4})
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    boxes = {path: row["box"] for path, row in rows.items() if row["box"]}
    assert {path: [round(side, 6) for side in box] for path, box in boxes.items()} == {
        "Images/Acanthuridae/aa-1.jpg": [0.1, 0.1, 0.6, 0.6],
        "Images/Acanthuridae/aa-3.jpg": [0.5, 0.5, 1.0, 1.0],
    }
    assert rows["Images/Moronidae/gone.jpg"]["status"] == "broken"
    assert sorted(row["split"] for row in rows.values() if row["status"] == "ok") == [
        "test", "test", "train", "train", "train", "val",
    ]  # fmt: skip


def test_what_is_missing_or_named_twice_is_said(root: Path) -> None:
    (root / "Images/Moronidae/bb-2.jpg").unlink()
    (root / "anns/train.csv").write_text(HEAD + "".join([*TRAIN, TEST[0]]))
    warnings = read(root).warnings
    assert warnings[0] == f"{root / 'anns'}: 1 rows name a picture again and are left out: Images/Acanthuridae/aa-3.jpg"
    assert warnings[2].endswith(
        "1 of 6 images that are listed are not there: Images/Moronidae/bb-2.jpg; unpack the archive of images again"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("anns/train.csv", None, r"train\.csv: cannot be read"),
        ("anns/train.csv", "Family,Folder\na,b\n", r"train\.csv: has no column image"),
        ("anns/train.csv", HEAD + line("", "Moronidae", "x"), r"train\.csv: line 2: image is empty"),
        ("anns/train.csv", HEAD + line("a.jpg", "", "x"), r"train\.csv: line 2: Family is empty"),
        ("anns/train.csv", HEAD + line("a.jpg", "Moronidae", "x", folder="../x"), r"line 2: path '.*' leads out"),
        ("anns/train.csv", HEAD + line("a.jpg", "Nofamily", "x"), r"meta_new\.csv: has no family Nofamily"),
        ("anns/train_full_meta_new.csv", None, r"meta_new\.csv: cannot be read"),
        ("Images/Acanthuridae/aa-1.txt", "Acanthuridae 1 2 3\n", r"aa-1\.txt: 'Acanthuridae 1 2 3' is not a"),
        ("Images/Acanthuridae/aa-1.txt", "Acanthuridae 1 2 3 x\n", r"aa-1\.txt: '1 2 3 x': could not convert"),
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


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: .* has no folder anns/; name the folder that holds it"):
        read(tmp_path)


@pytest.mark.skipif(not EXCERPT.is_dir(), reason=f"{EXCERPT} is no part of this project")
def test_the_publishers_files(tmp_path: Path) -> None:
    """The excerpt of test.csv stands for both tables; families that the excerpt's label map lacks are added to it."""
    shutil.copytree(EXCERPT, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)
    content = (tmp_path / "anns/test.csv").read_text()
    lines = content.splitlines(keepends=True)
    (tmp_path / "anns/train.csv").write_text(lines[0])
    with open(tmp_path / "anns/train_full_meta_new.csv", "a") as file:
        for family in ("Sparidae", "Sciaenidae", "Acanthuridae"):
            file.write(f"9,9,9,{family},x,0,0.0,27,Perciformes\n")
    listing = read(tmp_path)
    assert len(listing.images) == len(lines) - 1
    assert {row["path"] for row in listing.images} >= {
        "Images/Sparidae/ce230657-448a-491b-ad57-4522e753d738.jpg", "Images/Acanthuridae/Zefla_u2.jpg",
    }  # fmt: skip
    assert {row["split"] for row in listing.images} == {"test"}
    assert sorted(str(read_box(path)) for path in EXCERPT.glob("Images/*/*.txt")) == [
        "[1.0, 28.0, 499.0, 252.0]", "[12.0, 113.0, 74.0, 210.0]", "[142.0, 98.0, 342.0, 177.0]",
    ]  # fmt: skip
