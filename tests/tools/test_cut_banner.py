"""FGVC-Aircraft without its banner: what is cut, what is copied, what is kept, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.command import UserError
from fieldmark.formats.fgvc_aircraft import BANNER
from tests.fieldmark.formats.layouts import listed, make_aircraft, read
from tests.project import draw
from tools.cut_banner import cut_all

BANNER_COLOUR = (250, 250, 250)


def with_banner(path: Path, seed: int, pixels: int) -> None:
    """A drawn picture of 80 x 60 whose last rows are a white banner."""
    draw(path, seed)
    image = Image.open(path).convert("RGB")
    image.paste(BANNER_COLOUR, (0, 60 - pixels, 80, 60))
    image.save(path, quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "fgvc-aircraft-2013b"
    make_aircraft(folder)
    for number in range(1, 10):
        with_banner(folder / f"data/images/{number:07d}.jpg", number, 20)
    return folder


def test_the_banner_is_cut_and_all_else_is_the_same(root: Path, run_stage: Callable[..., None]) -> None:
    out = root.parent / "aircraft"
    run_stage("tools.cut_banner", str(root), str(out), "--pixels", "20")
    for path in sorted((root / "data/images").iterdir()):
        before, after = np.asarray(Image.open(path)), np.asarray(Image.open(out / "data/images" / path.name))
        assert after.shape == (40, 80, 3)
        # A drawing whose JPEG is decoded and encoded again stays what it was, but for its noise.
        assert np.abs(after[:38].astype(int) - before[:38]).mean() < 3
        assert before[-15:].mean() > 240
    assert listed(read("fgvc_aircraft", out)) == listed(read("fgvc_aircraft", root))
    assert "a banner with its photographer" in read("fgvc_aircraft", root).warnings[-1]
    assert not any("with its photographer" in warning for warning in read("fgvc_aircraft", out).warnings)


def test_a_command_that_was_interrupted_goes_on(root: Path) -> None:
    out = root.parent / "aircraft"
    assert cut_all(root, out, 20) == []
    kept = out / "data/images/0000001.jpg"
    kept.write_bytes(b"as it was")
    (out / "data/images/0000002.jpg").unlink()
    assert cut_all(root, out, 20) == []
    assert kept.read_bytes() == b"as it was"
    assert Image.open(out / "data/images/0000002.jpg").height == 40


def test_what_cannot_be_cut_is_named_and_not_written(root: Path) -> None:
    (root / "data/images/0000001.jpg").write_bytes(b"\xff\xd8\xff")
    draw(root / "data/images/0000002.jpg", 2, (80, 20))
    out = root.parent / "aircraft"
    assert cut_all(root, out, 20) == ["0000001.jpg", "0000002.jpg"]
    assert len(list((out / "data/images").iterdir())) == 7
    assert "2 of 9 images that are listed are not there" in read("fgvc_aircraft", out).warnings[-1]


def test_refusals(root: Path) -> None:
    out = root.parent / "aircraft"
    with pytest.raises(UserError, match="has no folder data/images"):
        cut_all(root / "data", out, 20)
    for inside in (root, root / "data/cut"):
        with pytest.raises(UserError, match="is to stay as it is"):
            cut_all(root, inside, 20)
    assert not out.exists()
    cut_all(root, out, 20)
    with pytest.raises(UserError, match=rf"{BANNER}: 20 pixels were cut there"):
        cut_all(root, out, 12)
    with pytest.raises(UserError, match="has its banner cut off already"):
        cut_all(out, root.parent / "twice", 20)
