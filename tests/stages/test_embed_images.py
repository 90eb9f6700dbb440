import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from stages import embed_images, store
from stages.clip import load_encoder
from stages.command import UserError
from stages.embed_images import crop_fraction, cut_windows, grid_cells, in_image, view_region
from stages.params import Params
from tests.stages.project import CONV, draw, image_id, save_model, snapshot, unit

SetParams = Callable[..., Params]
RunStage = Callable[..., None]


def buckets_of(name: str = "conv") -> dict[str, tuple[bytes, int]]:
    return snapshot(Path(f"data/embed/{name}/images"))


def contents(files: dict[str, tuple[bytes, int]]) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files.items()}


def read(name: str = "conv") -> pa.Table:
    return store.read_buckets(f"data/embed/{name}/images", "embed.nodes/1", 4)


@pytest.fixture
def embed(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run index_images and embed_images; return how many images were embedded."""

    def run(name: str = "conv") -> int:
        run_stage("index_images")
        capsys.readouterr()
        run_stage("embed_images", "--encoder", name)
        return int(capsys.readouterr().out.split(": ")[1].split()[0])

    return run


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_nodes_of_a_picture(
    name: str, set_params: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    params = set_params(embed={"tokens": True, "grids": [1, 2], "crops": [2], "views": 1})
    assert embed(name) == len(dataset)
    table = read(name)
    side = {"conv": 2, "vit": 4}[name]
    kinds = ["global"] + ["token"] * side**2 + ["grid"] * (1 + 4) + ["crop"] * 4
    assert len(table) == len(dataset) * 2 * len(kinds)
    assert table.column("kind").to_pylist() == kinds * 2 * len(dataset)
    assert table.column("node").to_pylist() == list(range(len(kinds))) * 2 * len(dataset)
    assert table.column("view").to_pylist() == ([0] * len(kinds) + [1] * len(kinds)) * len(dataset)
    vectors = store.vectors_of(table).astype(np.float32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=2e-3)

    # One picture by hand: 80 x 60, of which the encoder sees the middle 60 x 60.
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    encoder = load_encoder(name, params.encoder(name), torch.device("cpu"))
    row = index[0]
    rows = table.filter(pa.compute.equal(table["image_id"], row["image_id"])).to_pylist()[: len(kinds)]
    with Image.open(Path("images") / row["path"]) as picture:
        pixels = [encoder.preprocess(picture)]
        for top, left in itertools.product((0, 30), (10, 40)):
            pixels.append(encoder.preprocess(picture.crop((left, top, left + 30, top + 30))))
    pooled, tokens = encoder.embed_images(torch.stack(pixels[:4]))
    last, _ = encoder.embed_images(torch.stack(pixels[4:]))
    grid = F.avg_pool2d(tokens[0].permute(2, 0, 1), side // 2).flatten(1).T
    expected = torch.cat(
        [pooled[:1], tokens[0].reshape(-1, 16), tokens[0].mean(dim=(0, 1))[None], grid, pooled[1:], last]
    )
    assert [each["norm"] for each in rows] == pytest.approx(expected.norm(dim=1).tolist(), rel=1e-4)
    np.testing.assert_allclose(
        np.array([each["vector"] for each in rows], dtype=np.float32), unit(expected.numpy()), atol=1e-3
    )

    corners = [[each[corner] for corner in ("x0", "y0", "x1", "y1")] for each in rows]
    quarters = [[0.125, 0, 0.5, 0.5], [0.5, 0, 0.875, 0.5], [0.125, 0.5, 0.5, 1], [0.5, 0.5, 0.875, 1]]
    assert corners[0] == corners[1 + side**2] == [0.125, 0, 0.875, 1]
    np.testing.assert_allclose(corners[-8:], quarters * 2, atol=1e-7)
    step = 0.75 / side
    np.testing.assert_allclose(corners[1], [0.125, 0, 0.125 + step, 1 / side], atol=1e-7)
    np.testing.assert_allclose(corners[side], [0.875 - step, 0, 0.875, 1 / side], atol=1e-7)
    assert not any(each["flip"] for each in rows)


def test_views_lie_in_the_picture_and_some_are_flipped(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_params(embed={"tokens": False, "grids": [2], "views": 3})
    embed()
    flips = set()
    for row in read().to_pylist():
        assert 0 <= row["x0"] < row["x1"] <= 1
        assert 0 <= row["y0"] < row["y1"] <= 1
        flips.add((row["view"] > 0, row["flip"]))
    assert flips == {(False, False), (True, False), (True, True)}


def test_a_flipped_view_keeps_the_boxes_on_what_they_show(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    """A picture that is dark but for one corner: the token that differs from the others has the box of that corner."""
    path = project / "images/train/a/0.png"
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:20, :20] = 255
    # image_id is the hash of the bytes: padding is searched until view 1 is flipped and shows most of the picture.
    for shade in range(200):
        pixels[-1, -1] = shade % 4, shade // 4, 0
        Image.fromarray(pixels).save(path)
        name = store.sha256(path.read_bytes())
        (left, top, right, _), flip = view_region(name, 1, 64, 64)
        if flip and left < 4 and top < 4 and right - left > 55:
            break
    else:
        pytest.fail("no picture has such a view")
    set_params(embed={"tokens": True, "grids": [], "views": 1})
    embed("vit")
    rows = [row for row in read("vit").to_pylist() if row["image_id"] == name and row["kind"] == "token"]
    for view in (0, 1):
        tokens = [row for row in rows if row["view"] == view]
        vectors = np.array([row["vector"] for row in tokens], dtype=np.float32)
        lit = tokens[int((vectors @ np.median(vectors, axis=0)).argmin())]
        assert lit["flip"] == (view == 1)
        assert lit["x1"] < 0.45
        assert lit["y1"] < 0.45


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
        lambda size: st.tuples(st.just(size), st.integers(1, size[0]), st.integers(1, size[1]))
    ),
    st.booleans(),
)
def test_a_cell_covers_the_tokens_that_are_pooled_into_it(
    case: tuple[tuple[int, int], int, int], flip: bool
) -> None:
    (height, width), rows, columns = case
    box = (0.25, 0.0, 0.75, 1.0)
    cells = grid_cells(box, height, width, rows, columns, flip=flip)
    tokens = grid_cells(box, height, width, height, width, flip=flip)
    assert len(cells) == rows * columns
    # Row t of the pooled identity: which tokens go into each cell.
    pooled = F.adaptive_avg_pool2d(
        torch.eye(height * width).reshape(-1, height, width), (rows, columns)
    ).flatten(1)
    for cell, (x0, y0, x1, y1) in enumerate(cells):
        for token, (a0, b0, a1, b1) in enumerate(tokens):
            inside = x0 - 1e-9 <= a0 and a1 <= x1 + 1e-9 and y0 - 1e-9 <= b0 and b1 <= y1 + 1e-9
            assert inside == bool(pooled[token, cell] > 0)


def test_cells_of_sizes_that_do_not_divide() -> None:
    halves = grid_cells((0, 0, 1, 1), 1, 3, 1, 2, flip=False)
    np.testing.assert_allclose(halves, [(0, 0, 2 / 3, 1), (1 / 3, 0, 1, 1)])
    thirds = grid_cells((0, 0, 1, 1), 1, 3, 1, 3, flip=True)
    np.testing.assert_allclose(thirds, [(2 / 3, 0, 1, 1), (1 / 3, 0, 2 / 3, 1), (0, 0, 1 / 3, 1)])


def test_windows() -> None:
    quarters = [(0.25, 0, 0.5, 0.5), (0.5, 0, 0.75, 0.5), (0.25, 0.5, 0.5, 1), (0.5, 0.5, 0.75, 1)]
    assert cut_windows((0.25, 0, 0.75, 1), 2) == quarters
    assert in_image((0.5, 0, 1, 0.5), (20, 10, 60, 50), (80, 100)) == (0.5, 0.1, 0.75, 0.3)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
def test_every_window_has_a_pixel(width: int, height: int, count: int) -> None:
    for window in cut_windows((0, 0, 1, 1), count):
        cut = crop_fraction(Image.new("L", (width, height), 9), window)
        assert cut.width >= 1
        assert cut.height >= 1
        assert np.asarray(cut).min() == 9


@given(st.integers(0, 10**6).map(image_id), st.integers(1, 16), st.integers(1, 500), st.integers(1, 500))
def test_a_view_is_a_square_of_half_to_all_of_the_largest(
    name: str, number: int, width: int, height: int
) -> None:
    (left, top, right, bottom), flip = view_region(name, number, width, height)
    side = min(width, height)
    assert right - left == bottom - top
    assert round(side * 0.5**0.5) <= right - left <= side
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert ((left, top, right, bottom), flip) == view_region(name, number, width, height)
    assert view_region(name, 0, width, height) == ((0, 0, width, height), False)


def test_one_image_more_embeds_one_and_changes_one_bucket(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    set_params(embed={"views": 1, "crops": [2]})
    assert embed() == len(dataset)
    before = buckets_of()
    assert embed() == 0
    assert buckets_of() == before
    new = draw(project / "images/train/a/new.png", 1000)
    assert embed() == 1
    after = buckets_of()
    bucket = store.bucket_path("", store.bucket_of(store.sha256(new.read_bytes()), 4)).name
    assert [name for name in after if after[name] != before[name]] == [bucket]
    # As if it had been made at once.
    for path in project.glob("data/embed/conv/images/*"):
        path.unlink()
    assert embed() == len(dataset) + 1
    assert contents(buckets_of()) == contents(after)
    new.unlink()
    assert embed() == 0
    assert contents(buckets_of()) == contents(before)


def test_paths_and_batches_do_not_change_bytes(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    set_params()
    embed()
    before = contents(buckets_of())
    for path in (project / "images").glob("*/*/*.png"):
        path.rename(path.with_name(f"z{9 - int(path.stem)}.png"))
    for path in project.glob("data/embed/conv/images/*"):
        path.unlink()
    embed()
    assert contents(buckets_of()) == before


def test_bad_images_are_left_out(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    (project / "images/train/a/broken.png").write_bytes(b"")
    (project / "images/train/a/same.png").write_bytes((project / "images" / dataset[0]).read_bytes())
    set_params()
    assert embed() == len(dataset)


def test_an_empty_bucket_is_a_file(
    set_params: SetParams, draw_images: Callable[[dict[str, int]], None], embed: Callable[..., int]
) -> None:
    draw_images({"train/a/0.png": 0, "val/a/0.png": 1, "test/a/0.png": 2})
    set_params()
    assert embed() == 3
    assert len(buckets_of()) == 4
    table = read()
    assert len(table) == 3 * 9
    assert store.vectors_of(table).shape == (27, 16)


def test_strays_of_a_killed_run_or_another_count_go(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_params()
    embed()
    before = contents(buckets_of())
    Path("data/embed/conv/images/.b000.parquet.1.partial").write_bytes(b"half")
    set_params(dataset={"buckets": 2})
    embed()
    assert len(buckets_of()) == 2
    set_params()
    embed()
    assert contents(buckets_of()) == before


def test_a_corrupt_bucket_is_told(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_params()
    embed()
    path = Path("data/embed/conv/images/b001.parquet")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"data/embed/conv/images/b001\.parquet: is not readable Parquet"):
        embed()


def test_another_encoder_embeds_all_anew(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], models: dict[str, Path]
) -> None:
    set_params()
    embed()
    before = read().column("norm").to_pylist()
    set_params(encoders={"conv": {"model": f"local-dir:{models['vit']}", "batch_size": 4}})
    assert embed() == len(dataset)
    assert read().column("norm").to_pylist()[:5] != before[:5]
    set_params(encoders={"conv": {"model": f"local-dir:{models['vit']}", "batch_size": 3}})
    assert embed() == 0
    set_params(
        embed={"grids": [1]}, encoders={"conv": {"model": f"local-dir:{models['vit']}", "batch_size": 4}}
    )
    assert embed() == len(dataset)


def test_what_cannot_be_is_one_line(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, embed: Callable[..., int], project: Path
) -> None:
    set_params()
    with pytest.raises(UserError, match=r"data/index/images\.parquet: is missing"):
        run_stage("embed_images", "--encoder", "conv")
    with pytest.raises(UserError, match=r"params\.yaml: encoders\.reef: .*conv, vit"):
        run_stage("embed_images", "--encoder", "reef")
    run_stage("index_images")
    with pytest.raises(UserError, match="--device abacus: "):
        run_stage("embed_images", "--encoder", "conv", "--device", "abacus")
    set_params(embed={"grids": [3]})
    with pytest.raises(UserError, match=r"embed\.grids: 3 x 3 is finer than the 2 x 2 tokens"):
        embed()
    assert not list(project.glob("data/embed/**/*.p*"))
    (project / "images/train/a/0.png").write_bytes(b"no longer a picture")
    set_params()
    with pytest.raises(UserError, match=r"images/train/a/0\.png: could be read when it was indexed"):
        run_stage("embed_images", "--encoder", "conv")


def test_an_embedding_that_is_no_number_is_told(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "nan", CONV)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.head.proj.weight"].fill_(torch.nan)
    save_file(weights, folder / "open_clip_model.safetensors")
    set_params(encoders={"conv": {"model": f"local-dir:{folder}"}})
    with pytest.raises(UserError, match=r"not finite; try encoders\.NAME\.precision"):
        embed()
    assert not list(Path("data").glob("embed/**/*.p*"))


def test_the_zoo_of_orientations_embeds_alike(
    set_params: SetParams, project: Path, embed: Callable[..., int]
) -> None:
    chance = np.random.default_rng(0)
    upright = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (80, 60), Image.Resampling.BICUBIC
    )
    stored = (
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    )
    (project / "images/train/a").mkdir(parents=True)
    for orientation, method in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = upright if method is None else upright.transpose(method)
        picture.save(project / f"images/train/a/{orientation}.jpg", exif=exif, quality=95)
    draw(project / "images/test/a/0.png", 5)
    set_params()
    embed()
    table = read()
    vectors = store.vectors_of(table).astype(np.float32)[np.array(table.column("node")) == 0]
    train = {
        row["image_id"]
        for row in store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
        if row["path"].startswith("train")
    }
    ids = [
        each
        for each, node in zip(table["image_id"].to_pylist(), table["node"].to_pylist(), strict=True)
        if node == 0
    ]
    same = vectors[[each in train for each in ids]]
    assert len(same) == 8
    assert (same @ same.T).min() > 0.999


def test_memory_does_not_hold_what_is_kept(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a bucket are read when it is written, not all at the start."""
    set_params()
    embed()
    for number in range(8):
        draw(Path("images/train/a") / f"new{number}.png", 100 + number)
    events: list[str] = []
    read_images, write_table = store.read_images, store.write_table

    def note_read(path: Any, *rest: Any) -> Any:
        events.append("read")
        return read_images(path, *rest)

    def note_write(table: Any, path: Any, schema: str, *rest: Any) -> None:
        events.append("write")
        write_table(table, path, schema, *rest)

    monkeypatch.setattr(store, "read_images", note_read)
    monkeypatch.setattr(store, "write_table", note_write)
    params = set_params()
    sources = [
        embed_images.Source(store.sha256(path.read_bytes()), path)
        for path in Path("images").glob("*/*/*.png")
    ]
    encoder = load_encoder("conv", params.encoder("conv"), torch.device("cpu"))
    assert embed_images.embed(sources, encoder, params.embed, Path("data/embed/conv/images"), 4) == 8
    assert events.count("write") > 1
    assert all(pair != ("read", "read") for pair in itertools.pairwise(events))
