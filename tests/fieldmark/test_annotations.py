"""What annotations come in: MATLAB's files in Python's own types, boxes of XML, counts that were published."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fieldmark.annotations import (
    Published,
    Thing,
    check_published,
    from_one,
    largest,
    missing_files,
    read_matlab,
    read_voc,
    root_of,
    table_of,
)
from fieldmark.command import UserError
from fieldmark.listing import Listing


def test_matlab_in_python_s_own_types(tmp_path: Path) -> None:
    struct = np.zeros((1, 2), dtype=[("n", object), ("s", object)])
    struct["n"][0, 0], struct["n"][0, 1] = np.array([[200]], dtype=np.uint8), np.array([[1.5]])
    struct["s"][0, 0], struct["s"][0, 1] = "a b", ""
    cell = np.empty((2, 1), dtype=object)
    cell[:, 0] = ["x", np.array([[1, 2]], dtype=np.uint16)]
    savemat(tmp_path / "a.mat", {"struct": struct, "cell": cell, "row": np.array([[250, 250]], dtype=np.uint8)})
    assert read_matlab(tmp_path / "a.mat", "struct") == [{"n": [200], "s": "a b"}, {"n": [1.5], "s": ""}]
    assert read_matlab(tmp_path / "a.mat", "cell") == ["x", [1, 2]]
    row = read_matlab(tmp_path / "a.mat", "row")
    assert sum(row) == 500
    assert {type(value) for value in row} == {int}


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file", b"\0" * 200, b"\x89HDF\r\n\x1a\n" + b"\0" * 600])
def test_what_is_no_matlab_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mat: (is no MATLAB file of version 5|has no variable x)") as error:
        read_matlab(tmp_path / "a.mat", "x")
    assert "\n" not in str(error.value)


def test_a_truncated_matlab_file(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"x": np.arange(1000)}, do_compression=True)
    whole = (tmp_path / "a.mat").read_bytes()
    for length in range(130, len(whole), 97):
        (tmp_path / "a.mat").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.mat: "):
            read_matlab(tmp_path / "a.mat", "x")


def test_boxes_of_xml_and_the_largest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(
        "<annotation><filename>%s</filename><segment>0</segment>"
        "<object><name> cat </name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>4.5</ymax></bndbox></object>"
        "<object><bndbox><xmax>9</xmax><ymax>9</ymax><xmin>0</xmin><ymin>0</ymin></bndbox></object></annotation>"
    )
    found = read_voc(tmp_path / "a")
    assert found == [Thing("cat", [1, 2, 5, 4.5]), Thing("", [0, 0, 9, 9])]
    assert largest(found) == [0, 0, 9, 9]
    assert largest([Thing("inside out", [9, 9, 0, 0]), Thing("one pixel", [3, 3, 4, 4])]) == [3, 3, 4, 4]
    assert largest([]) is None


def test_corners_that_count_from_one() -> None:
    # The first pixel alone, and the whole of a picture of 80 x 60.
    assert from_one([1, 1, 1, 1]) == [0, 0, 1, 1]
    assert from_one([1, 1, 80, 60]) == [0, 0, 80, 60]


def test_a_table_says_one_thing_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("01 x y\r\n02 z\r\n01 x y\r\n")
    assert table_of(tmp_path / "a.txt") == {"01": "x y", "02": "z"}
    (tmp_path / "a.txt").write_text("01 x\n01 y\n")
    with pytest.raises(UserError, match=r"a\.txt: 01 is 'x' and 'y'; correct it"):
        table_of(tmp_path / "a.txt")


def test_roots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: dataset\.root: .*gone is not a folder; name the one"):
        root_of(str(tmp_path / "gone"), "images.txt")
    with pytest.raises(UserError, match=r"holds no images\.txt; name the folder that the archive unpacks to"):
        root_of(str(tmp_path), "images.txt")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/images.txt").touch()
    with pytest.raises(UserError, match=r"holds no images\.txt; name .*/inner$"):
        root_of(str(tmp_path), "images.txt")
    assert root_of(str(tmp_path / "inner"), "images.txt") == tmp_path / "inner"


def listing(*rows: tuple[str, str, str | None]) -> Listing:
    return Listing([{"path": path, "name": name, "split": split} for path, name, split in rows])


def test_published_counts(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).touch()
    rows = [("1.jpg", "a", "train"), ("2.jpg", "b", "test")]
    same = listing(*rows)
    check_published(same, tmp_path, Published(2, {"train": 1, "test": 1}))
    assert same.warnings == []
    other = listing(*rows, ("x/3.jpg", "b", "val"))
    check_published(other, tmp_path, Published(3, {"train": 2, "val": 1, "test": 1}))
    counts, gone = other.warnings
    assert counts == f"{tmp_path}: lists 2 of 3 classes, 1 of 2 train that the data set was published with"
    assert gone.startswith(f"{tmp_path}: 1 of 3 images that are listed are not there: x/3.jpg; unpack")
    several = listing(*rows)
    check_published(several, tmp_path, Published(3, {"train": 1}), Published(2, {"train": 5}))
    assert several.warnings == [f"{tmp_path}: lists 1 of 5 train that the data set was published with"]
    none = listing(*rows)
    check_published(none, tmp_path, Published(3, {}), Published(4, {}))
    assert none.warnings == [f"{tmp_path}: lists 2 classes; the data sets of this layout have 3, 4"]


def test_missing_files_of_many_folders(tmp_path: Path) -> None:
    paths = [f"{folder}/{number}.jpg" for folder in ("a", "b/c", "gone") for number in range(3)]
    for path in (paths[0], paths[2], paths[4]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert missing_files(tmp_path, paths) == [path for path in paths if not (tmp_path / path).exists()]
