"""Films as pictures: which frame a path means, what is unpacked when, and what is broken or hostile."""

import contextlib
import io
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.command import UserError
from fieldmark.pictures import clips, held
from fieldmark.pictures.clips import container_of, count_frames, frame_path, length_of, moment_path
from fieldmark.pictures.decode import BadImage, hash_file, open_file, open_rgb
from tests.fieldmark.films import SIZE, all_frames, film, film_at


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def near(path: str, frame: np.ndarray) -> bool:
    """Whether a picture is a frame, but for what JPEG changes."""
    return float(np.abs(np.asarray(open_rgb(path), dtype=float) - frame).mean()) < 3


def reason(path: str | Path) -> str:
    with pytest.raises(BadImage) as error:
        open_rgb(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("b.webm", "libvpx-vp9"), ("c.avi", "mpeg4"), ("d.ts", "mpeg2video")]
)
def test_frames_at_a_rate_and_at_a_time(name: str, codec: str, tmp_path: Path) -> None:
    fps = 25 if codec == "mpeg2video" else 10
    path = str(film(tmp_path / name, 3.0, fps=fps, codec=codec))
    frames = all_frames(Path(path))
    assert length_of(path) == pytest.approx(3.0, abs=0.15)
    for rate in (1.0, 2.5):
        for number in range(count_frames(3.0, rate)):
            shown = int(number / rate * fps + 1e-6)
            assert near(frame_path(path, rate, number), frames[shown]), (rate, number)
    assert near(moment_path(path, 1.25), frames[int(1.25 * fps)])
    assert near(moment_path(path, 2.96), frames[-1])
    assert open_rgb(frame_path(path, 1, 0)).size == SIZE


def test_a_frame_is_shown_until_the_next_one(tmp_path: Path) -> None:
    path = str(film(tmp_path / "slow.mp4", 3.0, fps=1))
    ids = [hash_file(open_file(frame_path(path, 2, number))) for number in range(6)]
    assert ids[0::2] == ids[1::2]
    assert len(set(ids)) == 3


