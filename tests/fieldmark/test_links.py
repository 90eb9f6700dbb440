from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.links import (
    count_by_split,
    given_links,
    links_of_groups,
    pairs_of,
    refuse_stale,
    said_of,
    table_of,
    update,
    window,
)
from fieldmark.nearest import Pairs, unit_rows
from tests.project import image_id, unit, write_nodes


def equal(one: Pairs, other: Pairs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_update_has_the_bits_of_a_start_from_nothing() -> None:
    """Images that come and go: what is kept, what is merged and what is made anew give what all at once gives."""
    draw = np.random.default_rng(0)
    pool = unit_rows([draw.integers(-2, 3, (60, 6))])
    names = np.array(sorted(image_id(n) for n in range(60)))
    for _ in range(30):
        k = int(draw.integers(1, 6))
        before, now = (np.sort(draw.permutation(60)[: draw.integers(1, 61)]) for _ in range(2))
        old = table_of(update(None, pool[before], names[before].tolist(), k), names[before].tolist(), "knn")
        ids = names[now].tolist()
        assert equal(update(old, pool[now], ids, k), update(None, pool[now], ids, k))


def test_pairs_and_tables_are_one() -> None:
    ids = [image_id(n) for n in range(4)]
    pairs = Pairs(np.array([0, 0, 3]), np.array([1, 2, 0]), np.array([0.5, 0.25, 1], np.float32))
    table = table_of(pairs, ids, "knn")
    assert table["dst"].to_pylist() == [ids[0], ids[0], ids[3]]
    assert table["src"].to_pylist() == [ids[1], ids[2], ids[0]]
    assert equal(pairs_of(table, ids), pairs)
    assert pairs_of(table, ids[:2]).near.tolist() == [1, -1, 0]


def images(*groups: str | None) -> pa.Table:
    return pa.table({
        "image_id": [image_id(n) for n in range(len(groups))],
        "path": [f"{n:02}.png" for n in range(len(groups))],
        "group": pa.array(groups, pa.string()),
        "captured_at": pa.array([None] * len(groups), pa.string()),
    })


def test_a_group_links_all_of_it() -> None:
    pairs, ids, cut = links_of_groups(images("a", None, "b", "a", "a"), most=2)
    found = {(ids[row], ids[near]) for row, near in zip(pairs.row, pairs.near, strict=True)}
    members = [image_id(n) for n in (0, 3, 4)]
    assert found == {(one, other) for one in members for other in members if one != other}
    assert cut == 0
    assert pairs.cosine.tolist() == [1.0] * 6


def test_of_a_large_group_those_next_to_it_are_linked() -> None:
    """By time of capture: here the reverse of the paths."""
    table = images(*["a"] * 7).set_column(3, "captured_at", pa.array([f"2026-01-0{9 - n}" for n in range(7)]))
    pairs, ids, cut = links_of_groups(table, most=2)
    assert cut == 1
    order = [image_id(n) for n in range(7)][::-1]
    near = {order.index(ids[row]): set() for row in pairs.row}
    for row, other in zip(pairs.row, pairs.near, strict=True):
        near[order.index(ids[row])].add(order.index(ids[other]))
    assert near == {0: {1, 2}, **{n: {n - 1, n + 1} for n in range(1, 6)}, 6: {4, 5}}


@pytest.mark.parametrize("most", [1, 2, 3, 4, 20])
def test_a_window_gives_everyone_the_same_number(most: int) -> None:
    for count in range(1, 9):
        row, near = window(np.arange(count), most)
        assert np.bincount(row, minlength=count).tolist() == [min(most, count - 1)] * count
        assert not (row == near).any()


def test_given_edges_lead_to_what_is_used() -> None:
    rows = [
        {"path": "a", "image_id": image_id(0), "status": "ok", "duplicate_of": None},
        {"path": "b", "image_id": image_id(1), "status": "ok", "duplicate_of": None},
        {"path": "c", "image_id": image_id(1), "status": "duplicate", "duplicate_of": "b"},
        {"path": "d", "image_id": image_id(2), "status": "conflict", "duplicate_of": None},
    ]
    edges = [
        ("a", "b", 1.0, "cites"), ("b", "a", 2.0, "cites"), ("a", "c", 3.0, "cites"), ("a", "c", 0.5, "given"),
        ("b", "c", 1.0, "cites"), ("a", "d", 1.0, "cites"), ("a", "elsewhere", 1.0, "cites"),
    ]  # fmt: skip
    table = pa.Table.from_pylist([dict(zip(("src", "dst", "weight", "kind"), edge, strict=True)) for edge in edges])
    found, left_out = given_links(table, pa.Table.from_pylist(rows))
    one, other = image_id(0), image_id(1)
    assert {tuple(row.values()) for row in found.to_pylist()} == {
        (one, other, 3.0, "cites"), (other, one, 2.0, "cites"), (one, other, 0.5, "given"),
    }  # fmt: skip
    assert left_out == {"an end is not used": 2, "both ends are one": 1, "they stand there twice": 1}
    found, again = given_links(table, pa.Table.from_pylist(rows), both_ways=True)
    assert {tuple(row.values()) for row in found.to_pylist()} == {
        (one, other, 3.0, "cites"), (other, one, 3.0, "cites"), (one, other, 0.5, "given"), (other, one, 0.5, "given"),
    }  # fmt: skip
    assert again == left_out


def test_links_are_counted_by_the_splits_of_their_ends() -> None:
    splits = {image_id(0): "train", image_id(1): "train", image_id(2): "test"}
    pairs = Pairs(np.array([0, 1, 2, 2]), np.array([1, 0, 0, 1]), np.ones(4, np.float32))
    counts = count_by_split(table_of(pairs, list(splits), "knn"), splits)
    assert counts == {("train", "train"): 2, ("train", "test"): 2}


def test_links_of_vectors_that_were_made_anew_are_refused(tmp_path: Path) -> None:
    nodes, path = tmp_path / "embed/conv/images", tmp_path / "links/near.parquet"
    vectors = {image_id(n): unit(np.eye(4)[n : n + 1]) for n in range(3)}
    write_nodes(nodes, vectors, mark="one")
    said = said_of(store.bucket_path(nodes, 0), "embed.nodes/1")
    made_by = {"kind": "knn", "k": 1, "sources": {"embed/conv/images": said}}
    store.write_table(store.make_table("links/1", []), path, "links/1", made_by, "mark")
    refuse_stale(path, tmp_path)
    write_nodes(nodes, vectors, mark="another")
    with pytest.raises(UserError, match=r"near.parquet: was not made from .*embed/conv/images as it is now; run"):
        refuse_stale(path, tmp_path)
    for file in nodes.iterdir():
        file.unlink()
    refuse_stale(path, tmp_path)
