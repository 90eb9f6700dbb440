"""Every odd file that a folder may hold, through index_images and embed_images: a picture, or a row with its reason."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fieldmark import store
from fieldmark.params import Params
from fieldmark.pictures.decode import BACKGROUND, FORMATS
from tests.fieldmark.pictures.test_decode import STORED, swapped_profile
from tests.project import ROOT, draw

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
# Smooth, so that an encoder sees the same in it after a lossy codec.
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
    (80, 60), Image.Resampling.BICUBIC
)
NO_PICTURE = f"is none of {', '.join(FORMATS)}"


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good_pictures() -> dict[str, bytes]:
    """Files by name, each of them a picture."""
    files = {}
    for orientation, method in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = PICTURE if method is None else PICTURE.transpose(method)
        files[f"orientation{orientation}.jpg"] = encode(stored, "JPEG", exif=exif, quality=95)
    grey = PICTURE.convert("L")
    alpha = PICTURE.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
    sixteen = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    frames = {"save_all": True, "append_images": [Image.new("RGB", PICTURE.size)]}
    return files | {
        "cmyk.jpg": encode(PICTURE.convert("CMYK"), "JPEG", quality=95),
        "palette.png": encode(PICTURE.quantize(255), "PNG"),
        "palette_clear.gif": encode(PICTURE.quantize(255), "GIF", transparency=0),
        "alpha.png": encode(alpha, "PNG"),
        "clear.png": encode(Image.new("RGBA", (30, 30)), "PNG"),
        "sixteen.png": encode(sixteen, "PNG"),
        "sixteen.tif": encode(sixteen, "TIFF"),
        "grey.png": encode(grey, "PNG"),
        "bits.png": encode(PICTURE.convert("1"), "PNG"),
        "animated.gif": encode(PICTURE, "GIF", **frames),
        "animated.webp": encode(PICTURE, "WEBP", quality=95, **frames),
        "phone.heic": encode(PICTURE, "HEIF", quality=95),
        "phone.avif": encode(PICTURE, "AVIF", quality=95),
        "profile.png": encode(PICTURE, "PNG", icc_profile=swapped_profile()),
        "profile_broken.png": encode(PICTURE, "PNG", icc_profile=b"none"),
        "suffix.jpg": encode(PICTURE, "PNG"),
        "SHOUTED.PNG": encode(PICTURE, "PNG", compress_level=1),
        "with a space, and an ü.png": encode(PICTURE, "PNG", compress_level=2),
        "pixel.png": encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
        "wide.png": encode(PICTURE.resize((4000, 3)), "PNG"),
        "tall.png": encode(PICTURE.resize((3, 4000)), "PNG"),
    }


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with further chunks, and holds a line of ten pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(31))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in content
    )


def claim(content: bytes, place: int, layout: str, width: int, height: int) -> bytes:
    """A file whose header says another size, which stands at `place`."""
    size = struct.pack(layout, width, height)
    return content[:place] + size + content[place + len(size) :]


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that would fill hundreds of megabytes, and the reasons that stand for them."""
    jpeg, gif, bmp = (encode(PICTURE, kind) for kind in ("JPEG", "GIF", "BMP"))
    return {
        "bomb.png": (png_of(10_000, 12_001), "10000 x 12001 pixels, more than"),
        "absurd.png": (png_of(2**31 - 1, 2**31 - 1), "pixels"),
        "bomb.jpg": (claim(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 11_000, 12_000), "pixels, more than"),
        "absurd.jpg": (claim(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65_500, 65_500), "pixels"),
        "bomb.gif": (claim(gif, 6, "<HH", 65_535, 65_535), "pixels"),
        "bomb.bmp": (claim(bmp, 18, "<ii", 60_000, 60_000), "pixels"),
    }


