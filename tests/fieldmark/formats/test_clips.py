"""Folders of films, and tables of what they show: the index, row by row, of films encoded here."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from tests.fieldmark.films import film


def read(root: Path, rate: float = 1.0) -> Listing:
    return read_listing(Dataset(format="clips", root=str(root), frames_per_second=rate))


@pytest.fixture
def root(project: Path) -> Path:
    """Two seconds each, but for one of half a second, in folders of their classes."""
    for seed, name in enumerate(("goby/a.mp4", "goby/b.mp4", "wrasse/c.mp4")):
        film(project / f"films/{name}", 2.0, seed)
    film(project / "films/wrasse/short.mp4", 0.5, 9)
    return project / "films"


def test_folders_of_classes(root: Path) -> None:
    (root / "readme.txt").write_text("x")
    shutil.copy(root / "goby/a.mp4", root / "loose.mp4")
    listing = read(root)
    assert [(row["path"], row["name"], row["split"], row["group"]) for row in listing.images] == [
        ("goby/a.mp4/1fps/000000.jpg", "goby", None, "goby/a.mp4"),
        ("goby/a.mp4/1fps/000001.jpg", "goby", None, "goby/a.mp4"),
        ("goby/b.mp4/1fps/000000.jpg", "goby", None, "goby/b.mp4"),
        ("goby/b.mp4/1fps/000001.jpg", "goby", None, "goby/b.mp4"),
        ("wrasse/c.mp4/1fps/000000.jpg", "wrasse", None, "wrasse/c.mp4"),
        ("wrasse/c.mp4/1fps/000001.jpg", "wrasse", None, "wrasse/c.mp4"),
        ("wrasse/short.mp4/1fps/000000.jpg", "wrasse", None, "wrasse/short.mp4"),
    ]
    assert listing.passed_over == ["loose.mp4"]
    assert len(read(root, 0.5).images) == 4
    assert read(root, 0.5).images[0]["path"] == "goby/a.mp4/0.5fps/000000.jpg"
    (root / "loose.mp4").unlink()
    for split in ("train", "test"):
        shutil.copytree(root / "goby", root / split / "goby")
    shutil.rmtree(root / "goby")
    found = [(row["path"], row["name"], row["split"]) for row in read(root, 0.5).images]
    assert found[:2] == [
        ("test/goby/a.mp4/0.5fps/000000.jpg", "goby", "test"), ("test/goby/b.mp4/0.5fps/000000.jpg", "goby", "test"),
    ]  # fmt: skip


def test_a_table_of_parts_and_moments(root: Path) -> None:
    (root / "clips.csv").write_text(
        "path,class,split,group,start,end,time,box,captured_at,depth_m\n"
        "goby/a.mp4,goby,train,dive 1,0,1,,,2026-05-01T10:00:00Z,12\n"
        "goby/a.mp4,wrasse,train,dive 1,1,,,,2026-05-01T10:00:00Z,12\n"
        "wrasse/c.mp4#7,wrasse,test,,,,1.25,0.1 0.2 0.5 0.9,,\n"
        "wrasse/c.mp4#8,goby,test,,,,1.25,0.5 0.2 0.9 0.9,,\n"
        "wrasse/short.mp4,goby,val,,0.1,0.2,,,,\n"
    )
    listing = read(root, 2.0)
    found = [
        tuple(row.get(key) for key in ("path", "name", "split", "group", "box", "captured_at", "depth_m"))
        for row in listing.images
    ]
    half = "goby/a.mp4/2fps/00000"
    assert found == [
        (half + "0.jpg", "goby", "train", "dive 1", None, "2026-05-01T10:00:00Z", 12.0),
        (half + "1.jpg", "goby", "train", "dive 1", None, "2026-05-01T10:00:00.500000Z", 12.0),
        (half + "2.jpg", "wrasse", "train", "dive 1", None, "2026-05-01T10:00:01Z", 12.0),
        (half + "3.jpg", "wrasse", "train", "dive 1", None, "2026-05-01T10:00:01.500000Z", 12.0),
        ("wrasse/c.mp4/at/1.250.jpg#7", "wrasse", "test", "wrasse/c.mp4", [0.1, 0.2, 0.5, 0.9], None, None),
        ("wrasse/c.mp4/at/1.250.jpg#8", "goby", "test", "wrasse/c.mp4", [0.5, 0.2, 0.9, 0.9], None, None),
        ("wrasse/short.mp4/2fps/000000.jpg", "goby", "val", "wrasse/short.mp4", None, None, None),
    ]
    assert listing.passed_over == ["goby/b.mp4"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("goby/a.mp4,goby,,,\ngoby/a.mp4,wrasse,1,,\n", "line 3: the frame .*000001.jpg' is of .* line 2"),
        ("goby/a.mp4,goby,2,1,\n", "line 2: start, end, time are seconds"),
        ("goby/a.mp4,goby,1,,1\n", "line 2: has a time, and a start or an end"),
        ("goby/a.mp4#1,goby,,,1\n", "line 2: 'goby/a.mp4#1' names a box by its `#`"),
        ("goby/a.mp4,goby,x,,\n", "line 2: start is 'x', which is no number"),
        ("../a.mp4,goby,,,\n", "line 2: path '../a.mp4' leads out"),
        ("goby/a.mp4,goby,,,1e13\n", "line 2: start, end, time are seconds, and no film has 1000000 of them"),
        ("goby/a.mp4,goby,,1e13,\n", "line 2: start, end, time are seconds, and no film has 1000000 of them"),
    ],
)
def test_a_row_that_cannot_stand(lines: str, said: str, root: Path) -> None:
    (root / "clips.csv").write_text("path,class,start,end,time\n" + lines)
    with pytest.raises(UserError, match=said) as error:
        read(root)
    assert "\n" not in str(error.value)


def test_the_index_and_what_is_broken(
    root: Path, set_params: Callable[..., Any], run_stage: Callable[..., None], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FIELDMARK_CACHE", str(root.parent / "cache"))
    for seed, name in enumerate(("goby/d.mp4", "goby/e.mp4", "wrasse/f.mp4", "wrasse/g.mp4"), start=20):
        film(root / name, 2.0, seed)
    (root / "wrasse/bad.mp4").write_bytes(b"nothing")
    set_params(dataset={
        "format": "clips", "root": str(root), "test_fraction": 0.3, "val_fraction": 0.4, "frames_per_second": 2.0,
    })  # fmt: skip
    run_stage("index_images")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    broken = [(row["path"], row["error"]) for row in rows if row["status"] == "broken"]
    [(path, error)] = broken
    assert path == "wrasse/bad.mp4/2fps/000000.jpg"
    assert error.startswith("is no film by its first bytes")
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == 7 * 4 + 1
    assert {(row["width"], row["height"]) for row in good} == {(64, 48)}
    assert {row["split"] for row in good} == {"train", "val", "test"}
    assert len({(row["group"], row["split"]) for row in good}) == 8, "no clip stands in two splits"
    assert "1 file is broken, and is not used: wrasse/bad.mp4/2fps/000000.jpg" in capfd.readouterr().err
    assert not [each for each in root.rglob("*") if each.suffix == ".jpg"], "nothing is written beside the films"
    assert store.read_header("data/index/images.parquet", "index.images/1").params["frames_per_second"] == 2.0


def test_what_is_no_folder_of_films(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no clip; expected .*/CLASS/CLIP, or clips\.csv"):
        read(tmp_path)
    with pytest.raises(UserError, match="is not a folder; name the one that holds the clips"):
        read(tmp_path / "gone")


def test_a_time_after_the_last_year_is_said(root: Path) -> None:
    for time in ("1", ""):
        row = f"goby/a.mp4,goby,{time},9999-12-31T23:59:59"
        (root / "clips.csv").write_text(f"path,class,time,captured_at\n{row}\n")
        with pytest.raises(UserError, match=r"line 2: captured_at is '9999-12-31T23:59:59', and frames are later"):
            read(root)
