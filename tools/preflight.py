"""Look at what params.yaml names before DVC does: it hashes whole folders, and some names stop it, or hide from it.

Reads   params.yaml, which it checks as every command does; whether each path in it is there; and the names
        under dataset.root, concepts.import and llm.recordings. Where concepts.import or concepts.edits names texts, it
        reads them and the tables of the data set: whether they name its classes shows before anything is indexed.
        It opens no image.
Writes  nothing. Of data that people keep in the project it says what tracks them, and warns of what nothing tracks;
        where all comes with the repository or lies outside, it says nothing. It warns where params.yaml was made of a
        profile that was edited since.
Costs   one look a name: about a second for 200,000 files on a local disk, two with texts.

What it refuses in a folder [T: DVC 3.67]: names that are not UTF-8, links that lead nowhere, a .dvcignore and files
that may not be read, at all of which DVC stops with an error; pipes and devices, on which it may wait for ever; and, as
DVC would see no change there: what lies behind a link to a folder, in a folder that may be entered but not listed, and
beside an entry named .dvc. A link to a file is followed and does no harm, nor does a link back to a folder it lies in.
An experiment in a copy (`dvc exp run --temp`, --queue) and a clone have what git or DVC tracks, and nothing else of the
project. In this project's folder DVC skips .git, .hg and __pycache__; elsewhere it reads them as well.

    python -m tools.preflight
"""

import contextlib
import io
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import NONE, Params, load_params
from tools.profiles import changed_since

# Drawn by draw_reef while the demo is on: it need not be there before.
REEF = Path("data/reef")
# Where the pipeline writes.
OUTPUTS = Path("data")
# What of it comes with the repository.
BUNDLED = {("data", "demo"), ("data", "none")}
# What DVC skips below its own project: its defaults, and the line in .dvcignore.
SKIPPED = {".git", ".hg", ".dvc", "__pycache__"}
SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# The keys whose folders DVC hashes; of the others it reads nothing, or a file.
HASHED = ("dataset.root", "concepts.import", "llm.recordings")
SHOWN = 20


def named_paths(params: Params) -> Iterator[tuple[str, str, str]]:
    """Each path that params.yaml names: its key, itself, and what must stand there: a file, a folder, or either."""
    dataset = params.dataset
    yield "dataset.root", dataset.root, "file or folder" if dataset.format == "manifest" else "folder"
    if dataset.images is not None:
        yield "dataset.images", dataset.images, "folder"
    yield "dataset.val_list", dataset.val_list, "file"
    yield "llm.recordings", params.llm.recordings, "file or folder"
    yield "concepts.import", params.concepts.imported, "file or folder"
    yield "concepts.edits", params.concepts.edits, "file or folder"
    yield "concepts.prompt", params.concepts.prompt, "file"
    yield "concepts.generic_prompt", params.concepts.generic_prompt, "file"
    yield "concepts.contrast_prompt", params.concepts.contrast_prompt, "file"
    yield "describe.prompt", params.describe.prompt, "file"
    for name, question in params.ask.items():
        yield f"ask.{name}.prompt", question.prompt, "file"
    for block, tuned in (("adapt", params.adapt), ("finetune", params.finetune)):
        for name, each in tuned.items():
            yield f"{block}.{name}.classes", each.classes, "file"
    # What adapt_encoder and finetune make need not be there before.
    for block, encoders in (("encoders", params.encoders), ("towers", params.towers)):
        for name, encoder in encoders.items():
            if encoder.model.startswith("local-dir:") and not params.makes(encoder):
                yield f"{block}.{name}.model", encoder.model.removeprefix("local-dir:"), "folder"
    for name, tower in params.towers.items():
        if tower.pretrained is not None and not params.makes(tower):
            yield f"towers.{name}.pretrained", tower.pretrained, "file"


