"""Take a profile, a whole parameter file under profiles/, as params.yaml: `make repro PROFILE=NAME` does it first.

Reads   profiles/*.yaml; params.yaml, and what git's last commit holds of it.
Writes  params.yaml, at once and whole: a copy of profiles/NAME.yaml, where that is a valid parameter file. Where it is
        that copy already, nothing is touched. And .cache/profile, the copy's name and hash.
Costs   nothing.

It never overwrites an edit: params.yaml has to be as the last commit has it, or equal to one of the profiles, or as it
was copied last (so that a profile can be edited and taken again), or not there. The way back to the demo is
`git checkout params.yaml`.

    python -m tools.profiles cub100
"""

import difflib
import subprocess
from pathlib import Path

from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import load_params

PROFILES = Path("profiles")
COPIED = Path(".cache/profile")


def find_profile(name: str) -> Path:
    """The file of a profile. Raises UserError where there is none of that name."""
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? It has" if close else "it has"
        raise UserError(f"{PROFILES}/: has no profile {name!r}; {hint} {', '.join(known) or 'none'}")
    return known[name]


def committed(path: Path) -> bytes:
    """What a checkout of git's last commit would write to `path`.

    `git diff` would not do: it says nothing of an untracked file, nor of one marked assume-unchanged. Raises
    LookupError, with git's reason, where git is missing, this is no repository, or the commit has no such file.
    """
    command = ["git", "cat-file", "--filters", f"HEAD:./{path.name}"]
    try:
        return subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise LookupError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").partition("\n")[0]
        raise LookupError(f"git: {reason}") from None


def refuse_edits(path: Path, profile: Path) -> None:
    """Raises UserError unless `path` is a copy of a profile, or as the last commit has it: then nothing can be lost."""
    content = path.read_bytes()
    if COPIED.is_file():
        name, _, sha = COPIED.read_text(encoding="utf-8").rpartition(" ")
        if sha == store.sha256(content) and (PROFILES / name).is_file():
            return
    if any(content == other.read_bytes() for other in PROFILES.glob("*.yaml")):
        return
    try:
        edited = content != committed(path)
    except LookupError as error:
        remedy = f"keep a copy if it was, then run `cp {profile} {path}`"
        raise UserError(f"{path}: nobody can tell whether it was edited ({error}); {remedy}") from None
    if edited:
        raise UserError(
            f"{path}: has edits that are not committed, and {profile} would replace them; commit them, save the file as"
            f" {PROFILES}/MINE.yaml, or drop them with `git checkout HEAD {path}`"
        )


def take(name: str, path: Path) -> bool:
    """Make `path` a copy of a profile; whether it was not one already. Raises UserError, and then changes nothing."""
    profile = find_profile(name)
    load_params(profile)
    wanted = profile.read_bytes()
    if path.exists():
        if path.read_bytes() == wanted:
            return False
        refuse_edits(path, profile)

    for target, content in ((path, wanted), (COPIED, f"{profile.name} {store.sha256(wanted)}".encode())):

        def write(partial: Path, content: bytes = content) -> None:
            partial.write_bytes(content)

        store.write_atomic(target, write)
    return True


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a file under profiles/, without .yaml")
    args = parser.parse_args()
    if take(args.name, Path(args.params)):
        print(f"{args.params} is now a copy of {PROFILES / args.name}.yaml")


if __name__ == "__main__":
    run(main)
