"""Fish4Knowledge: folders drawn as they were published; which species each is, is said in the layout."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.formats.fish4knowledge import SPECIES
from fieldmark.listing import Listing
from fieldmark.params import Dataset, Params
from tests.project import draw

# Folder, track and picture.
PICTURES = [("01", 9598, 5281), ("01", 9598, 5282), ("01", 9599, 5283), ("23", 12, 27370)]


@pytest.fixture
def root(project: Path) -> Path:
    for seed, (folder, track, fish) in enumerate(PICTURES):
        draw(project / f"images/fish_image/fish_{folder}/fish_{track:012d}_{fish:05d}.png", seed)
    draw(project / "images/mask_image/mask_01/mask_000000009598_05281.png", 0)
    (project / "images/fish_image/fish_01/Thumbs.db").write_bytes(b"")
    return project / "images"


def read(root: Path) -> Listing:
    return read_listing(Dataset(format="fish4knowledge", root=str(root)))


def test_the_published_layout(root: Path) -> None:
    listing = read(root)
    assert [(row["path"], row["name"], row["split"], row["group"]) for row in listing.images] == [
        ("fish_image/fish_01/fish_000000009598_05281.png", "fish_01", None, "000000009598"),
        ("fish_image/fish_01/fish_000000009598_05282.png", "fish_01", None, "000000009598"),
        ("fish_image/fish_01/fish_000000009599_05283.png", "fish_01", None, "000000009599"),
        ("fish_image/fish_23/fish_000000000012_27370.png", "fish_23", None, "000000000012"),
    ]
    assert listing.classes == [
        {"class_id": "fish_01", "name": "Dascyllus reticulatus", "scientific_name": "Dascyllus reticulatus",
         "superclass": "Pomacentridae", "lineage": ["Pomacentridae", "Dascyllus"]},
        {"class_id": "fish_23", "name": "Siganus fuscescens", "scientific_name": "Siganus fuscescens",
         "superclass": "Siganidae", "lineage": ["Siganidae", "Siganus"]},
    ]  # fmt: skip
    assert listing.passed_over == ["fish_image/fish_01/Thumbs.db"]
    missing, counts = listing.warnings
    assert missing.startswith(f"{root / 'fish_image'}: 21 of 23 folders are not there: fish_02, fish_03")
    assert "fish_01 3 of 12112, fish_23 1 of 25" in counts
    assert read(root / "fish_image").images[0]["path"].startswith("fish_01/")


def test_the_numbers_add_up_to_the_published_one() -> None:
    assert sum(count for _, _, count in SPECIES.values()) == 27_370
    assert list(SPECIES) == [f"fish_{number:02d}" for number in range(1, 24)]


def test_a_class_table_goes_first(root: Path) -> None:
    (root / "classes.csv").write_text("class_id,name\nfish_01,reticulate dascyllus\n")
    first = read(root).classes[0]
    assert (first["name"], first["scientific_name"]) == ("reticulate dascyllus", "Dascyllus reticulatus")


def test_a_track_stands_in_one_split(
    root: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    for track in range(12):
        for frame in range(4):
            number = 1000 + 100 * track + frame
            draw(root / f"fish_image/fish_0{track % 2 + 1}/fish_{100 + track:012d}_{number:05d}.png", number)
    set_params(dataset={"format": "fish4knowledge", "test_fraction": 0.3, "val_fraction": 0.3})
    run_stage("index_images")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    assert len({row["split"] for row in ok}) == 3
    assert len({(row["group"], row["split"]) for row in ok}) == len({row["group"] for row in ok}) == 15


def test_what_is_no_fish4knowledge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no fish_image/fish_01; name the unpacked folder"):
        read(tmp_path)
    (tmp_path / "fish_01").mkdir()
    (tmp_path / "fish_01/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no folder holds a picture named fish_TRACK_FISH\.png") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
