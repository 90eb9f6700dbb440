from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.params import Dataset


def touch(root: Path, *paths: str) -> Dataset:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return Dataset(root=str(root))


def test_splits_classes_images(tmp_path: Path) -> None:
    listing = read_listing(touch(tmp_path, "train/b/1.png", "train/a/1.JPG", "test/a/2.png", "val/a/3.webp"))
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("test/a/2.png", "a", "test"),
        ("train/a/1.JPG", "a", "train"),
        ("train/b/1.png", "b", "train"),
        ("val/a/3.webp", "a", "val"),
    ]
    assert (listing.passed_over, listing.empty, listing.classes, listing.in_pixels) == ([], [], [], False)


def test_classes_without_splits(tmp_path: Path) -> None:
    listing = read_listing(touch(tmp_path, "b/1.png", "a/1.jpg"))
    assert [(row["path"], row["name"], row["split"]) for row in listing.images] == [
        ("a/1.jpg", "a", None),
        ("b/1.png", "b", None),
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    listing = read_listing(touch(tmp_path, "train/1.png", "bus/1.png"))
    assert [(row["name"], row["split"]) for row in listing.images] == [("bus", None), ("train", None)]


def test_what_is_passed_over_is_counted_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    dataset = touch(
        tmp_path, "a/1.png", "a/notes.txt", "a/deep/er/2.png", "a/deep/3.png", "lost.png", "README.md",
        ".git/config", "a/.DS_Store", "a/._1.png", ".cache/a/1.png",
    )  # fmt: skip
    listing = read_listing(dataset)
    assert [row["path"] for row in listing.images] == ["a/1.png"]
    assert sorted(listing.passed_over) == ["a/deep/3.png", "a/deep/er/2.png", "a/notes.txt", "lost.png"]


def test_an_empty_folder_is_no_class(tmp_path: Path) -> None:
    dataset = touch(tmp_path, "train/a/1.png", "test/a/2.png", "test/b/3.png")
    for folder in ("train/b", "train/c", "test/d"):
        (tmp_path / folder).mkdir()
    listing = read_listing(dataset)
    assert listing.empty == ["c", "d"]
    assert {row["name"] for row in listing.images} == {"a", "b"}


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["train/a/1.png"], r"no folder test/; name the images that are held out test/"),
        (["test/a/1.png"], r"no folder train/; lay it out as train/CLASS"),
        (["train/a/1.png", "val/a/1.png"], r"no folder test/"),
        (["train/a/1.png", "test/a/1.png", "valid/a/1.png"], r"both splits and a folder valid/"),
        (["train/a/notes.txt", "test/a/notes.txt"], r"holds no image; expected .*/train/CLASS/IMAGE"),
        (["1.png"], r"holds no image; expected .*/CLASS/IMAGE"),
    ],
)
def test_a_layout_that_is_none(tmp_path: Path, paths: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_listing(touch(tmp_path, *paths))
    assert str(error.value).startswith("params.yaml: dataset.root: ")
    assert "\n" not in str(error.value)


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: .*gone is not a folder"):
        read_listing(Dataset(root=str(tmp_path / "gone")))


def test_every_suffix_of_a_format_that_is_read_is_a_picture(tmp_path: Path) -> None:
    suffixes = [
        "jpg", "jpeg", "jpe", "jfif", "jfi", "jif", "mpo", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff",
        "avif", "avifs", "heic", "heics", "heif", "heifs", "hif",
    ]  # fmt: skip
    dataset = touch(tmp_path, *(f"a/{name.upper()}.{name}" for name in suffixes), "a/B.JPE", "a/notes.txt", "a/c.eps")
    listing = read_listing(dataset)
    assert len(listing.images) == len(suffixes) + 1
    assert listing.passed_over == ["a/c.eps", "a/notes.txt"]


def test_a_linked_class_folder_is_read(tmp_path: Path) -> None:
    dataset = touch(tmp_path / "data", "a/1.png")
    touch(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    assert [row["path"] for row in read_listing(dataset).images] == ["a/1.png", "b/2.png"]


def test_the_class_table(tmp_path: Path) -> None:
    dataset = touch(tmp_path, "a/1.png")
    (tmp_path / "classes.csv").write_text(
        "\ufeffclass_id,lineage,name,aliases\na,Animalia > Chordata >Aves,Auk,Alk; razor-bill;\nb,,,\n",
        encoding="utf-8",
    )
    assert read_listing(dataset).classes == [
        {
            "class_id": "a", "lineage": ["Animalia", "Chordata", "Aves"], "name": "Auk",
            "aliases": ["Alk", "razor-bill"], "aphia_id": None,
        },
        {"class_id": "b", "lineage": None, "name": "", "aliases": None, "aphia_id": None},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name\na\n", "classes.csv: has no column class_id; it has name"),
        (b"", "classes.csv: has no column class_id"),
        (b"class_id,name\na\n", "classes.csv: line 2 has not as many fields"),
        (b"class_id,name,name\na,b,c\n", "classes.csv: has two columns name"),
        (b"class_id,name\na,\xff\n", "classes.csv: is not CSV in UTF-8"),
        (b'class_id,name\na,"b"c\n', "classes.csv: is not CSV in UTF-8"),
        (b"class_id,name\na,b\na,c\n", "classes.csv: names the class a twice"),
        (b"class_id,name\n,b\n", "classes.csv: has a row without class_id"),
    ],
)
def test_a_malformed_class_table(tmp_path: Path, content: bytes, words: str) -> None:
    dataset = touch(tmp_path, "a/1.png")
    (tmp_path / "classes.csv").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_listing(dataset)
    assert "\n" not in str(error.value)
