"""embed_images with `embed.regions`: the object and its crops are what their boxes say, and nothing else changes."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import Clock, CpuSlots, forward_sources, forward_views
from fieldmark.params import Embed, Params, Regions, load_params
from fieldmark.pictures import views
from fieldmark.pictures.regions import activation, best_windows, find_object, grow_square
from fieldmark.pictures.views import Source, View, count_passes, crop_fraction, prepare, view_region
from tests.project import draw, snapshot, unit

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"map": "similarity"},
    {"map": "attention"},
    {"crops": "grid"},
    {"crops": "random"},
    {"object": "box"},
    {"object": "whole", "crops": "grid", "sides": [0.5]},
    {"object": "whole", "crops": "random", "sides": [], "count": []},
]


def contents() -> dict[str, bytes]:
    return {name: content for name, (content, _) in snapshot(Path("data/embed/vit/images")).items()}


def read() -> pa.Table:
    return store.read_buckets("data/embed/vit/images", "embed.nodes/1", 4)


@pytest.fixture
def embed(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """Run index_images and embed_images; return how many images were embedded."""

    def run() -> int:
        run_stage("index_images")
        capsys.readouterr()
        run_stage("embed_images", "--encoder", "vit")
        return int(capsys.readouterr().out.split(": ")[1].split()[0])

    return run


def sources(count: int = 5) -> list[Source]:
    paths = sorted(Path("images").glob("*/*/*.png"))[:count]
    return [Source(store.sha256(path.read_bytes()), path, (0.1, 0.2, 0.6, 0.9)) for path in paths]


def rows_of(params: Params, sources: list[Source]) -> list[pa.Table]:
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    return [rows for rows, in forward_sources(sources, [nodes_of(encoder, params.embed)])]


def test_object_and_crops_by_hand(set_params: SetParams, dataset: list[str]) -> None:
    """One picture, 80 x 60, of which the encoder sees the middle 60 x 60, step by step."""
    params = set_params(embed={"tokens": True, "grids": [2], "crops": [2], "regions": {}})
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    [source] = sources(1)
    rows = rows_of(params, [source])[0].to_pylist()
    kinds = ["global", "object"] + ["token"] * 16 + ["grid"] * 4 + ["crop"] * (4 + 7)
    assert [row["kind"] for row in rows] == kinds
    assert [row["node"] for row in rows] == list(range(len(kinds)))

    def look(*cuts: Image.Image) -> list[tuple[torch.Tensor, ...]]:
        pixels = torch.stack([encoder.preprocess(cut) for cut in cuts])
        return [each for part in pixels.split(4) for each in zip(*encoder.embed_images(part), strict=True)]

    with Image.open(source.path) as picture:
        [whole] = look(picture)
        seen = (0.125, 0, 0.875, 1)
        place = grow_square(find_object(activation("norm", whole), seen), 80, 60)
        [of_object] = look(crop_fraction(picture, place))
        windows = best_windows(activation("norm", of_object), place, place, Regions())
        of_crops = look(*(crop_fraction(picture, window) for window in windows))
    expected = [(1, place, of_object), *zip(range(26, 33), windows, of_crops, strict=True)]
    for node, box, (vector, _) in expected:
        row = rows[node]
        assert [row[side] for side in ("x0", "y0", "x1", "y1")] == pytest.approx(box, abs=1e-6)
        np.testing.assert_allclose(np.float32(row["vector"]), unit(vector.numpy()), atol=1e-3)


@pytest.mark.parametrize(
    "regions",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in SETTINGS[1:-1]), SETTINGS[-1]],
    ids=str,
)
def test_company_order_and_threads_do_not_change_bits(
    regions: dict[str, Any], set_params: SetParams, dataset: list[str]
) -> None:
    params = set_params(embed={"views": 1, "tokens": False, "grids": [2], "regions": regions})
    together = rows_of(params, sources())
    nodes = count_passes(params.embed) // 2 + 4
    assert {len(rows) for rows in together} == {2 * nodes}
    for order in ([0], [4, 2]):
        alone = rows_of(params, [sources()[number] for number in order])
        assert all(rows.equals(together[number]) for rows, number in zip(alone, order, strict=True))
    # As on a GPU: passes run in a thread, some batches ahead.
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    product, ahead = nodes_of(encoder, params.embed), CpuSlots(torch.device("cuda"), 1)
    prepared = [view for source in sources() for view in prepare(source, encoder, params.embed)]
    found = [each for part in forward_views(prepared, product, ahead, Clock()) for each in zip(*part, strict=True)]
    made = [product.rows([view], [passes]) for view, passes in found]
    assert pa.concat_tables(made).cast(product.columns).equals(pa.concat_tables(together))
    for row in made[0].to_pylist():
        assert 0 <= row["x0"] < row["x1"] <= 1
        assert 0 <= row["y0"] < row["y1"] <= 1


def lit(view: View, top: int, left: int) -> tuple[torch.Tensor, ...]:
    """What a pass gives, 4 x 4 cells, of which 2 x 2 are lit, as they lie in a view that is not mirrored."""
    tokens = torch.zeros(4, 4, 3)
    tokens[top : top + 2, left : left + 2] = 1
    return torch.ones(3), tokens.flip(1) if view.flip else tokens


def test_a_mirrored_view_shows_what_its_boxes_say(set_params: SetParams, project: Path) -> None:
    encoder = load_encoder("vit", set_params().encoder("vit"), torch.device("cpu"))
    path = project / "a.png"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(path)
    source = Source(store.sha256(path.read_bytes()), path)
    flips = Counter[bool]()
    for view in prepare(source, encoder, Embed(views=8, regions=Regions(sides=[0.5], count=[1]))):
        region, _ = view_region(source.image_id, view.number, 64, 64)
        cut, side = picture.crop(region), region[2] - region[0]
        assert len(view.pixels) == 1
        assert view.further is not None
        found = [lit(view, 1, 2)]
        # The middle of the right half, then the lower left quarter of that.
        shown = [(0.5, 0.25, 1.0, 0.75), (0.5, 0.5, 0.75, 0.75)]
        for number, window in enumerate(shown):
            view = view.further(found)
            expected = crop_fraction(cut, window)
            if view.flip:
                expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert torch.equal(view.pixels, encoder.preprocess(expected)[None])
            box = [(region[axis % 2] + side * window[axis]) / 64 for axis in range(4)]
            assert view.boxes[1 + number] == pytest.approx(box)
            found.append(lit(view, 2, 0))
            assert (view.further is None) == (number == 1)
            if view.further is None:
                break
        flips[view.flip] += 1
    assert min(flips.values()) > 1


def test_the_box_of_the_data_is_the_object(
    set_params: SetParams, run_stage: RunStage, embed: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(4):
        draw(Path(f"pictures/{seed}.png"), seed)

    def write(first: str) -> None:
        lines = ["path,class,split,box", f"0.png,a,train,{first}", "1.png,b,val,", "2.png,a,test,", "3.png,b,test,"]
        Path("list.csv").write_text("\n".join(lines) + "\n")

    write("0.5 0.25 0.75 0.75")
    params = set_params(
        dataset={"format": "manifest", "root": "list.csv", "images": "pictures", "buckets": 1, "val_fraction": 0.5},
        embed={"tokens": False, "grids": [], "regions": {"object": "box", "crops": "grid"}},
    )
    assert embed() == 4

    def objects() -> dict[str, list[float]]:
        found = store.read_buckets("data/embed/vit/images", "embed.nodes/1", 1)
        rows = found.filter(pc.field("kind") == "object").to_pylist()
        index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
        paths = {row["image_id"]: row["path"] for row in index}
        return {paths[row["image_id"]]: [row[side] for side in ("x0", "y0", "x1", "y1")] for row in rows}

    before = contents()
    # 20 x 30 pixels of 80 x 60, as the square of 30; of those without a box the middle square of the whole.
    assert objects()["0.png"] == pytest.approx([0.4375, 0.25, 0.8125, 0.75])
    assert objects()["1.png"] == [0.125, 0, 0.875, 1]
    assert params.embed.regions is not None
    assert embed() == 0
    # A box that was corrected is embedded anew, and only that; undone, the bytes are back.
    write("0.5 0.5 0.75 1")
    assert embed() == 1
    assert objects()["0.png"] == pytest.approx([0.4375, 0.5, 0.8125, 1])
    write("0.5 0.25 0.75 0.75")
    assert embed() == 1
    assert contents() == before


def test_one_image_more_embeds_one_and_changes_one_bucket(
    set_params: SetParams, dataset: list[str], embed: Callable[[], int], project: Path
) -> None:
    set_params(embed={"views": 1, "regions": {}})
    assert embed() == len(dataset)
    before = contents()
    new = draw(project / "images/train/a/new.png", 1000)
    assert embed() == 1
    after = contents()
    bucket = store.bucket_path("", store.bucket_of(store.sha256(new.read_bytes()), 4)).name
    assert [name for name in after if after[name] != before[name]] == [bucket]
    # What a run that was killed had finished stays, and the rest is as if it had been made at once.
    (project / "data/embed/vit/images/b001.parquet").unlink()
    embed()
    assert contents() == after
    new.unlink()
    assert embed() == 0
    assert contents() == before


def test_the_mark_holds_what_changes_rows_and_nothing_else(set_params: SetParams) -> None:
    encoder = load_encoder("vit", set_params().encoder("vit"), torch.device("cpu"))

    def mark(**asked: Any) -> str:
        return nodes_of(encoder, Embed(regions=Regions(**asked))).fingerprint

    made_by = {"encoder": encoder.fingerprint, "views": 0, "tokens": False, "grids": [2, 4], "crops": []}
    assert nodes_of(encoder, Embed()).made_by == made_by
    assert len({mark(**asked) for asked in SETTINGS}) == len(SETTINGS)
    assert mark() == mark(sides=[2 / 7, 3 / 7, 4 / 7], count=[2, 3, 2]) != mark(count=[2, 3, 3])
    assert mark(object="whole", crops="grid", map="similarity") == mark(object="whole", crops="grid")


def test_few_views_are_on_their_way_at_a_time(set_params: SetParams, dataset: list[str]) -> None:
    """Memory: pictures wait for what the encoder says of them, 9 passes each, in batches of 4."""
    params = set_params(embed={"regions": {}})
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    begun, done, most = 0, 0, 0

    def coming() -> Iterator[View]:
        nonlocal begun, most
        for source in 4 * sources(12):
            begun += 1
            most = max(most, begun - done)
            yield from prepare(source, encoder, params.embed)

    for found, _ in forward_views(coming(), nodes_of(encoder, params.embed), CpuSlots(torch.device("cpu"), 1), Clock()):
        done += len(found)
    assert (begun, done) == (48, 48)
    assert most <= 8


@pytest.mark.parametrize("held", [0, 2**30])
def test_a_large_picture_is_cut_with_pixels_to_spare(
    held: int, set_params: SetParams, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder("vit", set_params().encoder("vit"), torch.device("cpu"))
    path = project / "large.jpg"
    rough = np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((1200, 900), Image.Resampling.BICUBIC).save(path, quality=90)
    source = Source(store.sha256(path.read_bytes()), path)
    settings = Embed(regions=Regions(object="whole", sides=[0.25], count=[1]))
    decoded = deque[tuple[int, int]]()
    open_indexed = views.open_indexed

    def opened(source: Source, side: float) -> tuple[Image.Image, tuple[int, int]]:
        image, size = open_indexed(source, side)
        decoded.append(image.size)
        return image, size

    monkeypatch.setattr(views, "open_indexed", opened)
    monkeypatch.setattr(views, "HELD_PIXELS", held)


    def cut() -> View:
        [view] = prepare(source, encoder, settings)
        assert view.further is not None
        return view.further([lit(view, 1, 1)])

    view = cut()
    # 32 pixels are read, and 64 are there of the whole, of the object, which is its middle, and of a quarter of that.
    assert list(decoded) == ([(150, 113)] * 2 if held == 0 else [(150, 113)]) + [(600, 450)]
    monkeypatch.setattr(views, "OVERSAMPLING", 1000)
    full = cut()
    assert full.boxes == view.boxes
    assert (full.pixels.float() - view.pixels.float()).abs().mean() < 3


def test_what_cannot_be_is_one_line(set_params: SetParams) -> None:
    params = set_params()
    conv = load_encoder("conv", params.encoder("conv"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"embed\.regions\.map: a ResNet has no CLS token.*use norm or similarity"):
        nodes_of(conv, Embed(regions=Regions(map="attention")))
    # Where no map is read there is nothing to refuse.
    nodes_of(conv, Embed(regions=Regions(object="box", crops="grid", map="attention")))
    for given, said in (
        ({"sides": [0.5]}, r"embed\.regions\.count: 1 sides need as many counts"),
        ({"crops": "grid", "count": [9]}, r"embed\.regions\.count: a grid has as many crops as fit"),
        ({"crops": "appm"}, r"embed\.regions\.crops: input should be"),
        ({"objects": "box"}, r"embed\.regions\.objects: unknown key; did you mean `object`"),
        ({"sides": [1.5], "count": [1]}, r"embed\.regions\.sides\.0: input should be less than"),
    ):
        with pytest.raises(UserError, match=said):
            set_params(embed={"regions": given})


def test_crops_that_are_not_finite_are_refused(set_params: SetParams, dataset: list[str]) -> None:
    params = set_params(embed={"regions": {}})
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    product = nodes_of(encoder, params.embed)

    def broken(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each * torch.nan for each in product.forward(pixels))

    with pytest.raises(UserError, match="its embedding is 0 or not finite"):
        list(forward_sources(sources(1), [replace(product, forward=broken)]))


def test_regions_of_the_parameters_are_read_back(set_params: SetParams) -> None:
    assert set_params().embed.regions is None
    set_params(embed={"regions": {"object": "box", "crops": "random", "sides": [0.5, 0.25], "count": [1, 2]}})
    regions = load_params().embed.regions
    assert regions is not None
    assert regions.windows == [(0.5, 1), (0.25, 2)]
