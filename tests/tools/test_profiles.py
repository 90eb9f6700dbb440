"""Profiles laid over params.yaml, in real git repositories: no edit is ever lost."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fieldmark.command import UserError
from fieldmark.params import check_params, load_params
from tests.project import PARAMS, ROOT
from tools.profiles import changed_since, lay_over, take

RunStage = Callable[..., None]
PATH = Path("params.yaml")


@pytest.mark.parametrize("path", ["params.yaml", *(f"profiles/{path.name}" for path in ROOT.glob("profiles/*.yaml"))])
def test_what_the_repository_brings_has_all_that_its_stages_ask_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC stops at a stage whose parameter is left out of params.yaml, whatever its default."""
    monkeypatch.chdir(ROOT)
    yaml = YAML(typ="safe", pure=True)
    base = Path("params.yaml").read_text()
    text = base if path == "params.yaml" else lay_over(base, Path(path))
    content = yaml.load(text)
    check_params(path, content)
    # DVC reads them with ruamel's parser in C, which asks for quotes around `local-dir:x` between braces.
    assert YAML(typ="safe").load(text) == content
    stages = yaml.load(Path("dvc.yaml"))["stages"]
    wanted = set()
    for stage in stages.values():
        looped = re.fullmatch(r"\$\{(.+)\}", stage.get("foreach", ""))
        keys = list(find(content, looped[1])) if looped else [""]
        for key in keys:
            body = stage.get("do", stage)
            wanted |= {param.replace("${key}", key) for param in body.get("params", [])}
            named = {dep[2:-1] for dep in body["deps"] if re.fullmatch(r"\$\{[a-z_.]+\}", dep)}
            of_loop = f"{looped[1]}.{key}." if looped else ""
            wanted |= {re.sub(r"^item\.", of_loop, name) for name in named}
    assert len(wanted) > 20
    for key in wanted:
        find(content, key)


def find(content: Any, key: str) -> Any:
    for part in key.split("."):
        assert part in content, key
        content = content[part]
    return content


def params(seed: int) -> str:
    content = json.loads(json.dumps(PARAMS))
    content["encoders"] = {"conv": {"model": "ViT-B-32", "pretrained": "openai"}}
    content["dataset"]["seed"] = seed
    return json.dumps(content)


def laid(seed: int) -> str:
    """A profile that says what differs."""
    return f"dataset: {{seed: {seed}}}  # drawn anew\n"


def git(*words: str) -> None:
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *author, *words], check=True, capture_output=True)


def commit() -> None:
    git("add", "-A")
    git("commit", "-q", "-m", "change")


