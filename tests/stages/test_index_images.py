import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.listing import name_classes
from fieldmark.params import Dataset, Params
from stages.index_images import group_sequences, hold_out, index, mark_duplicates, split_rows
from tests.project import image_id, snapshot

SetParams = Callable[..., Params]
DrawImages = Callable[[dict[str, int]], None]


def read(name: str) -> list[dict[str, Any]]:
    return store.read_table(f"data/index/{name}.parquet", f"index.{name}/{2 if name == 'classes' else 1}").to_pylist()


def by_path() -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in read("images")}


def test_every_file_is_a_row(set_params: SetParams, dataset: list[str], project: Path) -> None:
    (project / "images/train/a/notes.txt").write_text("no picture")
    (project / "images/train/a/broken.JPG").write_bytes(b"no picture either")
    (project / "images/train/b/._0.png").write_bytes(b"what a Mac leaves")
    (project / "images/test/.hidden").mkdir()
    (project / "images/test/.hidden/0.png").write_bytes(b"")
    (project / "images/test/b/gone.png").symlink_to("nowhere.png")
    counts = index(set_params(dataset={"val_fraction": 0.25}))
    rows = by_path()
    assert sorted(rows) == sorted([*dataset, "train/a/broken.JPG", "test/b/gone.png"])
    good = rows["train/a/0.png"]
    assert (good["class_id"], good["status"], good["width"], good["height"]) == ("a", "ok", 80, 60)
    assert good["image_id"] == store.sha256((project / "images/train/a/0.png").read_bytes())
    for path, reason in (("train/a/broken.JPG", "none of JPEG"), ("test/b/gone.png", "No such file")):
        assert rows[path]["status"] == "broken"
        assert reason in rows[path]["error"]
    assert rows["test/b/gone.png"]["image_id"] is None
    assert counts == {
        "classes": 2,
        "images": {"train": 6, "val": 2, "test": 4},
        "unused": {"broken": 2, "duplicate": 0, "conflict": 0},
        "health": counts["health"],
    }
    assert counts["health"]["passed_over"] == 1
    assert [row["split"] for row in rows.values() if row["class_id"] == "a" and row["status"] == "ok"].count(
        "val"
    ) == 1


def test_what_is_no_file_is_a_row(set_params: SetParams, dataset: list[str], project: Path) -> None:
    """A manifest may name what waits for ever, never ends, or is no path; the picture that is thin is good."""
    os.mkfifo(project / "images/pipe.png")
    (project / "images/endless.png").symlink_to("/dev/zero")
    with open(project / "images/sparse.png", "wb") as file:
        file.truncate(20 * 2**30)
    Image.new("RGB", (60_000, 1)).save(project / "images/thin.jfif", "PNG")
    odd = ["pipe.png", "endless.png", "sparse.png", "nul\0.png", "train", "gone.png", "thin.jfif"]
    lines = [f"{path},{path.split('/')[1]},{path.split('/')[0]}\n" for path in dataset]
    lines += [f"{path},a,train\n" for path in odd]
    (project / "manifest.csv").write_text("path,class,split\n" + "".join(lines))
    index(set_params(dataset={"format": "manifest", "root": "manifest.csv", "images": "images"}))
    rows = by_path()
    assert {path: (rows[path]["status"], rows[path]["error"], rows[path]["image_id"]) for path in odd[:-1]} == {
        "pipe.png": ("broken", "is a named pipe, not a file", None),
        "endless.png": ("broken", "is a device, not a file", None),
        "sparse.png": ("broken", f"{20 * 2**30} bytes, more than {2**30}", None),
        "nul\0.png": ("broken", "cannot be read: there is a NUL in its name", None),
        "train": ("broken", "cannot be read: Is a directory", None),
        "gone.png": ("broken", "cannot be read: No such file or directory", None),
    }
    assert (rows["thin.jfif"]["status"], rows["thin.jfif"]["width"]) == ("ok", 60_000)


