"""What would stop DVC, or hide from it, is refused by name; what does neither passes, and DVC agrees."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.command import UserError
from fieldmark.params import load_params
from tests.checkout import git
from tests.project import PARAMS, ROOT
from tools.preflight import bad_entries, check, check_texts, is_utf8

RunStage = Callable[..., None]
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


@pytest.fixture(autouse=True)
def images(project: Path) -> Path:
    """A project with all that params.yaml names by default, and one picture (an empty file: nothing opens it)."""
    prompts = [f"prompts/{name}.md" for name in ("concepts", "generic_concepts", "contrast", "describe")]
    for path in (*prompts, "data/demo/answers/concepts.jsonl"):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).touch()
    (project / "images/train/a").mkdir(parents=True)
    (project / "images/train/a/0.png").touch()
    return project / "images"


def write_params(**changes: Any) -> None:
    """params.yaml, with dotted keys set (`__` stands for the dot)."""
    content = json.loads(json.dumps(PARAMS))
    content["encoders"] = {"conv": {"model": "ViT-B-32", "pretrained": "openai"}}
    for key, value in changes.items():
        *blocks, last = key.split("__")
        block = content
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = value
    Path("params.yaml").write_text(json.dumps(content))


def complaint(**changes: Any) -> str:
    write_params(**changes)
    with pytest.raises(UserError) as error:
        check("params.yaml", load_params())
    return str(error.value)


def passes(**changes: Any) -> None:
    write_params(**changes)
    check("params.yaml", load_params())


def pipe(path: str) -> None:
    os.mkfifo(path)


def link(target: str) -> Callable[[str], None]:
    return lambda path: os.symlink(target, path)


def touch(path: str) -> None:
    Path(path).touch()


def listen(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path)


# Where, what stands there, and what is said of it.
BAD: list[tuple[str, Callable[[str], None], str]] = [
    ("train/a/1.png", link("nowhere.png"), "a link to 'nowhere.png' (No such file or directory); restore"),
    ("train/.hidden", link("nowhere.png"), "a link to 'nowhere.png'"),
    ("train/a/me", link("me"), "a link to 'me' (Too many levels of symbolic links)"),
    (f"train/a/{NOT_UTF8}", touch, "the name is not UTF-8; rename it"),
    (f"train/{NOT_UTF8}", os.mkdir, "the name is not UTF-8; rename it"),
    ("train/a/pipe", pipe, "a named pipe, not a file; move or delete it"),
    ("train/a/zeros", link("/dev/zero"), "a device, not a file; move or delete it"),
    ("s", listen, "a socket, not a file; move or delete it"),
    (".dvcignore", touch, "DVC stops at it; move or delete it"),
    ("train/.dvcignore", touch, "DVC stops at it; move or delete it"),
    ("train/.dvc", os.mkdir, "makes DVC overlook the whole folder it lies in; move or delete it"),
    (".dvc", touch, "makes DVC overlook the whole folder it lies in; move or delete it"),
    ("train/b", link("../../prompts"), "a link to a folder, and DVC does not look behind it; put a folder here"),
    ("val", link("train"), "a link to a folder, and DVC does not look behind it"),
]
# Where DVC ends with an error, rather than waits.
STOPS = ("train/a/1.png", "train/a/me", f"train/a/{NOT_UTF8}", "s", ".dvcignore", "train/.dvcignore")


def make_harmless(images: Path) -> None:
    """Odd entries that DVC reads, or skips inside this project."""
    for name in ("new\nline.png", "cafe\u0301.png", "caf\xe9.png", "back\\slash.png", ".hidden", "x" * 255):
        (images / "train/a" / name).touch()
    (images.parent / "elsewhere.png").touch()
    (images / "train/a/relative.png").symlink_to("0.png")
    (images / "train/a/absolute.png").symlink_to(images.parent / "elsewhere.png")
    (images / "train/own").symlink_to(".")
    (images / "train/a/above").symlink_to(images)
    (images / "empty").mkdir()
    for name in (".git", "__pycache__"):
        (images / name).mkdir()
        (images / name / "link").symlink_to("nowhere")
    (images.parent / "root").symlink_to("images")


def dvc(*words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("dvc")
    return subprocess.run([program, *words], capture_output=True, text=True, errors="replace", check=False)


def start_dvc() -> None:
    """A stage that depends on the root, ignoring what the repository's .dvcignore ignores."""
    assert dvc("init", "--no-scm", "--quiet").returncode == 0
    Path(".dvcignore").write_text("__pycache__/\n")
    Path("dvc.yaml").write_text("stages: {index: {cmd: echo ran, deps: [images]}}")


