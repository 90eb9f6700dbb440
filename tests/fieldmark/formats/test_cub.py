from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset, Params
from tests.project import ROOT, draw

FILES = {
    "classes.txt": "1 001.Black_footed_Albatross\n2 002.Auk\n",
    "images.txt": "1 001.Black_footed_Albatross/a.png\n2 001.Black_footed_Albatross/b 2.png\n7 002.Auk/c.png\n",
    "image_class_labels.txt": "1 1\n2 1\n7 2\n",
    "train_test_split.txt": "1 0\n2 1\n7 1\n",
    "bounding_boxes.txt": "1 20.0 15.0 70.0 30.0\n2 0 0 90 30\n99 1 1 1 1\n",
    "parts/parts.txt": "1 back\n2 left eye\n",
    "parts/part_locs.txt": "1 1 40.0 45.0 1\n1 2 0.0 0.0 0\n99 1 1.0 1.0 1\n",
    "attributes/attributes.txt": "1 has_bill::hooked\n2 has_tail::curved_(up or down)\n",
    "attributes/class_attribute_labels_continuous.txt": "0.0 12.5\n100.0 3.25\n",
}


@pytest.fixture
def root(project: Path) -> Path:
    folder = project / "images"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def read(root: Path) -> Listing:
    return read_listing(Dataset(format="cub", root=str(root)))


def test_the_official_layout(root: Path) -> None:
    listing = read(root)
    assert [(row["path"], row["name"], row["split"], row["number"], row.get("box")) for row in listing.images] == [
        ("images/001.Black_footed_Albatross/a.png", "001.Black_footed_Albatross", "test", "1", [20, 15, 90, 45]),
        ("images/001.Black_footed_Albatross/b 2.png", "001.Black_footed_Albatross", "train", "2", [0, 0, 90, 30]),
        ("images/002.Auk/c.png", "002.Auk", "train", "7", None),
    ]
    assert listing.in_pixels
    assert [(row["class_id"], row["name"]) for row in listing.classes] == [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("002.Auk", "Auk"),
    ]
    path = "images/001.Black_footed_Albatross/a.png"
    assert listing.parts == [
        {"path": path, "part": "back", "visible": True, "x": 40.0, "y": 45.0},
        {"path": path, "part": "left eye", "visible": False},
    ]
    assert listing.attributes[1] == {
        "class_id": "001.Black_footed_Albatross",
        "attribute": "has_tail::curved_(up or down)",
        "value": "12.5",
    }
    assert len(listing.attributes) == 4


def test_attribute_names_may_lie_beside_the_root(root: Path) -> None:
    (root / "attributes/attributes.txt").rename(root.parent / "attributes.txt")
    assert read(root).attributes[0]["attribute"] == "has_bill::hooked"


def test_what_is_optional_may_be_missing(root: Path) -> None:
    for name in ("bounding_boxes.txt", "parts/part_locs.txt", "attributes/class_attribute_labels_continuous.txt"):
        (root / name).unlink()
    listing = read(root)
    assert (listing.parts, listing.attributes) == ([], [])
    assert all("box" not in row for row in listing.images)


def test_a_class_table_adds_to_the_classes(root: Path) -> None:
    (root / "classes.csv").write_text("class_id,scientific_name\n002.Auk,Pinguinus impennis\nDodo,Raphus\n")
    assert [(row["class_id"], row.get("name"), row.get("scientific_name")) for row in read(root).classes] == [
        ("001.Black_footed_Albatross", "Black footed Albatross", None),
        ("002.Auk", "Auk", "Pinguinus impennis"),
        ("Dodo", None, "Raphus"),
    ]