def test_a_film_is_decoded_once_and_anew_where_it_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    whole = clips.write_frames
    monkeypatch.setattr(clips, "write_frames", lambda *given: calls.append(given[0].name) or whole(*given))
    one, two = (str(film(tmp_path / f"{name}.mp4", seed=seed)) for seed, name in enumerate("ab"))
    paths = [frame_path(path, 2, number) for path in (one, two) for number in range(6)]
    before: dict[str, bytes] = {}

    def look(path: str) -> None:
        before[path] = open_file(path).read()

    threads = [threading.Thread(target=look, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["a.mp4", "b.mp4"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4", "cache"}, "no frame beside the films"
    film(tmp_path / "a.mp4", seed=7)
    after = {path: open_file(path).read() for path in paths}
    assert calls[2:] == ["a.mp4"]
    assert [after[path] != before[path] for path in paths] == [True] * 6 + [False] * 6
    assert len(list(cache.glob("pictures/*/*/2fps"))) == 2, "what was made of the film before is gone"
    held.shutil.rmtree(cache)
    assert {path: open_file(path).read() for path in paths} == after, "made again, the bytes are the same"


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = frame_path(str(film(tmp_path / "a.mp4")), 1, 2)
    whole = open_file(path).read()
    [made] = cache.glob("pictures/*/*/1fps")
    half = made.parent.parent / "half"
    made.rename(half)
    (half / "000002.jpg").write_bytes(b"half")
    assert open_file(path).read() == whole
    assert not half.exists()


def test_a_film_that_breaks_off_has_the_frames_before(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.webm", 6.0, codec="libvpx-vp9").read_bytes()
    path = tmp_path / "b.webm"
    path.write_bytes(whole[: len(whole) // 2])
    assert count_frames(length_of(path), 1) == 6, "its head says so"
    assert open_rgb(frame_path(str(path), 1, 0)).size == SIZE
    assert reason(frame_path(str(path), 1, 5)).startswith(("the film ends after", "cannot be decoded from"))
    assert reason(moment_path(str(path), 5.5)).startswith("the film ends after")


def test_what_is_no_film(tmp_path: Path) -> None:
    film(tmp_path / "good.mp4", 1.0)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"not a film" * 100)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    (tmp_path / "noise.avi").write_bytes(b"RIFF\0\0\0\0AVI " + np.random.default_rng(0).bytes(5000))
    for name in ("empty.mp4", "text.mp4"):
        assert reason(frame_path(str(tmp_path / name), 1, 0)).startswith("is no film by its first bytes")
    assert reason(frame_path(str(tmp_path / "cut.mp4"), 1, 0)).startswith("cannot be decoded")
    assert reason(frame_path(str(tmp_path / "noise.avi"), 1, 0)) == "holds no stream of pictures"
    assert reason(frame_path(str(tmp_path / "good.mp4"), 1, 9)) == "the film is shorter than that"
    assert reason(tmp_path / "good.mp4/other.jpg") == "is no path of a frame"
    assert reason(tmp_path / "good.mp4/1fps/../../x.jpg") == "is no path of a frame"
    assert reason(tmp_path / "gone.mp4/1fps/000000.jpg") == "cannot be read: No such file or directory"


def test_no_playlist_opens_another_file(tmp_path: Path) -> None:
    target = film(tmp_path / "secret.mp4", 1.0)
    lists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {target}\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        assert reason(frame_path(str(tmp_path / name), 1, 0)).startswith("is no film by its first bytes")
        # Nor where its first bytes are those of a film.
        (tmp_path / name).write_bytes(b"\0\0\0\x08free" + content.encode())
        assert reason(frame_path(str(tmp_path / name), 1, 0)).startswith("cannot be decoded")


def test_large_frames_and_long_films_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(film(tmp_path / "a.mp4"))
    monkeypatch.setattr(clips, "MAX_DECODED", 15 * 64 * 48)
    assert open_rgb(frame_path(path, 1, 1)).size == SIZE
    assert "more than" in reason(frame_path(path, 1, 2))
    monkeypatch.setattr(clips, "MAX_PIXELS", 1000)
    assert reason(frame_path(path, 2, 0)) == "64 x 48 pixels a frame, more than 1000"
    assert count_frames(10**9, 25) == clips.MOST


def test_hostile_bytes_give_frames_or_a_reason(tmp_path: Path) -> None:
    """Bytes changed at random, in the head and in the stream."""
    whole = film(tmp_path / "a.mp4", 1.0).read_bytes()
    chance = np.random.default_rng(0)
    for number in range(40):
        content = bytearray(whole)
        for place in chance.integers(0, len(whole), 8):
            content[place] = chance.integers(0, 256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(content)
        with contextlib.suppress(BadImage):
            assert np.asarray(open_rgb(frame_path(str(path), 2, 0))).ndim == 3


def test_a_film_that_is_held_sideways_is_turned(tmp_path: Path) -> None:
    content = bytearray(film(tmp_path / "a.mp4", 1.0).read_bytes())
    upright = open_rgb(frame_path(str(tmp_path / "a.mp4"), 1, 0))
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = content.rindex(unit)  # the matrix of the track: a quarter turn, clockwise
    content[place : place + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(content)
    turned = open_rgb(frame_path(str(tmp_path / "b.mp4"), 1, 0))
    assert turned.size == (SIZE[1], SIZE[0])
    assert np.abs(np.asarray(turned, float) - np.asarray(upright.transpose(Image.Transpose.ROTATE_270))).mean() < 3


def test_containers_are_known_by_their_first_bytes() -> None:
    assert container_of(b"\0\0\0 ftypisom") == "mov"
    assert container_of(b"G" + bytes(187) + b"G" + bytes(100)) == "mpegts"
    assert container_of(b"#EXTM3U\n") is None
    assert container_of(b"") is None


def test_a_full_disk_is_no_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = frame_path(str(film(tmp_path / "a.mp4")), 1, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clips, "write_frames", full)
    with pytest.raises(UserError, match=r"pictures cannot be unpacked \(No space left on device\)"):
        open_file(path)


def test_a_folder_may_be_named_as_a_film(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    (tmp_path / "old.mp4/a.png").write_bytes(buffer.getvalue())
    assert open_rgb(tmp_path / "old.mp4/a.png").size == (5, 4)


def test_a_frame_that_is_shown_for_long_is_one_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(film_at(tmp_path / "long.mp4", (0, 600, 600.1)))
    open_rgb(frame_path(path, 1, 500))
    files = [file.stat() for file in cache.glob("pictures/*/*/1fps/*.jpg")]
    assert len(files) > 600
    assert len({file.st_ino for file in files}) == 2

    def no_link(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    # Where a file system has no links, copies count.
    monkeypatch.setattr(clips.os, "link", no_link)
    monkeypatch.setattr(clips, "MAX_WRITTEN", 20 * files[0].st_size)
    assert open_rgb(frame_path(path, 0.5, 20)).size == SIZE
    assert "its frames have more than" in reason(frame_path(path, 0.5, 22))


def test_the_frames_of_a_film_have_a_bound(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(film(tmp_path / "a.mp4", 3.0))
    monkeypatch.setattr(clips, "MAX_WRITTEN", 2000)
    assert open_rgb(frame_path(path, 10, 0)).size == SIZE
    assert reason(frame_path(path, 10, 20)).endswith("its frames have more than 2000 bytes; take fewer a second")


@pytest.mark.parametrize("name", ["gap.mkv", "gap.mp4"])
def test_a_moment_between_two_frames_is_no_end(name: str, tmp_path: Path) -> None:
    path = str(film_at(tmp_path / name, (0, 0.04, 10, 10.04)))
    assert np.asarray(open_rgb(moment_path(path, 5.0))).mean() == pytest.approx(40, abs=3)
    assert reason(moment_path(path, 25.0)).startswith("the film ends after 10.")


def test_a_slanted_film_is_no_larger(tmp_path: Path) -> None:
    content = bytearray(film(tmp_path / "a.mp4", 0.5).read_bytes())
    place = content.rindex(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    content[place : place + 36] = struct.pack(">9i", 56756, 32768, 0, -32768, 56756, 0, 0, 0, 1 << 30)  # 30 degrees
    (tmp_path / "b.mp4").write_bytes(content)
    assert open_rgb(frame_path(str(tmp_path / "b.mp4"), 1, 0)).size == SIZE


def test_a_frame_that_no_jpeg_can_have(tmp_path: Path) -> None:
    path = str(film_at(tmp_path / "wide.mkv", (0, 0.1), (70_000, 16), "ffv1"))
    assert reason(frame_path(path, 1, 0)) == "70000 x 16 pixels a frame, more than 65500 on a side"


def test_a_film_is_decoded_by_one_thread(tmp_path: Path) -> None:
    with clips.opened(film(tmp_path / "a.mp4", 0.5)) as (container, stream):
        next(container.decode(stream))
        assert stream.codec_context.thread_count == 1


def test_a_length_that_no_head_states_is_read_from_the_packets(tmp_path: Path) -> None:
    class Packet:
        def __init__(self, pts: int | None) -> None:
            self.pts = pts

    class Stream:
        duration, time_base = None, 0.5

    class Container:
        duration = None

        def demux(self, _: object) -> list[Packet]:
            return [Packet(each) for each in packets]

    packets: list[int | None] = [4, None, 2, 10]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(clips, "opened", lambda _: contextlib.nullcontext((Container(), Stream())))
        assert length_of(tmp_path) == 4.0
        packets = []
        assert length_of(tmp_path) == 0.0
