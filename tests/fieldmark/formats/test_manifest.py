from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.formats.manifest import inside
from fieldmark.listing import Listing
from fieldmark.params import Dataset


def read(root: Path, content: str | bytes, **settings: Any) -> Listing:
    path = root / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_listing(Dataset(format="manifest", root=str(path), **settings))


def test_two_columns_are_enough(tmp_path: Path) -> None:
    listing = read(tmp_path, "\ufeffpath,class\r\nb.png,Blue Tang\r\na/a.png,a/b\r\n")
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("a/a.png", "a/b", None),
        ("b.png", "Blue Tang", None),
    ]
    assert store.class_id_of("a/b") == f"a-b-{store.sha256('a/b')[:8]}"
    assert listing.classes == []


def test_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "class,path,split,group,box,captured_at,latitude,longitude,depth_m,licence,photographer\n"
    row = 'Auk,./x//a.png,test,dive 3,"0, 0.25 0.5 1",2024-05-01T10:00:00Z,-8.5,115.25,12.5,CC-BY,Me\n'
    [image] = read(tmp_path, head + row).images
    assert image == {
        "path": "x/a.png", "name": "Auk", "split": "test", "group": "dive 3", "box": [0, 0.25, 0.5, 1],
        "captured_at": "2024-05-01T10:00:00Z", "latitude": -8.5, "longitude": 115.25, "depth_m": 12.5,
        "licence": "CC-BY",
    }  # fmt: skip
    assert "not read: photographer" in capsys.readouterr().err
    [image] = read(tmp_path, head + "Auk,a.png,,,,,,,,,\n").images
    assert {value for key, value in image.items() if key not in ("path", "name")} == {None}


def test_parquet_says_the_same(tmp_path: Path) -> None:
    rows = [
        {"path": "a.png", "class": "a", "split": "train", "group": 7, "box": [0.0, 0.0, 1.0, 0.5], "depth_m": 3.0},
        {"path": "b.png", "class": 12, "split": None, "group": None, "box": None, "depth_m": None},
    ]
    rows[1]["class"] = "12"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    first, second = read_listing(Dataset(format="manifest", root=str(tmp_path / "m.parquet"))).images
    assert (first["group"], first["box"], first["depth_m"]) == ("7", [0, 0, 1, 0.5], 3.0)
    assert (second["name"], second["split"], second["group"], second["box"]) == ("12", None, None, None)
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"m\.parquet: is not readable Parquet"):
        read_listing(Dataset(format="manifest", root=str(tmp_path / "m.parquet")))


def test_a_folder_holds_the_manifest_and_the_class_table(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,class\na.png,a\n")
    (tmp_path / "classes.csv").write_text("class_id,name\nb,Bee-eater\n")
    dataset = Dataset(format="manifest", root=str(tmp_path), images="/elsewhere")
    assert read_listing(dataset).classes[0]["name"] == "Bee-eater"
    assert dataset.folder == Path("/elsewhere")
    assert Dataset(format="manifest", root=str(tmp_path)).folder == tmp_path
    assert Dataset(format="manifest", root=str(tmp_path / "manifest.csv")).folder == tmp_path
    (tmp_path / "manifest.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds both manifest\.csv and manifest\.parquet"):
        read_listing(dataset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no column path"),
        ("path,classes\na,b\n", "has no column class; it has path, classes"),
        ("path,class\n", "names no image"),
        ("path,class\n,a\n", "line 2: path is empty"),
        ("path,class\na.png,\n", "line 2: class is empty"),
        ("path,class\na.png,a\n/a.png,a\n", "line 3: path '/a.png' is absolute"),
        ("path,class\nC:\\a.png,a\n", "line 2: path .* is absolute"),
        ("path,class\n../a.png,a\n", "line 2: path '../a.png' leads out"),
        ("path,class\na/../../b.png,a\n", "line 2: path .* leads out"),
        ("path,class\n.,a\n", "line 2: path '.' leads out"),
        ("path,class\na.png,a\n./a.png,b\n", "line 3: path 'a.png' stands in 2 too"),
        ("path,class,split\na.png,a,dev\n", "line 2: split is 'dev'; use train, val, test"),
        ("path,class,spilt\na.png,a,test\n", "a column 'spilt'; did you mean 'split'"),
        ("path,class,Split\na.png,a,test\n", "a column 'Split'; did you mean 'split'"),
        ("path,class,box\na.png,a,10 10 80 90\n", r"line 2: box is '10 10 80 90'; .*divide pixels"),
        ("path,class,box\na.png,a,0 0 1\n", "line 2: box is '0 0 1'"),
        ("path,class,box\na.png,a,0.5 0 0.5 1\n", "line 2: box is"),
        ("path,class,depth_m\na.png,a,deep\n", "line 2: depth_m is 'deep'"),
        ("path,class,latitude\na.png,a,90.5\n", "line 2: latitude is '90.5'; it lies between -90 and 90"),
        ("path,class,longitude\na.png,a,-181\n", "line 2: longitude is '-181'; it lies between -180 and 360"),
        ("path,class\na.png,Auk\nb.png,auk\n", "the classes 'Auk' and 'auk' differ only"),
        ("path,class,latitude\na.png,a,nan\n", "line 2: latitude is 'nan'"),
        (b"path,class\na.png,\xff\n", "is not CSV in UTF-8"),
    ],
)
def test_what_cannot_stand(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, content)
    assert str(tmp_path / "mine.csv") in str(error.value)
    assert "\n" not in str(error.value)


def test_roots_that_are_no_manifest(tmp_path: Path) -> None:
    for name, words in (("m.xlsx", "neither .csv nor .parquet"), ("m.csv", "m.csv: cannot be read"), (".", "neither")):
        with pytest.raises(UserError, match=words):
            read_listing(Dataset(format="manifest", root=str(tmp_path / name)))


def test_parquet_holds_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": [b"a.png"], "class": ["a"]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"m\.parquet: column path holds bytes; write it as text"):
        read_listing(Dataset(format="manifest", root=str(tmp_path / "m.parquet")))
    odd = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"path": odd, "class": ["a"]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"m\.parquet: is not readable Parquet"):
        read_listing(Dataset(format="manifest", root=str(tmp_path / "m.parquet")))


def test_a_path_has_one_form() -> None:
    assert inside("./a//b/./c.png", "here") == "a/b/c.png"


@pytest.mark.slow
def test_200_thousand_rows(tmp_path: Path) -> None:
    lines = (f"site{n % 7}/{n:06d}.jpg,species {n % 500},group {n // 9}" for n in range(200_000))
    listing = read(tmp_path, "path,class,group\n" + "\n".join(lines) + "\n")
    assert len(listing.images) == 200_000
    assert listing.images[0]["path"] == "site0/000000.jpg"
    assert len({row["name"] for row in listing.images}) == 500
