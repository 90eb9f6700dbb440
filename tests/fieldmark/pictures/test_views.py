"""What an encoder is shown of a picture, from a decode at full or at reduced size."""

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from fieldmark import store
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Embed, Params
from fieldmark.pictures import views
from fieldmark.pictures.boxes import scale_region
from fieldmark.pictures.decode import MAX_PIXELS, open_reduced, open_rgb
from fieldmark.pictures.views import Source, needed_side, prepare, trim, view_region
from tests.fieldmark.pictures.test_decode import STORED
from tests.project import image_id


def draw_smooth(width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("side", "size"),
    [(10, (63, 38)), (37, (63, 38)), (37.5, (126, 76)), (75, (126, 76)), (150, (251, 151)), (151, (501, 301))],
)
def test_a_jpeg_shrinks_by_halves_and_never_below_the_side(side: float, size: tuple[int, int]) -> None:
    image, true = open_reduced(encode(draw_smooth(501, 301)), side)
    assert (image.size, true) == (size, (501, 301))
    assert open_rgb(encode(draw_smooth(501, 301))).size == (501, 301)


def test_only_a_jpeg_shrinks() -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        assert open_reduced(encode(draw_smooth(400, 300), kind), 10)[0].size == (400, 300)


@pytest.mark.parametrize("orientation", STORED)
def test_a_reduced_picture_is_upright_and_so_is_its_true_size(orientation: int) -> None:
    picture, method = draw_smooth(401, 301), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture if method is None else picture.transpose(method)
    image, size = open_reduced(encode(stored, exif=exif, quality=95), 100)
    assert size == (401, 301)
    assert image.size == (201, 151)
    difference = np.asarray(image, dtype=float) - np.asarray(picture.resize((201, 151)), dtype=float)
    assert np.abs(difference).mean() < 2