def test_thumbnails_of_usable_images_only(
    set_params: SetParams, dataset: list[str], draw_images: DrawImages
) -> None:
    draw_images({"train/a/again.png": 0})
    Path("images/train/a/broken.png").write_bytes(b"")
    index(set_params())
    thumbs = store.read_buckets("data/thumbs", "thumbs/1", 4).to_pylist()
    usable = {row["image_id"] for row in read("images") if row["status"] == "ok"}
    assert len(thumbs) == len(dataset) == len(usable)
    assert {row["image_id"] for row in thumbs} == usable
    assert Image.open(io.BytesIO(thumbs[0]["webp"])).size == (80, 60)


def test_a_thumbnail_is_192_pixels_at_most(set_params: SetParams, dataset: list[str]) -> None:
    Image.new("RGB", (4000, 3)).save("images/train/a/wide.png")
    index(set_params())
    wide = by_path()["train/a/wide.png"]
    assert (wide["width"], wide["height"]) == (4000, 3)
    for row in store.read_buckets("data/thumbs", "thumbs/1", 4).to_pylist():
        if row["image_id"] == wide["image_id"]:
            assert Image.open(io.BytesIO(row["webp"])).size == (192, 1)


def test_running_twice_gives_the_same_bytes(
    set_params: SetParams, dataset: list[str], run_stage: Callable[..., None]
) -> None:
    set_params()
    run_stage("index_images")
    folders = [Path("data/index"), Path("data/thumbs")]
    first = [{name: content for name, (content, _) in snapshot(folder).items()} for folder in folders]
    run_stage("index_images")
    assert first == [{name: content for name, (content, _) in snapshot(folder).items()} for folder in folders]
    assert set(first[0]) == {
        *(f"{name}.parquet" for name in ("images", "classes", "parts", "attributes", "near_duplicates", "links")),
        "metrics.json",
    }
    assert set(first[1]) == {f"b{bucket:03d}.parquet" for bucket in range(4)}
    assert json.loads(first[0]["metrics.json"])["images"]["test"] == 4


def row(path: str, image: int) -> dict[str, Any]:
    split, class_id, _ = path.split("/")
    return {"path": path, "split": split, "class_id": class_id, "image_id": image_id(image)}


def test_of_equal_files_one_is_used() -> None:
    rows = [row(path, 0) for path in ("train/a/1", "val/a/1", "test/a/2", "test/a/1")] + [row("train/a/0", 1)]
    rows += [row("train/a/9", 2), row("train/a/8", 2), row("val/a/9", 2)]
    mark_duplicates(rows)
    states = {row["path"]: (row["status"], row.get("duplicate_of")) for row in rows}
    assert states == {
        "train/a/1": ("duplicate", "test/a/1"),
        "val/a/1": ("duplicate", "test/a/1"),
        "test/a/2": ("duplicate", "test/a/1"),
        "test/a/1": ("ok", None),
        "train/a/0": ("ok", None),
        "train/a/9": ("duplicate", "val/a/9"),
        "train/a/8": ("duplicate", "val/a/9"),
        "val/a/9": ("ok", None),
    }


def test_equal_files_in_two_classes_are_not_used() -> None:
    rows = [row("train/a/1", 0), row("test/b/1", 0), row("train/a/2", 0), row("train/a/3", 1)]
    mark_duplicates(rows)
    assert [row["status"] for row in rows] == ["conflict"] * 3 + ["ok"]
    assert all("another class" in row["error"] for row in rows[:3])


def by_image(row: dict[str, Any]) -> str:
    return store.sha256(f"0:{row.get('group') or row['image_id']}")


def val_of(rows: list[dict[str, Any]], fraction: float) -> set[str]:
    hold_out(rows, "val", fraction, by_image)
    return {row["path"] for row in rows if row["split"] == "val"}


@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_one_image_more_moves_at_most_one(count: int, fraction: float) -> None:
    def val(numbers: range) -> set[str]:
        return val_of([{**row(f"train/a/{n}", n), "status": "ok"} for n in numbers], fraction)

    before, after = val(range(count)), val(range(count + 1))
    assert len(before) == min(round(fraction * count), count - 1)
    assert len((before ^ after) - {f"train/a/{count}"}) <= 1


