"""Rows of the index whose picture is a box of a file, held against files of what lies in these boxes."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.llm.pictures import data_url
from fieldmark.params import Embed, Params
from fieldmark.pictures.boxes import region_of
from fieldmark.pictures.cuts import cut_path, file_of, image_id_of, is_cut, object_of, part_of, place_of
from fieldmark.pictures.decode import BadImage, open_part
from fieldmark.pictures.views import Source, prepare, read_sources
from stages.index_images import check_stated
from stages.label_patches import read_objects
from tests.project import draw
from tools.exports.dataset import read_picture
from tools.prediction.pictures import Views, look, read_question, thumbnail

# File, ID, class and box in shares of 80 x 60 pixels, at whole pixels.
ROWS = [
    ("0.png", "7", "a", (0.1, 0.2, 0.6, 0.7)),
    ("0.png", "8", "b", (0.5, 0.5, 1.0, 1.0)),
    ("1.png", "9", "a", (0.0, 0.0, 0.5, 1.0)),
    ("1.png", "10", "b", (0.25, 0.5, 1.0, 1.0)),
    ("2.png", "11", "a", (0.25, 0.25, 0.75, 0.75)),
    ("2.png", "12", "b", (0.0, 0.5, 0.5, 1.0)),
]
SPLITS = ["train", "train", "val", "val", "test", "test"]


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("a.jpg#1", "a.jpg"),
        ("x/a#2.jpg#b-3_c", "x/a#2.jpg"),
        ("file#%2E", "file"),
        ("a#1.jpg", None),
        ("a#b/c", None),
        ("#1", None),
        ("a.jpg#", None),
        ("a", None),
    ],
)
def test_what_names_a_box_of_a_file(path: str, file: str | None) -> None:
    assert is_cut(path) == (file is not None)
    assert file_of(path) == (file or path)
    box = [0.0, 0.0, 0.5, 1.0]
    assert part_of(path, box) == (tuple(box) if file else None)
    assert object_of(path, box) == (None if file else tuple(box))
    assert place_of(Path("f"), path, box) == (Path("f", file or path), tuple(box) if file else None)


def test_an_id_is_written_so_that_it_is_found_again() -> None:
    assert cut_path("a.jpg", 12) == "a.jpg#12"
    assert cut_path("a.jpg", "x/1.5#%") == "a.jpg#x%2F1%2E5%23%25"
    assert file_of(cut_path("a.jpg", "x/1.5#%")) == "a.jpg"


def test_an_image_id_is_of_the_file_and_of_the_box_as_stored() -> None:
    assert image_id_of("d" * 64, None) == "d" * 64
    box = (0.1, 0.2, 0.7, 0.9)
    stored = tuple(map(float, np.array(box, dtype=np.float32)))
    assert stored != box
    assert image_id_of("d" * 64, box) == image_id_of("d" * 64, stored) != image_id_of("e" * 64, box)
    assert image_id_of("d" * 64, box) != image_id_of("d" * 64, (0.1, 0.2, 0.7, 0.8))


def test_a_part_of_a_jpeg_keeps_the_pixels_that_are_asked_for() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((800, 600), Image.Resampling.BICUBIC).save(file, "JPEG")
    part = (0.5, 0.25, 0.75, 0.75)  # 200 x 300 pixels
    for side, size in ((None, (200, 300)), (75, (100, 150)), (76, (200, 300)), (25, (50, 75))):
        file.seek(0)
        image, true = open_part(file, part, *([side] if side else []))
        assert true == (200, 300)
        assert image.size == size


def test_a_part_is_a_pixel_at_least() -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    file.seek(0)
    image, true = open_part(file, (0.999, 0.0, 1.0, 1e-9), 10)
    assert image.size == true == (1, 1)


def write_both(project: Path) -> None:
    """images/ with three files and a manifest of boxes of them; crops/ with a file for each box and its manifest."""
    lines, own = ["path,class,split,box"], ["path,class,split"]
    (project / "crops").mkdir()
    for number in range(3):
        draw(project / f"images/{number}.png", number)
    for (file, number, name, box), split in zip(ROWS, SPLITS, strict=True):
        with Image.open(project / "images" / file) as image:
            image.crop(region_of(box, image.size)).save(project / f"crops/{number}.png")
        lines.append(f"{file}#{number},{name},{split},{' '.join(map(str, box))}")
        own.append(f"{number}.png,{name},{split}")
    (project / "images/manifest.csv").write_text("\n".join(lines))
    (project / "crops/manifest.csv").write_text("\n".join(own))


def test_every_stage_sees_what_lies_in_the_box(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_both(project)
    found = {}
    for root in ("images", "crops"):
        set_params(
            dataset={"format": "manifest", "root": root},
            embed={"grids": [2], "regions": {"object": "box", "crops": "grid"}},
        )
        run_stage("index_images")
        run_stage("embed_images", "--encoder", "conv")
        rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
        assert {row["status"] for row in rows} == {"ok"}
        nodes: dict[str, list[tuple[object, ...]]] = {}
        for bucket in range(4):
            table = store.read_table(f"data/embed/conv/images/b{bucket:03d}.parquet", "embed.nodes/1")
            for row in table.sort_by([("image_id", "ascending"), ("node", "ascending")]).to_pylist():
                said = (row["kind"], *(row[side] for side in ("x0", "y0", "x1", "y1")), *row["vector"])
                nodes.setdefault(row["image_id"], []).append(said)
            webp = store.read_table(f"data/thumbs/b{bucket:03d}.parquet", "thumbs/1").to_pylist()
            for row in webp:
                nodes[row["image_id"]].append((row["webp"],))
        key = {row["image_id"]: row["path"].rpartition("#")[2].removesuffix(".png") for row in rows}
        found[root] = {
            key[row["image_id"]]: (row["width"], row["height"], row["dhash"], nodes[row["image_id"]]) for row in rows
        }
    assert len(found["crops"]) == 6
    assert found["images"] == found["crops"]


def test_a_file_that_changed_is_not_taken_for_the_indexed_one(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_both(project)
    params = set_params(dataset={"format": "manifest", "root": "images"})
    run_stage("index_images")
    sources = {source.part: source for source in read_sources(params.dataset.folder)}
    source = sources[tuple(map(float, np.array(ROWS[0][3], dtype=np.float32)))]  # type: ignore[index]
    assert (source.path, source.box, source.size) == (Path("images/0.png"), None, (40, 30))
    encoder = load_encoder("vit", params.encoders["vit"], torch.device("cpu"))
    [view] = prepare(source, encoder, Embed())
    assert view.image_id == source.image_id
    with pytest.raises(UserError, match=r"0\.png: has changed since it was indexed"):
        prepare(source._replace(part=(0.0, 0.0, 0.5, 0.5)), encoder, Embed())


def test_a_mark_without_a_box_is_refused_and_a_missing_file_is_a_row(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_both(project)
    set_params(dataset={"format": "manifest", "root": "images"})
    manifest = project / "images/manifest.csv"
    content = manifest.read_text()
    manifest.write_text(f"{content}\n3.png#1,a,train,0 0 1 1")
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert (rows["3.png#1"]["status"], rows["3.png#1"]["image_id"]) == ("broken", None)
    assert "No such file" in rows["3.png#1"]["error"]
    manifest.write_text(f"{content}\n0.png#3,a,train,")
    with pytest.raises(UserError, match=r"'0\.png#3' names a box of a file by its `#`, and has none") as error:
        run_stage("index_images")
    assert "\n" not in str(error.value)


def test_boxes_of_a_file_are_duplicates_where_they_are_one_box(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_both(project)
    manifest = project / "images/manifest.csv"
    same = "0.1 0.2 0.6 0.7"
    manifest.write_text(f"{manifest.read_text()}\n0.png#70,a,train,{same}\n1.png#90,b,train,0 0 0.5 1")
    set_params(dataset={"format": "manifest", "root": "images"})
    run_stage("index_images")
    rows = {row["path"]: row for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()}
    assert (rows["0.png#7"]["status"], rows["0.png#70"]["status"]) == ("ok", "duplicate")
    assert rows["0.png#70"]["duplicate_of"] == "0.png#7"
    assert rows["1.png#9"]["status"] == rows["1.png#90"]["status"] == "conflict"


def test_a_file_of_another_shape_than_its_table_says_is_broken() -> None:
    for size in ((640, 480), (320, 240), (321, 240), (1280, 961)):
        check_stated((640, 480), size)
    check_stated(None, (1, 1))
    for size in ((480, 640), (640, 640), (100, 80)):
        with pytest.raises(BadImage, match="the table of its boxes says 640 x 480"):
            check_stated((640, 480), size)


def test_what_is_sent_to_a_model_and_what_is_exported_is_the_part(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_both(project)
    params = set_params(dataset={"format": "manifest", "root": "images"})
    run_stage("index_images")
    for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist():
        with Image.open(project / f"crops/{row['path'].partition('#')[2]}.png") as image:
            image.load()
        exported = Image.open(io.BytesIO(read_picture(params.dataset.folder, row)))
        assert np.array_equal(np.asarray(exported), np.asarray(image))
        url = data_url(place_of(params.dataset.folder, row["path"], row["box"]), 512, 95)
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert sent.size == image.size
        assert np.abs(np.asarray(sent, dtype=float) - np.asarray(image, dtype=float)).mean() < 20
        with pytest.raises(UserError, match="is not the file that was indexed"):
            read_picture(params.dataset.folder, row | {"box": [0.0, 0.0, 0.3, 0.3]})


def test_labels_know_no_object_within_a_part(
    project: Path, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    """A box that says which part of a file is the picture is not the box of an object in it."""
    write_both(project)
    set_params(dataset={"format": "manifest", "root": "images"})
    manifest = project / "images/manifest.csv"
    manifest.write_text(f"{manifest.read_text()}\n2.png,a,train,0 0 0.5 0.5")
    run_stage("index_images")
    table = store.read_table("data/index/images.parquet", "index.images/1")
    with_object = read_objects()
    assert with_object.column("path").to_pylist() == ["2.png"]
    assert len(table) == 7


def test_a_run_is_asked_about_boxes_of_files(project: Path) -> None:
    write_both(project)
    question = read_question("images/manifest.csv")

    def prepare_one(file: io.BufferedReader, source: Source) -> Views:
        seen.append((source.path.as_posix(), source.part, source.box))
        return ()

    seen: list[tuple[str, Any, None]] = []
    looked = list(look(question, (), prepare_one, ahead=1))  # type: ignore[arg-type]
    # As the index stores them: the pictures that the run was trained on were cut so.
    stored = {box: tuple(np.float32(box).tolist()) for _, _, _, box in ROWS}
    assert sorted(seen) == sorted((f"images/{file}", stored[box], None) for file, _, _, box in ROWS)
    digest = store.sha256((project / "images/0.png").read_bytes())
    assert looked[0].image_id == image_id_of(digest, ROWS[0][3])
    for each, (_, number, _, _) in zip(looked, ROWS, strict=True):
        webp = thumbnail(question, each.picture)
        with Image.open(project / f"crops/{number}.png") as image:
            assert webp is not None
            assert Image.open(io.BytesIO(webp)).size == image.size
