"""The real stage graph, run by DVC in a temporary checkout on a small reef: promises 1, 2, 3 and 5 of the design."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fieldmark import store
from fieldmark.concepts import gate
from fieldmark.labels.splits import read_globals, read_split
from fieldmark.sources import imports_of
from fieldmark.store import sha256
from tests.checkout import command, edit_params
from tests.openai_server import OpenAIServer, default_answer
from tools.repro import stages_behind

RUNS = ["zero_shot", "linear_probe", "moments", "concept_graph"]  # of the small reef
OF_TEXT = {"zero_shot", "concept_graph"}  # those that read the bank or the labels


@pytest.fixture(scope="module")
def made(small_reef: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the whole pipeline ran once."""
    return shutil.copytree(small_reef, tmp_path_factory.mktemp("first") / "fieldmark", symlinks=True)


def refitted(folder: Path, *words: str, **environment: str) -> set[str]:
    """The runs that `dvc repro` makes anew."""
    said = command("dvc", "repro", *words, cwd=folder, **environment).stdout
    return set(re.findall(r"Running stage 'train@([\w-]+)'", said))


def image_files(folder: Path) -> list[Path]:
    """What the encoders made of images: nodes, tokens, moments, and what goes with them."""
    found = (folder / "data/embed").glob("*/*/**/*")
    files = [path for path in found if path.is_file()] + [*folder.glob("data/embed/*/projection.safetensors")]
    assert {path.parent.name for path in files} >= {"images", "tokens", "pooled", "isqrt"}
    return files


def test_repro_goes_from_nothing_to_a_report(made: Path) -> None:
    summary = (made / "data/report/summary.txt").read_text()
    assert all(run in summary for run in RUNS)
    assert (made / "data/report/index.html").stat().st_size > 10_000


def test_second_repro_runs_no_stage(made: Path) -> None:
    again = command("dvc", "repro", cwd=made)
    assert "Running stage" not in again.stdout
    assert "Data and pipelines are up to date." in again.stdout


def test_an_edited_prompt_in_replay_mode_is_one_line_and_changes_nothing(made: Path) -> None:
    prompt, answers = made / "prompts/concepts.md", made / "data/concepts/answers.parquet"
    before, text = answers.read_bytes(), prompt.read_text()
    try:
        prompt.write_text(text + "\nOne more wish.\n")
        failed = command(sys.executable, "-m", "stages.generate_concepts", cwd=made, check=False)
    finally:
        prompt.write_text(text)
    assert failed.returncode != 0
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "prompts/concepts.md" in failed.stderr
    assert "llm.mode" in failed.stderr
    assert answers.read_bytes() == before


