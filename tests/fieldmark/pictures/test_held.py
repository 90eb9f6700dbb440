"""Pictures in other files: which file a path means, what is noted of a broken one, and what is said of the cache."""

import errno
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from fieldmark.command import UserError
from fieldmark.pictures import clips, held
from fieldmark.pictures.decode import open_file, open_rgb
from fieldmark.pictures.files import BadImage
from fieldmark.pictures.held import Held, find_held
from tests.fieldmark.films import SIZE, film


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_folders_may_be_named_as_what_holds_pictures(tmp_path: Path) -> None:
    film(tmp_path / "site.ts/dive.mp4/dive.mp4", 1.0)
    assert open_rgb("site.ts/dive.mp4/dive.mp4/1fps/000000.jpg").size == SIZE
    (tmp_path / "train.parquet").mkdir()
    (tmp_path / "train.parquet/part-0.parquet").write_bytes(b"")
    inside = Held(Path("train.parquet/part-0.parquet"), "0")
    assert find_held("train.parquet/part-0.parquet/0") == inside
    assert find_held(tmp_path / "site.ts/dive.mp4/gone.jpg") is None


@pytest.mark.parametrize(
    "inside",
    [
        "1.0fps/000000.jpg", "01fps/000000.jpg", "1e0fps/000000.jpg", "1e999fps/000000.jpg", "0fps/000000.jpg",
        "1001fps/000000.jpg", f"{'1' * 300}fps/000000.jpg", f"at/{'1' * 300}.000.jpg", "at/1000001.000.jpg",
    ],
)  # fmt: skip
def test_a_frame_has_one_path_and_no_endless_one(inside: str, tmp_path: Path, cache: Path) -> None:
    film(tmp_path / "a.mp4", 0.5)
    with pytest.raises(BadImage, match=r"^is no path of a frame$"):
        open_file(f"a.mp4/{inside}")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some room there"),
        (errno.EROFS, "let FIELDMARK_CACHE name a folder that you may write to"),
        (errno.EMFILE, "allow the process more open files"),
    ],
)
def test_what_the_cache_lacks_is_said(
    number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(film(tmp_path / "a.mp4", 0.5))

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(clips, "write_frames", fail)
        with pytest.raises(UserError, match=rf"\({os.strerror(number)}\); {remedy}"):
            open_file(f"{path}/1fps/000000.jpg")
    assert open_rgb(f"{path}/1fps/000000.jpg").size == SIZE, "nothing is noted of the film"


@pytest.mark.parametrize("error", [OSError("encoder error -2"), ValueError("two\nlines"), OSError(errno.EIO, "I/O")])
def test_any_other_error_is_a_broken_picture(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(film(tmp_path / "a.mp4", 0.5))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(clips, "as_jpeg", fail)
    for inside in ("1fps/000000.jpg", "at/0.000.jpg"):
        with pytest.raises(BadImage, match=f"^cannot be unpacked: {type(error).__name__}: ") as found:
            open_file(f"{path}/{inside}")
        assert "\n" not in str(found.value)


def test_what_cannot_be_opened_now_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(film(tmp_path / "a.mp4", 0.5))

    def closed(*_: object) -> None:
        raise BadImage("cannot be read: Permission denied")

    with monkeypatch.context() as patched:
        for module in (held, clips):
            patched.setattr(module, "open_plain", closed)
        with pytest.raises(BadImage, match="Permission denied"):
            open_file(f"{path}/1fps/000000.jpg")
    assert open_rgb(f"{path}/1fps/000000.jpg").size == SIZE


def test_pictures_are_on_the_disk_before_their_folder_has_its_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = str(film(tmp_path / "a.mp4", 2.0)), []
    monkeypatch.setattr(held, "sync", lambda path: done.append((path.name, list(cache.glob("pictures/*/*/1fps")))))
    open_file(f"{path}/1fps/000000.jpg")
    *before, after = done
    assert sorted(before) == [("000000.jpg", []), ("000001.jpg", []), ("half", [])]
    assert len(after[1]) == 1


def test_a_shard_and_a_film_have_rules_of_their_own(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fieldmark.formats.test_hf_parquet import write_shard

    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    write_shard(tmp_path / "a.parquet", [buffer.getvalue()], [0])
    open_file("a.parquet/0")
    [made] = cache.glob("pictures/*/*/rows")
    monkeypatch.setattr(clips, "RULES", clips.RULES + 1)
    open_file("a.parquet/0")
    assert list(cache.glob("pictures/*/*/rows")) == [made]
    monkeypatch.setattr(held.shards, "RULES", held.shards.RULES + 1)
    open_file("a.parquet/0")
    assert list(cache.glob("pictures/*/*/rows")) != [made]
