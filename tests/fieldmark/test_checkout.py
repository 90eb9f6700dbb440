"""Which checkout a folder is a passing copy of: experiments of DVC's, worktrees of git's, and what only looks so."""

from pathlib import Path

import pytest

from fieldmark.checkout import original_checkout
from tests.checkout import git


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """A repository with one commit that holds a project in a folder `sub`, too."""
    (tmp_path / "main/sub").mkdir(parents=True)
    (tmp_path / "main/sub/file").touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        git(*words, cwd=tmp_path / "main")
    return tmp_path / "main"


def test_a_folder_that_is_no_copy_is_its_own(main: Path, tmp_path: Path) -> None:
    assert original_checkout(main, None) == main
    assert original_checkout(main / "sub", None) == main / "sub"
    assert original_checkout(tmp_path, None) == tmp_path
    # What was set before DVC ran, for another project: even for one around this.
    assert original_checkout(main, "/elsewhere") == main
    assert original_checkout(main / "sub", str(main)) == main / "sub"


def test_an_experiment_is_a_copy_of_dvcs_root(main: Path, tmp_path: Path) -> None:
    place = main / ".dvc/tmp/exps/standalone/tmpabc"
    place.mkdir(parents=True)
    for root in (None, str(main), "/elsewhere", ""):
        assert original_checkout(place, root) == main
        assert original_checkout(place / "..", root) == main
    assert original_checkout(main / ".dvc/tmp", None) == main / ".dvc/tmp"
    # DVC's temporary files on another disk: no path tells, its variable does.
    (tmp_path / "other/.dvc").mkdir(parents=True)
    (tmp_path / "disk/exps/tmpabc").mkdir(parents=True)
    (tmp_path / "other/.dvc/tmp").symlink_to(tmp_path / "disk")
    assert original_checkout(tmp_path / "disk/exps/tmpabc", str(tmp_path / "other")) == tmp_path / "other"


def test_worktrees_share_with_the_main_checkout(main: Path, tmp_path: Path) -> None:
    git("worktree", "add", "-q", "../tree", cwd=main)
    assert original_checkout(tmp_path / "tree", None) == main
    assert original_checkout(tmp_path / "tree/sub", None) == main / "sub"
    place = tmp_path / "tree/.dvc/tmp/exps/tmpabc"
    place.mkdir(parents=True)
    assert original_checkout(place, str(tmp_path / "tree")) == main
    git("clone", "-q", "--bare", "main", "bare.git", cwd=tmp_path)
    for name in ("one", "two"):
        git("worktree", "add", "-q", "-b", name, f"../{name}", cwd=tmp_path / "bare.git")
        assert original_checkout(tmp_path / name, None) == tmp_path / "bare.git"


def test_a_submodule_and_a_broken_git_file_share_with_nothing(main: Path, tmp_path: Path) -> None:
    git("clone", "-q", "main", "super", cwd=tmp_path)
    git("-c", "protocol.file.allow=always", "submodule", "add", "-q", "../main", "part", cwd=tmp_path / "super")
    assert original_checkout(tmp_path / "super/part", None) == tmp_path / "super/part"
    for content in (b"", b"gitdir: /nowhere", b"\xff\xfe", b"gitdir: \0"):
        folder = tmp_path / content.hex()
        folder.mkdir(exist_ok=True)
        if folder != tmp_path:
            (folder / ".git").write_bytes(content)
        assert original_checkout(folder, None) == folder
