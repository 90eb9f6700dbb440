"""A run that is asked says of new pictures what it said of the same ones in the data set, and how sure it is."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluation.calibration import calibrate, read_half
from evaluation.runs import read_run
from evaluation.votes import calibrate_votes, vote
from fieldmark import store
from fieldmark.command import UserError
from tests.fieldmark.films import film
from tests.fieldmark.formats.test_hf_parquet import write_shard
from tests.project import ROOT, draw, ray_cluster, run_ray
from tests.tools.conftest import RUNS, Write, contents, run_module
from training.explain import LEAST_MOVE

Row = dict[str, Any]
Ask = Callable[..., list[Row]]


@pytest.fixture
def ask(asked: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run predict for JSON lines; the rows."""

    def run(*arguments: str) -> list[Row]:
        capsys.readouterr()
        run_module("tools.predict", "--format", "jsonl", "--device", "cpu", *arguments)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def copy_of(project: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, the working directory from now on."""
    shutil.copytree(project, target, symlinks=True)
    monkeypatch.chdir(target)
    return target


def forget(paths: set[str]) -> None:
    """Take pictures out of the index, so that they are new; what the runs said of them stays."""
    path = "data/index/images.parquet"
    header, table = store.read_header(path, "index.images/1"), store.read_table(path, "index.images/1")
    kept = [row for row in table.to_pylist() if row["path"] not in paths]
    store.write_table(
        store.make_table("index.images/1", kept), path, "index.images/1", header.params, header.fingerprint
    )


def said(name: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes of a run, and the logits of its kept model by path."""
    path = f"data/runs/{name}/predictions.parquet"
    table = store.read_table(path, "run.predictions/1")
    logits = dict(zip(table["path"].to_pylist(), store.vectors_of(table, "logits"), strict=True))
    return store.read_header(path, "run.predictions/1").params["classes"], logits


def test_new_pictures_are_judged_as_the_same_pictures_were(
    asked: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that the index forgets go through encoder and model, and get the probabilities of their logits."""
    copy_of(asked, tmp_path / "copy", monkeypatch)
    pictures = sorted(f"test/{path.parent.name}/{path.name}" for path in Path("images/test").rglob("*.png"))
    forgotten = pictures[::2]
    forget(set(forgotten))
    for name in RUNS:
        half = read_half(Path("data"), name)
        found = calibrate(half.logits, half.y, half.groups, half.classes, half.lineages)
        classes, logits = said(name)
        rows = ask("--run", name, "images/test")
        assert [row["path"] for row in rows] == [f"images/{path}" for path in pictures]
        for row, path in zip(rows, pictures, strict=True):
            expected = found.probabilities(logits[path][None])[0]
            p = {each["class_id"]: each["p"] for each in row["top"]}
            np.testing.assert_allclose([p[name] for name in classes], expected, atol=1e-4)
            assert row.get("split") == (None if path in forgotten else "test")


def new_pictures(folder: Path, count: int = 5) -> list[str]:
    """Pictures that no index has."""
    return [str(draw(folder / f"{seed}.png", 1000 + seed)) for seed in range(count)]


def test_what_the_run_knows_needs_no_encoder(ask: Ask, write_other: Write, tmp_path: Path) -> None:
    gone = {"model": "local-dir:nowhere"}
    write_other(encoders={"vit": gone, "twin": gone})
    rows = ask("--params", "other.yaml", "--run", "moments", "images/train")
    assert len(rows) == 18
    assert {row["split"] for row in rows} == {"train", "choose", "val"}
    with pytest.raises(UserError, match=r"encoders\.vit\.model: there is no folder nowhere"):
        ask("--params", "other.yaml", "--run", "moments", *new_pictures(tmp_path, 1))


def test_the_best_run_on_the_half_that_chooses_is_asked(
    ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {name: read_run(Path("data"), name, "vit") for name in RUNS}
    best = max(RUNS, key=lambda name: runs[name].accuracy("choose")[0])  # type: ignore[union-attr]
    run_module("tools.predict", "--format", "jsonl", "images/test")
    said = capsys.readouterr()
    assert said.err.startswith(f"run: {best}, the best on the half of val that chooses (")
    assert [json.loads(line) for line in said.out.splitlines()] == ask("--run", best, "images/test")


def test_every_format_says_the_same(ask: Ask, tmp_path: Path) -> None:
    new_pictures(tmp_path / "new")
    rows = ask("--run", "linear_probe", str(tmp_path / "new"))
    assert [len(row["top"]) for row in rows] == [3] * 5
    assert {"path", "image_id", "class_id", "name", "p", "top", "nearest"} <= rows[0].keys()
    for form in ("csv", "parquet"):
        out = tmp_path / f"answers.{form}"
        run_module("tools.predict", "--run", "linear_probe", str(tmp_path / "new"), "--format", form, "--out", str(out))
    table = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    with open(tmp_path / "answers.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == list(table[0])
    for row, other, cell in zip(rows, table, cells, strict=True):
        for name, value in row.items():
            assert other[name] == (pytest.approx(value) if isinstance(value, float) else other[name])
            assert json.dumps(value) == cell[name] if isinstance(value, list) else str(value) == cell[name]
        assert [each["class_id"] for each in other["top"]] == [each["class_id"] for each in row["top"]]


def test_a_broken_file_is_a_row_with_its_reason(ask: Ask, tmp_path: Path) -> None:
    first, _ = new_pictures(tmp_path, 2)
    shutil.copy(first, tmp_path / "copy.png")
    (tmp_path / "cut.png").write_bytes(Path(first).read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "manifest.csv").write_text(
        "path,group\n0.png,x\ncut.png,x\nnot there.png,\n1.png,\nempty.png,\npipe.png,y\ncopy.png,y\n"
    )
    rows = ask("--run", "zero_shot", str(tmp_path / "manifest.csv"))
    assert [row["path"] for row in rows] == [
        "0.png", "cut.png", "not there.png", "1.png", "empty.png", "pipe.png", "copy.png"
    ]  # fmt: skip
    reasons = [row.get("error") for row in rows]
    assert reasons[0] is reasons[3] is reasons[6] is None
    assert reasons[2] == "cannot be read: No such file or directory"
    assert reasons[5] == "is a named pipe, not a file"
    assert all(reasons[place] for place in (1, 4))
    assert all(row["top"] == [] for row in rows if "error" in row)
    assert rows[6]["top"] == rows[0]["top"] != rows[3]["top"]


def test_files_that_are_no_pictures_load_no_encoder(
    ask: Ask, write_other: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among pictures that the run knows they are rows; where there are no others, that is an error."""
    gone = {"model": "local-dir:nowhere"}
    write_other(encoders={"vit": gone, "twin": gone})
    words = ("--params", "other.yaml", "--run", "moments", "--format", "jsonl")
    notes = tmp_path / "notes.png"
    notes.write_text("no picture")
    shutil.copy("images/test/a/18.png", tmp_path)
    run_module("tools.predict", *words, str(tmp_path))
    said = capsys.readouterr()
    assert ["error" in json.loads(line) for line in said.out.splitlines()] == [False, True]
    assert f"{tmp_path}: 1 of 2 pictures cannot be read, the reasons: is none of JPEG" in said.err
    assert said.err.endswith("; correct the path, save the picture anew as JPEG or PNG, or leave it out\n")
    with pytest.raises(UserError, match=r"notes\.png: is none of JPEG, .*; correct the path, save the picture anew"):
        run_module("tools.predict", *words, str(notes))
    assert "is none of JPEG" in json.loads(capsys.readouterr().out)["error"]
    (tmp_path / "list.csv").write_text("path\nnotes.png\ngone.png\n")
    reasons = r"2 of 2 pictures cannot be read, the reasons: is none of .*, cannot be read: No such file or directory; "
    with pytest.raises(UserError, match=reasons):
        run_module("tools.predict", *words, str(tmp_path / "list.csv"))


@pytest.mark.slow
def test_chunks_change_nothing(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_pictures(tmp_path, 6)
    shutil.copytree("images/test", tmp_path / "known")
    (tmp_path / "a broken one.png").touch()
    whole = ask("--run", "concept_graph", str(tmp_path))
    monkeypatch.setattr("tools.predict.CHUNK", 1)  # a batch of four
    for row, other in zip(ask("--run", "concept_graph", str(tmp_path)), whole, strict=True):
        assert row["path"] == other["path"]
        for each, same in zip(row["top"], other["top"], strict=True):
            assert each["p"] == pytest.approx(same["p"], abs=1e-5)


def test_candidates_alone_are_ranked_and_calibrated(ask: Ask, tmp_path: Path) -> None:
    [path] = new_pictures(tmp_path, 1)
    classes = tmp_path / "classes.txt"
    classes.write_text("Cardinal\n\na\n")
    [row] = ask("--run", "linear_probe", "--classes", str(classes), path)
    assert {each["class_id"] for each in row["top"]} == {"a", "c"}
    assert sum(each["p"] for each in row["top"]) == pytest.approx(1)
    known = ask("--run", "linear_probe", "--classes", str(classes), "images/test")
    half, logits = read_half(Path("data"), "linear_probe"), said("linear_probe")[1]
    kept = np.isin(half.y, [0, 2])
    found = calibrate(half.logits[kept][:, [0, 2]], half.y[kept] // 2, None, ["a", "c"])
    for each in known:
        own = logits[each["path"].removeprefix("images/")][[0, 2]]
        assert each["p"] == pytest.approx(found.probabilities(own[None]).max(), abs=1e-5)
    classes.write_text("Cardinal\nCadinal\nShark\n")
    with pytest.raises(UserError, match=r"classes\.txt: no class of this run: 'Cadinal', 'Shark'; did you mean 'Card"):
        ask("--run", "linear_probe", "--classes", str(classes), path)


def test_limits_are_promised_where_they_are_shown(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Val is too small for sets here: what shows them says why there are none, a table says nothing of them."""
    for form, count in (("text", 1), ("table", 0)):
        run_module("tools.predict", "--run", "zero_shot", "--format", form, "images/test")
        said = capsys.readouterr().err
        assert said.count("; there are no sets: they take 9 pictures of val that show these classes, not ") == count


def test_a_group_has_one_answer_by_votes(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.predict.CHUNK", 1)
    paths = sorted(f"test/{path.parent.name}/{path.name}" for path in Path("images/test").rglob("*.png"))
    groups = ["x", "y", "x", "", "x", "y"]
    lines = [f"{path},{group}" for path, group in zip([*paths, "test/gone.png"], [*groups, "y"], strict=True)]
    manifest = Path("images/survey.csv")
    manifest.write_text("\n".join(["path,group", *lines]))
    broken, *rows = ask("--run", "moments", "--by", "group", str(manifest))
    manifest.unlink()
    assert (broken["path"], broken["group"]) == ("test/gone.png", "y")
    names = [group or path for path, group in zip(paths, groups, strict=True)]
    logits = said("moments")[1]
    half = read_half(Path("data"), "moments")
    found = calibrate(half.logits, half.y, half.groups, half.classes)
    _, votes = vote(np.stack([logits[path] for path in paths]), np.unique(names, return_inverse=True)[1])
    assert [(row["group"], row["pictures"]) for row in rows] == [(n, names.count(n)) for n in sorted(set(names))]
    for row, p in zip(rows, found.probabilities(votes), strict=True):
        assert row["p"] == pytest.approx(p.max(), abs=1e-5)
        assert not {"set", "sure_name", "none_of_these"} & row.keys()
    with pytest.raises(UserError, match="names no group"):
        ask("--run", "moments", "--by", "group", "images/test")


def test_groups_of_val_calibrate_the_votes_of_groups(ask: Ask) -> None:
    path, schema = Path("data/index/images.parquet"), "index.images/1"
    header, table = store.read_header(path, schema), store.read_table(path, schema)
    rows = table.to_pylist()
    for row in rows:
        row["group"] = f"{row['split']} {row['class_id']}"
    kept = path.read_bytes()
    store.write_table(store.make_table(schema, rows), path, schema, header.params, header.fingerprint)
    try:
        manifest = Path("images/survey.csv")
        seen = [row for row in rows if row["split"] == "test" and row["status"] == "ok"]
        manifest.write_text("\n".join(["path,group", *(f"{row['path']},{row['group']}" for row in seen)]))
        found = ask("--run", "moments", "--by", "group", str(manifest))
        manifest.unlink()
        half = read_half(Path("data"), "moments")
    finally:
        path.write_bytes(kept)
    assert half.groups is not None
    calibration = calibrate_votes(half.logits, half.y, half.groups, half.classes)
    assert calibration is not None
    assert calibration.units < len(half.y)
    logits = said("moments")[1]
    names = [row["group"] for row in seen]
    _, votes = vote(np.stack([logits[row["path"]] for row in seen]), np.unique(names, return_inverse=True)[1])
    assert [row["group"] for row in found] == sorted(set(names))
    for row, p, sure in zip(found, calibration.probabilities(votes), calibration.answer(votes), strict=True):
        assert row["p"] == pytest.approx(p.max(), abs=1e-5)
        assert row.get("set") == sure["set"]


def test_the_nearest_training_pictures_are_named(ask: Ask) -> None:
    rows = ask("--run", "moments", "images")
    table = store.read_buckets("data/embed/vit/moments/pooled", "embed.moments/1", 2)
    table = table.filter([view == 0 for view in table["view"].to_pylist()])
    vectors = store.vectors_of(table).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = dict(zip(table["image_id"].to_pylist(), vectors, strict=True))
    train = {row["image_id"]: row["path"].removeprefix("images/") for row in rows if row["split"] == "train"}
    for row in rows:
        cosine = {each: own[row["image_id"]] @ own[each] for each in train if each != row["image_id"]}
        best = sorted(cosine, key=lambda each: -cosine[each])[:5]
        assert [each["path"] for each in row["nearest"]] == [train[each] for each in best]
        found = [each["cosine"] for each in row["nearest"]]
        np.testing.assert_allclose(found, [cosine[each] for each in best], atol=1e-3)


@pytest.mark.slow
def test_one_picture_is_told_whole(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = new_pictures(tmp_path, 1)
    run_module("tools.predict", "--run", "concept_graph", path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path
    assert [re.fullmatch(r" +[\d.]+ %  (\w+)", line) is not None for line in lines[1:4]] == [True] * 3
    # What a run of a few epochs on noise finds hangs on the last bits: reasons, or that there are none, or both.
    why = r"  (\w+ rather than \w+, in logits( .*)?:|no (patch and no )?(patch|text) moves this decision towards .*)"
    assert any(re.fullmatch(why, line) for line in lines)
    assert sum("train/" in line for line in lines) == 5


def test_a_run_without_reasons_names_those_that_have_some(
    asked: Path, write_other: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--run", "linear_probe", "--explain", "images/test")
    run_module("tools.predict", *words)
    line = "has no patches and no concepts to name"
    assert f"{line}; ask one that has: --run zero_shot or attention_pool or concept_graph\n" in capsys.readouterr().err
    # Neither one that is not trained nor one that cannot stand.
    runs = {name: RUNS[name] for name in ("linear_probe", "zero_shot")}
    wrong = RUNS["attention_pool"] | {"settings": {"lr": "fast"}}
    write_other(train={"seeds": 1, "runs": {**runs, "new": RUNS["attention_pool"], "attention_pool": wrong}})
    run_module("tools.predict", "--params", "other.yaml", *words)
    assert f"{line}; ask one that has: --run zero_shot\n" in capsys.readouterr().err


@pytest.mark.slow
def test_reasons_are_those_of_the_trainer(ask: Ask, tmp_path: Path) -> None:
    """A stored picture and its new copy, cut down to other bytes of the same pixels, have the same reasons."""
    with Image.open("images/test/a/18.png") as image:
        image.save(tmp_path / "same.png", compress_level=1)
    asked = ("images/test/a/18.png", str(tmp_path))
    [old], [new] = (ask("--run", "concept_graph", "--explain", path) for path in asked)
    assert (old["split"], "split" in new) == ("test", False)
    assert old["image_id"] != new["image_id"]
    for name in ("patches", "concepts"):
        assert [each["gain"] for each in old[name]] == pytest.approx([each["gain"] for each in new[name]], abs=1e-4)
    assert all(each["gain"] >= LEAST_MOVE for each in old["patches"])


def test_the_page_loads_nothing_and_escapes_names(asked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    new_pictures(folder, 2)
    (folder / "<script>alert(1)<").mkdir()
    draw(folder / "<script>alert(1)<" / "x.png", 7)
    (folder / "broken.png").touch()
    page = tmp_path / "page.html"
    run_module("tools.predict", "--run", "attention_pool", str(folder), "--html", str(page))
    html = page.read_text()
    assert "default-src 'none'; img-src data:" in html
    assert html.count("<article") == 4
    assert "<script" not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert html.count("data:image/webp") == 3 + 3 * 5
    assert "is none of JPEG" in html


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: is not there; name a picture, a folder"),
        (["data"], "data: holds no picture"),
        (["--run", "other", "images"], r"train\.runs: has no other; choose one of"),
        (["--format", "parquet", "images"], "goes to a file; name it with --out"),
    ],
    ids=["nothing there", "no picture", "no run", "parquet"],
)
def test_a_person_is_told_what_to_do(arguments: list[str], reason: str, ask: Ask) -> None:
    with pytest.raises(UserError, match=reason):
        run_module("tools.predict", "--run", "zero_shot", *arguments)


def test_nothing_is_trained_yet(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    copy_of(trained, tmp_path / "copy", monkeypatch)
    shutil.rmtree("data/runs")
    with pytest.raises(UserError, match="data/runs: no run is trained yet; make repro trains"):
        run_module("tools.predict", "images")
    with pytest.raises(UserError, match=r"data/runs/zero_shot/config\.json: is missing"):
        run_module("tools.predict", "--run", "zero_shot", "images")


@pytest.mark.slow
def test_libraries_of_encoders_are_not_loaded_for_what_is_known(asked: Path) -> None:
    code = "import sys; from tools.predict import main; main(); assert 'open_clip' not in sys.modules"
    words = [sys.executable, "-c", code, "--run", "zero_shot", "images/test"]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)


@pytest.mark.slow
def test_a_cluster_makes_and_says_the_same(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands that run on one, each beginning with nothing; a page and groups of the answers too."""
    copy_of(asked, tmp_path / "copy", monkeypatch)
    folders = {
        "embed_images": "data/embed/vit/images", "embed_tokens": "data/embed/vit/tokens",
        "pool_tokens": "data/embed/vit/moments", "build_graphs": "data/graphs/vit",
        "label_patches": "data/labels/vit",
    }  # fmt: skip
    with ray_cluster(2) as variables:
        compare_all(folders, variables, tmp_path / "copy/new")


def compare_all(folders: dict[str, str], variables: dict[str, str], new: Path) -> None:
    for stage, folder in folders.items():
        plain = contents(Path(folder))
        shutil.rmtree(folder)
        done = run_ray(f"stages.{stage}", "--encoder", "vit", "--cpus", "1", **variables)
        assert done.returncode == 0, done.stderr
        assert contents(Path(folder)) == plain
    # Moments of the images, without stored tokens.
    shutil.rmtree("data/embed/vit/tokens")
    plain = contents(Path("data/embed/vit/moments"))
    shutil.rmtree("data/embed/vit/moments")
    done = run_ray("stages.pool_tokens", "--encoder", "vit", "--cpus", "1", **variables)
    assert done.returncode == 0, done.stderr
    assert contents(Path("data/embed/vit/moments")) == plain

    new_pictures(new, 400)
    Path("new/broken.png").write_bytes(b"no picture")
    for form, more in (("jsonl", ["--html", "page.html"]), ("csv", ["--explain"])):
        options = ["new", "--run", "concept_graph", "--device", "cpu", "--format", form, *more]
        run_module("tools.predict", *options, "--out", "plain")
        pages = [Path("page.html").read_bytes()] if "--html" in more else []
        done = run_ray("tools.predict", *options, "--cpus", "1", "--out", "ray", **variables)
        assert done.returncode == 0, done.stderr
        assert Path("ray").read_bytes() == Path("plain").read_bytes()
        assert pages == ([Path("page.html").read_bytes()] if "--html" in more else [])


def test_frames_of_films_and_rows_of_shards_are_asked_about(
    asked: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film gives a row a frame, and one by its votes; a shard what the pictures in it give as files."""
    monkeypatch.setenv("FIELDMARK_CACHE", str(tmp_path / "cache"))
    name = "linear_probe"
    one = str(film(tmp_path / "new/a.mp4", 3.0))
    rows = ask("--run", name, one)
    assert [row["path"] for row in rows] == [f"{one}/1fps/00000{number}.jpg" for number in range(3)]
    assert {row["group"] for row in rows} == {one}
    film(tmp_path / "new/b.mp4", 2.0, seed=5)
    (tmp_path / "new/c.mp4").write_bytes(b"no film")
    broken, *voted = ask("--run", name, "--by", "group", str(tmp_path / "new"))
    assert [(row["group"], row["pictures"]) for row in voted] == [(one, 3), (str(tmp_path / "new/b.mp4"), 2)]
    assert broken["path"] == str(tmp_path / "new/c.mp4/1fps/000000.jpg")
    assert broken["error"].startswith("is no film by its first bytes")

    pictures = [draw(tmp_path / f"drawn/{seed}.png", 100 + seed) for seed in range(3)]
    write_shard(tmp_path / "new.parquet", [path.read_bytes() for path in pictures], [0, 1, 0])
    of_rows, of_files = (ask("--run", name, str(tmp_path / each)) for each in ("new.parquet", "drawn"))
    assert [row["path"] for row in of_rows] == [f"{tmp_path / 'new.parquet'}/{row}" for row in range(3)]
    assert [{**row, "path": ""} for row in of_rows] == [{**row, "path": ""} for row in of_files]