def test_pixels_become_shares_of_the_image(
    root: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    for seed, row in enumerate(read(root).images):
        draw(root / row["path"], seed)  # 80 x 60
    for number in range(8, 16):
        draw(root / f"images/002.Auk/{number}.png", number)
        for name, line in (("images.txt", f"002.Auk/{number}.png"), ("image_class_labels.txt", "2")):
            with open(root / name, "a") as file:
                file.write(f"{number} {line}\n")
        with open(root / "train_test_split.txt", "a") as file:
            file.write(f"{number} 1\n")
    Path("val.txt").write_text("8\n")
    with open(root / "parts/part_locs.txt", "a") as file:
        file.write("2 1 1 1 1\n")
    (root / "images/001.Black_footed_Albatross/b 2.png").write_bytes(b"broken")
    set_params(dataset={"format": "cub", "val_list": "val.txt"})
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert rows["images/001.Black_footed_Albatross/a.png"]["box"] == [0.25, 0.25, 1, 0.75]
    assert rows["images/001.Black_footed_Albatross/b 2.png"]["box"] is None
    assert [path for path, row in rows.items() if row["split"] == "val"] == ["images/002.Auk/8.png"]
    back, eye = store.read_table("data/index/parts.parquet", "index.parts/1").to_pylist()
    assert (back["x"], back["y"], back["visible"]) == (0.5, 0.75, True)
    assert (eye["x"], eye["y"], eye["visible"]) == (None, None, False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images.txt", None, "images.txt: cannot be read"),
        ("images.txt", "", "images.txt: names no image"),
        ("images.txt", "1\n", "images.txt: line 1 has not 2 fields"),
        ("images.txt", "1 ../a.png\n", "images.txt: image 1: ../a.png leads out"),
        ("images.txt", "1 /a.png\n", "images.txt: image 1: /a.png leads out"),
        ("images.txt", "1 a/1.png\n1 a/2.png\n", "images.txt: names an image twice"),
        ("images.txt", "1 a/1.png\n2 a/1.png\n", "images.txt: names an image twice"),
        ("images.txt", "5 a/1.png\n", "image_class_labels.txt: has no line for 5"),
        ("classes.txt", "1 a\n", "classes.txt: has no line for 2"),
        ("train_test_split.txt", "1 0\n", "train_test_split.txt: has no line for 2"),
        ("train_test_split.txt", "1 train\n", "train_test_split.txt: image 1: 'train' is neither 1 nor 0"),
        ("bounding_boxes.txt", "98 0 0 9 9\n99 0 0 9 9\n", "names no image of images.txt, the first is '98'"),
        ("classes.txt", "1 a\n2 a\n", "classes.txt: names two classes 'a'"),
        ("hierarchy.txt", "1 3\n", "classes.txt: has no line for 3"),
        ("hierarchy.txt", "1 2\n2 1\n", "hierarchy.txt: 1 lies in itself"),
        ("bounding_boxes.txt", "1 a 0 0 1\n", "bounding_boxes.txt: 'a 0 0 1': .*'a'"),
        ("parts/part_locs.txt", "1 3 0 0 1\n", "parts.txt: has no line for 3"),
        ("attributes/class_attribute_labels_continuous.txt", "0.0\n", "is not a row for each of 2 classes with 2"),
    ],
)
def test_files_that_do_not_fit(root: Path, name: str, content: str | None, words: str) -> None:
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read(root)
    assert "\n" not in str(error.value)


def test_the_real_one() -> None:
    root = ROOT.parent / "shared/data/cub100/CUB_200_2011"
    if not root.is_dir():
        pytest.skip("../shared/data/cub100 is not on this machine")
    listing = read(root)
    assert len(listing.images) == 5902
    assert [row["split"] for row in listing.images].count("test") == 2903
    assert len({row["name"] for row in listing.images}) == len(listing.classes) == 100
    assert listing.classes[0]["name"] == "Black footed Albatross"
    assert len(listing.attributes) == 100 * 312
    assert all((root / row["path"]).is_file() for row in listing.images[::100])
    assert {row["part"] for row in listing.parts} >= {"beak", "left eye"}