def test_validation_is_taken_in_each_class_from_usable_training_images() -> None:
    rows = [
        {**row(f"{split}/{name}/{n}", n), "status": status}
        for n, (split, name, status) in enumerate(
            [("train", "a", "ok")] * 4
            + [("train", "b", "ok")] * 8
            + [("train", "a", "broken")] * 4
            + [("test", "a", "ok")] * 4
        )
    ]
    val_of(rows, 0.25)
    val = [row for row in rows if row["split"] == "val"]
    assert sorted(row["class_id"] for row in val) == ["a", "b", "b"]
    assert {row["status"] for row in val} == {"ok"}
    lowest = min(rows[:4], key=by_image)
    assert lowest["split"] == "val"


groups = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9) | st.none()), min_size=1, max_size=60)


@given(groups, st.floats(0.05, 0.5))
def test_a_group_stays_whole_and_a_class_keeps_a_training_image(
    drawn: list[tuple[str, int | None]], fraction: float
) -> None:
    """Also where a group (a camera) holds images of two classes."""
    rows = [
        {**row(f"train/{name}/{n}", n), "status": "ok", "group": None if group is None else f"camera {group}"}
        for n, (name, group) in enumerate(drawn)
    ]
    val_of(rows, fraction)
    for group in {row["group"] for row in rows} - {None}:
        assert len({row["split"] for row in rows if row["group"] == group}) == 1
    for name in {row["class_id"] for row in rows}:
        assert "train" in {row["split"] for row in rows if row["class_id"] == name}


def test_a_group_goes_where_it_brings_its_class_closest() -> None:
    """Of 20 images, 3 are wanted: a group of 4 is nearer to it than nothing, one of 6 is not."""
    for size, taken in ((4, 4), (6, 0)):
        rows = [{**row(f"train/a/{n}", n), "status": "ok", "group": f"g{n // size}"} for n in range(20)]
        rows = [each for each in rows if each["group"] == "g0"] + [
            {**each, "group": "rest"} for each in rows if each["group"] != "g0"
        ]
        assert len(val_of(rows, 0.15)) == taken


def undecided(names: str, **more: Any) -> list[dict[str, Any]]:
    return [{**row(f"-/{name}/{n}", n), "split": None, "status": "ok", **more} for n, name in enumerate(names)]


def test_without_splits_test_is_drawn_first_and_val_from_the_rest() -> None:
    rows = undecided("a" * 20 + "b" * 10)
    split_rows(rows, Dataset(root="x", test_fraction=0.2, val_fraction=0.25))
    count = {(name, split): 0 for name in "ab" for split in ("train", "val", "test")}
    for each in rows:
        count[each["class_id"], each["split"]] += 1
    assert count == {
        ("a", "test"): 4, ("a", "val"): 4, ("a", "train"): 12,
        ("b", "test"): 2, ("b", "val"): 2, ("b", "train"): 6,
    }  # fmt: skip
    other = undecided("a" * 20 + "b" * 10)
    split_rows(other, Dataset(root="x", test_fraction=0.2, val_fraction=0.25, seed=1))
    assert [each["split"] for each in rows] != [each["split"] for each in other]


def test_rows_without_a_split_are_for_training_where_others_are_test() -> None:
    rows = [*undecided("aaaaaaaa"), {**row("test/a/99", 99), "status": "ok"}]
    split_rows(rows, Dataset(root="x"))
    assert [each["split"] for each in rows].count("test") == 1


def test_a_class_of_one_image_is_trained_on() -> None:
    rows = undecided("a" * 10 + "b")
    split_rows(rows, Dataset(root="x", test_fraction=0.6, val_fraction=0.6))
    assert rows[-1]["split"] == "train"


def test_a_copy_stands_where_the_image_stands_that_is_used() -> None:
    for count in range(8, 20):
        rows = undecided("a" * count)
        rows.append({**rows[0], "path": "-/a/copy", "status": "duplicate", "duplicate_of": rows[0]["path"]})
        split_rows(rows, Dataset(root="x", test_fraction=0.5))
        assert rows[-1]["split"] == rows[0]["split"]


