import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import forward_sources
from fieldmark.params import Params
from fieldmark.pictures.boxes import cut_windows, grid_cells, in_image
from fieldmark.pictures.views import Source, crop_fraction, view_region
from tests.project import CONV, ROOT, VIT, draw, image_id, save_model, snapshot, unit, write_concepts

SetParams = Callable[..., Params]
RunStage = Callable[..., None]


def buckets_of(name: str = "conv") -> dict[str, tuple[bytes, int]]:
    return snapshot(Path(f"data/embed/{name}/images"))


def contents(files: dict[str, tuple[bytes, int]]) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files.items()}


def read(name: str = "conv", buckets: int = 4) -> pa.Table:
    return store.read_buckets(f"data/embed/{name}/images", "embed.nodes/1", buckets)


@pytest.fixture
def embed(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run index_images and embed_images; return how many images were embedded."""

    def run(name: str = "conv") -> int:
        run_stage("index_images")
        capsys.readouterr()
        run_stage("embed_images", "--encoder", name)
        return int(capsys.readouterr().out.split(": ")[1].split()[0])

    return run


@pytest.mark.slow
def test_a_rule_for_cells_makes_another_encoder_of_one_model(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], run_stage: RunStage,
    models: dict[str, Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a tower beside it, views that are mirrored, texts and tokens."""
    torch.save(torchvision.models.resnet18().state_dict(), "tower.pth")
    towers = {"cnn": {"library": "torchvision", "model": "resnet18", "pretrained": "tower.pth", "image_size": 64}}
    vit = {"model": f"local-dir:{models['vit']}", "batch_size": 4}
    encoders = {"vit": vit, "mine": {**vit, "dense": {"proxy": "cnn"}}}
    params = set_params(
        encoders=encoders, towers=towers, embed={"tokens": True, "grids": [2], "views": 2},
        tokens={"mine": {"layers": ["head"]}},
    )
    assert embed("vit") == embed("mine") == len(dataset)
    one, other = (read(name).to_pandas() for name in ("vit", "mine"))
    assert (one["kind"] == other["kind"]).all()
    assert one["flip"].any()
    vectors = [np.stack(table["vector"]).astype(np.float32) for table in (one, other)]
    whole = (one["kind"] == "global").to_numpy()
    assert np.array_equal(vectors[0][whole], vectors[1][whole])
    assert (vectors[0][~whole] * vectors[1][~whole]).sum(1).min() < 0.99
    # Its rows are those of its passes, on view 0 of a picture.
    encoder = load_encoder("mine", params.encoder("mine"), torch.device("cpu"), params.towers)
    row = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()[0]
    with Image.open(Path("images") / row["path"]) as picture:
        tokens = encoder.embed_images(encoder.preprocess(picture)[None])[1][0].flatten(0, 1).numpy()
    mine = other[(other["image_id"] == row["image_id"]) & (other["view"] == 0) & (other["kind"] == "token")]
    np.testing.assert_allclose(np.stack(mine["vector"]).astype(np.float32), unit(tokens), atol=1e-3)
    # Another run embeds nothing; tokens and texts are of the same encoder.
    assert embed("mine") == 0
    run_stage("embed_tokens", "--encoder", "mine")
    write_concepts([("a forked tail", "a", "visual")])
    no_text = store.make_table("descriptions/1", [])
    store.write_table(no_text, "data/descriptions/descriptions.parquet", "descriptions/1", {}, "none")
    no_cell = store.make_table("descriptions.cells/1", [])
    store.write_table(no_cell, "data/descriptions/cells.parquet", "descriptions.cells/1", {"nodes": []}, "none")
    run_stage("embed_text", "--encoder", "mine")
    folder = Path("data/embed/mine")
    headers = [store.read_folder_header(folder / "images", "embed.nodes/1", 4),
               store.read_folder_header(folder / "tokens", "embed.tokens/1", 4),
               store.read_header(folder / "text.parquet", "embed.text/1")]  # fmt: skip
    assert {header.params["encoder"] for header in headers} == {encoder.fingerprint}
    path = store.bucket_path(folder / "tokens", store.bucket_of(row["image_id"], 4))
    stored = store.read_images(path, "embed.tokens/1", [row["image_id"]]).to_pylist()[0]
    head = np.array(stored["vectors"], dtype=np.float32).reshape(16, -1)
    np.testing.assert_allclose(head @ encoder.model.visual.proj.numpy(), tokens, atol=2e-2)  # type: ignore
    with pytest.raises(UserError, match=r"^--compile: params\.yaml: encoders\.mine\.dense: .*, or use last$"):
        run_stage("embed_images", "--encoder", "mine", "--compile")


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


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_company_and_order_do_not_change_bits(name: str, set_params: SetParams, dataset: list[str]) -> None:
    params = set_params(embed={"views": 1, "grids": [2], "crops": [2]})
    encoder = load_encoder(name, params.encoder(name), torch.device("cpu"))
    product = nodes_of(encoder, params.embed)
    sources = [
        Source(store.sha256(path.read_bytes()), path) for path in sorted(Path("images").glob("*/*/*.png"))[:5]
    ]
    together = list(forward_sources(sources, [product]))
    for order in ([0], [4], [3, 1], [4, 3, 2, 1, 0]):
        for number, (rows,) in zip(order, forward_sources([sources[i] for i in order], [product]), strict=True):
            assert store.image_of(rows) == sources[number].image_id
            assert rows.equals(together[number][0])


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


def test_a_changed_image_embeds_one_and_its_return_restores_the_bytes(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    set_params()
    embed()
    before = contents(buckets_of())
    path = project / "images/train/a/0.png"
    original = path.read_bytes()
    draw(path, 1000)
    touched = {store.bucket_of(store.sha256(content), 4) for content in (original, path.read_bytes())}
    assert embed() == 1
    after = contents(buckets_of())
    assert {int(name[1:4]) for name in after if after[name] != before[name]} == touched
    path.write_bytes(original)
    assert embed() == 1
    assert contents(buckets_of()) == before


def test_another_class_or_split_embeds_nothing(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    set_params()
    embed()
    before = buckets_of()
    (project / "images/train/a/0.png").rename(project / "images/train/b/moved.png")
    assert embed() == 0
    (project / "images/train/b/1.png").rename(project / "images/test/b/moved.png")
    assert embed() == 0
    assert buckets_of() == before


def test_images_more_than_a_row_group_are_merged_in_order(
    set_params: SetParams,
    dataset: list[str],
    embed: Callable[..., int],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 9 nodes an image: every row group ends within one.
    monkeypatch.setattr(store, "ROW_GROUP", 20)
    set_params(dataset={"buckets": 1, "val_fraction": 0.25})
    held = [path for path in (project / "images").glob("train/*/*.png") if path.stem == "1"]
    kept = {path: path.read_bytes() for path in held}
    for path in held:
        path.unlink()
    assert embed() == len(dataset) - len(held)
    fewer = contents(buckets_of())
    for path, content in kept.items():
        path.write_bytes(content)
    assert embed() == len(held)
    bucket = Path("data/embed/conv/images/b000.parquet")
    merged = bucket.read_bytes()
    assert pq.ParquetFile(bucket).num_row_groups == 6
    bucket.unlink()
    assert embed() == len(dataset)
    assert bucket.read_bytes() == merged
    for path in held:
        path.unlink()
    assert embed() == 0
    assert contents(buckets_of()) == fewer


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


# Imports torch once, then runs the stage in a process of its own for each line of arguments: says its id, then how it
# ended. Its output goes to the files `said` and `progress`.
FORKER = """
import os, sys
from stages import embed_images
from fieldmark.command import run

for line in sys.stdin:
    said, progress = (os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("said", "progress"))
    process = os.fork()
    if process == 0:
        os.dup2(said, 1)
        os.dup2(progress, 2)
        sys.argv = ["embed_images", *line.split()]
        try:
            run(embed_images.main)
        except SystemExit as stop:
            sys.stdout.flush()
            # Python's own end takes longer than the work, and nothing is left to kill in it.
            os._exit(stop.code)
    os.close(said)
    os.close(progress)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture
def run_until(project: Path) -> Iterator[Callable[[float], tuple[int, float]]]:
    """Run embed_images in a process, killed so many seconds after it began to embed; its exit code and its time."""
    forker = subprocess.Popen(
        [sys.executable, "-c", FORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert forker.stdin is not None
    assert forker.stdout is not None

    def run(seconds: float) -> tuple[int, float]:
        (project / "progress").unlink(missing_ok=True)
        print("--encoder vit --device cpu", file=forker.stdin, flush=True)
        process = int(forker.stdout.readline())
        while not (project / "progress").stat().st_size:
            time.sleep(0.001)
        started = time.perf_counter()
        ended = threading.Timer(seconds, os.kill, (process, signal.SIGKILL))
        ended.start()
        code = int(forker.stdout.readline())
        ended.cancel()
        return code, time.perf_counter() - started

    yield run
    forker.stdin.close()
    forker.wait()


@pytest.mark.parametrize(
    ("shown", "wanted_kills"),
    [
        ({"views": 3}, 2),
        pytest.param({"views": 3}, 10, marks=pytest.mark.slow),
        pytest.param({"regions": {}}, 10, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_killed_at_any_moment_it_goes_on_where_it_was(
    shown: dict[str, Any],
    wanted_kills: int,
    set_params: SetParams,
    draw_images: Callable[[dict[str, int]], None],
    run_stage: RunStage,
    run_until: Callable[[float], tuple[int, float]],
) -> None:
    """Kills of runs that begin with nothing, and of runs that change what is there."""
    folder = Path("data/embed/vit/images")
    set_params(dataset={"buckets": 16}, embed=shown)

    def run_through() -> tuple[dict[str, bytes], float]:
        run_stage("index_images")
        code, seconds = run_until(600)
        assert code == 0
        return contents(snapshot(folder)), seconds

    draw_images({f"{('train', 'test')[seed % 2]}/a/{seed}.png": seed for seed in range(60)})
    old, _ = run_through()
    for path in Path("images/test/a").glob("*1.png"):
        path.unlink()
    draw_images({f"train/b/{seed}.png": seed for seed in range(60, 90)})
    shutil.rmtree(folder)
    new, seconds = run_through()
    wanted = set(read("vit", 16).column("image_id").to_pylist())

    chance = random.Random(0)
    kills, starts = 0, itertools.cycle([{}, old])
    while kills < wanted_kills:
        start = next(starts)
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in start.items():
            (folder / name).write_bytes(content)
        code = -signal.SIGKILL
        while code:
            before = snapshot(folder)
            done = {name: file for name, file in before.items() if file[0] == new.get(name)}
            held = [pq.read_table(path, columns=["image_id"]) for path in folder.glob("b*")]
            missing = wanted.difference(*(table.column("image_id").to_pylist() for table in held))
            code, _ = run_until(chance.uniform(0, seconds / 2) if kills < wanted_kills else 600)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            after = snapshot(folder)
            # What was finished is not touched; what is there is whole, as it was before or as it should be; what a
            # killed run had begun is removed by the next one.
            assert {name: after[name] for name in done} == done
            assert sum(name.endswith(".partial") for name in after) <= 1
            for name, (content, _) in after.items():
                assert name.endswith(".partial") or content in (new[name], start.get(name))
        assert contents(after) == new
        kept = len(wanted) - len(missing)
        assert Path("said").read_text() == f"{folder}: {len(missing)} images embedded, {kept} kept\n"


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


@pytest.mark.parametrize(
    "change",
    [
        {"views": 1},
        pytest.param({"grids": [1]}, marks=pytest.mark.slow),
        pytest.param({"crops": [2]}, marks=pytest.mark.slow),
        pytest.param({"tokens": False}, marks=pytest.mark.slow),
    ],
    ids=lambda change: str(*change),
)
def test_a_changed_parameter_embeds_all_anew(
    change: dict[str, Any], set_params: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_params()
    embed()
    before = contents(buckets_of())
    set_params(embed=change)
    assert embed() == len(dataset)
    assert embed() == 0
    set_params()
    assert embed() == len(dataset)
    assert contents(buckets_of()) == before


def test_a_changed_encoder_embeds_all_of_its_own_anew(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], models: dict[str, Path], tmp_path: Path
) -> None:
    set_params()
    embed("conv")
    embed("vit")
    before, other = read().column("norm").to_pylist(), buckets_of("vit")
    set_params(encoders={"conv": {"model": f"local-dir:{models['vit']}", "batch_size": 4}})
    assert embed("conv") == len(dataset)
    assert embed("vit") == 0
    assert buckets_of("vit") == other
    assert read().column("norm").to_pylist()[:5] != before[:5]
    # What changes no vector: how many go through at a time, and where the weights lie.
    moved = shutil.copytree(models["vit"], tmp_path / "moved")
    set_params(encoders={"conv": {"model": f"local-dir:{moved}", "batch_size": 3}})
    assert embed("conv") == 0
    weights = load_file(moved / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 0.5
    save_file(weights, moved / "open_clip_model.safetensors")
    assert embed("conv") == len(dataset)
    assert buckets_of("vit") == other


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(
    set_params: SetParams,
    dataset: list[str],
    embed: Callable[..., int],
    run_stage: RunStage,
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def preview(*options: str) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
        capsys.readouterr()
        run_stage("embed_images", "--encoder", "vit", "--dry-run", *options)
        assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before
        return capsys.readouterr().out.splitlines()

    embedding = {"tokens": True, "views": 9, "grids": [1, 2]}
    params = set_params(dataset={"buckets": 1}, embed=embedding)
    # Four batches of 15 passes, 10 an image: a sample of 6.
    encoder = {"model": params.encoder("vit").model, "batch_size": 15}
    set_params(dataset={"buckets": 1}, embed=embedding, encoders={"vit": encoder})
    run_stage("index_images")
    assert re.search(r"; 0:00:\d\d on one, this is on 64 like it\)", preview("--workers", "64")[1])
    head, rate, size, passes = preview()
    assert passes == "forward passes: 10 an image"
    assert head == "data/embed/vit/images: 12 images to embed, 0 kept; 1 buckets to write"
    assert re.fullmatch(r"time: about 0:00:\d\d \(\d+\.\d images/s on (?:cpu|cuda:0), measured with 6 of them\)", rate)
    embed("vit")
    written = Path("data/embed/vit/images/b000.parquet").stat().st_size / 1e6
    told = re.fullmatch(r"on disk: about (\d+\.\d\d) MB, \d+ MB are free", size)
    assert float(told[1]) == pytest.approx(written, rel=0.1)  # type: ignore[index]
    assert preview()[:-1] == ["data/embed/vit/images: 0 images to embed, 12 kept; 0 buckets to write"]
    draw(project / "images/train/a/new.png", 1000)
    run_stage("index_images")
    assert preview()[0] == "data/embed/vit/images: 1 images to embed, 12 kept; 1 buckets to write"
    (project / "images/train/a/new.png").unlink()
    (project / "images/train/a/0.png").unlink()
    run_stage("index_images")
    assert preview()[:-1] == ["data/embed/vit/images: 0 images to embed, 11 kept; 1 buckets to write"]


def test_what_cannot_be_is_one_line(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, embed: Callable[..., int], project: Path
) -> None:
    set_params()
    with pytest.raises(UserError, match=r"data/index/images\.parquet: is missing"):
        run_stage("embed_images", "--encoder", "conv")
    with pytest.raises(UserError, match=r"params\.yaml: .*'reef'; choose one of: conv, vit"):
        run_stage("embed_images", "--encoder", "reef")
    run_stage("index_images")
    with pytest.raises(UserError, match="--device abacus: "):
        run_stage("embed_images", "--encoder", "conv", "--device", "abacus")
    set_params(embed={"grids": [3]})
    with pytest.raises(UserError, match=r"embed\.grids: 3 x 3 is finer than the 2 x 2 tokens"):
        embed()
    assert not list(project.glob("data/embed/**/*.p*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), r"could be read when it was indexed, not now \(No such file or directory\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "has changed since it was indexed"),
        (lambda path: draw(path, 1000), "has changed since it was indexed"),
    ],
    ids=["gone", "cut", "another"],
)
def test_a_file_that_is_not_as_it_was_indexed_is_one_line(
    change: Callable[[Path], object], words: str, set_params: SetParams, dataset: list[str], run_stage: RunStage
) -> None:
    set_params()
    run_stage("index_images")
    change(Path("images/train/a/0.png"))
    with pytest.raises(UserError, match=rf"^images/train/a/0\.png: {words}.*; run index_images again") as error:
        run_stage("embed_images", "--encoder", "conv")
    assert "\n" not in str(error.value)
    assert not list(Path("data").glob("embed/**/.*"))
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "conv")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert set(read().column("image_id").to_pylist()) == {row["image_id"] for row in rows if row["status"] == "ok"}


def test_an_embedding_that_is_no_number_is_told(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "nan", CONV)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.head.proj.weight"].fill_(torch.nan)
    save_file(weights, folder / "open_clip_model.safetensors")
    set_params(encoders={"conv": {"model": f"local-dir:{folder}"}})
    with pytest.raises(UserError, match=r"is 0 or not finite; try encoders\.NAME\.precision"):
        embed()
    assert not list(Path("data").glob("embed/**/*.p*"))


def test_a_cell_in_which_a_tower_sees_nothing_is_zero(
    set_params: SetParams, dataset: list[str], embed: Callable[..., int], project: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "blind", VIT)
    weights = load_file(folder / "open_clip_model.safetensors")
    # Without blocks, positions and biases, a token is a patch's own: a black patch gives 0, and so it stays.
    for name, tensor in weights.items():
        if name.startswith("visual.") and (
            name.endswith(("bias", "out_proj.weight", "c_proj.weight")) or "positional" in name
        ):
            tensor.zero_()
    save_file(weights, folder / "open_clip_model.safetensors")
    half = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    half[:, 16:] = 0
    path = project / "images/train/a/half.png"
    Image.fromarray(half).save(path)
    # Black is 0 to the encoder, exactly on every device: a GPU divides by multiplying.
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.0] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    set_params(encoders={"vit": {"model": f"local-dir:{folder}", "batch_size": 4}}, embed={"grids": [2]})
    embed("vit")
    name = store.sha256(path.read_bytes())
    rows = [row for row in read("vit").to_pylist() if row["image_id"] == name]
    assert {row["kind"] for row in rows} == {"global", "token", "grid"}
    for row in rows:
        blind = row["kind"] != "global" and row["x0"] >= 0.5
        length = float(np.linalg.norm(np.array(row["vector"], dtype=np.float32)))
        assert length == (0 if blind else pytest.approx(1, abs=2e-3))
        assert (row["norm"] == 0) == blind
