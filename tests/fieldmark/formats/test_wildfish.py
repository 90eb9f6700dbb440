"""WildFish and WildFish++, whose layouts are known from loaders alone: folders drawn as these read them."""

from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from tests.project import draw


def read(root: Path, name: str = "wildfish") -> Listing:
    return read_listing(Dataset(format=name, root=str(root)))


@pytest.fixture
def wildfish(tmp_path: Path) -> Path:
    for part, name in (
        (1, "Abudefduf_bengalensis_1.jpg"), (1, "Abudefduf_bengalensis_2.JPG"), (1, "Thumbs.db"),
        (3, "Zebrasoma_scopas_12.jpeg"), (3, "Zebrasoma_scopas.jpg"), (3, ".hidden_one_1.jpg"),
    ):  # fmt: skip
        path = tmp_path / f"images/WildFish_part{part}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_wildfish(wildfish: Path) -> None:
    listing = read(wildfish)
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("images/WildFish_part1/Abudefduf_bengalensis_1.jpg", "Abudefduf_bengalensis", None),
        ("images/WildFish_part1/Abudefduf_bengalensis_2.JPG", "Abudefduf_bengalensis", None),
        ("images/WildFish_part3/Zebrasoma_scopas_12.jpeg", "Zebrasoma_scopas", None),
    ]
    assert listing.classes == [
        {"class_id": "Abudefduf_bengalensis", "name": "Abudefduf bengalensis", "superclass": "Abudefduf",
         "scientific_name": "Abudefduf bengalensis", "lineage": ["Abudefduf"]},
        {"class_id": "Zebrasoma_scopas", "name": "Zebrasoma scopas", "superclass": "Zebrasoma",
         "scientific_name": "Zebrasoma scopas", "lineage": ["Zebrasoma"]},
    ]  # fmt: skip
    assert sorted(listing.passed_over) == [
        "images/WildFish_part1/Thumbs.db", "images/WildFish_part3/Zebrasoma_scopas.jpg",
    ]  # fmt: skip
    base = wildfish / "images"
    assert listing.warnings == [
        f"{base}: WildFish_part2, WildFish_part4 of 4 parts are not there; unpack them too",
        f"{wildfish}: holds 2 of 1000 species and 3 of 54459 pictures that the data set was published with",
    ]
    assert read(base).images[0]["path"] == "WildFish_part1/Abudefduf_bengalensis_1.jpg"


def test_a_class_table_adds_families(wildfish: Path) -> None:
    lines = "Zebrasoma_scopas,Twotone tang,Acanthuridae,Actinopteri > Acanthuridae > Zebrasoma"
    (wildfish / "classes.csv").write_text(f"class_id,name,superclass,lineage\n{lines}\n")
    row = read(wildfish).classes[1]
    assert (row["name"], row["superclass"], row["lineage"][0]) == ("Twotone tang", "Acanthuridae", "Actinopteri")
    assert row["scientific_name"] == "Zebrasoma scopas"


def test_what_is_no_wildfish(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no WildFish_part1/, nor in images/; name the folder"):
        read(tmp_path)
    (tmp_path / "WildFish_part2").mkdir()
    with pytest.raises(UserError, match=r"no part has a picture named Genus_species_1\.jpg") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inside", [True, False])
def test_wildfishpp(tmp_path: Path, inside: bool) -> None:
    release = tmp_path / "WildFish++_Release"
    for name in ("Abudefduf_bengalensis/a.jpg", "Zebrasoma_scopas/b.png"):
        draw(release / name, 0)
    (release / "Empty_one").mkdir()
    (release / "Zebrasoma_scopas/notes.txt").write_text("")
    listing = read(tmp_path if inside else release, "wildfishpp")
    base = "WildFish++_Release/" if inside else ""
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        (f"{base}Abudefduf_bengalensis/a.jpg", "Abudefduf_bengalensis", None),
        (f"{base}Zebrasoma_scopas/b.png", "Zebrasoma_scopas", None),
    ]
    assert (listing.empty, listing.passed_over) == (["Empty_one"], [f"{base}Zebrasoma_scopas/notes.txt"])
    assert listing.classes[0]["superclass"] == "Abudefduf"
    said = "holds 2 of 2348 species and 2 of 103034 pictures that the data set was published with"
    assert listing.warnings == [f"{release}: {said}"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "fine_grained").mkdir()
    (tmp_path / "fine_grained/train.txt").write_text("A_a_1.jpg 0\nA_b_7.jpg 1\n")
    (tmp_path / "fine_grained/val.txt").write_text("A_a_2.jpg 0\n")
    for name in ("A_a_1", "A_b_7", "A_a_2"):
        draw(tmp_path / f"Pair_images/{name}.jpg", 0)
    return tmp_path


def test_pairs_that_look_alike(pairs: Path) -> None:
    listing = read(pairs, "wildfishpp")
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("Pair_images/A_a_1.jpg", "A_a", "train"),
        ("Pair_images/A_a_2.jpg", "A_a", "test"),
        ("Pair_images/A_b_7.jpg", "A_b", "train"),
    ]
    assert listing.warnings == []
    (pairs / "Pair_images/A_b_7.jpg").unlink()
    [warning] = read(pairs, "wildfishpp").warnings
    assert "1 of 3 pictures that are listed are not there: Pair_images/A_b_7.jpg" in warning


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("A_a_1.jpg 0\nA_b_7.jpg 0\n", r"train\.txt: id 0 is A_a and A_b"),
        ("A_a_1.jpg 0\nA_a_3.jpg 1\n", r"train\.txt: A_a has the ids 0 and 1"),
        ("A_a_1.jpg\n", r"train\.txt: line 1 has not 2 fields"),
        ("a.jpg 0\n", r"train\.txt: 'a\.jpg' is not named Genus_species_1\.jpg"),
        ("A_a_1.jpg 0\nA_a_1.jpg 0\n", r"train\.txt: names A_a_1\.jpg twice"),
        ("A_a_2.jpg 0\n", r"val\.txt: names A_a_2\.jpg twice, or train\.txt and val\.txt do"),
    ],
)
def test_pairs_that_cannot_stand(pairs: Path, content: str, words: str) -> None:
    (pairs / "fine_grained/train.txt").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read(pairs, "wildfishpp")
    assert "\n" not in str(error.value)


def test_roots_that_are_no_wildfishpp(tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no Genus_species/IMAGE"):
        read(tmp_path / "empty", "wildfishpp")
    with pytest.raises(UserError, match="nowhere is not a folder; name WildFish"):
        read(tmp_path / "nowhere", "wildfishpp")
    (pairs / "Pair_images").rename(pairs / "elsewhere")
    with pytest.raises(UserError, match="has no Pair_images/; unpack it beside fine_grained/"):
        read(pairs, "wildfishpp")
