"""Pictures that a map resamples: places, detail, mirroring, padding, and a decode at reduced size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fieldmark import store
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Embed, Params
from fieldmark.pictures import views
from fieldmark.pictures.sampler import sampled_points
from fieldmark.pictures.views import Source, prepare, view_region
from fieldmark.pictures.zoom import padding_of, zoomed_views
from tests.fieldmark.pictures.test_sampler import SIDE, peak

EVEN = torch.ones(SIDE, SIDE)


@pytest.fixture
def encoder(set_params: Callable[..., Params]) -> LoadedEncoder:
    """One that reads the middle 32 x 32 pixels."""
    return load_encoder("vit", set_params().encoder("vit"), torch.device("cpu"))


def save(path: Path, pixels: np.ndarray, **options: object) -> Source:
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return Source(store.sha256(path.read_bytes()), path)


def smooth(width: int, height: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))


def stripes(side: int, period: float) -> np.ndarray:
    wave = 127.5 + 127.5 * np.sign(np.sin(2 * np.pi * np.arange(side) / period))
    return np.broadcast_to(wave[None, :, None], (side, side, 3))


def test_an_even_map_gives_what_the_encoder_sees_anyway(encoder: LoadedEncoder, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", smooth(403, 301))
    own = prepare(source, encoder, Embed(views=2))
    again = zoomed_views(source, encoder, EVEN.expand(3, 2, -1, -1))
    for one, other in zip(own, again, strict=True):
        assert (other.image_id, other.number, other.flip) == (one.image_id, one.number, one.flip)
        assert other.pixels.shape == (2, 3, 32, 32)
        assert other.boxes == [one.boxes[0]] * 2
        assert (other.pixels.float() - one.pixels.float()).abs().mean() < 5
    assert (own[0].pixels.float() - own[1].pixels.float()).abs().mean() > 20


def test_a_place_is_shown_where_the_grid_says(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """A ramp tells of each pixel which place it shows, in every view, mirrored ones too."""
    width = 512
    ramp = np.broadcast_to((np.arange(width) / 2)[None, :, None], (width, width, 3))
    source = save(tmp_path / "ramp.png", ramp)
    q = peak(10, 20)
    views_seen = zoomed_views(source, encoder, q.expand(4, 1, -1, -1))
    assert len({view.flip for view in views_seen}) == 2
    x = sampled_points(q)[..., 0]
    # Of the centre of pixel 16, between nodes.
    node = 16.5 / 32 * (SIDE - 1)
    below = int(node)
    expected = (x[below, below] * (below + 1 - node) + x[below, below + 1] * (node - below)).item()
    for view in views_seen:
        (left, _, right, _), flip = view_region(source.image_id, view.number, width, width)
        place = left + (right - left) * (1 - expected if flip else expected)
        assert view.pixels[0, 0, 16, 16].item() == pytest.approx(place / 2, abs=4)


def contrast(pixels: Tensor) -> float:
    """How much a row of the middle varies from pixel to pixel."""
    return float(pixels.float()[:, 14:18, 13:19].std(-1).mean())


def test_zoom_shows_detail_that_the_encoders_own_picture_has_not(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """Stripes of little more than one pixel a period melt to grey at input size; the zoom shows them."""
    source = save(tmp_path / "stripes.png", stripes(640, 22))
    q = 0.003 + peak(15, 15, 0.05) - 0.09
    own = prepare(source, encoder, Embed())[0].pixels[0]
    [view] = zoomed_views(source, encoder, torch.stack([EVEN.double(), q])[None])
    even, zoomed = view.pixels
    assert contrast(own) < 25
    assert contrast(even) < 25
    assert contrast(zoomed) > 60
    # The same grid over the encoder's own picture: pixels are larger, and nothing more is seen.
    small = save(tmp_path / "small.png", own.permute(1, 2, 0).numpy())
    [blown_up] = zoomed_views(small, encoder, q[None, None])
    assert contrast(blown_up.pixels[0]) < 25


def test_a_reduced_decode_shows_the_same(
    encoder: LoadedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "large.jpg", smooth(1604, 1203), quality=90)
    maps = peak(10, 20).expand(2, 1, -1, -1)
    opened = []
    whole = views.open_part

    def spy(*words: object) -> tuple[Image.Image, tuple[int, int]]:
        opened.append(whole(*words))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(views, "open_part", spy)
    reduced = zoomed_views(source, encoder, maps)
    monkeypatch.setattr(views, "OVERSAMPLING", 1000)
    full = zoomed_views(source, encoder, maps)
    assert opened[0][0].size < opened[1][0].size == (1604, 1203)
    for one, other in zip(reduced, full, strict=True):
        assert (one.pixels.float() - other.pixels.float()).abs().mean() < 3


def test_beside_the_picture_is_padding(encoder: LoadedEncoder, tmp_path: Path) -> None:
    encoder.preprocessing.update(resize_mode="longest", fill_color=7)
    source = save(tmp_path / "wide.png", np.full((50, 100, 3), 200))
    [view] = zoomed_views(source, encoder, EVEN[None, None])
    assert padding_of(encoder.preprocessing) == 7
    assert (view.pixels[0, :, :7] == 7).all()
    assert (view.pixels[0, :, 9:23] == 200).all()
    assert (view.pixels[0, :, 25:] == 7).all()


@pytest.mark.parametrize("at", [(0, 0), (30, 15), (2, 28)])
def test_a_peak_at_the_border_is_shown_like_any_other(
    encoder: LoadedEncoder, tmp_path: Path, at: tuple[int, int]
) -> None:
    """Points that lie beyond it are read at the border: they say nothing of how large anything is shown."""
    source = save(tmp_path / "a.png", smooth(320, 320))
    q = peak(*at) - 0.08
    assert not ((sampled_points(q) >= 0) & (sampled_points(q) <= 1)).all()
    [view] = zoomed_views(source, encoder, q[None, None])
    y, x = (round(place / (SIDE - 1) * 319) for place in at)
    shown = sampled_points(q).clamp(0, 1)[at[0], at[1]] * 319
    assert (shown - torch.tensor([x, y])).abs().max() < 48
    row, column = (min(31, round(place / (SIDE - 1) * 31)) for place in at)
    expected = torch.from_numpy(smooth(320, 320)[round(shown[1].item()), round(shown[0].item())].astype(float))
    assert (view.pixels[0, :, row, column] - expected).abs().max() < 25