def test_it_says_nothing_where_all_is_right(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> None:
    write_params()
    run_stage("tools.preflight")
    assert capsys.readouterr() == ("", "")


def test_it_says_what_tracks_the_data_that_people_keep(
    project: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> tuple[str, list[str]]:
        run_stage("tools.preflight")
        out, err = capsys.readouterr()
        return out, [line.split(": ", 2)[2].partition(": clones")[0] for line in err.splitlines()]

    def add(*paths: str) -> None:
        git("add", "-f", *paths, cwd=project)

    write_params(dataset__root="data/images", concepts__import="data/concepts.json", demo={})
    shutil.move("images", "data/images")
    shutil.copytree("data/images/train", "data/images/test")
    Path("data/concepts.json").write_text(json.dumps({"a": ["a fish with a fin"]}))
    git("init", "-q", cwd=project)
    (project / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    add("params.yaml", "prompts", "data/demo", "data/none")
    nothing = "is tracked by neither git nor DVC, or in parts only"
    images, concepts = "dataset.root: data/images", "concepts.import: data/concepts.json"
    assert said() == ("", [f"{images} {nothing}", f"{concepts} {nothing}"])
    (project / "data/images.dvc").write_text("outs: []")
    add("data/concepts.json")
    half = f"{images} is tracked by DVC, but git does not have data/images.dvc"
    assert said() == ("tracked: data/images by DVC, data/concepts.json by git\n", [half])
    add("data/images.dvc")
    assert said() == ("tracked: data/images by DVC, data/concepts.json by git\n", [])
    (project / "data/images.dvc").unlink()
    add("data/images")
    assert said() == ("tracked: data/images by git, data/concepts.json by git\n", [])
    (project / "data/images/train/a/1.png").touch()
    assert said() == ("tracked: data/concepts.json by git\n", [f"{images} {nothing}"])


def test_it_checks_the_parameters_themselves(run_stage: RunStage) -> None:
    write_params(dataset__rot="images")
    with pytest.raises(UserError, match=r"params\.yaml: dataset\.rot: unknown key; did you mean `root`"):
        run_stage("tools.preflight")


@pytest.mark.parametrize(("name", "make", "said"), BAD)
def test_a_bad_entry(name: str, make: Callable[[str], None], said: str) -> None:
    make(f"images/{name}")
    heading, *lines = complaint().splitlines()
    assert heading == "params.yaml: dataset.root: DVC would stop at this, or miss what changes there:"
    assert len(lines) == 1
    assert lines[0].startswith(f"  {f'images/{name}'!r}: {said}")
    assert lines[0].isprintable()


def test_odd_entries_that_do_no_harm_pass_and_dvc_reads_them(images: Path) -> None:
    make_harmless(images)
    passes()
    passes(dataset__root="root")
    passes(dataset__root=f"{images}/")
    start_dvc()
    done = dvc("repro")
    assert done.returncode == 0, done.stderr
    (images.parent / "elsewhere.png").write_text("changed")
    assert "ran" in dvc("repro").stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), [bad[:2] for bad in BAD if bad[0] in STOPS])
def test_dvc_does_stop_there(name: str, make: Callable[[str], None]) -> None:
    start_dvc()
    make(f"images/{name}")
    assert dvc("repro").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train/.dvc", "train/b/c"])
def test_dvc_does_not_see_a_change_there(project: Path, name: str) -> None:
    if name == "train/.dvc":
        Path("images/train/.dvc").touch()
        changed = Path("images/train/a/0.png")
    else:
        (project / "elsewhere").mkdir()
        Path("images/train/b").symlink_to(project / "elsewhere")
        changed = project / "elsewhere/0.png"
    start_dvc()
    assert "ran" in dvc("repro").stdout.splitlines()
    changed.write_text("changed")
    assert "ran" not in dvc("repro").stdout.splitlines()


def test_outside_the_project_dvc_skips_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There .dvc is a folder as any other, and what is wrong in .git counts."""
    (project / "inner").mkdir()
    for name in (".dvc", ".git"):
        (project / "images" / name).mkdir()
    (project / "images/.git/link").symlink_to("nowhere")
    assert [path for path, _ in bad_entries("images")] == ["images/.dvc"]
    monkeypatch.chdir(project / "inner")
    assert [path for path, _ in bad_entries("../images")] == ["../images/.git/link"]
    # As DVC, by the path that is named, not by where it leads.
    Path("linked").symlink_to("../images")
    assert [path for path, _ in bad_entries("linked")] == ["linked/.dvc"]


def test_all_are_listed_and_the_terminal_survives(images: Path) -> None:
    for number in range(25):
        (images / f"train/a/{number:02d}\x1b[2J\n").symlink_to("nowhere")
    heading, *lines = complaint().splitlines()
    assert len(lines) == 21
    assert [line[:22] for line in lines[:20]] == [f"  'images/train/a/{number:02d}\\x" for number in range(20)]
    assert lines[20] == "  and 5 more"
    assert all(map(str.isprintable, [heading, *lines]))


def test_exactly_twenty_leave_nothing_out(images: Path) -> None:
    for number in range(20):
        (images / str(number)).symlink_to("nowhere")
    assert len(complaint().splitlines()) == 21


def test_folders_of_other_keys_are_looked_through() -> None:
    Path("texts").mkdir()
    Path("texts", NOT_UTF8).touch()
    Path("images/link").symlink_to("nowhere")
    heading, *lines = complaint(concepts__import="texts").splitlines()
    assert heading.startswith("params.yaml: dataset.root and concepts.import: ")
    assert len(lines) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(images: Path) -> None:
    (images / "test").mkdir()
    (images / "link.png").symlink_to("train/a/0.png")
    (images / "train/a/0.png").chmod(0)
    for mode in (0o000, 0o111, 0o444):
        (images / "test").chmod(mode)
        assert {path: said.partition(";")[0] for path, said in bad_entries("images")} == {
            "images/test": "may not be listed by you",
            "images/link.png": "a link to a file that you may not read",
            "images/train/a/0.png": "may not be read by you",
        }
    (images / "test").chmod(0o755)
    images.chmod(0)
    assert "dataset.root: 'images' may not be read by you" in complaint()
    images.chmod(0o755)


@given(st.binary(min_size=1, max_size=8))
def test_utf8_is_what_decodes_as_it(name: bytes) -> None:
    try:
        name.decode()
        decodes = True
    except UnicodeDecodeError:
        decodes = False
    assert is_utf8(os.fsdecode(name)) == decodes


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dataset__root", "no", "dataset.root: 'no' is not there; correct it (a path counts from "),
        ("dataset__root", "~/no", "dataset.root: '~/no' is not there; correct it (a path counts from "),
        ("dataset__root", "prompts/concepts.md", "dataset.root: 'prompts/concepts.md' is not a folder; "),
        ("dataset__root", "link", "dataset.root: 'link' is a link that leads nowhere; "),
        ("dataset__val_list", "no.txt", "dataset.val_list: 'no.txt' is not there; "),
        ("dataset__val_list", "images", "dataset.val_list: 'images' is not a file; "),
        ("dataset__val_list", "pipe", "dataset.val_list: 'pipe' is not a file; "),
        ("concepts__import", "no.json", "concepts.import: 'no.json' is not there; "),
        ("concepts__import", "pipe", "concepts.import: 'pipe' is not a file or folder; "),
        ("concepts__prompt", "no.md", "concepts.prompt: 'no.md' is not there; "),
        ("concepts__generic_prompt", "no.md", "concepts.generic_prompt: 'no.md' is not there; "),
        ("concepts__contrast_prompt", "no.md", "concepts.contrast_prompt: 'no.md' is not there; "),
        ("concepts__edits", "no.json", "concepts.edits: 'no.json' is not there; "),
        ("describe__prompt", "no.md", "describe.prompt: 'no.md' is not there; "),
        ("llm__recordings", "no", "llm.recordings: 'no' is not there; "),
        ("encoders__conv__model", "local-dir:no", "encoders.conv.model: 'no' is not there; "),
        ("encoders__conv__model", "local-dir:params.yaml", "encoders.conv.model: 'params.yaml' is not a folder; "),
    ],
)
def test_a_path_that_cannot_stand(key: str, value: str, said: str) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("nowhere")
    message = complaint(**{key: value})
    assert message.startswith(f"params.yaml: {said}")
    assert "\n" not in message
    assert ("home folder" in message) == value.startswith("~")
    assert ("data/none" in message) == (key in ("dataset__val_list", "concepts__import"))


def test_the_file_that_stands_for_none_is_missing() -> None:
    Path("data/none").unlink()
    message = complaint()
    assert message.startswith("params.yaml: dataset.val_list: 'data/none' is not there")
    assert "set it to" not in message


def test_the_demo_draws_its_own_images() -> None:
    demo = {"reef": {}}
    for root in ("data/reef", "./data/reef/", os.path.abspath("data/reef")):
        passes(dataset__root=root, demo=demo)
        assert "is not there" in complaint(dataset__root=root, demo={})
    assert "is not there" in complaint(dataset__root="data/reefs", demo=demo)
    Path("data/reef").mkdir()
    passes(dataset__root="data/reef", demo={})
    Path("data/reef/link").symlink_to("nowhere")
    assert "'data/reef/link'" in complaint(dataset__root="data/reef", demo=demo)


@pytest.mark.parametrize("root", ["data", "data/", ".", "..", "", "here"])
def test_images_stand_apart_from_what_the_pipeline_writes(root: str) -> None:
    Path("here").symlink_to(".")
    message = complaint(dataset__root=root)
    assert message.startswith(f"params.yaml: dataset.root: {root!r} holds data/, where the pipeline writes; ")
    assert "\n" not in message


def test_a_manifest_is_a_file_or_a_folder() -> None:
    Path("data/mine.csv").touch()
    manifest = {"dataset__format": "manifest"}
    passes(**manifest, dataset__root="data/mine.csv")
    passes(**manifest, dataset__root="images", dataset__images="images")
    # Nobody asks DVC to hash the folder of the images.
    Path("images/link").symlink_to("nowhere")
    passes(**manifest, dataset__root="data/mine.csv", dataset__images="images")
    assert "'images/link'" in complaint(**manifest, dataset__root="images")
    message = complaint(**manifest, dataset__root="data/mine.csv", dataset__images="no")
    assert message.startswith("params.yaml: dataset.images: 'no' is not there")
    os.mkfifo("pipe.csv")
    assert "'pipe.csv' is not a file or folder" in complaint(**manifest, dataset__root="pipe.csv")


def test_texts_of_a_class_that_was_renamed_are_told_before_anything_is_indexed(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "train/Blue tang").mkdir()
    (images / "train/Blue tang/0.png").touch()
    (images / "test/a").mkdir(parents=True)
    (images / "test/a/0.png").touch()
    for texts, said in (
        ({"a": ["x"], "Blue tangs": ["y"]}, "'Blue tangs': is no folder, .*; did you mean 'Blue tang'"),
        ({"a": ["x"], "Blue tang": []}, "'Blue tang': has no text"),
    ):
        Path("own.json").write_text(json.dumps(texts))
        for key in ("concepts__import", "concepts__edits"):
            write_params(**{key: "own.json"})
            check("params.yaml", load_params())
            with pytest.raises(UserError, match=said):
                check_texts(load_params())
    # Of a class that was removed, index and concepts will warn; and the demo's images may yet have to be drawn.
    Path("own.json").write_text(json.dumps({"a": ["x"], "Blue tang": ["y"], "Great auk": ["z"]}))
    write_params(concepts__import="own.json")
    check_texts(load_params())
    write_params(concepts__import="own.json", dataset__root="gone")
    check_texts(load_params())
    assert capsys.readouterr().err == ""