@pytest.mark.parametrize(("split", "key"), [("val", "val_fraction"), ("test", "test_fraction")])
def test_a_split_without_images_is_refused_before_anyone_pays(split: str, key: str) -> None:
    rows = undecided("aaaabbbb")
    with pytest.raises(UserError, match=f"left for {split}; .*dataset.{key}"):
        split_rows(rows, Dataset.model_validate({"root": "x", key: 0.01}))


def test_a_list_may_have_accents_stored_otherwise(
    set_params: SetParams, dataset: list[str], draw_images: DrawImages
) -> None:
    draw_images({"train/a/moine\u0301.png": 99})
    Path("val.txt").write_text("train/a/moin\u00e9.png\n", encoding="utf-8")
    index(set_params(dataset={"val_list": "val.txt"}))
    assert [path for path, row in by_path().items() if row["split"] == "val"] == ["train/a/moine\u0301.png"]
    Path("val.txt").write_text("train/b/O.png\n")
    with pytest.raises(UserError, match=r"'train/b/O\.png' is no image of the data set; did you mean 'train/b/"):
        index(set_params(dataset={"val_list": "val.txt"}))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (
            ["train\\a\\0.png", "train\\b\\0.png"],
            r"^mine\.csv: 2 of 2 images, 'train\\\\a\\\\0\.png' among them: cannot be read: No such file or directory"
            r" \(paths start from images, with / for \\\); no usable image is left for train; add training images$",
        ),
        (["train", "x/0.png", "x/1.png"], r"^mine\.csv: 2 of 3 images, 'x/0\.png' among them: .*; no usable image"),
    ],
)
def test_where_no_image_can_be_used_the_commonest_reason_goes_first(
    set_params: SetParams, dataset: list[str], paths: list[str], words: str
) -> None:
    Path("mine.csv").write_text("path,class\n" + "".join(f"{path},a\n" for path in paths))
    with pytest.raises(UserError, match=words):
        index(set_params(dataset={"format": "manifest", "root": "mine.csv", "images": "images"}))


def cub_of(boxes: dict[str, str], points: dict[str, str]) -> None:
    """A data set in the official layout of CUB: 8 pictures of 80 x 60, these boxes and points by number."""
    numbers = [str(number) for number in range(8)]
    tables = {
        "classes": ["1 a"],
        "images": [f"{number} a/{number}.png" for number in numbers],
        "image_class_labels": [f"{number} 1" for number in numbers],
        "train_test_split": [f"{number} {int(number) // 2 % 2}" for number in numbers],
        "bounding_boxes": [f"{number} {box}" for number, box in boxes.items()],
        "parts/parts": ["1 eye"],
        "parts/part_locs": [f"{number} 1 {point}" for number, point in points.items()],
    }
    for name, lines in tables.items():
        path = Path("images") / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))


