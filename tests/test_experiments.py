"""Living with DVC on images of one's own: what an edit did, experiments here, in a copy and in the queue, and plots.

Slow: every call of DVC takes seconds, and the pipeline runs once.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.checkout import command, commit
from tests.own_images import own_checkout

pytestmark = pytest.mark.slow
RUNS = {"zero_shot", "linear_probe", "attention_pool"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the pipeline ran once, and whose dvc.lock is committed."""
    folder = own_checkout(tmp_path_factory.mktemp("own") / "fieldmark")
    command("dvc", "repro", "--quiet", cwd=folder)
    commit(folder)
    return folder


def changes(folder: Path, *words: str) -> str:
    return command(sys.executable, "-m", "tools.changes", *words, cwd=folder).stdout


def test_what_an_edit_did_and_what_undoing_it_did(made: Path) -> None:
    assert changes(made).startswith("nothing to compare with")
    texts = made / "data/concepts.json"
    before = texts.read_text()
    try:
        texts.write_text(before.replace("a fish with blue fins", "a fish with a blue snout"))
        said = command(sys.executable, "-m", "tools.repro", cwd=made).stdout
        count = len(command("dvc", "stage", "list", "--name-only", cwd=made).stdout.splitlines())
        assert re.search(rf"^stage \d+ of {count}, clean_concepts: Split, normalise", said, re.MULTILINE)
        assert "embed_images" not in said
        edited = changes(made)
        assert "concepts of tiny: 1 gained, 1 lost, in 1 class\n  goby\n" in edited
        assert "    + a fish with a blue snout\n    - a fish with blue fins (is not written any more)\n" in edited
        assert "money: 0 answers since, 0.0000 US dollars" in edited
        assert changes(made, "--against", "HEAD").splitlines()[1:] == edited.splitlines()[1:]
    finally:
        texts.write_text(before)
    said = command(sys.executable, "-m", "tools.repro", cwd=made).stdout
    # The report comes back from DVC's cache and runs nothing; what it is compared with is the edit all the same.
    assert re.search(rf"^stage {count} of {count}, report: as it was made before$", said, re.MULTILINE)
    assert "    + a fish with blue fins\n    - a fish with a blue snout" in changes(made)
    refused = command(sys.executable, "-m", "tools.changes", "--against", "nowhere", cwd=made, check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "--against nowhere: " in refused.stderr


def test_experiments_in_a_copy_in_the_queue_and_here(made: Path) -> None:
    def run(*words: str, check: bool = True) -> str:
        done = command("dvc", "exp", "run", *words, "train@linear_probe", cwd=made, check=check)
        return done.stdout + done.stderr

    grid = "train.runs.linear_probe.settings.l2"
    # params.yaml leaves out what is a default: such a key is added.
    assert "Could not override" in run("--temp", "-S", f"{grid}=[0.1,1.0]", check=False)
    run("--temp", "--name", "copied", "-S", f"++{grid}=[0.1,1.0]")
    run("--queue", "--name", "queued", "-S", f"++{grid}=[100.0]")
    command("dvc", "exp", "run", "--run-all", cwd=made)
    run("--name", "here", "-S", "train.seeds=1")
    shown = json.loads(command("dvc", "exp", "show", "--json", cwd=made).stdout)
    names = {each["name"]: each["revs"][0]["data"] for rev in shown for each in rev["experiments"] or []}
    assert set(names) == {"copied", "queued", "here"}
    settings = {name: data["params"]["params.yaml"]["data"]["train"] for name, data in names.items()}
    assert settings["queued"]["runs"]["linear_probe"]["settings"]["l2"] == [100.0]
    assert settings["here"]["seeds"] == 1
    assert len(list((made / "data/images").rglob("*.png"))) == 36

    command("dvc", "exp", "branch", "copied", "kept", cwd=made)
    command("git", "rev-parse", "--verify", "kept", cwd=made)
    metrics = json.loads(command("dvc", "metrics", "show", "--json", cwd=made).stdout)[""]["data"]
    assert set(metrics) == {f"data/runs/{name}/metrics.json" for name in RUNS}
    assert {sum(map(len, each["data"].values())) for each in metrics.values()} == {12}
    changed = json.loads(command("dvc", "metrics", "diff", "main", "kept", "--json", cwd=made).stdout)
    assert set(changed) == {"data/runs/linear_probe/metrics.json"}
    assert "val.log_loss" in changed["data/runs/linear_probe/metrics.json"]

    # An experiment has the report of the commit that it began at, where it asked for a run alone.
    assert changes(made, "--against", "copied").startswith("against revision copied:\n\nconcepts: as they were")

    command("dvc", "plots", "diff", "main", "kept", "--out", "plots", cwd=made)
    page = (made / "plots/index.html").read_text()
    assert page.count("vegaEmbed('#") == len(RUNS)
    assert not re.search(r"(src|href)\s*=|@import|fetch\(|url\(", page)
    [spec] = [json.loads(line) for line in re.findall(r"var spec = (\{.*\});", page) if "linear_probe" in line]
    rows = spec["data"]["values"]
    assert {(row["rev"], row["seed"]) for row in rows} == {(rev, seed) for rev in ("main", "kept") for seed in "01"}
    assert [part["field"] for part in spec["encoding"]["detail"]] == ["seed", "filename"]
