"""The stage draw_reef: whole, repeatable, and independent of how many pictures are asked for."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fieldmark.params import Reef
from fieldmark.reef.species import load_species
from stages.draw_reef import Picture, draw_reef, picture_seed

SMALL = Reef(seed=5, size=48, train_per_class=2, test_per_class=1)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reef(tmp_path_factory):
    root = tmp_path_factory.mktemp("draw") / "reef"
    draw_reef(SMALL, root)
    return root


def test_pictures_and_tables_are_there(reef):
    images = sorted(path.relative_to(reef).as_posix() for path in reef.rglob("*.jpg"))
    assert len(images) == 24 * 3
    assert images[0] == "test/apricot-paddler/000.jpg"
    with Image.open(reef / images[0]) as image:
        assert image.size == (48, 48)
    assert [row["class_id"] for row in rows(reef / "classes.csv")] == [one.class_id for one in load_species()]
    assert {(r["class_id"], r["attribute"], r["value"]) for r in rows(reef / "attributes.csv")} == {
        (one.class_id, name, value) for one in load_species() for name, value in one.attributes.items()
    }
    parts = rows(reef / "parts.csv")
    assert {row["path"] for row in parts} == set(images)
    assert all(0 <= float(row["x0"]) <= float(row["x1"]) <= 1 and row["visible"] in "01" for row in parts)


def test_a_picture_depends_on_nothing_but_what_identifies_it(reef, tmp_path):
    """More pictures a class change no picture that was there; drawing again over an old folder gives the same bytes."""
    more = tmp_path / "reef"
    draw_reef(SMALL.model_copy(update={"train_per_class": 3}), more)
    old, new = contents(reef), contents(more)
    assert {name: new[name] for name in old if name.endswith(".jpg")} == {
        name: data for name, data in old.items() if name.endswith(".jpg")
    }
    draw_reef(SMALL, more)
    assert contents(more) == old
    assert [path.name for path in tmp_path.iterdir()] == ["reef"]


def test_seed_split_species_and_number_each_change_the_seed():
    one, other = load_species()[:2]
    seeds = [
        picture_seed(0, Picture("train", one, 0)),
        picture_seed(1, Picture("train", one, 0)),
        picture_seed(0, Picture("test", one, 0)),
        picture_seed(0, Picture("train", other, 0)),
        picture_seed(0, Picture("train", one, 1)),
    ]
    assert len({tuple(seed) for seed in seeds}) == 5


def test_without_demo_reef_one_line_says_so(tmp_path):
    params = tmp_path / "params.yaml"
    text = Path("params.yaml").read_text(encoding="utf-8")
    start = text.index("\ndemo:")
    end = next(i for i in range(start + 6, len(text)) if text[i] == "\n" and not text[i + 1 : i + 2].isspace())
    params.write_text(text[:start] + "\ndemo: {}" + text[end:], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stages.draw_reef", "--params", params], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {params}: demo.reef is missing")
    assert done.stderr.count("\n") == 1
