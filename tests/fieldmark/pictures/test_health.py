from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.listing import Listing
from fieldmark.pictures import health
from fieldmark.pictures.health import NEAR_BITS, examine, find_near_duplicates, near_pairs

Row = dict[str, Any]


def image(path: str, dhash: int, **more: Any) -> Row:
    split, class_id, _ = path.split("/")
    return {
        "path": path, "split": split, "class_id": class_id, "dhash": dhash, "status": "ok", "width": 30, "height": 20,
        **more,
    }  # fmt: skip


def brute_force(hashes: np.ndarray) -> set[tuple[int, int]]:
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    return set(zip(*(side.tolist() for side in np.nonzero(np.triu(bits <= NEAR_BITS, 1))), strict=True))


# Few distinct bits, so that pairs near each other are common.
near_values = st.integers(0, 2**12 - 1).map(lambda n: sum(((n >> i) & 1) << (5 * i) for i in range(12)))


@given(st.lists(near_values | st.integers(0, 2**64 - 1), unique=True, max_size=60))
def test_near_pairs_are_those_that_comparing_all_finds(values: list[int]) -> None:
    hashes = np.array(values, dtype=np.uint64)
    a, b = near_pairs(hashes)
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == brute_force(hashes)
    assert (a < b).all()


def test_near_pairs_where_many_share_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "BLOCK", 100)
    hashes = np.unique(np.random.default_rng(0).integers(0, 2**64, 700, dtype=np.uint64))
    hashes[:500] &= np.uint64(0x0000_0000_00FF_FFFF)
    hashes = np.unique(hashes)
    a, b = near_pairs(hashes)
    expected = brute_force(hashes)
    assert expected
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == expected


def test_pairs_and_leaks() -> None:
    rows = [
        image("train/a/1", 0b1111), image("test/a/1", 0b1110), image("test/a/2", 0b1000),
        image("val/b/1", 0xFFFF << 40), image("test/b/1", 0xFFFF << 40), image("test/b/2", 1 << 60 | 0xFF << 20),
    ]  # fmt: skip
    pairs, leaks = find_near_duplicates(rows)
    assert sorted((pair["path"], pair["other"], pair["bits"]) for pair in pairs) == [
        ("test/a/1", "test/a/2", 2),
        ("test/a/1", "train/a/1", 1),
        ("test/a/2", "train/a/1", 3),
        ("test/b/1", "val/b/1", 0),
    ]
    assert leaks == {"test/a/1", "test/a/2", "test/b/1"}


def test_many_images_of_one_hash_are_all_leaks_but_not_all_paired() -> None:
    rows = [image(f"test/a/{n:03d}", 0) for n in range(300)] + [image("train/a/0", 0)]
    pairs, leaks = find_near_duplicates(rows)
    assert len(leaks) == 300
    assert len(pairs) == health.MAX_PAIRED * (health.MAX_PAIRED - 1) // 2


def test_numbers() -> None:
    rows = [
        image("train/a/1", 1 << 10, group="g"), image("train/a/2", 0xFF << 20, group="h"),
        image("test/a/1", 0xFF << 40, group="g", width=10), image("test/a/2", 0xF0F0F, group="i"),
        image("train/b/1", 0xFF << 50, width=100),
        image("val/c/1", 0xFF << 30), image("test/c/1", 0xFF << 30),
        image("train/c/9", 0, status="duplicate", duplicate_of="val/c/1", width=None),
        image("train/c/8", 0, status="broken", width=None), image("train/c/7", 0, status="conflict", width=None),
    ]  # fmt: skip
    classes = [{"class_id": name} for name in "abcd"]
    found, pairs = examine(rows, classes, Listing(rows, passed_over=list("12345")))
    assert found == {
        "byte_duplicates": {"within_split": 0, "across_splits": 1, "across_classes": 1},
        "near_duplicates": {"within_split": 0, "across_splits": 1, "across_classes": 0},
        "groups": {"count": 3, "across_splits": 1},
        "sequences": {"count": 0, "images": 0, "across_splits": 0, "test_images": 0},
        "contaminated_test": {"near_duplicates": 1, "groups": 1, "images": 2},
        "images_a_class": {
            "train": {"min": 0, "median": 1.0, "max": 2},
            "val": {"min": 0, "median": 0.0, "max": 1},
            "test": {"min": 0, "median": 1.0, "max": 2},
        },
        "classes_without": {"train": 1, "val": 2, "test": 1, "images": 1},
        "pixels": {
            "shorter_side": {"min": 10, "median": 20.0, "max": 20},
            "longer_side": {"min": 20, "median": 30.0, "max": 100},
        },
        "passed_over": 5,
    }
    assert len(pairs) == 1


def test_likely_sequences_are_those_that_no_group_holds() -> None:
    """Named worst first; a group that holds a whole sequence has mended it, one that holds a part has not."""
    rows = [
        image("train/a/IMG_1.jpg", 1, sequence="s"), image("test/a/IMG_2.jpg", 2, sequence="s"),
        *(image(f"train/a/f{number}.jpg", number, sequence="t") for number in range(5)),
        image("train/b/1", 3, sequence="u", group="g"), image("val/b/2", 4, sequence="u", group="g"),
        image("train/b/3", 5, sequence="v", group="h"), image("val/b/4", 6, sequence="v"),
        image("test/b/5", 7), image("test/b/6", 8, status="broken", sequence="t"),
    ]  # fmt: skip
    found, _ = examine(rows, [], Listing([]))
    assert found["sequences"] == {"count": 3, "images": 9, "across_splits": 2, "test_images": 1}
    said = "\n".join(health.warnings(found, rows, [], Listing([])))
    assert "3 likely sequences hold 9 images" in said
    assert "1 of 2 test images have others of theirs in train or val" in said
    assert "train/a/IMG_1.jpg to IMG_2.jpg (2), train/a/f0.jpg to f4.jpg (5), train/b/3 to 4 (2);" in said
    assert "`group_by: sequence`" in said


def test_nothing_to_say_of_nothing() -> None:
    found, pairs = examine([], [], Listing([]))
    assert pairs == []
    assert found["images_a_class"]["train"] == {"min": None, "median": None, "max": None}
    assert health.warnings(found, [], [], Listing([])) == []


def test_warnings_name_a_few_and_say_one_and_many() -> None:
    paths = ["train/a/1", "val/a/2", "test/a/3", *(f"train/{name}/4" for name in "bcde"), "test/b/5", "test/f/6"]
    rows = [image(path, 0b11111 << 5 * number) for number, path in enumerate(paths)]
    rows.append(image("train/g/4", 0, status="broken", width=None))
    classes = [{"class_id": name, "name": name.upper()} for name in "abcdefg"]
    listing = Listing(rows, passed_over=["notes.txt"], empty=["x", "y"])
    found, _ = examine(rows, classes, listing)
    assert health.warnings(found, rows, classes, listing) == [
        "1 file is broken, and is not used: train/g/4; `error` in data/index/images.parquet says why",
        "1 class with images has none in train: F; nothing learns them from images; add some",
        "4 classes with images have none in val: B, C, D and 1 more; they have no say in what is chosen on val; add"
        " images, or raise dataset.val_fraction",
        "3 classes with images have none in test: C, D, E; test accuracy says nothing of them; add images, or raise"
        " dataset.test_fraction",
        "1 class has no image, and its texts alone can tell it: G",
        "2 folders hold no image and are no classes: x, y",
        "1 file is no image, or does not stand where images stand, and is passed over: notes.txt",
    ]