@given(st.integers(0, 10**6).map(image_id), st.integers(0, 8), st.integers(1, 3000), st.integers(1, 3000))
def test_a_region_is_itself_at_full_size_and_lies_within_a_reduced_one(
    name: str, number: int, width: int, height: int
) -> None:
    region, _ = view_region(name, number, width, height)
    assert scale_region(region, (width, height), (width, height)) == region
    reduced = -(-width // 4), -(-height // 4)
    left, top, right, bottom = scale_region(region, (width, height), reduced)
    assert 0 <= left < right <= reduced[0]
    assert 0 <= top < bottom <= reduced[1]
    assert abs(left * width / reduced[0] - region[0]) <= 4
    assert abs(bottom * height / reduced[1] - region[3]) <= 4


def test_whatever_is_cut_has_pixels_to_spare(encoder: LoadedEncoder) -> None:
    assert encoder.preprocessing["size"] == (32, 32)
    assert needed_side(encoder, Embed()) == 64
    assert needed_side(encoder, Embed(crops=[2, 3])) == 3 * 64
    assert needed_side(encoder, Embed(views=1)) == pytest.approx(64 * 2**0.5)
    assert needed_side(encoder, Embed(views=1, crops=[2])) == pytest.approx(2 * 64 * 2**0.5)


@pytest.fixture
def encoder(set_params: Callable[..., Params]) -> LoadedEncoder:
    return load_encoder("vit", set_params().encoder("vit"), torch.device("cpu"))


@pytest.mark.parametrize("settings", [Embed(), Embed(views=2, crops=[2])], ids=["plain", "views and crops"])
def test_a_reduced_decode_shows_the_same(
    settings: Embed, encoder: LoadedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(encode(draw_smooth(1201, 903), quality=90).getvalue())
    source = Source(store.sha256(path.read_bytes()), path)
    assert open_reduced(path, needed_side(encoder, settings))[0].size[0] < 1201
    reduced = prepare(source, encoder, settings)
    monkeypatch.setattr(views, "OVERSAMPLING", 1000)
    full = prepare(source, encoder, settings)
    for one, other in zip(reduced, full, strict=True):
        assert one._replace(pixels=0) == other._replace(pixels=0)  # type: ignore[arg-type]
        assert (one.pixels.float() - other.pixels.float()).abs().mean() < 2
    # A shift by a tenth of the picture would be seen.
    shifted = full[0].pixels.roll(3, dims=-1).float()
    assert (shifted - full[0].pixels.float()).abs().mean() > 5


def test_a_full_decode_is_cut_to_the_pixel(encoder: LoadedEncoder, tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (59, 87, 3), dtype=np.uint8))
    picture.save(path)
    source = Source(store.sha256(path.read_bytes()), path)
    for view in prepare(source, encoder, Embed(views=8)):
        region, flip = view_region(source.image_id, view.number, 87, 59)
        cut = picture.crop(region)
        expected = encoder.preprocess(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cut)
        assert torch.equal(view.pixels[0], expected)
        assert view.pixels.dtype == torch.uint8


def test_a_window_of_which_a_middle_is_shown_says_so(
    models: dict[str, Path], set_params: Callable[..., Params], tmp_path: Path
) -> None:
    params = set_params()
    encoder = load_encoder("conv", params.encoder("conv"), torch.device("cpu"))
    path = tmp_path / "wide.png"
    draw_smooth(200, 100).save(path)
    source, cuts = Source(store.sha256(path.read_bytes()), path), Embed(views=0, crops=[2])
    [whole] = prepare(source, encoder, cuts)
    encoder.preprocessing = encoder.preprocessing | {"crop_share": 0.8}
    [middle] = prepare(source, encoder, cuts)
    np.testing.assert_allclose(whole.boxes[1], (0.25, 0, 0.5, 0.5))
    # The middle square's inner 0.8 is cut in four, and of each the inner 0.8 is shown.
    np.testing.assert_allclose(middle.boxes[0], (0.3, 0.1, 0.7, 0.9))
    np.testing.assert_allclose(middle.boxes[1], (0.32, 0.14, 0.48, 0.46))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_thin_picture_is_resized_in_bounded_memory(size: tuple[int, int], mode: str) -> None:
    """A picture of 60,000 x 1, resized whole to 224 pixels of height, takes 10 GB."""
    settings = PreprocessCfg(size=224, resize_mode=mode)
    trimmed = trim(Image.new("RGB", size, (9, 8, 7)), asdict(settings))
    assert image_transform_v2(settings, is_train=False)(trimmed).shape == (3, 224, 224)
    if mode == "shortest":
        assert 224**2 * max(trimmed.size) / min(trimmed.size) < MAX_PIXELS + 2 * 224**2


@pytest.mark.parametrize("size", [(1999, 4), (3, 1501), (700, 2)])
def test_what_an_encoder_sees_of_a_thin_picture_stays(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MAX_PIXELS", 10_000_000)
    settings = PreprocessCfg(size=224)
    transform = image_transform_v2(settings, is_train=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    trimmed = trim(picture, asdict(settings))
    assert max(trimmed.size) < max(size)
    # At most one of 255 levels apart, where the resized size is rounded.
    assert (transform(trimmed) - transform(picture)).abs().max() <= 1 / 255 / 0.26


@pytest.mark.parametrize("size", [(40, 30), (1300, 3), (4, 223 * 4), (2390, 1)])
def test_any_other_picture_is_left_as_it_is(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    for mode in ("shortest", "squash", *(["longest"] if max(size) < 2000 else [])):
        assert trim(picture, {"size": (224, 224), "resize_mode": mode}) is picture


def test_a_thin_picture_has_all_its_views(encoder: LoadedEncoder, tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), (200, 0, 0)).save(tmp_path / "a.png")
    source = Source(store.sha256((tmp_path / "a.png").read_bytes()), tmp_path / "a.png")
    made = prepare(source, encoder, Embed(views=1, crops=[2]))
    assert [view.pixels.shape[0] for view in made] == [5, 5]
    assert all(torch.equal(view.pixels[:, 0], torch.full_like(view.pixels[:, 0], 200)) for view in made)
    assert made[0].boxes[0] == pytest.approx((0.5 - 0.5 / 60_000, 0, 0.5 + 0.5 / 60_000, 1))


def test_ids_of_many_sources_are_one_array(tmp_path: Path) -> None:
    """Of a type that holds any number of them; of bucket sources, each is in its bucket."""
    ids = [image_id(number) for number in range(6)]
    one, two = (
        pa.table({
            "image_id": pa.array(part, pa.string()), "path": part, "box": pa.nulls(3, pa.list_(pa.float32())),
            "width": [8] * 3, "height": [6] * 3,
        })
        for part in (ids[:3], ids[3:])
    )  # fmt: skip
    table = pa.concat_tables([one, two])
    found = views.image_ids_of(views.Sources(tmp_path, table))
    assert found.type == views.image_ids_of([]).type == pa.large_string()
    assert found.to_pylist() == ids
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(views, "read_usable", lambda: table)
        images = views.BucketSources(tmp_path, 4)
    for bucket in range(4):
        assert [source.image_id for source in images[bucket]] == [
            each for each in ids if store.bucket_of(each, 4) == bucket
        ]