def test_what_reaches_out_of_its_picture_is_counted_and_named(
    set_params: SetParams, draw_images: DrawImages, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images({f"images/a/{number}.png": number for number in range(8)})
    inside = {str(number): "0 0 80 60" for number in range(2, 8)}
    points = {str(number): "81 0 1" for number in range(2, 8)}
    cub_of({**inside, "0": "40 30 80 60", "1": "200 100 50 50"}, {**points, "0": "90 30 1", "1": "0 0 0"})
    index(set_params(dataset={"format": "cub", "val_fraction": 0.3}))
    said = capsys.readouterr().err
    assert "2 of 8 boxes reach out of their picture, the first is 40 30 120 90 in images/a/0.png (80 x 60" in said
    assert "1 of 7 part points reach out of their picture, the first is 90 30 in images/a/0.png" in said
    rows = by_path()
    assert [rows[f"images/a/{number}.png"]["box"] for number in range(3)] == [[0.5, 0.5, 1, 1], None, [0, 0, 1, 1]]
    parts = [(part["x"], part["y"], part["visible"]) for part in read("parts")]
    assert parts[:3] == [(None, None, False), (None, None, False), (1.0, 0.0, True)]


@pytest.mark.parametrize(
    ("boxes", "points", "words"),
    [
        (["90 10 20 20"] * 5 + ["0 0 80 60"] * 3, [], r"5 of 8 boxes reach out .* are of pictures of another size"),
        ([], ["10 10 1"] * 2 + ["10 70 1"] * 5, r"5 of 7 part points reach out .* are of pictures of another size"),
        (["0 0 1 0.5"] * 8, [], r"bounding_boxes\.txt: every box lies in \[0,1\]; multiply"),
        (["0 0 -1 0.5"], [], r"bounding_boxes\.txt: image 0: the box is -1 wide"),
        (["0 0 nan 1"], [], r"bounding_boxes\.txt: '0 0 nan 1': is no place in pixels"),
        ([], ["10 10 2"], r"part_locs\.txt: image 0, part 1: visible is '2', neither 0 nor 1"),
    ],
)
def test_annotations_that_do_not_fit(
    set_params: SetParams, draw_images: DrawImages, boxes: list[str], points: list[str], words: str
) -> None:
    draw_images({f"images/a/{number}.png": number for number in range(8)})
    cub_of({str(n): box for n, box in enumerate(boxes)}, {str(n): point for n, point in enumerate(points)})
    with pytest.raises(UserError, match=words) as error:
        index(set_params(dataset={"format": "cub", "val_fraction": 0.3}))
    assert "\n" not in str(error.value)


def test_a_validation_folder_is_taken_as_it_is(
    set_params: SetParams, dataset: list[str], draw_images: DrawImages
) -> None:
    draw_images({"val/a/0.png": 99})
    index(set_params())
    assert [path for path, row in by_path().items() if row["split"] == "val"] == ["val/a/0.png"]


def test_a_list_names_the_validation_images(set_params: SetParams, dataset: list[str]) -> None:
    Path("val.txt").write_text("\ufefftrain/a/1.png\n\ntrain/b/3.png\n", encoding="utf-8")
    index(set_params(dataset={"val_list": "val.txt"}))
    assert [path for path, row in by_path().items() if row["split"] == "val"] == ["train/a/1.png", "train/b/3.png"]
    for line, words in (("train/a/9.png", "is no image"), ("test/a/0.png", "is a test image")):
        Path("val.txt").write_text(line)
        with pytest.raises(UserError, match=f"val.txt: '{line}' {words}"):
            index(set_params(dataset={"val_list": "val.txt"}))
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        index(set_params(dataset={"val_list": "gone.txt"}))


def test_what_changes_when_images_come_go_and_move(
    set_params: SetParams, dataset: list[str], draw_images: DrawImages, run_stage: Callable[..., None]
) -> None:
    """An image is its bytes: a new name or split embeds nothing, a new image embeds one, a removed one leaves."""
    set_params()

    def embedded() -> tuple[set[str], dict[str, bytes]]:
        run_stage("index_images")
        run_stage("embed_images", "--encoder", "conv")
        folder = Path("data/embed/conv/images")
        ids = store.read_buckets(folder, "embed.nodes/1", 4, ["image_id"]).column("image_id").to_pylist()
        return set(ids), {name: content for name, (content, _) in snapshot(folder).items()}

    first, before = embedded()
    Path("images/train/a/0.png").rename("images/train/a/renamed.png")
    Path("images/train/b/1.png").rename("images/test/b/moved.png")
    same, after = embedded()
    assert same == first
    assert after == before
    rows = by_path()
    assert rows["train/a/renamed.png"]["status"] == "ok"
    assert rows["test/b/moved.png"]["split"] == "test"
    draw_images({"train/a/new.png": 77})
    more, after = embedded()
    assert len(more - first) == 1
    assert sum(after[name] != before[name] for name in before) == 1
    Path("images/train/a/new.png").unlink()
    assert embedded() == (first, before)


def test_what_it_warns_of(
    set_params: SetParams, dataset: list[str], draw_images: DrawImages, capsys: pytest.CaptureFixture[str]
) -> None:
    index(set_params())
    assert "warning" not in capsys.readouterr().err
    near = np.asarray(Image.open("images/test/a/0.png")).copy()
    near[0, 0] ^= 1
    Image.fromarray(near).save("images/train/a/near.png")
    draw_images({"train/c/0.png": 0})
    Path("images/train/d").mkdir()
    Path("images/train/a/broken.png").write_bytes(b"")
    counts = index(set_params())
    said = capsys.readouterr().err
    for words in (
        "test is contaminated: 1 of 4 test images",
        "2 files stand under two classes with the same bytes, and are not used: train/",
        "1 file is broken, and is not used: train/a/broken.png; `error` in",
        "1 folder holds no image and is no class: d",
    ):
        assert f"warning: {words}" in said
    assert read("near_duplicates") == [{"path": "test/a/0.png", "other": "train/a/near.png", "bits": 0}]
    assert counts["health"]["contaminated_test"] == {"near_duplicates": 1, "groups": 0, "images": 1}
    assert "d" not in {row["class_id"] for row in read("classes")}


names = st.text(st.sampled_from("aAbB01 -_.é鱼ß'"), min_size=1, max_size=6) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
)