def heavy_metadata() -> dict[str, bytes]:
    """Good pictures of ten pixels, whose profile or text would fill a hundred megabytes."""
    zeros = zlib.compress(bytes(10**8), 1)
    return {
        "heavy_profile.png": png_of(10, 1, (b"iCCP", b"x\0\0" + zeros)),
        "heavy_text.png": png_of(10, 1, (b"zTXt", b"x\0\0" + zeros)),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that are no usable pictures, and the reasons that stand for them."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    cut = {f"cut.{kind.lower()}": encode(noise, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")}
    return {name: (content[: len(content) // 2], "") for name, content in cut.items()} | {
        "cut.heic": (encode(noise, "HEIF")[:5000], ""),
        "cut.jpg": (encode(noise, "JPEG")[:2000], "truncated"),
        "empty.png": (b"", NO_PICTURE),
        "text.jpg": (b"<html>404 Not Found</html>", NO_PICTURE),
        "other.jpg": (encode(PICTURE, "PPM"), NO_PICTURE),
        "script.jpg": (encode(PICTURE, "EPS"), NO_PICTURE),
        "zeros.png": (bytes(5000), NO_PICTURE),
    }


def read_index() -> dict[str, dict[str, Any]]:
    """The rows of the index by file name."""
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    return {Path(row["path"]).name: row for row in rows}


def read_globals() -> dict[str, np.ndarray]:
    """The global vector of each picture by file name."""
    table = store.read_buckets("data/embed/conv/images", "embed.nodes/1", 4)
    first = table.filter(np.array(table.column("node")) == 0)
    vectors = store.vectors_of(first).astype(np.float32)
    by_id = dict(zip(first.column("image_id").to_pylist(), vectors, strict=True))
    return {name: by_id[row["image_id"]] for name, row in read_index().items() if row["status"] == "ok"}


@pytest.fixture
def folder(project: Path) -> Path:
    """The folder of a class whose test images are as any other."""
    for seed in range(1, 6):
        draw(project / f"images/{'test' if seed == 1 else 'train'}/a/{seed}.png", seed)
    return project / "images/train/a"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


# A test runs with filters of its own.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_animal_of_the_zoo_has_its_place(
    folder: Path, set_params: SetParams, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = good_pictures() | heavy_metadata(), bad_files() | bombs()
    write(folder, good | {name: content for name, (content, _) in bad.items()})
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()
    (folder / "folder.png/inside.png").write_bytes(encode(PICTURE, "PNG", compress_level=3))
    (folder / "loop").symlink_to(".")
    (folder / "other.png").symlink_to(folder / "cmyk.jpg")
    reasons = {name: reason for name, (_, reason) in bad.items()} | {"dangling.png": "No such file"}

    set_params(embed={"views": 1, "crops": [2]})
    run_stage("index_images")
    rows = read_index()
    plain = {f"{seed}.png" for seed in range(1, 6)}
    assert set(rows) == {*good, *reasons, *plain, "other.png"}
    for name in {*good, *plain} - {"cmyk.jpg"}:
        assert (rows[name]["status"], rows[name]["error"]) == ("ok", None), name
    # A link to a file is that file once more.
    assert {rows["other.png"]["status"], rows["cmyk.jpg"]["status"]} == {"ok", "duplicate"}
    for name, reason in reasons.items():
        assert rows[name]["status"] == "broken", name
        assert re.search(re.escape(reason), rows[name]["error"]), name
        assert "\n" not in rows[name]["error"]
        assert str(folder) not in rows[name]["error"]
    metrics = json.loads(Path("data/index/metrics.json").read_text())
    assert metrics["unused"] == {"broken": len(reasons), "duplicate": 1, "conflict": 0}
    assert metrics["health"]["passed_over"] > 0

    capsys.readouterr()
    run_stage("embed_images", "--encoder", "conv")
    count = len(good) + len(plain)
    assert capsys.readouterr().out == f"data/embed/conv/images: {count} images embedded, 0 kept\n"
    table = store.read_buckets("data/embed/conv/images", "embed.nodes/1", 4)
    assert len(table) == count * 2 * (1 + 4 + 4 + 4)
    vectors = store.vectors_of(table).astype(np.float32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=2e-3)


def test_the_same_picture_embeds_alike_however_it_is_stored(
    folder: Path, set_params: SetParams, run_stage: RunStage
) -> None:
    good = good_pictures()
    write(folder, good)
    set_params()
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "conv")
    vectors = read_globals()
    orientations = np.stack([vectors[f"orientation{number}.jpg"] for number in STORED])
    assert (orientations @ orientations.T).min() > 0.999
    for name, other in (
        *((name, "suffix.jpg") for name in ("SHOUTED.PNG", "profile_broken.png", "palette.png", "phone.heic")),
        *((name, "suffix.jpg") for name in ("phone.avif", "animated.webp", "animated.gif", "orientation1.jpg")),
        ("sixteen.png", "grey.png"),
        ("sixteen.tif", "grey.png"),
    ):
        assert vectors[name] @ vectors[other] > 0.999, name
    # Of pictures that are not alike this does not hold.
    assert vectors["profile.png"] @ vectors["suffix.jpg"] < 0.999
    assert vectors["grey.png"] @ vectors["suffix.jpg"] < 0.999

    thumbs = store.read_buckets("data/thumbs", "thumbs/1", 4).to_pylist()
    webp = {row["image_id"]: row["webp"] for row in thumbs}
    rows = read_index()

    def shade(name: str) -> float:
        return float(np.asarray(Image.open(io.BytesIO(webp[rows[name]["image_id"]]))).mean())

    grey = np.asarray(PICTURE.convert("L")).mean()
    for name in ("sixteen.png", "sixteen.tif", "grey.png"):
        assert shade(name) == pytest.approx(grey, abs=2)
    assert shade("clear.png") == pytest.approx(BACKGROUND[0], abs=2)


def test_a_link_that_leads_to_itself_is_a_row(folder: Path, set_params: SetParams, run_stage: RunStage) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    set_params()
    run_stage("index_images")
    assert read_index()["loop.png"]["status"] == "broken"
    assert "Too many levels of symbolic links" in read_index()["loop.png"]["error"]


def test_a_file_that_may_not_be_read_is_a_row(folder: Path, set_params: SetParams, run_stage: RunStage) -> None:
    write(folder, {"secret.png": encode(PICTURE, "PNG")})
    (folder / "secret.png").chmod(0)
    if os.access(folder / "secret.png", os.R_OK):
        pytest.skip("this user may read every file, as root may")
    set_params()
    run_stage("index_images")
    row = read_index()["secret.png"]
    assert (row["status"], row["error"]) == ("broken", "cannot be read: Permission denied")


# Of its own memory alone: what getrusage says of a child begins with the memory of the process that started it.
INDEX = """
import sys
from stages import index_images
sys.argv = ["index_images"]
index_images.main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_bombs_do_not_raise_memory(folder: Path, set_params: SetParams) -> None:
    set_params()

    def peak_mb() -> float:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = subprocess.check_output([sys.executable, "-c", INDEX], env=environment, text=True)
        return int(said.splitlines()[-1]) / 1024

    without = peak_mb()
    write(folder, heavy_metadata() | {name: content for name, (content, _) in bombs().items()})
    # The least of them would take 100 MB.
    assert peak_mb() < without + 20
    assert sum(row["status"] == "broken" for row in read_index().values()) == len(bombs())
