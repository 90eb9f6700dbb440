from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fieldmark.command import UserError
from fieldmark.halves import halve
from fieldmark.labels.splits import read_split
from fieldmark.store import read_header, read_table, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training.data import Cache, read_cache

labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def halved(y: list[int], groups: list[str] | None = None) -> np.ndarray:
    """(n,): the half of each image, all of them of val."""
    names = [f"{number}.png" for number in range(len(y))] if groups is None else groups
    return halve(np.repeat("val", len(y)), np.ones(len(y), dtype=bool), names, np.array(y))


@given(y=labels)
def test_each_class_is_halved_to_the_image(y: list[int]) -> None:
    found = halved(y)
    for label in set(y):
        choosing = sum(half == "choose" for half, own in zip(found, y, strict=True) if own == label)
        assert abs(2 * choosing - y.count(label)) <= 1
    assert len(y) == 1 or set(found) == {"choose", "val"}


@given(y=labels, group=st.integers(1, 6))
def test_a_group_stays_whole(y: list[int], group: int) -> None:
    groups = [f"track {number // group}" for number in range(len(y))]
    found = halved(y, groups)
    assert all(len(set(found[np.array(groups) == name])) == 1 for name in groups)
    assert len(set(groups)) == 1 or set(found) == {"choose", "val"}


def test_groups_of_one_class_are_shared_out_evenly() -> None:
    groups = [f"track {number // 5}" for number in range(200)]
    assert (halved([0] * 200, groups) == "choose").sum() == 100
    # Which lone images, and which halves of two groups, choose is drawn as well: no half gets all of them.
    lone = halved(list(range(40)))
    assert 10 < (lone == "choose").sum() < 30
    pairs = halved([number // 10 for number in range(200)], [f"{number // 5}" for number in range(200)])
    assert (pairs == "choose").sum() == 100


@given(y=labels, more=st.integers(0, 4))
def test_one_image_more_moves_one_image_at_most(y: list[int], more: int) -> None:
    assume(len(set(y)) < len(y))  # of images that are each the only one of their class, one may change sides
    before, after = halved(y), halved([*y, more])[:-1]
    moved = before != after
    assert moved.sum() <= 2  # it takes another's place, and that one the place of a third where numbers become even
    assert all(y[image] == more for image in np.flatnonzero(moved))


@given(y=labels)
def test_other_images_stay_where_they_are_and_do_not_count(y: list[int]) -> None:
    split = np.array([("val", "train", "test")[number % 3] for number in range(len(y))])
    names = [f"{number}.png" for number in range(len(y))]
    found = halve(split, split == "val", names, np.array(y))
    others = split != "val"
    assert found[others].tolist() == split[others].tolist()
    alone = halve(split[~others], split[~others] == "val", names[::3], np.array(y[::3], dtype=int))
    assert found[~others].tolist() == alone.tolist()


def with_groups(folder: Path, groups: list[str]) -> None:
    """Write these groups into the images of val."""
    path = folder / "index/images.parquet"
    header, rows = read_header(path, "index.images/1"), read_table(path, "index.images/1").to_pylist()
    of_val = [row for row in rows if row["split"] == "val"]
    for row, group in zip(of_val, groups, strict=True):
        row["group"] = group
    table = read_table(path, "index.images/1").from_pylist(rows, schema=read_table(path, "index.images/1").schema)
    write_table(table, path, "index.images/1", header.params, header.fingerprint)


def same_for_stages(folder: Path, cache: Cache) -> None:
    """What a stage reads of either half is what the trainer has there."""
    for half in ("choose", "val"):
        wanted = {image_id for image_id, own in zip(cache.image_ids, cache.split, strict=True) if own == half}
        assert set(read_split(folder / "index/images.parquet", half)) == wanted


def test_a_cache_has_val_in_halves_with_groups_whole(tmp_path: Path) -> None:
    write_cache(tmp_path, Plan(val=6))
    plain = read_cache(tmp_path, ENCODER, 3, {"globals"})
    assert plain.groups == plain.image_ids
    same_for_stages(tmp_path, plain)
    assert {half: int((plain.split == half).sum()) for half in ("choose", "val")} == {"choose": 12, "val": 12}
    with_groups(tmp_path, [f"track {number // 3}" for number in range(24)])
    grouped = read_cache(tmp_path, ENCODER, 3, {"globals"})
    same_for_stages(tmp_path, grouped)
    halves: dict[str, set[str]] = {}
    for group, half in zip(grouped.groups, grouped.split, strict=True):
        halves.setdefault(group, set()).add(half)
    assert all(len(found) == 1 for found in halves.values())
    assert {half: int((grouped.split == half).sum()) for half in ("choose", "val")} == {"choose": 12, "val": 12}
    # The order of the images of a cache is another than that of the index's rows; and a part of it keeps its groups.
    some = grouped.take(grouped.images("val"))
    assert some.groups == [grouped.groups[image] for image in grouped.images("val").tolist()]
    with_groups(tmp_path, ["one track"] * 24)
    with pytest.raises(UserError, match=r"val is of one image or group, .*; put more into val \(dataset\.val_fract"):
        read_cache(tmp_path, ENCODER, 3, {"globals"})
