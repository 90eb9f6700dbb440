"""What is asked about in a folder: pipes, scripts, films without their reader, Parquet that only states its rows."""

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fieldmark.command import UserError
from tests.fieldmark.films import film
from tools.prediction.pictures import pictures_in, read_question


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One photograph."""
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    Path("new/a.png").write_bytes(buffer.getvalue())
    return Path("new")


def paths(asked: str) -> tuple[list[str], int]:
    question = read_question(asked)
    return [picture.path for picture in question.pictures], question.passed_over


def test_pipes_and_scripts_are_no_pictures(folder: Path) -> None:
    for name in ("pipe.parquet", "pipe.mp4"):
        os.mkfifo(folder / name)
    (folder / "page.ts").write_text("export const film = 1;\n")
    film(folder / "b.ts", 1.0, codec="mpeg2video", fps=25)
    found, passed_over = paths("new")
    assert found[0] == "new/a.png"
    assert {path.rpartition("/1fps")[0] for path in found[1:]} == {"new/b.ts"}
    assert passed_over == 3
    with pytest.raises(UserError, match="is no file"):
        read_question("new/pipe.parquet")


def test_films_are_passed_over_where_nothing_reads_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "bc":
        (folder / f"{name}.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert paths("new") == (["new/a.png"], 0)
    said = "2 films are passed over, since PyAV is not installed; install the extra"
    assert capsys.readouterr().err.startswith(f"new: {said}")
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=f"new: holds no picture: {said}"):
        read_question("new")


def test_a_parquet_file_that_only_states_its_rows(folder: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.nulls(100_001, kind)}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"new/a\.parquet: states 100001 rows, .*; leave it out"):
        read_question("new")
    pq.write_table(pa.table({"image": pa.nulls(2, kind)}), folder / "a.parquet")
    found = pictures_in("new/a.parquet", 1.0)
    assert found is not None
    assert [picture.path for picture in found] == ["new/a.parquet/0", "new/a.parquet/1"]