def check_path(where: str, path: str, kind: str) -> None:
    """Raises UserError, beginning with `where`, unless `path` is a readable file or folder, as `kind` says."""
    if not os.path.lexists(path):
        home = "; write your home folder out, ~ is not replaced by it" if path.startswith("~") else ""
        what = f"is not there; correct it (a path counts from the project's folder){home}"
    elif not os.path.exists(path):
        what = "is a link that leads nowhere; restore its target, or correct the path"
    elif not (("file" in kind and os.path.isfile(path)) or ("folder" in kind and os.path.isdir(path))):
        what = f"is not a {kind}; correct it"
    elif not may_read(path, os.path.isdir(path)):
        what = "may not be read by you; change its permissions, or correct the path"
    else:
        return
    none = f", or set it to {NONE}" if where.endswith(("val_list", "import")) and path != NONE else ""
    raise UserError(f"{where}: {path!r} {what}{none}")


def check_apart(where: str, root: str) -> None:
    """Raises UserError where dataset.root holds what the pipeline writes: DVC cannot have it as input and output."""
    if OUTPUTS.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(
            f"{where}: {root!r} holds {OUTPUTS}/, where the pipeline writes; give the images a folder of their own,"
            f" e.g. {OUTPUTS}/images"
        )


def bad_entries(root: str) -> Iterator[tuple[str, str]]:
    """What DVC could not read or would not see in a folder, as (path, what is wrong and what to do)."""
    within = Path(os.path.abspath(root)).is_relative_to(os.path.abspath("."))
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if within and entry.name == ".dvc":
                        yield entry.path, "makes DVC overlook the whole folder it lies in; move or delete it"
                    if within and entry.name in SKIPPED:
                        continue
                    wrong = look_at(entry)
                    if wrong is not None:
                        yield entry.path, wrong
                    if entry.is_dir(follow_symlinks=False) and may_read(entry.path, folder=True):
                        folders.append(entry.path)
        except OSError as error:
            yield folder, f"cannot be listed ({error.strerror}); mend that, or move it out"


def look_at(entry: os.DirEntry[str]) -> str | None:
    """What is wrong with one entry of a folder and what to do, or None."""
    if not is_utf8(entry.name):
        return "the name is not UTF-8; rename it (convmv renames a whole folder)"
    if entry.name == ".dvcignore":
        return "DVC stops at it; move or delete it"
    if entry.is_symlink():
        return look_behind(entry.path)
    if entry.is_dir():
        return None if may_read(entry.path, folder=True) else "may not be listed by you; chmod u+rx it, or move it out"
    if entry.is_file():
        return None if may_read(entry.path) else "may not be read by you; chmod u+r it, or move it out"
    return special(entry.stat().st_mode)


def look_behind(link: str) -> str | None:
    """What is wrong with a symbolic link and what to do, or None."""
    try:
        mode = os.stat(link).st_mode
    except OSError as error:
        return f"a link to {os.readlink(link)!r} ({error.strerror}); restore what it leads to, or delete it"
    if stat.S_ISDIR(mode):
        if Path(link).parent.resolve().is_relative_to(os.path.realpath(link)):
            return None
        return "a link to a folder, and DVC does not look behind it; put a folder here (`cp -rs` links file by file)"
    if stat.S_ISREG(mode):
        return None if may_read(link) else "a link to a file that you may not read; change that, or delete the link"
    return special(mode)


def special(mode: int) -> str:
    return f"{SPECIAL.get(stat.S_IFMT(mode), 'something else')}, not a file; move or delete it"


