"""Lay a profile over params.yaml: `make repro PROFILE=NAME` does it first.

Reads   profiles/NAME.yaml, which says what differs for a data set; params.yaml, and what git holds of it.
Writes  params.yaml, at once and whole: the repository's with what the profile changes, comments kept, where that is a
        valid parameter file. Where it is that already, nothing is touched. And .cache/profile/: the params.yaml that
        profiles are laid over, and the hash of what was written last.
Costs   nothing.

A block of knobs is merged, key by key; what holds things by names of your own (encoders, towers, adapt, finetune,
tokens, moments, controls, links, ask, demo, llm.prices, llm.headers, train.runs, train.first_looks) is taken whole from
the profile. It never loses an edit: params.yaml has to be as the last commit has it, or as it was written last (so that
a profile can be edited and taken again), or not there. Where no git can tell, .cache/profile/base.yaml keeps what was
there. The way back to the demo is `git checkout params.yaml`, or that copy.

    python -m tools.profiles cub100
"""

import difflib
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fieldmark import store
from fieldmark.command import LAID_OVER, UserError, run, stage_parser
from fieldmark.params import Block, Params, check_params, read_yaml

PROFILES = Path("profiles")
KEPT = Path(".cache/profile")


def find_profile(name: str) -> Path:
    """The file of a profile. Raises UserError where there is none of that name."""
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? It has" if close else "it has"
        raise UserError(f"{PROFILES}/: has no profile {name!r}; {hint} {', '.join(known) or 'none'}")
    return known[name]


def git(path: Path, *words: str) -> bytes:
    """What a git command prints in the folder of `path`. Raises LookupError, with the reason, where it fails."""
    try:
        return subprocess.run(["git", *words], cwd=path.parent, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise LookupError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").partition("\n")[0]
        raise LookupError(f"git: {reason}") from None


def committed(path: Path, commit: str = "HEAD") -> bytes:
    """What a checkout of a commit would write to `path`.

    `git diff` would not do: it says nothing of an untracked file, nor of one marked assume-unchanged. Raises
    LookupError where git is missing, this is no repository, or the commit has no such file.
    """
    return git(path, "cat-file", "--filters", f"{commit}:./{path.name}")


def refuse_edits(path: Path, profile: Path) -> None:
    """Raises UserError where `path` has edits that nothing else holds.

    It has none as it was written last and as the last commit has it. Where no git can tell, a file that was not made
    of a profile is kept as the base, so that nothing is lost.
    """
    content, written = path.read_bytes(), KEPT / "written"
    if written.is_file() and written.read_text(encoding="utf-8") == store.sha256(content):
        return
    try:
        edited = content != committed(path)
    except LookupError:
        edited = content.decode(errors="replace").startswith(LAID_OVER)
    if edited:
        raise UserError(
            f"{path}: has edits that are not committed, and {profile} would replace them; commit them, write them into"
            f" {PROFILES}/MINE.yaml, or drop them with `git checkout HEAD {path}`"
        )


def find_base(path: Path) -> str:
    """The params.yaml that profiles are laid over: this one, or the last that was not made of a profile."""
    kept = KEPT / "base.yaml"
    if path.is_file():
        content = path.read_text(encoding="utf-8")
        if not content.startswith(LAID_OVER):
            return content
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    for content in former_versions(path):
        if not content.startswith(LAID_OVER):
            return content
    remedy = "put the repository's params.yaml there and run this again"
    raise UserError(f"{path}: was made of a profile, and what it was made over is not known here; {remedy}")


def former_versions(path: Path) -> Iterator[str]:
    """What git's history holds of a file, the last commit first; nothing where there is no history."""
    try:
        for commit in git(path, "log", "--format=%H", "--", path.name).decode().split():
            yield committed(path, commit).decode()
    except LookupError:
        return


def lay_over(base: str, profile: Path) -> str:
    """The text of a parameter file with what a profile changes. Raises UserError for a key that is not known."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.representer.add_representer(type(None), lambda of, _: of.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.indent(mapping=2, sequence=4, offset=2)
    content, changes = yaml.load(base), yaml.load(profile.read_text(encoding="utf-8"))
    merge(content, changes, Params, str(profile))
    text = io.StringIO()
    yaml.dump(content, text)
    what = f"{LAID_OVER}{profile.name} laid over it; `git checkout params.yaml` brings the demo back."
    return f"{what}\n{text.getvalue()}"


def merge(content: Any, changes: Any, model: type[Block], path: str, prefix: str = "") -> None:
    """Put `changes` into `content`: a block of knobs key by key, anything else whole."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for key, value in changes.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"remove it; known here: {', '.join(fields)}"
            raise UserError(f"{path}: {prefix}{key}: unknown key; {remedy}")
        kind: Any = fields[key]
        is_block = get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Block)
        if is_block and isinstance(value, dict) and isinstance(content.get(key), dict):
            merge(content[key], value, kind, path, f"{prefix}{key}.")
        else:
            content[key] = value


def changed_since(path: Path) -> str | None:
    """A warning where `path` was made of a profile, and laying that over again would change it; else None."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        profile = PROFILES / first.removeprefix(LAID_OVER).partition(" ")[0]
        if not first.startswith(LAID_OVER) or lay_over(find_base(path), profile) == path.read_text(encoding="utf-8"):
            return None
    # A profile that is gone or cannot be laid over is none to compare with.
    except (UserError, OSError, YAMLError):
        return None
    again = f"`make profile PROFILE={profile.stem}` takes it over"
    return f"{path} is not what {profile} makes of it any more: one of them was edited since; {again}"


def take(name: str, path: Path) -> bool:
    """Lay a profile over `path`; whether it was not so already. Raises UserError, and then changes nothing."""
    profile = find_profile(name)
    read_yaml(profile)
    base = find_base(path)
    wanted = lay_over(base, profile)
    check_params(profile, YAML(typ="safe", pure=True).load(wanted))
    if path.exists():
        if path.read_text(encoding="utf-8") == wanted:
            return False
        refuse_edits(path, profile)
    store.write_text(KEPT / "base.yaml", base)
    store.write_text(path, wanted)
    store.write_text(KEPT / "written", store.sha256(wanted))
    return True


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a file under profiles/, without .yaml")
    args = parser.parse_args()
    if take(args.name, Path(args.params)):
        print(f"{args.params} has {PROFILES / args.name}.yaml laid over it now")


if __name__ == "__main__":
    run(main)
