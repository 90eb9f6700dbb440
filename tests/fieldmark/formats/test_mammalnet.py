"""MammalNet: films and annotations made here as loaders read them; no file of the data set was seen."""

import json
from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.formats.mammalnet import segment_of
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from tests.fieldmark.films import film

GENERA = ("canis", "panthera", "ursus")
WOLF = {"order": "Carnivora", "family": "Canidae", "genus": "Canis", "common_name": "gray wolf"}
CAT = [{"order": "carnivora"}, {"family": "felidae"}, {"genus": "panthera"}]


def make(root: Path, train: int = 2, others: int = 1, seconds: float = 2.0) -> Path:
    """Films of 11-character ids; of each genus the first of train has two parts."""
    (root / "annotation/composition").mkdir(parents=True)
    (root / "annotation/genus_to_id.txt").write_text("".join(f"{name}\t{n}\n" for n, name in enumerate(GENERA)))
    (root / "annotation/behavior_to_id.txt").write_text("hunts\t0\nfeeds on plants\t1\n")
    known, seed = {}, 0
    for split, count in (("train", train), ("val", others), ("test", others)):
        lines = []
        for genus, name in enumerate(GENERA):
            for number in range(count):
                film_id = f"{split[:2]}_{name[:4]}_-{number:02d}"
                stems = [f"{film_id}_{part}" for part in (1, 2)] if split == "train" and number == 0 else [film_id]
                for stem in stems:
                    film(root / f"trimmed_videos/{stem}.mp4", seconds, seed)
                    lines.append(f"trimmed_videos/{stem}.mp4 {int(number == 0)} {genus}\n")
                    seed += 1
                taxon = {"canis": [WOLF], "panthera": CAT, "ursus": []}[name]
                known[film_id] = {"taxnomy": taxon, "annotations": [{"label": "hunts", "segment": ["0.5", 1.5]}]}
        (root / f"annotation/composition/{split}.csv").write_text("".join(lines))
    (root / "annotation/detection_annotations.json").write_text(json.dumps(known))
    return root


def read(root: Path, rate: float = 1.0) -> Listing:
    return read_listing(Dataset(format="mammalnet", root=str(root), frames_per_second=rate))


def test_the_layout(tmp_path: Path) -> None:
    listing = read(make(tmp_path), 0.5)
    assert [(row["path"], row["name"], row["split"], row["group"]) for row in listing.images] == sorted(
        (f"trimmed_videos/{stem}.mp4/0.5fps/000000.jpg", name, split, stem[:11])
        for name in GENERA
        for split, stems in (
            ("train", (f"tr_{name[:4]}_-00_1", f"tr_{name[:4]}_-00_2", f"tr_{name[:4]}_-01")),
            ("val", (f"va_{name[:4]}_-00",)),
            ("test", (f"te_{name[:4]}_-00",)),
        )
        for stem in stems
    )
    assert listing.classes == [
        {"class_id": "canis", "name": "Canis", "scientific_name": "Canis", "superclass": "Canidae",
         "lineage": ["Carnivora", "Canidae"], "aliases": ["gray wolf"]},
        {"class_id": "panthera", "name": "Panthera", "scientific_name": "Panthera", "superclass": "Felidae",
         "lineage": ["Carnivora", "Felidae"], "aliases": None},
        {"class_id": "ursus", "name": "Ursus", "scientific_name": "Ursus", "superclass": None, "lineage": None,
         "aliases": None},
    ]  # fmt: skip
    said = [(row["class_id"], row["attribute"], row["value"]) for row in listing.attributes]
    assert said[:2] == [("canis", "behaviour::hunts", "33.33"), ("canis", "behaviour::feeds on plants", "66.67")]
    assert [each.partition(" ")[2] for each in listing.warnings] == [
        "lists 3 of 173 genera that the data set was published with",
        "lists 2 of 12 behaviours that the data set was published with",
    ]
    assert len(read(tmp_path).images) == 30


def test_films_that_are_not_there(tmp_path: Path) -> None:
    root = make(tmp_path)
    (root / "full_videos").mkdir()
    (root / "trimmed_videos/tr_cani_-01.mp4").rename(root / "full_videos/tr_cani_-01.mp4")
    (root / "trimmed_videos/te_ursu_-00.mp4").unlink()
    listing = read(root, 2.0)
    of_part = [row["path"] for row in listing.images if row["path"].startswith("full_videos")]
    assert of_part == [f"full_videos/tr_cani_-01.mp4/2fps/00000{number}.jpg" for number in (1, 2)], "0.5 to 1.5 s"
    assert [row["path"] for row in listing.images if "te_ursu" in row["path"]] == [
        "trimmed_videos/te_ursu_-00.mp4/2fps/000000.jpg"
    ]
    assert "1 films that are listed are not there: trimmed_videos/te_ursu_-00.mp4" in listing.warnings[-1]
    (root / "annotation/detection_annotations.json").unlink()
    assert {row["superclass"] for row in read(root).classes} == {None}


def test_what_is_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no annotation/genus_to_id\.txt; name the folder"):
        read(tmp_path)
    root = make(tmp_path / "set", 1, 1, 0.3)
    for file, content, said in (
        ("composition/val.csv", "trimmed_videos/x.mp4 0\n", "line 1 has not 3 fields"),
        ("composition/val.csv", "trimmed_videos/x.mp4 0 9\n", "has no line for 9"),
        ("genus_to_id.txt", "canis 0\n", "'canis 0' is not a name, a tab and a number"),
        ("detection_annotations.json", "{", "is not JSON"),
        ("detection_annotations.json", "[]", "is no table of films"),
    ):
        path = root / "annotation" / file
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match=said) as error:
            read(root)
        assert "\n" not in str(error.value)
        assert path.name in str(error.value) or "genus_to_id" in str(error.value)
        path.write_text(before)


def test_odd_segments_are_none_and_move_no_other() -> None:
    parts = [{"segment": [0, float("inf")]}, {"segment": [2, 1]}, {"segment": [10**400, 1]}, 7, {"segment": ["3", 4]}]
    assert [segment_of({"annotations": parts}, part) for part in range(7)] == [None] * 5 + [(3.0, 4.0), None]
    for other in (None, 5, {}, {"annotations": 5}, {"annotations": {}}):
        assert segment_of(other, 1) is None