@pytest.fixture
def profiles(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """params.yaml and two profiles that change it. A repository above the project is not seen."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    monkeypatch.setenv("LC_ALL", "C")
    (project / "profiles").mkdir()
    (project / "params.yaml").write_text(params(0))
    for seed, name in enumerate(["cub100", "cub200"], start=1):
        (project / f"profiles/{name}.yaml").write_text(laid(seed))
    (project / ".gitignore").write_text(".cache/\n")


@pytest.fixture
def repository(profiles: None) -> None:
    """The same, committed."""
    git("init", "-q", "-b", "main")
    commit()


def refused(name: str, *words: str) -> None:
    """Taking a profile is refused in one line, and params.yaml left alone."""
    before = PATH.read_bytes(), PATH.stat().st_mtime_ns
    with pytest.raises(UserError) as error:
        take(name, PATH)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert (PATH.read_bytes(), PATH.stat().st_mtime_ns) == before


def is_profile(name: str) -> bool:
    """Whether params.yaml is the base with what a profile changes, and says so."""
    text, seed = PATH.read_text(), re.findall(r"\d+", Path("profiles", f"{name}.yaml").read_text())[0]
    assert load_params(PATH).dataset.seed == int(seed)
    return f"profiles/{name}.yaml" in text.splitlines()[0] and load_params(PATH).domain.noun == "fish"


@pytest.mark.usefixtures("repository")
def test_a_profile_takes_the_place_of_what_is_committed(
    run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("tools.profiles", "cub100")
    assert capsys.readouterr() == ("params.yaml has profiles/cub100.yaml laid over it now\n", "")
    assert is_profile("cub100")
    assert not list(Path().glob("*.partial"))
    changed = PATH.stat().st_mtime_ns
    run_stage("tools.profiles", "cub100")
    assert capsys.readouterr() == ("", "")
    assert PATH.stat().st_mtime_ns == changed


@pytest.mark.usefixtures("repository")
def test_switching_and_the_way_back() -> None:
    for name in ("cub100", "cub200", "cub100"):
        assert take(name, PATH)
        assert is_profile(name)
    git("checkout", "params.yaml")
    assert PATH.read_text() == params(0)
    assert take("cub200", PATH)
    PATH.unlink()
    assert take("cub100", PATH)
    assert is_profile("cub100")


@pytest.mark.usefixtures("repository")
def test_an_edit_is_not_lost() -> None:
    PATH.write_text(params(9))
    remedies = ("not committed", "profiles/MINE.yaml", "`git checkout HEAD params.yaml`")
    refused("cub100", *remedies)
    git("add", "params.yaml")
    refused("cub100", *remedies)
    git("checkout", "HEAD", "params.yaml")
    assert take("cub100", PATH)
    PATH.write_text(PATH.read_text() + "# mine\n")
    refused("cub200", *remedies)


@pytest.mark.usefixtures("repository")
def test_a_profile_may_be_edited_and_taken_again() -> None:
    profile = Path("profiles/cub100.yaml")
    take("cub100", PATH)
    profile.write_text(laid(7))
    assert take("cub100", PATH)
    assert load_params(PATH).dataset.seed == 7
    PATH.write_text(params(seed=8))
    refused("cub100", "not committed")


@pytest.mark.usefixtures("repository")
def test_a_profile_that_was_edited_since_is_told_of() -> None:
    """Commands read params.yaml alone: without a word they would go on with what the profile said before."""
    assert changed_since(PATH) is None
    take("cub100", PATH)
    assert changed_since(PATH) is None
    profile = Path("profiles/cub100.yaml")
    profile.write_text(laid(7))
    said = changed_since(PATH)
    assert said is not None
    assert "is not what profiles/cub100.yaml makes of it any more" in said
    assert "`make profile PROFILE=cub100`" in said
    take("cub100", PATH)
    assert changed_since(PATH) is None
    profile.write_text("dataset: [")
    assert changed_since(PATH) is None
    profile.unlink()
    assert changed_since(PATH) is None


@pytest.mark.usefixtures("repository")
def test_an_edit_that_is_committed_is_what_profiles_are_laid_over() -> None:
    PATH.write_text(params(9).replace('"reef fish"', '"coral fish"'))
    commit()
    assert take("cub100", PATH)
    assert load_params(PATH).domain.group == "coral fish"
    PATH.write_text(PATH.read_text() + "\n")
    refused("cub200", "not committed")


@pytest.mark.usefixtures("repository")
def test_a_committed_profile_gives_way_to_another_one() -> None:
    take("cub100", PATH)
    commit()
    shutil.rmtree(".cache")  # as in a clone: what profiles are laid over comes from the history
    assert take("cub200", PATH)
    assert is_profile("cub200")
    assert load_params(PATH).dataset.seed == 2


@pytest.mark.usefixtures("repository")
def test_an_edit_that_git_was_told_to_overlook_is_not_lost() -> None:
    git("update-index", "--assume-unchanged", "params.yaml")
    PATH.write_text(params(9))
    refused("cub100", "not committed")


@pytest.mark.usefixtures("repository")
def test_a_file_that_is_not_committed_is_kept() -> None:
    PATH.write_text(params(9))
    git("rm", "-q", "--cached", "params.yaml")
    git("commit", "-q", "-m", "untracked")
    assert take("cub100", PATH)
    assert Path(".cache/profile/base.yaml").read_text() == params(9)


@pytest.mark.usefixtures("profiles")
def test_without_a_repository_the_base_is_kept_and_edits_of_what_was_made_are_refused() -> None:
    PATH.write_text(params(9))
    assert take("cub100", PATH)
    assert Path(".cache/profile/base.yaml").read_text() == params(9)
    assert not take("cub100", PATH)
    assert take("cub200", PATH)
    PATH.write_text(PATH.read_text() + "# mine\n")
    refused("cub100", "not committed")


@pytest.mark.usefixtures("repository")
def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path("profiles").absolute()))
    assert take("cub100", PATH)
    PATH.unlink()
    assert take("cub200", PATH)
    shutil.rmtree(".cache")
    refused("cub100", "what it was made over is not known here; put the repository's params.yaml there")


def test_comments_stay_and_named_things_are_taken_whole(project: Path) -> None:
    Path("profiles").mkdir()
    PATH.write_text((ROOT / "params.yaml").read_text())
    profile = Path("profiles/x.yaml")
    prices = "llm: {prices: {one: {input: 1.0, output: 2.0}}}"
    profile.write_text(f"encoders:\n  b: {{model: local-dir:m}}\nembed: {{views: 3}}\n{prices}\n")
    text = lay_over(PATH.read_text(), profile)
    assert "views: 3                       # augmented views" in text
    content = YAML(typ="safe", pure=True).load(text)
    assert list(content["encoders"]) == ["b"]
    assert list(content["llm"]["prices"]) == ["one"]
    base = YAML(typ="safe", pure=True).load(PATH.read_text())
    assert content["embed"] == base["embed"] | {"views": 3}
    assert content["llm"] | {"prices": 0} == base["llm"] | {"prices": 0}
    assert {key: value for key, value in content.items() if key not in ("encoders", "embed", "llm")} == {
        key: value for key, value in base.items() if key not in ("encoders", "embed", "llm")
    }


def test_a_project_inside_another_repository(project: Path, profiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer repository has a params.yaml of its own at its root, and at first does not hold the inner one."""
    inner = project / "inner"
    inner.mkdir()
    for name in ("params.yaml", "profiles"):
        (project / name).rename(inner / name)
    (project / "params.yaml").write_text(params(0))
    git("init", "-q")
    git("add", "params.yaml")
    git("commit", "-q", "-m", "outer")
    monkeypatch.chdir(inner)
    commit()
    PATH.write_text(params(9))
    refused("cub100", "not committed")
    git("checkout", "params.yaml")
    assert take("cub100", PATH)
    assert (project / "params.yaml").read_text() == params(0)


@pytest.mark.usefixtures("repository")
def test_line_ends_that_git_changes_are_no_edit() -> None:
    git("config", "core.autocrlf", "true")
    PATH.write_text(params(0) + "\n")
    commit()
    PATH.unlink()
    git("checkout", "params.yaml")
    assert b"\r\n" in PATH.read_bytes()
    assert take("cub100", PATH)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cub10", ["'cub10'", "did you mean cub100?", "cub100, cub200"]),
        ("fish", ["'fish'", "it has cub100, cub200"]),
        ("../params", ["has no profile '../params'"]),
        ("", ["has no profile ''"]),
    ],
)
def test_an_unknown_profile(name: str, words: list[str]) -> None:
    refused(name, "profiles/: ", *words)


@pytest.mark.usefixtures("repository")
def test_a_broken_profile_changes_nothing() -> None:
    Path("profiles/cub100.yaml").write_text(laid(1).replace("seed", "sed"))
    refused("cub100", "profiles/cub100.yaml: dataset.sed: unknown key; did you mean `seed`?")
    Path("profiles/cub100.yaml").write_text("dataset: {buckets: 0}")
    refused("cub100", "profiles/cub100.yaml: dataset.buckets: input should be greater")
    shutil.rmtree("profiles")
    refused("cub100", "it has none")


def test_make_takes_the_profile_first() -> None:
    def planned(*words: str) -> list[str]:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    steps = planned("repro", "PROFILE=cub100")
    wanted = ['python -m tools.profiles "cub100"', "python -m tools.preflight", "python -m tools.repro"]
    assert [step for step in steps if step in wanted] == wanted
    assert not [step for step in planned("repro", "PROFILE=") if "tools.profiles" in step]
    retry = planned("retry", "PROFILE=cub100")
    assert retry.index(wanted[0]) < min(place for place, step in enumerate(retry) if "dvc repro" in step)