@given(st.sets(names, max_size=30))
def test_class_ids_are_safe_and_never_shared(folders: set[str]) -> None:
    folders = set({store.nfc(folder): folder for folder in folders}.values())
    ids = name_classes(folders)
    assert set(ids) == folders
    assert len(set(ids.values())) == len(folders)
    for folder, class_id in ids.items():
        assert re.fullmatch("[a-z0-9_-]+", class_id)
        assert class_id == store.class_id_of(folder)
        assert (class_id == folder) == bool(re.fullmatch("[a-z0-9_-]+", folder))


def test_a_class_named_as_the_id_of_another_is_refused() -> None:
    assert store.class_id_of("Blue Tang") == f"blue-tang-{store.sha256('Blue Tang')[:8]}"
    with pytest.raises(UserError, match="one class_id") as error:
        name_classes({"Blue Tang", store.class_id_of("Blue Tang")})
    assert "\n" not in str(error.value)


def test_classes_without_images_are_left_out_unless_they_are_wanted(
    set_params: SetParams, dataset: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images/classes.csv").write_text("class_id,name,superclass\na,A ray,rays\neels,Eels,\nskates,Skates,\n")
    index(set_params())
    assert [row["class_id"] for row in read("classes")] == ["a", "b"]
    said = capsys.readouterr().err
    assert "2 of 4 classes have no image and are left out (Eels, Skates); dataset.without_images: true" in said
    index(set_params(dataset={"without_images": True}))
    assert [row["class_id"] for row in read("classes")] == ["a", "b", "eels", "skates"]
    assert "left out" not in capsys.readouterr().err


def test_tables_beside_the_images(set_params: SetParams, dataset: list[str], draw_images: DrawImages) -> None:
    draw_images({"train/Blue Tang/0.png": 50})
    root = Path("images")
    # A byte order mark, as spreadsheets write; `c` has no image.
    (root / "classes.csv").write_text(
        "\ufeffclass_id,name,superclass,note\nBlue Tang,Blue tang,surgeonfish,\nc,Sea bat,,rare\n",
        encoding="utf-8",
    )
    (root / "attributes.csv").write_text("class_id,attribute,value\nBlue Tang,tail,forked\n")
    (root / "parts.csv").write_text(
        "path,part,x0,y0,x1,y1,visible\ntrain/a/0.png,tail,0,0.25,0.5,0.75,1\ntrain/a/0.png,eye,0,0,0,0,0\n"
    )
    index(set_params(dataset={"without_images": True}))
    tang = store.class_id_of("Blue Tang")
    classes = {row["class_id"]: row for row in read("classes")}
    assert set(classes) == {"a", "b", "c", tang}
    assert (classes[tang]["name"], classes[tang]["superclass"], classes[tang]["note"]) == (
        "Blue tang",
        "surgeonfish",
        None,
    )
    assert (classes["c"]["from_images"], classes["a"]["from_images"]) == (False, True)
    assert classes["a"]["name"] == "a"
    assert read("attributes") == [{"class_id": tang, "attribute": "tail", "value": "forked"}]
    eye, tail = read("parts")
    assert (eye["part"], eye["visible"]) == ("eye", False)
    assert (tail["x"], tail["y"], tail["visible"], tail["box"]) == (0.25, 0.5, True, [0, 0.25, 0.5, 0.75])
    assert by_path()["train/Blue Tang/0.png"]["class_id"] == tang


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("classes.csv", b"name\na\n", "classes.csv: has no column class_id"),
        ("classes.csv", b"", "classes.csv: has no column class_id"),
        ("classes.csv", b"class_id,name\na\n", "classes.csv: line 2 has not as many fields"),
        ("classes.csv", b"class_id,name\na,b,c\n", "classes.csv: line 2 has not as many fields"),
        ("classes.csv", b"class_id,name\na,\xff\n", "classes.csv: is not CSV in UTF-8"),
        (
            "parts.csv",
            b"path,part,x0,y0,x1,y1,visible\np,tail,0,0,half,1,1\n",
            "parts.csv: part 'tail' of p: .*'half'",
        ),
    ],
)
def test_a_malformed_table_is_one_line(
    set_params: SetParams, dataset: list[str], name: str, content: bytes, words: str
) -> None:
    Path("images", name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        index(set_params())
    assert "\n" not in str(error.value)
    assert not Path("data/index").exists()


def test_a_name_that_is_not_utf8(set_params: SetParams, dataset: list[str]) -> None:
    try:
        Path("images/train/a", "ca\udcff.png").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(UserError, match="is not UTF-8") as error:
        index(set_params())
    str(error.value).encode()


def test_dhash_and_size_are_of_the_upright_picture(set_params: SetParams, dataset: list[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.tile(np.arange(40, dtype=np.uint8)[::-1] * 6, (90, 1))
    Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90).save("images/train/a/turned.png", exif=exif)
    index(set_params())
    turned = by_path()["train/a/turned.png"]
    assert (turned["width"], turned["height"], turned["dhash"]) == (40, 90, 2**64 - 1)


def film_plants(folder: Path, plants: int = 6, frames: int = 5, step: float = 0.03) -> None:
    """Pictures of two kinds of flowers, `frames` of each plant, between which the camera moves by a share of its view.

    They are numbered as a camera does, kind by kind, plant after plant.
    """
    for kind, colour in (("tulip", (200, 40, 60)), ("iris", (90, 60, 190))):
        for plant in range(plants):
            chance = np.random.default_rng([len(kind), plant])
            meadow = chance.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            scene = Image.fromarray(meadow).resize((240, 240), Image.Resampling.BICUBIC)
            x, y = chance.integers(30, 130, 2).tolist()
            scene.paste(colour, (x, y, x + 50, y + 70))
            for frame in range(frames):
                left = int(20 + frame * step * 160)
                path = folder / kind / f"IMG_{1000 + plant * frames + frame}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                scene.crop((left, 30, left + 160, 190)).save(path)


def plants_of(frames: int = 5) -> dict[str, set[str]]:
    """The splits in which the frames of each plant stand."""
    splits: dict[str, set[str]] = {}
    for path, row in by_path().items():
        number = int(Path(path).stem.removeprefix("IMG_")) - 1000
        splits.setdefault(f"{Path(path).parent} {number // frames}", set()).add(row["split"])
    return splits


def test_frames_of_one_plant_in_two_splits_are_named_and_group_by_sequence_mends_it(
    set_params: SetParams, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film_plants(project / "images")
    before = index(set_params())
    found = before["health"]["sequences"]
    assert (found["count"], found["images"]) == (12, 60)
    assert found["across_splits"] == sum(len(splits) > 1 for splits in plants_of().values()) > 6
    assert found["test_images"] == sum(row["split"] == "test" for row in by_path().values())
    assert all(row["group"] is None for row in by_path().values())
    said = capsys.readouterr().err
    assert "12 likely sequences hold 60 images" in said
    assert re.search(r"iris/IMG_10\d\d\.jpg to IMG_10\d\d\.jpg \(5\)", said)
    assert "`group_by: sequence` under `dataset` in params.yaml" in said

    after = index(set_params(dataset={"group_by": "sequence"}))
    assert all(len(splits) == 1 for splits in plants_of().values())
    assert set().union(*plants_of().values()) == {"train", "val", "test"}
    assert after["health"]["sequences"] == {"count": 0, "images": 0, "across_splits": 0, "test_images": 0}
    assert after["health"]["groups"] == {"count": 12, "across_splits": 0}
    assert after["health"]["contaminated_test"]["images"] == 0
    assert "likely sequence" not in capsys.readouterr().err
    first = by_path()["tulip/IMG_1000.jpg"]
    assert by_path()["tulip/IMG_1004.jpg"]["group"] == first["group"] == first["image_id"]
    made = Path("data/index/images.parquet").read_bytes()
    index(set_params(dataset={"group_by": "sequence"}))
    assert Path("data/index/images.parquet").read_bytes() == made

    # One frame more goes where its plant is, and no other picture moves.
    split_of = {path: row["split"] for path, row in by_path().items()}
    image = Image.open("images/tulip/IMG_1029.jpg")
    image.rotate(1, Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0))).save("images/tulip/IMG_1030.jpg")
    index(set_params(dataset={"group_by": "sequence"}))
    new = by_path().pop("tulip/IMG_1030.jpg")
    assert new["split"] == split_of["tulip/IMG_1029.jpg"]
    assert {path: row["split"] for path, row in by_path().items() if path in split_of} == split_of


def test_boxes_of_files_that_a_sequence_joins_are_one_group() -> None:
    """Of path, group and sequence: a group that is a file joins others, one that the data name stays as it is."""
    rows = [
        {"path": path, "group": group, "sequence": sequence}
        for path, group, sequence in [
            # Two sequences that meet in b, and what else lies in these files.
            ("a.jpg#1", "a.jpg", "s1"), ("a.jpg#2", "a.jpg", None), ("b.jpg#1", "b.jpg", "s1"),
            ("b.jpg#2", "b.jpg", "s2"), ("c.jpg#1", "c.jpg", "s2"), ("c.jpg#2", "c.jpg", None), ("d.jpg", None, "s2"),
            # Alone; two boxes of one file; a camera's file with another one; two cameras with a file.
            ("e.jpg#1", "e.jpg", None), ("f.jpg#1", "f.jpg", "s3"), ("f.jpg#2", "f.jpg", "s3"),
            ("g.jpg#1", "camera", "s4"), ("h.jpg#1", "h.jpg", "s4"), ("h.jpg#2", "h.jpg", None),
            ("i.jpg#1", "left", "s5"), ("j.jpg#1", "right", "s5"), ("k.jpg#1", "k.jpg", "s5"),
        ]
    ]  # fmt: skip
    group_sequences(rows)
    assert [row["group"] for row in rows] == [
        *["s1"] * 7, "e.jpg", "f.jpg", "f.jpg", *["camera"] * 3, "left", "right", "s5",
    ]  # fmt: skip


def test_times_of_exif_and_manifests_make_sequences(set_params: SetParams, project: Path) -> None:
    """Pictures that look nothing alike, taken seconds apart; a group that the data name takes its sequence with it."""
    lines = ["path,class,group,captured_at"]
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2021:05:03 10:{number // 3:02d}:{5 * (number % 3):02d}"
        path = project / f"images/a/{'qwertyuiopas'[number]}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path, exif=exif)
        captured = "2021-05-03T12:00:05Z" if number in (9, 11) else "2021-05-03" if number == 10 else ""
        lines.append(f"a/{path.name},a,{'bed' if number == 1 else ''},{captured}")
    (project / "manifest.csv").write_text("\n".join(lines))
    index(set_params(dataset={"group_by": "sequence", "val_fraction": 0.4}))
    groups = [by_path()[f"a/{letter}.jpg"]["group"] for letter in "qwertyuiopas"]
    assert [groups[start : start + 3].count(groups[start]) for start in (0, 3, 6, 9)] == [3, 3, 3, 3]
    assert len(set(groups)) == 4
    # What the manifest says goes before the file.
    manifest = {"format": "manifest", "root": "manifest.csv", "images": "images"}
    index(set_params(dataset={**manifest, "group_by": "sequence", "val_fraction": 0.4}))
    groups = [by_path()[f"a/{letter}.jpg"]["group"] for letter in "qwertyuiopas"]
    assert groups[:3] == ["bed"] * 3
    assert groups[9] == groups[11] is not None
    assert groups[10] is None  # a date alone
