"""docs/sharing.md, run line by line by DVC: two clones and a folder remote, promise 5 of the design.

What is shared is a small reef; links between DVC's cache and the outputs are tried on it too.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from fieldmark.command import UserError
from tests.checkout import BIN, BUCKETS, ROOT, checkout, command, commit, edit_params, git
from tools.share import problem_of_url, set_remote

pytestmark = pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="clones borrow the virtual environment")

# What concept_graph reads of its encoder, and all that a second machine needs to train it.
READS = ["data/bank/reef.parquet", "data/embed/reef/images", "data/graphs/reef", "data/index/classes.parquet",
         "data/index/images.parquet", "data/inputs", "data/labels/reef"]  # fmt: skip
AUTHOR = {"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org",
          "GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.org"}  # fmt: skip


def steps() -> list[str]:
    """The shell blocks of the page, in their order: share, train, report, links."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/sharing.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    return blocks


def shell(script: str, folder: Path) -> str:
    """Run lines as a user types them, without GPU and key; return all that they say."""
    words = ("bash", "-eo", "pipefail", "-c", f"exec 2>&1\n{script}")
    return command(*words, cwd=folder, CUDA_VISIBLE_DEVICES="", **AUTHOR).stdout


def lend_environment(folder: Path) -> None:
    """A .venv that make takes for up to date: this one's, by links."""
    venv = folder / ".venv"
    venv.mkdir()
    for path in BIN.parent.iterdir():
        if not path.name.startswith(".fieldmark-"):
            (venv / path.name).symlink_to(path)
    pins = (folder / "pyproject.toml").read_bytes() + (folder / "constraints.txt").read_bytes()
    (venv / f".fieldmark-{hashlib.sha256(pins).hexdigest()[:16]}").touch()


