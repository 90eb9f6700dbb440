from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from tests.fieldmark.formats.layouts import index, listed, make_web, read
from tests.project import draw

A, B, C = "001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"
EXPECTED = [
    (f"train/{A}/{A}_00001.jpg", A, "train", None),
    (f"train/{A}/{A}_00002.jpg", A, "train", None),
    (f"train/{B}/{B}_00004.jpg", B, "train", None),
    (f"train/{B}/{B}_00005.jpg", B, "train", None),
    (f"train/{C}/{C}_00007.jpg", C, "train", None),
    (f"train/{C}/{C}_00008.jpg", C, "train", None),
    (f"val/{A}/{A}_00003.jpg", A, "test", None),
    (f"val/{B}/{B}_00006.jpg", B, "test", None),
    (f"val/{C}/{C}_00009.jpg", C, "test", None),
]


def test_the_layout(tmp_path: Path) -> None:
    make_web(tmp_path)
    listing = read("webfg496", tmp_path)
    assert listed(listing) == EXPECTED
    counts, noise = listing.warnings
    assert "lists 3 classes; the data sets of this layout have 200, 100, 196" in counts
    assert "labels of a search engine, some of them wrong; test is clean" in noise


def test_the_index(project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]) -> None:
    make_web(project / "web-bird")
    images, ranks, parts = index("webfg496", project / "web-bird", set_params, run_stage)
    names = {A: "Black footed Albatross", B: "Laysan Albatross", C: "Sooty Albatross"}
    assert images == [(path, names[name], split, None) for path, name, split, _ in EXPECTED]
    assert ranks == dict.fromkeys(names.values(), (None, None))
    assert parts == []


def test_a_set_is_known_by_its_number_of_classes(tmp_path: Path) -> None:
    for number in range(100):
        for split in ("train", "val"):
            (tmp_path / split / f"class {number}").mkdir(parents=True)
            (tmp_path / split / f"class {number}/1.jpg").touch()
    warned = read("webfg496", tmp_path).warnings[0]
    assert "lists 100 of 13503 train, 100 of 3333 test that" in warned


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["train/a/1.jpg"], "has no folder val/"),
        (["val/a/1.jpg"], "holds no train"),
        (["train/a/1.jpg", "val/b/1.jpg"], "have not the same classes: a, b"),
        (["train/a/notes.txt", "val/a/notes.txt"], "hold no image"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, images: list[str], words: str) -> None:
    for path in images:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(UserError, match=words) as error:
        read("webfg496", tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_picture_is_marked(
    project: Path, set_params: Callable[..., Any], run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_web(project / "web")
    for number in range(4):
        draw(project / f"web/train/{A}/{number}.jpg", 100 + number)
    (project / f"web/train/{A}/{A}_00001.jpg").write_bytes(b"\xff\xd8\xff")
    set_params(dataset={"format": "webfg496", "root": str(project / "web"), "val_fraction": 0.5})
    run_stage("index_images")
    assert "1 broken" in capsys.readouterr().out
