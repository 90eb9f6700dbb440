"""Which checkout a folder is a passing copy of: what must outlive an experiment or a worktree lies there."""

import functools
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where journals and arrays lie: $FIELDMARK_CACHE, or `.cache` where that is unset or empty, of that checkout."""
    checkout = original_checkout(Path.cwd(), os.environ.get("DVC_ROOT"))
    folder = Path(os.environ.get("FIELDMARK_CACHE") or ".cache")
    return folder if checkout == Path.cwd() else checkout / folder


@functools.cache
def original_checkout(folder: Path, dvc_root: str | None) -> Path:
    """The checkout that an experiment of DVC's or a worktree of git's was made of; `folder` itself where it is neither.

    `dvc exp run --temp` and `--queue` run in `.dvc/tmp/exps/` and delete that after. DVC tells its root in DVC_ROOT,
    but a value that was set before stays: it counts only where `folder` is one of its experiments.
    """
    here = folder.resolve()
    found = folder
    if dvc_root and here.is_relative_to(Path(dvc_root, ".dvc/tmp/exps").resolve()):
        found = Path(dvc_root).resolve()
    elif "/.dvc/tmp/exps/" in f"{here}/":
        found = Path(f"{here}/".partition("/.dvc/tmp/exps/")[0])
    return main_worktree(found)


def main_worktree(folder: Path) -> Path:
    """The same folder in the main checkout, where this one is in a worktree of git's.

    A worktree's `.git` is a file that names its folder inside the main repository; `commondir` there names what all
    worktrees share.
    """
    here = folder.resolve()
    for top in (here, *here.parents):
        if (top / ".git").is_dir():
            return folder
        try:
            inside = top / (top / ".git").read_text(encoding="utf-8").removeprefix("gitdir:").strip()
            common = (inside / (inside / "commondir").read_text(encoding="utf-8").strip()).resolve()
        except FileNotFoundError:
            if (top / ".git").exists():
                return folder  # a submodule: it shares with nothing
            continue
        except (OSError, ValueError):
            return folder
        # Worktrees of a bare repository have no main checkout: they meet in the repository's folder.
        return common.parent / here.relative_to(top) if common.name == ".git" else common
    return folder