def may_read(path: str, folder: bool = False) -> bool:
    return os.access(path, os.R_OK | os.X_OK if folder else os.R_OK)


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check(file: str, params: Params) -> None:
    """Raises UserError for the first path of a parameter file that cannot stand, or for all bad entries of folders."""
    bad = []
    for key, path, kind in named_paths(params):
        where = f"{file}: {key}"
        if key == "dataset.root":
            drawn = "reef" in params.demo and os.path.abspath(path) == os.path.abspath(REEF)
            if drawn and not os.path.lexists(path):
                continue
            check_apart(where, path)
        check_path(where, path, kind)
        if key in HASHED and os.path.isdir(path):
            bad += [(entry, wrong, key) for entry, wrong in bad_entries(path)]
    if bad:
        keys = " and ".join(dict.fromkeys(key for *_, key in bad))
        # repr: a name may hold what a terminal obeys.
        lines = [f"  {entry!r}: {wrong}" for entry, wrong, _ in sorted(bad)[:SHOWN]]
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        heading = f"{file}: {keys}: DVC would stop at this, or miss what changes there:"
        raise UserError("\n".join([heading, *lines, *more]))


def check_texts(params: Params) -> None:
    """Raises UserError where concepts.import or concepts.edits names what is no class of the data set, as stages do."""
    if params.concepts.imported == params.concepts.edits == NONE or not os.path.lexists(params.dataset.root):
        return
    # Reading tables takes a second to import, which few data sets need here.
    from fieldmark.formats import read_listing
    from fieldmark.listing import list_classes
    from fieldmark.llm.imported import read_own

    # What the stages will say again.
    with contextlib.redirect_stderr(io.StringIO()):
        read_own(params.concepts, list_classes(read_listing(params.dataset)))


def track_file(path: Path) -> Path | None:
    """The .dvc file that tracks a path or a folder that it lies in, or None."""
    found = [Path(f"{each}.dvc") for each in (path, *path.parents) if each != Path(".")]
    return next((file for file in found if file.is_file()), None)


def git_lists(*words: str) -> bool:
    """Whether `git ls-files` names anything."""
    return bool(subprocess.run(["git", "ls-files", *words], capture_output=True, check=False).stdout)


def kept_paths(params: Params) -> list[tuple[str, Path]]:
    """What params.yaml names in this project and no stage makes: its key and its path from here."""
    here = Path.cwd()
    kept = []
    for key, name, _ in named_paths(params):
        path = Path(os.path.abspath(name))
        if path.is_relative_to(here) and path.exists() and path != REEF.absolute():
            kept.append((key, path.relative_to(here)))
    return kept


def say_tracked(file: str, params: Params) -> tuple[str, list[str]]:
    """One line on what tracks the data that people keep here ("": nothing does), and warnings of what is untracked."""
    if shutil.which("git") is None or not git_lists("--", "params.yaml"):
        return "", []
    said, warnings = [], []
    for key, path in kept_paths(params):
        where, by_dvc = f"warning: {file}: {key}: {path}", track_file(path)
        lacks = "clones and experiments in a copy (`dvc exp run --temp`, --queue) lack it"
        if by_dvc is not None:
            said.append(f"{path} by DVC")
            if not git_lists("--", str(by_dvc)):
                warnings.append(f"{where} is tracked by DVC, but git does not have {by_dvc}: {lacks}; commit that file")
        elif git_lists("--others", "--", str(path)):
            how = f"`dvc add {path}` and commit {path}.dvc" if path.is_dir() else f"`git add {path}`, or `dvc add` it"
            warnings.append(f"{where} is tracked by neither git nor DVC, or in parts only: {lacks}; {how}")
        elif path.parts[0] == OUTPUTS.name and path.parts[:2] not in BUNDLED:
            said.append(f"{path} by git")
    return "tracked: " + ", ".join(dict.fromkeys(said)) if said else "", warnings


def main() -> None:
    file = stage_parser(__doc__).parse_args().params
    params = load_params(file)
    check(file, params)
    check_texts(params)
    line, warnings = say_tracked(file, params)
    stale = changed_since(Path(file))
    warnings += [f"warning: {stale}"] if stale else []
    for warning in warnings:
        print(warning, file=sys.stderr)
    if line:
        print(line)


if __name__ == "__main__":
    run(main)