def data_files(folder: Path) -> dict[str, str]:
    """The md5 of each file under data/ that git does not bring."""
    files = [path for path in sorted((folder / "data").rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: hashlib.md5(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(("data/demo/", "data/controls/")) and Path(name).name not in ("README.md", "none")
    }


def cached(folder: Path) -> dict[str, str]:
    """The md5 of each object of DVC's cache by the md5 that it goes by; a folder's list has `.dir` behind it."""
    objects = (folder / ".dvc/cache/files/md5").glob("??/*")
    return {f"{path.parent.name}{path.name}": hashlib.md5(path.read_bytes()).hexdigest() for path in objects}


@pytest.fixture(scope="module")
def first(small_reef: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first machine: the whole pipeline ran."""
    folder = shutil.copytree(small_reef, tmp_path_factory.mktemp("first") / "fieldmark", symlinks=True)
    lend_environment(folder)
    return folder


@pytest.fixture(scope="module")
def shared(first: Path) -> str:
    """What `make share` said on the first machine, and its commit."""
    return shell(steps()[0], first)


class Second(NamedTuple):
    folder: Path
    pulled: dict[str, str]
    fetched: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def second(first: Path, shared: str, tmp_path_factory: pytest.TempPathFactory) -> Second:
    """The second machine, a clone at another depth: what `make pull` brought, then the method trained."""
    folder = tmp_path_factory.mktemp("second") / "some/where/fieldmark"
    git("clone", "-q", str(first), str(folder), cwd=first)
    lend_environment(folder)
    pull, train = steps()[1].split("\n", 1)
    shell(pull, folder)
    return Second(folder, data_files(folder), cached(folder), shell(train, folder))


def test_share_names_what_to_commit_and_the_folder_of_this_machine(first: Path, shared: str) -> None:
    remote = first.parent / "fieldmark-cache"
    assert f"a folder of this machine, {remote};" in shared
    assert "dvc.lock and .dvc/config" in shared
    assert f"url = {remote}\n" in (first / ".dvc/config").read_text()
    assert command("git", "status", "--porcelain", cwd=first).stdout == ""
    assert command("git", "ls-files", "dvc.lock", cwd=first).stdout == "dvc.lock\n"
    pushed = {f"{path.parent.name}{path.name}" for path in (remote / "files/md5").glob("??/*")}
    assert pushed == set(cached(first))
    assert "Everything is up to date." in shell("make share", first)


def test_moments_come_without_tokens(first: Path, second: Second, tmp_path: Path) -> None:
    """In a copy of the second machine: another test says what that one holds."""
    folder = tmp_path / "copy"
    shutil.copytree(second.folder, folder, symlinks=True)
    command("dvc", "pull", "data/embed/reef/moments", "data/embed/reef/projection.safetensors", cwd=folder)
    brought = {name: digest for name, digest in data_files(folder).items() if name not in data_files(second.folder)}
    made = data_files(first)
    names = [f"moments/{name}/b{bucket:03d}.parquet" for name in ("isqrt", "pooled") for bucket in range(BUCKETS)]
    names += ["moments/isqrt/basis.safetensors", "projection.safetensors"]
    assert brought == {f"data/embed/reef/{name}": made[f"data/embed/reef/{name}"] for name in names}
    assert any("/tokens/" in name for name in made)


def test_pull_brings_what_the_trainer_reads_and_nothing_else(first: Path, second: Second) -> None:
    wanted = {
        name: digest
        for name, digest in data_files(first).items()
        if any(Path(name).is_relative_to(path) for path in READS)
    }
    assert len(wanted) == 3 + 4 + 3 * BUCKETS  # four plans of runs
    assert second.pulled == wanted
    folders = {name for name in second.fetched if name.endswith(".dir")}
    assert len(folders) == 4  # data/inputs and three of the encoder
    assert set(second.fetched) - folders == set(wanted.values())


def test_a_clone_trains_to_the_same_metrics_without_images_gpu_or_key(first: Path, second: Second) -> None:
    assert second.said.count("Running stage") == 1
    assert "Running stage 'train@concept_graph'" in second.said
    assert not (second.folder / "data/reef").exists()
    for name in ("metrics.json", "history.csv", "predictions.parquet", "model.safetensors"):
        path = Path("data/runs/concept_graph", name)
        assert (second.folder / path).read_bytes() == (first / path).read_bytes()


@pytest.mark.slow
def test_the_report_of_the_clone_shows_its_pictures_from_the_thumbnails(first: Path, second: Second) -> None:
    said = shell("source .venv/bin/activate\n" + steps()[2], second.folder)
    assert "Running stage 'report'" in said
    assert not (second.folder / "data/reef").exists()
    page = (second.folder / "data/report/index.html").read_text()
    thumbs = pq.read_table(second.folder / "data/thumbs", columns=["webp"], partitioning=None)["webp"].to_pylist()
    shown = [webp for webp in thumbs if base64.b64encode(webp).decode() in page]
    assert len(shown) >= 3
    assert (second.folder / "data/report/summary.txt").read_bytes() == (first / "data/report/summary.txt").read_bytes()


REFUSED = {
    "ssh://me:secret@host/path": "REMOTE holds a password",
    "me@host:/path": "write ssh://HOST/PATH",
    "me:hunter22@host:/path": "write ssh://HOST/PATH",
    "https://hunter22@host/path": "REMOTE holds a password or a token",
    "s3://hunter22:x@bucket/path": "REMOTE holds a password or a token",
    f"ssh://{'hunter22' * 5}@host/path": "REMOTE holds a password or a token",
    "https://host/path?sig=hunter22": "REMOTE holds a query",
    "s3://bucket/path#hunter22": "REMOTE holds a query",
    "https://[hunter22": "REMOTE is no address",
}
# By make one of them is enough for the fast tests: each costs a second.
BY_MAKE = ["https://hunter22@host/path"]


@pytest.mark.parametrize("remote", REFUSED)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no .dvc/config to spoil
    with pytest.raises(UserError, match=re.escape(REFUSED[remote])) as caught:
        set_remote(remote)
    assert "hunter22" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("", "error: no remote is set; make share REMOTE="),
        *(
            pytest.param(remote, said, marks=[] if remote in BY_MAKE else pytest.mark.slow)
            for remote, said in REFUSED.items()
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line(remote: str, said: str, bare: Path) -> None:
    before = (bare / ".dvc/config").read_bytes()
    failed = command("make", "share", f"REMOTE={remote}", cwd=bare, check=False)
    line, *of_make = failed.stderr.splitlines()
    assert failed.returncode != 0
    assert said in line
    assert "hunter22" not in failed.stdout + failed.stderr
    assert [each[:5] for each in of_make] == ["make:"]
    assert (bare / ".dvc/config").read_bytes() == before


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with an empty dvc.lock and no remote."""
    folder = checkout(tmp_path_factory.mktemp("bare") / "fieldmark")
    lend_environment(folder)
    (folder / "dvc.lock").write_text("schema: '2.0'\n")
    return folder


@pytest.mark.slow
def test_another_remote_takes_the_place_of_the_former(bare: Path) -> None:
    config = (bare / ".dvc/config").read_text()
    try:
        for name in ("one", "two words"):
            command("make", "share", f"REMOTE=../{name}", cwd=bare)
        settings = (bare / ".dvc/config").read_text()
        assert settings.count("url = ") == 1
        assert f"url = {bare.parent}/two words\n" in settings
        assert "remote = share\n" in settings
    finally:
        (bare / ".dvc/config").write_text(config)


@pytest.mark.parametrize(
    "setting",
    [
        "url = https://hunter22@host/path",
        pytest.param("url = https://host/path?hunter22", marks=pytest.mark.slow),
        "url = ../cache\n    password = hunter22",
    ],
)
def test_a_secret_in_the_committed_settings_is_told_and_not_repeated(setting: str, bare: Path) -> None:
    config = (bare / ".dvc/config").read_text()
    (bare / ".dvc/config").write_text(f"[core]\n    remote = old\n['remote \"old\"']\n    {setting}\n")
    try:
        failed = command("make", "share", cwd=bare, check=False)
    finally:
        (bare / ".dvc/config").write_text(config)
    assert failed.stderr.startswith("error: .dvc/config: ")
    assert "hunter22" not in failed.stdout + failed.stderr


@pytest.mark.parametrize("user", ["me@", ""])
def test_a_name_to_log_in_with_is_no_secret(user: str) -> None:
    assert problem_of_url(f"ssh://{user}host/path") is None
    assert problem_of_url("s3://bucket/path") is None
    assert problem_of_url("../a?b#c@d") is None


@pytest.mark.slow
def test_a_clone_that_lacks_files_says_so(tmp_path: Path) -> None:
    """Two clones of a small pipeline: what the first one did not push the second one cannot share."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    stage = "{cmd: mkdir -p data && echo x > data/one && echo y > data/two, outs: [data/one, data/two]}"
    (first / "dvc.yaml").write_text(f"stages: {{one: {stage}}}\n")
    git("init", "-q", "-b", "main", cwd=first)
    command("dvc", "init", "-q", cwd=first)
    command("dvc", "repro", "-q", cwd=first)
    commit(first)
    git("clone", "-q", str(first), str(second), cwd=first)

    def share(folder: Path) -> subprocess.CompletedProcess[str]:
        words = (sys.executable, "-m", "tools.share")
        return command(*words, cwd=folder, check=False, REMOTE="../remote", PYTHONPATH=str(ROOT))

    failed = share(second)
    assert failed.returncode == 1
    [said] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "2 files of dvc.lock are neither in this clone nor on the remote: data/one, data/two; `dvc pull" in said
    assert "to commit" not in failed.stdout
    assert share(first).stdout.endswith("to commit for a second machine: dvc.lock and .dvc/config\n")
    # What the remote has need not be here.
    assert share(second).returncode == 0


@pytest.mark.slow
def test_parts_travel_alone_and_one_image_more_moves_its_bucket(tmp_path: Path) -> None:
    """A pipeline of two encoders, 16 buckets in each of two folders: what a folder remote gets, in files and bytes."""
    first, remote = tmp_path / "first", tmp_path / "remote"
    first.mkdir()
    (first / "params.yaml").write_text("encoders: {one: {}, two: {}}\n")
    (first / "make.py").write_text(MAKE_BUCKETS)
    (first / "more").touch()
    stage = {"cmd": "python make.py ${key}", "deps": ["make.py", "more"],
             "outs": ["data/embed/${key}/images", "data/graphs/${key}"]}  # fmt: skip
    (first / "dvc.yaml").write_text(json.dumps({"stages": {"embed": {"foreach": "${encoders}", "do": stage}}}))
    git("init", "-q", "-b", "main", cwd=first)
    command("dvc", "init", "-q", cwd=first)
    command("dvc", "repro", "-q", cwd=first)
    commit(first)

    def moved(**words: str) -> tuple[int, int]:
        """Files and bytes that a share brings to the remote."""
        before = set(remote.rglob("*"))
        command(sys.executable, "-m", "tools.share", cwd=first, PYTHONPATH=str(ROOT), REMOTE=str(remote), **words)
        new = [path for path in remote.rglob("*") if path.is_file() and path not in before]
        return len(new), sum(path.stat().st_size for path in new)

    files, size = moved(ENCODER="one", PARTS="graphs")
    assert (files, size) == (17, pytest.approx(16 * 6_400, rel=0.1))
    assert moved(ENCODER="one")[0] == 17
    assert moved(PARTS="embed")[0] == 17
    assert moved()[0] == 17
    (first / "more").write_text("one image more")
    command("dvc", "repro", "-q", cwd=first)
    files, size = moved()
    # Of each of four folders a bucket and the list of its buckets.
    assert files == 8
    assert size < 4 * (6_400 + 16 * 120)
    assert moved() == (0, 0)


MAKE_BUCKETS = """
import hashlib, pathlib, sys
for folder in (f"data/embed/{sys.argv[1]}/images", f"data/graphs/{sys.argv[1]}"):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for bucket in range(16):
        more = pathlib.Path("more").read_text() if bucket == 3 else ""
        content = hashlib.sha256(f"{folder} {bucket} {more}".encode()).digest() * 200
        pathlib.Path(folder, f"b{bucket:03d}.parquet").write_bytes(content)
"""


def test_nothing_made_is_nothing_to_share(bare: Path) -> None:
    (bare / "dvc.lock").rename(bare / "lock")
    try:
        failed = command("make", "share", "REMOTE=../cache", cwd=bare, check=False)
    finally:
        (bare / "lock").rename(bare / "dvc.lock")
    assert failed.stderr.startswith("error: dvc.lock: is missing")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_links_to_the_cache_survive_an_update(
    kind: str, first: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image more by DVC, one less by hand: buckets are renamed into place, what the cache holds stays as it is."""
    folder = tmp_path / "linked"
    shutil.copytree(first, folder, symlinks=True)
    # The demo is drawn by a stage; images of one's own are not.
    edit_params(folder, lambda params: params.update(demo={}))
    shell(steps()[3].replace("reflink,hardlink,symlink,copy", kind), folder)
    before = data_files(folder)
    bucket = folder / "data/embed/reef/images/b000.parquet"

    def linked_to_cache() -> bool:
        return bucket.is_symlink() if kind == "symlink" else bucket.stat().st_nlink == 2

    def unspoilt() -> bool:
        return all(name.removesuffix(".dir") == digest for name, digest in cached(folder).items())

    assert linked_to_cache()
    source = sorted((folder / "data/reef/train").glob("*/*.jpg"))[0]
    extra = source.with_name("extra.jpg")
    extra.write_bytes(source.read_bytes() + b"\0")
    assert "1 images linked anew" in shell("dvc repro build_graphs@reef", folder)
    assert linked_to_cache()
    assert unspoilt()

    extra.unlink()
    changed = [name for name, digest in data_files(folder).items() if before[name] != digest]
    assert {Path(name).parts[1] for name in changed} == {"index", "thumbs", "embed", "graphs"}
    monkeypatch.chdir(folder)
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "reef")
    run_stage("build_graphs", "--encoder", "reef")
    assert data_files(folder) == before
    assert unspoilt()
