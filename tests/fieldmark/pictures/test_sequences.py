"""Sequences: which pictures belong together, against every pair compared with every other, and what a new one does."""

import random
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fieldmark.pictures.health import NEAR_BITS
from fieldmark.pictures.sequences import (
    ALIKE_BITS,
    FRAMES,
    NEXT,
    NUMBER,
    TOGETHER_S,
    find_sequences,
    mark_sequences,
    natural,
    read_time,
    seconds,
)

Row = dict[str, Any]
BITS = random.Random(0).sample(range(64), 64)


def image(path: str, dhash: int, taken: float | None = None) -> Row:
    return {"path": path, "class_id": path.split("/")[0], "dhash": dhash, "taken": taken, "image_id": f"id of {path}"}


def flip(dhash: int, count: int) -> int:
    """A hash in which so many bits differ."""
    for bit in BITS[:count]:
        dhash ^= 1 << bit
    return dhash


def unlike(number: int) -> int:
    return random.Random(number).getrandbits(64)


def paths(rows: list[Row]) -> list[list[str]]:
    return [[row["path"] for row in members] for members in find_sequences(rows)]


def parts(rows: list[Row], links: list[tuple[Row, Row]]) -> list[set[str]]:
    """Connected parts, by joining sets until nothing changes."""
    found = [{row["path"]} for row in rows]
    for one, other in links:
        both = [part for part in found if one["path"] in part or other["path"] in part]
        found = [part for part in found if part not in both] + [set().union(*both)]
    return found


def brute_force(rows: list[Row]) -> list[set[str]]:
    def numbered(one: Row, other: Row) -> bool:
        names = [NUMBER.split(PurePosixPath(row["path"]).stem) for row in (one, other)]
        if len(names[0]) != len(names[1]) or one["class_id"] != other["class_id"]:
            return False
        differ = [place for place, (a, b) in enumerate(zip(*names, strict=True)) if a != b]
        if len(differ) > 1 or any(place % 2 == 0 for place in differ) or len(names[0]) == 1:
            return False
        near = all(abs(int(names[0][place]) - int(names[1][place])) <= NEXT for place in differ)
        return near and (one["dhash"] ^ other["dhash"]).bit_count() <= ALIKE_BITS

    def together(one: Row, other: Row) -> bool:
        if (one["dhash"] ^ other["dhash"]).bit_count() <= NEAR_BITS:
            return True
        known = one["taken"] is not None and other["taken"] is not None
        return known and one["class_id"] == other["class_id"] and abs(one["taken"] - other["taken"]) <= TOGETHER_S

    pairs = list(combinations(rows, 2))
    long = [part for part in parts(rows, [pair for pair in pairs if numbered(*pair)]) if len(part) >= FRAMES]
    links = [pair for pair in pairs if together(*pair) or any({row["path"] for row in pair} <= part for part in long)]
    return [part for part in parts(rows, links) if len(part) > 1]


names = st.tuples(st.sampled_from("ab"), st.sampled_from(["IMG_", "x3_"]), st.integers(0, 30))
kinds = st.tuples(st.integers(0, 5), st.integers(0, 20), st.none() | st.integers(0, 60))


@settings(max_examples=30)
@given(st.dictionaries(names, kinds, max_size=20))
def test_sequences_are_those_that_comparing_all_finds(drawn: dict[Any, Any]) -> None:
    rows = [
        image(f"{folder}/{stem}{number}.jpg", flip(unlike(thing), bits), taken)
        for (folder, stem, number), (thing, bits, taken) in drawn.items()
    ]
    found = find_sequences(rows)
    assert sorted(map(sorted, paths(rows))) == sorted(map(sorted, brute_force(rows)))
    assert all(members == sorted(members, key=lambda row: natural(row["path"])) for members in found)


