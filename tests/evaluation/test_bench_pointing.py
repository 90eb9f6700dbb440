"""How often concepts point at parts, over folds: who is judged, by whose places, in which classes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bench import pointing
from bench.pointing import FOLDS, Pointed, judged_classes, point, table
from evaluation.pointing import Placed
from fieldmark.command import UserError
from fieldmark.store import read_header, read_table, sha256, write_table
from tests.evaluation.scene import name_concepts, write_parts
from tests.training.cache import ALL, ENCODER, Plan, write_cache
from training.data import Cache, read_cache
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.metrics import Bools

BUCKETS, PARTS = 3, ("beak", "tail")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose concepts name two parts, each at the centre of some node's box; two images are a group."""
    data = tmp_path / "data"
    write_cache(data, Plan(classes=3, train=16, val=6, test=2, cue="none", buckets=BUCKETS))
    name_concepts(data, "bill", "tail")
    path = data / "index/images.parquet"
    header, index = read_header(path, "index.images/1"), read_table(path, "index.images/1")
    groups = [f"{Path(name).parent}/{int(Path(name).stem) // 2}" if "broken" not in name else None
              for name in index["path"].to_pylist()]  # fmt: skip
    index = index.set_column(index.schema.get_field_index("group"), "group", pa.array(groups))
    write_table(index, path, "index.images/1", header.params, header.fingerprint)
    cache = read_cache(data, ENCODER, BUCKETS, ALL)
    rng, boxes, rows = np.random.default_rng(0), cache.part(Boxes).box.numpy(), []
    for image, name in enumerate(cache.paths):
        for part in PARTS:
            x0, y0, x1, y1 = boxes[image * cache.views, rng.integers(1, 7)].tolist()
            rows.append({"path": name, "part": part, "x": (x0 + x1) / 2, "y": (y0 + y1) / 2, "visible": True})
    write_parts(data, rows)
    monkeypatch.setattr(pointing, "DATA", data)
    return data


def holds(cache: Cache, data: Path, part: str) -> Bools:
    """(n, N): which local nodes' boxes hold a part."""
    rows = read_table(data / "index/parts.parquet", "index.parts/1").to_pylist()
    at = {row["path"]: (np.float32(row["x"]), np.float32(row["y"])) for row in rows if row["part"] == part}
    found = np.zeros(cache.part(Nodes).mask[:, 1:].shape, bool)
    for image, node in np.argwhere(cache.part(Nodes).mask[:, 1:].numpy()):
        x, y = at[cache.paths[image]]
        x0, y0, x1, y1 = cache.part(Boxes).box[image, 1 + node].numpy()
        found[image, node] = x0 <= x <= x1 and y0 <= y <= y1
    return found


def by_place(cache: Cache, held: Bools, fold: list[int | None], away: int) -> dict[int, bool]:
    """By judged image, whether the commonest place hits it: of images in none of `away` folds, the first its own."""
    found = {}
    for image, own in enumerate(fold):
        if own is not None:
            apart = {(own + step) % FOLDS for step in range(away)}
            train = [other for other, number in enumerate(fold) if number is not None and number not in apart]
            shown = held[train].sum(0)
            nodes = np.flatnonzero(cache.part(Nodes).mask[image, 1:].numpy()).tolist()
            found[image] = bool(held[image, max(nodes, key=shown.tolist().__getitem__)])
    return found


def test_each_image_is_judged_once_by_places_that_other_groups_show(folder: Path) -> None:
    """Against a loop: its own marks, those of its group and fold, and those that choose lam are in no place."""
    found, cache = point(ENCODER, BUCKETS), read_cache(folder, ENCODER, BUCKETS, ALL)
    judged = np.flatnonzero(np.isin(cache.split, ("train", "choose", "val")))
    fold = [int(sha256(f"fold {group}")[:8], 16) % FOLDS if image in judged else None
            for image, group in enumerate(cache.groups)]  # fmt: skip
    assert set(fold) == {None, *range(FOLDS)}
    assert list(found.parts) == ["bill", "tail"]
    assert len(found.lams) == FOLDS
    told_by_itself = 0
    for one, part in zip(found.parts.values(), PARTS, strict=True):
        assert sorted(one.images) == judged.tolist()
        held = holds(cache, folder, part)
        alone = dict(zip(one.images.tolist(), one.rivals[0].astype(bool).tolist(), strict=True))
        assert alone == by_place(cache, held, fold, away=2)
        told_by_itself += alone != by_place(cache, held, fold, away=0)
    assert told_by_itself == len(PARTS)  # else no leak could show here
    groups = [cache.groups[image] for image in found.groups]
    assert groups == cache.groups
    assert len(set(found.groups.tolist())) == len(set(groups))


def test_where_no_two_parts_are_named_there_is_nothing_to_judge(folder: Path) -> None:
    for parts in (["bill"], ["look"]):
        name_concepts(folder, *parts)
        with pytest.raises(UserError, match=rf"bank/{ENCODER}\.parquet: no two parts are both marked and named by con"):
            point(ENCODER, BUCKETS)


def pointed(**parts: list[int]) -> Pointed:
    """Hits on some of four images, those of class a at 1 and 3; place and concept hit on class a alone."""
    y = np.array([1, 0, 1, 0])
    placed = {
        part: Placed(np.array(images), (y[images] == 0) * 1.0, np.zeros((3, len(images))))
        for part, images in parts.items()
    }
    return Pointed(placed, [0.5], y, np.arange(4), ["a", "b"])


def test_classes_are_left_out_of_every_table() -> None:
    found = {"one": pointed(bill=[0, 1, 2, 3], tail=[1, 2], wing=[0, 2]).of_classes(["a"])}
    places, by_part, sizes = table(found).split("\n\n")
    assert places.splitlines()[1].split()[:5] == ["one:", "place", "and", "concept", "100.0"]
    assert [line.split() for line in by_part.splitlines()[1:]] == [
        ["bill", "2", "100.0", "0.0", "0.0"],
        ["tail", "1", "100.0", "0.0", "0.0"],
    ]
    assert sizes == "one: 3 parts on 2 images, lam by fold 0.5"
    assert pointed(bill=[0, 2]).of_classes(["a"]).parts == {}


def test_parts_of_every_encoder_are_listed() -> None:
    found = {"one": pointed(bill=[1, 3]), "two": pointed(bill=[1], tail=[1, 3])}
    rows = [line.split() for line in table(found).split("\n\n")[1].splitlines()[1:]]
    assert rows == [
        ["bill", "2", "or", "1", *["100.0", "0.0", "0.0"] * 2],
        ["tail", "2", "-", "-", "-", "100.0", "0.0", "0.0"],
    ]


def test_intervals_are_over_groups_where_there_are_any() -> None:
    one = pointed(bill=[0, 1, 2, 3])
    assert "over images" in table({"one": one})
    assert "over groups" in table({"one": one._replace(groups=np.array([0, 0, 2, 2]))})


def test_classes_are_those_of_the_index_or_it_is_said(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("class-01\n\nclass-00\n")
    assert judged_classes(str(file)) == ["class-00", "class-01"]
    for text, what in (("class-00\nwolf\n", "line 2: 'wolf'"), ("\n", "names no class; ")):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"^--classes: .*classes\.txt.* {what}"):
            judged_classes(str(file))
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        judged_classes(str(tmp_path / "nowhere.txt"))