def test_live_mode_without_a_key_is_one_line(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "params.yaml", tmp_path)
    edit_params(tmp_path, lambda params: params["llm"].update(mode="live"))
    words = [sys.executable, "-m", "stages.generate_concepts", "--params", str(tmp_path / "params.yaml")]
    failed = command(*words, cwd=made, check=False, FIELDMARK_CACHE=str(tmp_path / "cache"))
    assert failed.returncode != 0
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "OPENAI_API_KEY" in failed.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["training.train", "--run", "linear_probe"],
        pytest.param(["stages.label_patches", "--encoder", "reef"], marks=pytest.mark.slow),
    ],
)
def test_a_corrupt_bucket_is_one_line_that_names_it(words: list[str], made: Path) -> None:
    bucket = made / "data/embed/reef/images/b002.parquet"
    content = bucket.read_bytes()
    runs = made / "data/runs/linear_probe/metrics.json"
    before = runs.read_bytes()
    try:
        bucket.chmod(0o644)
        bucket.write_bytes(content[: len(content) // 2])
        failed = command(sys.executable, "-m", *words, cwd=made, check=False)
        assert failed.returncode == 1
        assert len(failed.stderr.strip().splitlines()) == 1
        assert "data/embed/reef/images/b002.parquet" in failed.stderr
    finally:
        bucket.write_bytes(content)
    assert runs.read_bytes() == before


def test_unknown_key_stops_every_stage_with_one_line(made: Path, tmp_path: Path) -> None:
    text = (made / "params.yaml").read_text().replace("  root: data/reef", "  roots: data/reef")
    (tmp_path / "params.yaml").write_text(text)
    words = [sys.executable, "-m", "stages.index_images", "--params", str(tmp_path / "params.yaml")]
    failed = command(*words, cwd=made, check=False)
    assert failed.returncode == 1
    assert "dataset.root" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def plans_of(folder: Path) -> dict[str, bytes]:
    """What each run reads, by its name."""
    return {path.stem: path.read_bytes() for path in (folder / "data/inputs").glob("*.json")}


TOUCHED = ["data/concepts/answers.parquet", "data/bank/reef.parquet", "data/labels/reef/b000.parquet"]


def test_an_edited_prompt_costs_one_call_a_class_and_leads_to_no_image(
    made: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2 in this process: the stages that DVC says depend on the answers, up to the plans of the runs.

    A run is made anew when its plan changed (the test of plans below). DVC itself goes this way in the test after this.
    """
    folder = tmp_path / "live"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key-123")
    of_text = [f"{stage}@reef" for stage in ("embed_text", "select_concepts", "label_patches")]
    trained = {f"train@{run}" for run in RUNS}
    plans = {"plan_first_looks", "plan_runs"}
    assert stages_behind("generate_concepts") == {"clean_concepts", *of_text, *plans, *trained, "report"}

    def contents() -> dict[str, bytes]:
        return {path: (folder / path).read_bytes() for path in TOUCHED} | plans_of(folder)

    def run() -> tuple[int, set[str]]:
        calls, before = len(server.calls), contents()
        for stage in ("generate_concepts", "clean_concepts"):
            run_stage(stage)
        for stage in of_text:
            run_stage(stage.removesuffix("@reef"), "--encoder", "reef")
        run_stage("training.plan_runs")
        changed = {name for name, content in contents().items() if content != before[name]}
        return len(server.calls) - calls, changed - set(TOUCHED)

    prompt = folder / "prompts/concepts.md"
    text = prompt.read_text()
    with OpenAIServer() as server:
        edit_params(folder, lambda params: params["llm"].update(mode="live", base_url=server.base_url))
        assert run() == (24, OF_TEXT)
        first = contents()
        prompt.write_text(text.replace("based on just a photo", "seen in just one photo"))
        assert run() == (24, OF_TEXT)
        assert contents()[TOUCHED[0]] != first[TOUCHED[0]]
        prompt.write_text(text)
        assert run() == (0, OF_TEXT)
        assert contents() == first


@pytest.mark.slow
def test_an_edited_prompt_costs_one_call_a_class_and_touches_no_image(made: Path, tmp_path: Path) -> None:
    """Promise 2: live against a local server; undoing the edit calls nobody and restores the bytes.

    Runs that read no text are left alone too.
    """
    folder = tmp_path / "live"
    shutil.copytree(made, folder, symlinks=True)
    prompt = folder / "prompts/concepts.md"
    text, classes = prompt.read_text(), 24

    def run() -> tuple[int, set[str], set[str], dict[str, bytes], dict[str, tuple[int, bytes]]]:
        before, planned = len(server.calls), plans_of(folder)
        made_anew = refitted(folder, "train", OPENAI_API_KEY="sk-test-key-123")
        changed = {name for name, plan in plans_of(folder).items() if plan != planned[name]}
        files = [*image_files(folder), *folder.glob("data/graphs/*/*")]
        files += [file for name in set(RUNS) - OF_TEXT for file in (folder / "data/runs" / name).iterdir()]
        untouched = {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
        made_of_text = {path: (folder / path).read_bytes() for path in TOUCHED} | plans_of(folder)
        return len(server.calls) - before, changed, made_anew, made_of_text, untouched

    with OpenAIServer() as server:
        edit_params(folder, lambda params: params["llm"].update(mode="live", base_url=server.base_url))
        calls, changed, made_anew, first, images = run()
        assert (calls, changed, made_anew) == (classes, OF_TEXT, OF_TEXT)
        prompt.write_text(text.replace("based on just a photo", "seen in just one photo"))
        calls, changed, made_anew, edited, after = run()
        assert (calls, changed, made_anew) == (classes, OF_TEXT, OF_TEXT)
        assert after == images
        assert edited["data/concepts/answers.parquet"] != first["data/concepts/answers.parquet"]
        prompt.write_text(text)
        calls, changed, made_anew, undone, after = run()
        # DVC remembers what these inputs gave.
        assert (calls, changed, made_anew) == (0, OF_TEXT, set())
        assert undone == first
        assert after == images


@pytest.mark.slow
def test_of_classes_that_are_numbers_the_gate_fires_prototypes_carry_and_the_report_says_so(
    made: Path, tmp_path: Path
) -> None:
    """reef as a set of cultivars: folders are numbers, and what is said of a class is its number too."""
    folder = tmp_path / "numbers"
    shutil.copytree(made, folder, symlinks=True)
    reef, numbered = folder / "data/reef", folder / "data/numbered"
    names = sorted(path.name for path in (reef / "train").iterdir())
    for split in ("train", "test"):
        for number, name in enumerate(names, start=1):
            shutil.copytree(reef / split / name, numbered / split / str(number))
    # Spelled in letters: a text that holds the number of a class gives the class away, and is dropped.
    spell = str.maketrans("0123456789", "ghijklmnop")
    said = {
        str(number): [f"mark {sha256(f'{number} {text}')[:7].translate(spell)}" for text in range(8)]
        for number in range(1, len(names) + 1)
    }
    (folder / "numbers.json").write_text(json.dumps(said))

    def change(params: dict[str, Any]) -> None:
        runs = params["train"]["runs"]
        params |= {"demo": {}}
        params["dataset"]["root"] = "data/numbered"
        params["llm"]["mode"] = "import"
        params["concepts"]["import"] = "numbers.json"
        params["clean"]["visibility"] = "off"
        params["select"]["fallback"] = "auto"
        params["train"]["runs"] = {"linear_probe": runs["linear_probe"]}

    edit_params(folder, change)
    command("dvc", "repro", "report", cwd=folder)
    bank = json.loads((folder / "data/bank/reef.json").read_text())
    assert bank["judged"]["verdict"] == "none"
    assert (bank["kept"], bank["prototypes"] > 0) == (0, True)
    page = (folder / "data/report/index.html").read_text()
    assert "hese concepts carry NO signal on this data set" in page
    assert "visual prototypes stand in for named concepts" in page
    # Asked as the texts were, prototypes do tell classes, those that own one.
    index, nodes = folder / "data/index/images.parquet", folder / "data/embed/reef/images"
    buckets = len(list(nodes.glob("b*.parquet")))
    # The half of val that chooses has too few pictures here to tell; the others help, and nothing is tuned on them.
    splits = ("train", "choose", "test")
    train, choose, test = (read_globals(nodes, buckets, read_split(index, split)) for split in splits)
    asked = tuple(np.concatenate(both) for both in zip(choose, test, strict=True))
    rows = store.read_table(folder / "data/bank/reef.parquet", "bank/1").to_pylist()
    prototypes = [row for row in rows if row["kind"] == "proto"]
    vectors = np.array([row["vector"] for row in prototypes], dtype=np.float32)
    found = gate.judge(train, asked, vectors, [set(row["class_ids"]) for row in prototypes])
    assert found["verdict"] == "signal"
    assert found["accuracy"] > bank["judged"]["accuracy"]


@pytest.mark.slow
def test_an_edited_question_of_ones_own_asks_it_anew_and_makes_anew_what_reads_it_alone(
    made: Path, tmp_path: Path
) -> None:
    """Promise 2 for `ask`: no image, bank, label or other run knows of it; texts that stay are not embedded again."""
    folder = tmp_path / "asked"
    shutil.copytree(made, folder, symlinks=True)
    prompt = folder / "prompts/guess.md"
    edit, text = "One thing more: look twice.", prompt.read_text()

    def answer(request: dict[str, Any]) -> Any:
        content = request["messages"][-1]["content"]
        if isinstance(content, str):
            return default_answer(request)
        shown = sha256(content[1]["image_url"]["url"])
        second = [f"A fish of number {shown[1]} seen twice."] if edit in content[0]["text"] else []
        return {"guesses": ["Lantern bandit"], "reasons": [f"A fish of number {shown[0]}.", *second]}

    def run() -> tuple[int, set[str], str]:
        before = len(server.calls)
        said = command("dvc", "repro", cwd=folder, OPENAI_API_KEY="none").stdout
        return len(server.calls) - before, set(re.findall(r"Running stage '([\w@-]+)'", said)), said

    def untouched() -> dict[str, tuple[int, bytes]]:
        files = [*image_files(folder), *folder.glob("data/graphs/*/*"), *folder.glob("data/labels/*/*")]
        files += [*folder.glob("data/bank/*"), *folder.glob("data/embed/*/text.parquet")]
        files += [path for name in RUNS for path in (folder / "data/runs" / name).iterdir()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    def change(params: Any) -> None:
        params["llm"].update(mode="live", base_url=server.base_url)
        params["ask"] = {"guess": {"prompt": "prompts/guess.md", "links": "data/none"}}
        features = {"features": ["asked/guess/reasons"]}
        params["train"]["runs"]["reasons"] = {"method": "linear_probe", "encoder": "reef", "settings": features}

    with OpenAIServer(answer) as server:
        edit_params(folder, change)
        calls, _, _ = run()
        pictures = len(list((folder / "data/reef").rglob("*.jpg")))
        assert calls == 24 + pictures
        answers = folder / "data/asked/guess/answers.parquet"
        first, images = answers.read_bytes(), untouched()
        prompt.write_text(f"{text}\n{edit}\n")
        calls, stages, said = run()
        assert calls == pictures
        assert stages == {"ask@guess", "embed_asked@guess", "plan_runs", "train@reasons", "report"}
        assert re.search(r"vectors/reef\.parquet: \d+ texts embedded, 16 kept", said)
        assert untouched() == images
        prompt.write_text(text)
        calls, _, _ = run()
        assert calls == 0
        assert answers.read_bytes() == first
        assert untouched() == images


# Each of these stages counts the same in its own tests, without DVC.
@pytest.mark.slow
def test_one_image_more_is_one_image_embedded_and_one_bucket_changed(made: Path, tmp_path: Path) -> None:
    """Promise 3, by DVC: and taking the image away restores every byte."""
    folder = tmp_path / "more"
    shutil.copytree(made, folder, symlinks=True)
    # The demo is drawn by a stage; images of one's own are not.
    edit_params(folder, lambda params: params.update(demo={}))

    def run() -> tuple[str, dict[str, bytes]]:
        stages = [f"{stage}@reef" for stage in ("build_graphs", "embed_tokens", "pool_tokens")]
        done = command("dvc", "repro", *stages, cwd=folder)
        files = sorted([*image_files(folder), *folder.glob("data/graphs/*/*")])
        return done.stdout, {str(path.relative_to(folder)): path.read_bytes() for path in files}

    _, before = run()
    source = sorted(folder.glob("data/reef/train/*/*.jpg"))[0]
    extra = source.with_name("extra.jpg")
    extra.write_bytes(source.read_bytes() + b"\0")
    said, after = run()
    folders = [f"data/embed/reef/{name}" for name in ("images", "moments/isqrt", "moments/pooled", "tokens")]
    assert all(f"{each}: 1 images embedded" in said for each in folders)
    assert "1 images linked anew" in said
    changed = [path for path in before if before[path] != after[path]]
    assert [str(Path(path).parent) for path in changed] == [*folders, "data/graphs/reef"]
    assert len({Path(path).name for path in changed}) == 1
    extra.unlink()
    said, restored = run()
    assert restored == before


@contextmanager
def edited(path: Path, text: str) -> Iterator[None]:
    """While it lasts, a file has another text; one that was not there is gone afterwards."""
    before = path.read_text() if path.is_file() else None
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_a_run_is_made_anew_exactly_when_something_that_it_reads_changed(
    made: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the plans of the runs, made in this process of the code of a copy; DVC goes by them and by the parameters."""
    folder = tmp_path / "edited"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("training.inputs.imports_of", lambda modules, _: imports_of(modules, folder))
    before = plans_of(folder)
    assert set(before) == set(RUNS)

    def changed() -> set[str]:
        run_stage("training.plan_runs")
        after = plans_of(folder)
        return {name for name in before | after if before.get(name) != after.get(name)}

    def one_line_more(name: str) -> AbstractContextManager[None]:
        file = folder / f"training/{name}.py"
        text = file.read_text() if file.is_file() else '"""Nothing."""\n'
        return edited(file, text + "\n# One line more.\n")

    # A layer, a method, a control and a part of the cache that no run imports.
    with ExitStack() as stack:
        for name in ("layers/unused", "methods/unused", "controls/unused", "data/unused"):
            stack.enter_context(one_line_more(name))
        assert changed() == set()
    # Two start at its fit, and one chooses among probes.
    with one_line_more("methods/linear_probe"):
        assert changed() == {"linear_probe", "moments", "concept_graph"}
    with one_line_more("data/bank"):
        assert changed() == OF_TEXT
    with one_line_more("methods/zero_shot"):
        edit_params(folder, lambda params: params["train"]["runs"]["concept_graph"]["settings"].update(hidden=64))
        assert changed() == {"zero_shot"}
        assert refitted(folder, "--dry", "--single-item", "train") == {"zero_shot", "concept_graph"}
    assert changed() == set()


@pytest.mark.slow
def test_a_probe_on_a_tower_alone_is_in_the_report(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    shutil.copytree(made, folder, symlinks=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "tower.safetensors")

    def add_tower(params: Any) -> None:
        params["towers"] = {"cnn": {"model": "resnet10t", "pretrained": "tower.safetensors", "image_size": 64}}
        params["train"]["runs"]["on_a_tower"] = {"method": "linear_probe", "encoder": "cnn"}

    edit_params(folder, add_tower)
    assert refitted(folder) == {"on_a_tower"}
    assert "on_a_tower" in (folder / "data/report/summary.txt").read_text()
    assert "on_a_tower" in (folder / "data/report/index.html").read_text()
    plan = json.loads((folder / "data/inputs/on_a_tower.json").read_text())
    assert set(plan["files"]) == {"embed/cnn/images", "index/images.parquet", "index/classes.parquet"}
    assert refitted(folder) == set()


def links_of(folder: Path) -> dict[str, set[str]]:
    """Who sends to each image."""
    found: dict[str, set[str]] = {}
    for row in store.read_table(folder / "data/links/near.parquet", "links/1").to_pylist():
        found.setdefault(row["dst"], set()).add(row["src"])
    return found


@pytest.mark.slow
def test_links_follow_vectors_and_nothing_else(made: Path, tmp_path: Path) -> None:
    """They train nothing anew that does not read them, run once, and keep their bytes where another split is drawn."""
    folder = tmp_path / "links"
    shutil.copytree(made, folder, symlinks=True)

    def add_links(params: Any) -> None:
        params["demo"] = {}
        params["links"]["near"] = {"kind": "knn", "vectors": "data/embed/reef/images", "texts": "data/none", "k": 3}

    edit_params(folder, add_links)
    said = command("dvc", "repro", cwd=folder).stdout
    assert set(re.findall(r"Running stage '([\w@-]+)'", said)) == {"link_images@near", "plan_runs"}
    assert "Running stage" not in command("dvc", "repro", cwd=folder).stdout
    path, before = folder / "data/links/near.parquet", links_of(folder)
    content = path.read_bytes()
    edit_params(folder, lambda params: params["dataset"].update(val_fraction=0.4))
    assert "Running stage 'link_images@near'" in command("dvc", "repro", "link_images@near", cwd=folder).stdout
    assert path.read_bytes() == content
    edit_params(folder, lambda params: params["select"].update(per_class=2))
    assert "Running stage" not in command("dvc", "repro", "link_images@near", cwd=folder).stdout
    source = sorted((folder / "data/reef/train").glob("*/*.jpg"))[0]
    source.with_name("extra.jpg").write_bytes(source.read_bytes() + b"\0")
    command("dvc", "repro", "link_images@near", cwd=folder)
    after = links_of(folder)
    [new] = set(after) - set(before)
    changed = {image_id for image_id, sends in before.items() if after[image_id] != sends}
    assert changed == {image_id for image_id in before if new in after[image_id]}
    assert 0 < len(changed) < len(before) / 4
    source.with_name("extra.jpg").unlink()
    command("dvc", "repro", "link_images@near", cwd=folder)
    assert path.read_bytes() == content


def looked_again(said: str) -> int:
    """How many images `dvc repro` looked at again."""
    return int(re.findall(r"data/again/zoom: (\d+) images embedded", said)[0])


@pytest.mark.slow
def test_a_second_look_is_a_chain_of_its_own(made: Path, tmp_path: Path) -> None:
    """It trains nothing else, runs once, and one image more is one image looked at again."""
    folder = tmp_path / "again"
    shutil.copytree(made, folder, symlinks=True)

    def add_look(params: Any) -> None:
        params["demo"] = {}
        settings = {"epochs": 2, "hidden": 16, "weight_decay": [0.1]}
        params["train"]["first_looks"] = {"zoom": {"method": "s3n", "encoder": "reef", "settings": settings}}
        run = {"method": "ridge", "encoder": "reef", "settings": {"features": ["pooled", "again/zoom"]}}
        params["train"]["runs"]["again"] = run

    edit_params(folder, add_look)
    before = {path: path.read_bytes() for path in [*image_files(folder), *folder.glob("data/runs/*/model.safetensors")]}
    said = command("dvc", "repro", cwd=folder).stdout
    assert set(re.findall(r"Running stage '(?:train|first_look|look_again)@([\w-]+)'", said)) == {"zoom", "again"}
    images = len(list(folder.glob("data/reef/*/*/*.jpg")))
    assert looked_again(said) == images
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "again" in (folder / "data/report/summary.txt").read_text()
    assert "Running stage" not in command("dvc", "repro", cwd=folder).stdout
    # The run needs neither images nor the first look.
    plan = json.loads((folder / "data/inputs/again.json").read_text())
    assert "again/zoom" in plan["files"]
    assert not any(file.startswith(("first_looks", "embed/reef/tokens")) for file in plan["files"])
    # An image more, once to test and once to training: the fit stays.
    fit = (folder / "data/first_looks/zoom/model.safetensors").read_bytes()
    for split in ("test", "train"):
        buckets = {path: path.read_bytes() for path in sorted((folder / "data/again/zoom").iterdir())}
        source = sorted((folder / "data/reef" / split).glob("*/*.jpg"))[0]
        source.with_name("extra.jpg").write_bytes(source.read_bytes() + b"\0")
        said = command("dvc", "repro", "plan_runs", cwd=folder).stdout
        assert looked_again(said) == 1
        assert sum(path.read_bytes() != content for path, content in buckets.items()) == 1
    assert (folder / "data/first_looks/zoom/model.safetensors").read_bytes() == fit
    # A picture that the run knows needs no encoder; of a new one there is no second look.
    known = command(sys.executable, "-m", "tools.predict", "--run", "again", str(source), cwd=folder)
    assert known.stdout.startswith(str(source))
    new = folder / "new.jpg"
    new.write_bytes(source.read_bytes() + b"\0\0")
    failed = command(sys.executable, "-m", "tools.predict", "--run", "again", str(new), cwd=folder, check=False)
    assert failed.returncode == 1
    # Behind what it says of the run, the error is one line.
    *said_before, error = failed.stderr.strip().splitlines()
    assert error == "error: again/zoom: is read by this run, and cannot be made of a new picture; ask another run"
    assert not any(line.startswith(("error", "Traceback")) for line in said_before)