def test_what_joins_pictures_and_what_does_not() -> None:
    frames = [image(f"a/IMG_{number}.jpg", flip(unlike(0), number - 8)) for number in (8, 9, 10, 11)]
    assert paths(frames) == [["a/IMG_8.jpg", "a/IMG_9.jpg", "a/IMG_10.jpg", "a/IMG_11.jpg"]]
    # Numbers alone say nothing, however many, nor do two that are alike.
    assert paths([image(f"a/{number}.jpg", unlike(number)) for number in range(200)]) == []
    assert paths([image("a/1.jpg", unlike(0)), image("a/2.jpg", flip(unlike(0), 9))]) == []
    # Names of which two numbers differ, or that are far apart, and pictures of two classes.
    for others in (["a/7_1.jpg", "a/8_2.jpg", "a/9_3.jpg"], ["a/1.jpg", "a/11.jpg", "a/21.jpg"], ["a/1", "b/2", "c/3"]):
        assert paths([image(path, flip(unlike(0), 5 * place)) for place, path in enumerate(others)]) == []
    # One's times join what looks different, in any order of names, and only within a class.
    timed = [image("a/x.jpg", unlike(1), 100.0), image("a/q.jpg", unlike(2), 110.0), image("b/x.jpg", unlike(3), 105.0)]
    assert paths([*timed, image("a/z.jpg", unlike(4), 121.0)]) == [["a/q.jpg", "a/x.jpg"]]
    # Near duplicates are one photograph, whatever they are called.
    assert paths([image("a/x.jpg", unlike(0)), image("b/y.jpg", flip(unlike(0), 3))]) == [["a/x.jpg", "b/y.jpg"]]


def test_a_picture_more_joins_and_never_parts() -> None:
    chance = random.Random(3)
    rows = [
        image(f"a/{number}.jpg", flip(unlike(number // 8), chance.randint(0, 12)), chance.choice([None, 9.0 * number]))
        for number in range(60)
    ]
    chance.shuffle(rows)
    before: list[set[str]] = []
    for count in range(1, len(rows) + 1):
        after = [{row["path"] for row in members} for members in find_sequences(rows[:count])]
        assert all(any(part <= larger for larger in after) for part in before)
        before = after
    assert len(before) > 1


def test_a_sequence_is_named_by_its_first_picture_and_keeps_its_name() -> None:
    frames = [image(f"a/IMG_{number}.jpg", unlike(0)) for number in (9, 10, 11)]
    mark_sequences(frames)
    assert {row["sequence"] for row in frames} == {"id of a/IMG_9.jpg"}
    alone = image("a/other.jpg", unlike(1))
    mark_sequences([*frames, alone, image("a/IMG_12.jpg", unlike(0))])
    assert {row["sequence"] for row in frames} == {"id of a/IMG_9.jpg"}
    assert "sequence" not in alone


def test_many_files_of_one_name_take_no_time() -> None:
    rows = [{**image("a/0.jpg", unlike(number)), "path": f"a/{number}/0.jpg"} for number in range(3_000)]
    assert find_sequences(rows) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1970:01:01 00:01:40", 100.0),
        ("1970-01-01T00:01:40", 100.0),
        ("1970-01-01T00:01:40Z", 100.0),
        ("1970-01-01 01:01:40+01:00\0", 100.0),
        ("1970-01-01T00:01:40.5", 100.5),
        ("2021-05-03", None),
        ("2021:05:03 00:00:00", None),
        ("0000:00:00 00:00:00", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_times(text: str | None, found: float | None) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("suffix", ["jpg", "webp", "heic"])
def test_a_camera_s_time_is_read_from_its_file(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2021:05:03 10:11:12"
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    assert read_time(path) == "2021:05:03 10:11:12"
    Image.new("RGB", (8, 8)).save(path)
    assert read_time(path) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_is_odd_has_no_time(tmp_path: Path) -> None:
    odd = tmp_path / "odd.jpg"
    odd.write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_time(odd) is None
    assert read_time(tmp_path / "gone.jpg") is None
