"""The README and the pages of docs/: what they name is there, what they say of the code is true, their examples run."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from evaluation.plan import Study, read_study
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.prompts import load_prompt
from fieldmark.params import Params, check_params, load_params
from fieldmark.reef.species import load_species
from fieldmark.sources import PACKAGES
from tests.checkout import ROOT, edit_params
from tools.contracts import ABOUT, page, schemas
from tools.profiles import merge
from training.controls import control_names
from training.data import part_kinds
from training.methods import load_method, method_names
from training.regimes import REGIMES
from training.train import plan_run

# CHANGELOG names what was there before; the others name what is there.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "studies").glob("*.md"))]
LONGEST_README = 160
OUTPUTS = {"answers.md", "card.md"}  # pages that a command writes


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page, without the indent of a list that they stand in."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^ *```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{block[1]}", "", block[2], flags=re.MULTILINE) for block in found]


def code_on(path: Path) -> list[str]:
    """What stands on a page as code: in fenced blocks, line by line, and between backticks."""
    text = path.read_text()
    fenced = re.compile(r"^ *```\w*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced.findall(text) for line in block.splitlines()]
    return lines + re.findall(r"`([^`]+)`", fenced.sub("", text))


# What pages name.


def test_the_readme_is_short_and_its_picture_small() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README
    assert (ROOT / "docs/report.png").stat().st_size < 200_000


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", ALL_PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT)
        assert not anchor or anchor in slugs(there), f"{target}#{anchor}"


def test_every_page_of_docs_is_in_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {name_of(path) for path in (ROOT / "docs").glob("*.md")}


def written_here() -> list[Path]:
    """The Python and Markdown files of the repository, tests apart."""
    folders = [ROOT / name for name in (*PACKAGES, "bench", "docs", "prompts", "studies", "data/demo")]
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*") if is_text(path))]


def is_text(path: Path) -> bool:
    return path.suffix in (".py", ".md")


def test_no_page_is_mentioned_that_is_not_there() -> None:
    there = [path for path in written_here() if path.suffix == ".md"] + [*(ROOT / "tests").rglob("*.md")]
    names = {f"/{name_of(path)}" for path in there}
    wrong = []
    for path in written_here():
        text = path.read_text()
        for mention in re.findall(r"[\w./-]*\w\.md\b", text):
            beside = (path.parent / mention).resolve() in there
            if Path(mention).name in OUTPUTS or beside:
                continue
            if not any(name.endswith(f"/{mention}") for name in names):
                wrong.append(f"{name_of(path)} mentions {mention}")
        if "method catalogue" in text.lower():
            wrong.append(f"{name_of(path)} mentions a method catalogue")
    assert not wrong, "\n".join(wrong)


def commands() -> dict[str, set[str]]:
    """By module, the options that pages give to `python -m MODULE`."""
    found: dict[str, set[str]] = {}
    for path in PAGES:
        for line in code_on(path):
            for module, rest in re.findall(r"python -m ([\w.]+)([^#|`)]*)", line):
                found.setdefault(module, set()).update(re.findall(r"(?<=\s)--[a-z-]+", rest))
    return found


@pytest.mark.parametrize("module", sorted(commands()))
def test_commands_are_there_with_their_options(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    if module.split(".")[0] not in PACKAGES:
        assert importlib.util.find_spec(module.split(".")[0])
        return
    with pytest.raises(SystemExit):
        run_module(module, "--help")
    said = capsys.readouterr().out
    assert [option for option in commands()[module] if option not in said] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_make_has_the_targets_and_variables(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(?:export )?([A-Z]+) \?=", makefile, re.MULTILINE))
    for line in code_on(path):
        for target, rest in re.findall(r"(?:^|&& )make ([a-z-]+)([^#`]*)", line):
            assert target in targets, line
            assert set(re.findall(r"\b([A-Z]+)=", rest)) <= variables, line


@functools.cache
def stages() -> dict[str, Any]:
    """By name, the stages of dvc.yaml; of a foreach what it does."""
    found = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in found.items()}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_dvc_has_the_stages_that_are_asked_for(path: Path) -> None:
    for line in code_on(path):
        for words in re.findall(r"dvc repro((?: [\w@-]+)+)", line):
            assert {word.split("@")[0] for word in words.split() if not word.startswith("-")} <= set(stages()), line


# What pages say of the code.


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_arrows_of_the_stage_graph_are_dependencies(name: str) -> None:
    [graph] = blocks(name, "mermaid")
    arrows = [
        (line.split(" --> ")[place].strip(), line.split(" --> ")[place + 1].strip())
        for line in graph.splitlines()[1:]
        for place in range(line.count(" --> "))
    ]
    assert len(arrows) > 10
    for source, target in arrows:
        outs = [path for out in outputs(stages()[source]) for path in ([out] if isinstance(out, str) else out)]
        deps = stages()[target]["deps"]
        assert any(covers(dep, out) or covers(out, dep) for dep in deps for out in outs), f"{source} --> {target}"


def outputs(stage: dict[str, Any]) -> list[Any]:
    return [*stage["outs"], *stage.get("metrics", [])]


def covers(outer: str, inner: str) -> bool:
    """Whether a path of dvc.yaml is another or lies in it; the demo's dataset.root is data/reef."""
    return Path(inner.replace("${dataset.root}", "data/reef")).is_relative_to(
        outer.replace("${dataset.root}", "data/reef")
    )


def test_the_architecture_names_every_stage_and_every_part() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [name for name in stages() if f"`{name}`" not in text] == []
    assert [name for name in part_kinds() if f"`{name}`" not in text] == []


def test_the_readme_s_table_is_of_the_runs_of_params() -> None:
    [table] = [block for block in blocks("README.md", "text") if block.startswith("run ")]
    rows = table.split("\n\n")[0].splitlines()[1:]
    runs = list(load_params(ROOT / "params.yaml").train.runs)
    assert [row.split()[0] for row in rows] == runs, "README.md: its table has a row for each run of params.yaml"


def test_the_contracts_are_printed_from_the_code() -> None:
    assert (ROOT / "docs/contracts.md").read_text() == page(), "run: python -m tools.contracts > docs/contracts.md"
    assert {name: list(about.columns) for name, about in ABOUT.items()} == {
        name: schema.names for name, schema in schemas().items()
    }


def test_methods_have_a_section_each_and_read_what_the_page_says() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == re.findall(r"^\| \[(\w+)\]", text, re.MULTILINE)
    for method in method_names():
        [reads] = re.findall(rf"^\| \[{method}\]\(#{method}\) \| ([^|]*) \|", text, re.MULTILINE)
        assert set(re.findall(r"\w+", reads)) & set(part_kinds()) == load_method(method).READS, method


def test_the_page_of_studies_knows_every_key_control_and_regime() -> None:
    text = (ROOT / "docs/studies.md").read_text()
    assert [key for key in Study.model_fields if f"\n| `{key}` |" not in text] == []
    assert [name for name in control_names() if f"\n| `{name}` |" not in text] == []
    assert [kind for kind in REGIMES if f"\n| `{{kind: {kind}," not in text and f"\n| `{kind}` |" not in text] == []


def test_errors_are_worded_as_the_page_of_troubles_says() -> None:
    said = " ".join(texts_of_code()).replace("`", "")
    table = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    phrases = [phrase for cell in table for phrase in re.findall(r"`([^`]+)`", cell)]
    assert len(phrases) > 60
    parts = {part.strip() for phrase in phrases for part in phrase.split("...") if len(part.strip()) > 1}
    assert [part for part in sorted(parts) if part not in said] == []


def texts_of_code() -> Iterator[str]:
    """Every text of our modules, with a gap for each value that is filled in; and the Makefile."""
    yield (ROOT / "Makefile").read_text()
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# Examples that are read.


def yaml_blocks() -> list[tuple[str, str]]:
    return [(name_of(path), block) for path in PAGES for block in blocks(name_of(path), "yaml")]


def is_study(block: str) -> bool:
    return "methods" in YAML(typ="safe", pure=True).load(block)


@pytest.mark.parametrize(("name", "block"), [found for found in yaml_blocks() if not is_study(found[1])])
def test_a_block_of_parameters_can_be_laid_over_params(name: str, block: str) -> None:
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text())
    merge(content, YAML(typ="safe").load(block), Params, name)  # in C, as DVC reads it
    params = check_params(name, content)
    for run, settings in params.train.runs.items():
        if settings.method in method_names():  # the others are examples of methods to add
            plan_run(name, params, run)


@pytest.mark.parametrize(("name", "block"), [found for found in yaml_blocks() if is_study(found[1])])
def test_a_study_names_what_is_there(name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path, block)
    monkeypatch.chdir(tmp_path)
    params = load_params(ROOT / "params.yaml")
    if name == "docs/extending.md":  # it names what that page adds
        with pytest.raises(UserError, match=r"'nearest_mean' is not there|patches_removed\.py"):
            read_study(params, study_name(block))
    else:
        assert read_study(params, study_name(block)).methods


def study_name(block: str) -> str:
    found = re.match(r"# (\w+): ", block)
    assert found is not None, "a study's block begins with its name: # NAME: what it asks"
    return found[1]


def write_study(folder: Path, block: str) -> None:
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "studies" / f"{study_name(block)}.yaml").write_text(block)


# Examples that run, on what the pipeline writes.

OF_ENCODER = ["embed_images", "embed_tokens", "pool_tokens", "embed_text", "embed_controls", "select_concepts",
              "label_patches", "build_graphs"]  # fmt: skip
STAGES = ["draw_reef", "index_images", "generate_concepts", "describe_images", "clean_concepts", *OF_ENCODER]
CLASSES, TRAIN, TEST = 24, 2, 1
READING, EXPORTING, USING = "docs/reading-files.md", "docs/exporting.md", "docs/using-results.md"
NOT_INSTALLED = ("fiftyone", "lightly_studio")  # what the page of exports names and does not run


def run_module(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()


def record_tails(folder: Path) -> None:
    """A question of one's own, and recordings that answer it beside those of the demo."""
    schema = "{type: object, properties: {text: {type: string}}}"
    front = f"purpose: a test\nsubject: class\nvariables: [name]\nschema: {schema}\n"
    (folder / "tail.md").write_text(f"---\n{front}---\n# user\nHow is the tail of {{{{ name }}}}?\n")
    (folder / "recordings").mkdir()
    (folder / "recordings/concepts.jsonl").symlink_to(ROOT / "data/demo/answers/concepts.jsonl")
    of_all = {"prompt_sha": load_prompt(folder / "tail.md").sha, "sample": 0, "model": "authored", "created_at": ""}
    species = load_species(ROOT / "data/demo/species.yaml")
    records = [{**of_all, "class_id": one.class_id, "response": {"text": f"tail {n}"}} for n, one in enumerate(species)]
    (folder / "recordings/tail.jsonl").write_text("\n".join(map(json.dumps, records)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which the whole pipeline ran on three pictures a species; the working directory of its tests."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "prompts").symlink_to(ROOT / "prompts")
    (folder / "data").mkdir()
    (folder / "data/none").touch()
    for name in ("demo", "controls"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def make_small(params: Any) -> None:
        params["demo"]["reef"].update(train_per_class=TRAIN, test_per_class=TEST, size=96)
        params["dataset"].update(buckets=2, val_fraction=0.5)
        params["embed"]["views"] = 0
        zoom = {"method": "s3n", "encoder": "reef", "settings": {"epochs": 1, "hidden": 8}}
        runs = {"zero_shot": params["train"]["runs"]["zero_shot"]}
        params["train"].update(seeds=1, runs=runs, first_looks={"zoom": zoom})
        params["tokens"] = {"reef": {"layers": [-1]}}
        params["controls"] = {"reef": {"per_class": 2}}
        params["links"] = {"near": {"kind": "knn", "vectors": "data/embed/reef/images", "texts": "data/none", "k": 3}}
        params["report"]["reference"] = "zero_shot"
        params["ask"] = {"tail": {"prompt": "tail.md", "links": "data/none"}}
        params["llm"]["recordings"] = "recordings"

    edit_params(folder, make_small)
    record_tails(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in STAGES:
            run_module(f"stages.{name}", *(["--encoder", "reef"] if name in OF_ENCODER else []))
        run_module("stages.link_images", "--links", "near")
        for name in ("ask", "embed_asked"):
            run_module(f"stages.{name}", "--ask", "tail")
        run_module("training.plan_first_looks")
        run_module("training.first_look", "--look", "zoom")
        run_module("stages.look_again", "--look", "zoom")
        run_module("training.plan_runs")
        run_module("training.train", "--run", "zero_shot")
        run_module("tools.foci")
    return folder


@pytest.fixture
def inside(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def test_there_is_something_to_run() -> None:
    assert [len(blocks(READING, language)) for language in ("sql", "python", "sh")] == [5, 2, 2]


def test_the_queries_answer(inside: Path) -> None:
    images, nearest, shown, dropped, by_class = (duckdb.sql(query) for query in blocks(READING, "sql"))
    counts = {(split, status): count for split, status, _, count in images.fetchall()}
    assert counts == {("train", "ok"): CLASSES * (TRAIN - 1), ("val", "ok"): CLASSES, ("test", "ok"): CLASSES * TEST}

    rows = nearest.fetchall()
    texts = store.read_table("data/embed/reef/text.parquet", "embed.text/1")
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    image_id = next(row["image_id"] for row in index if row["path"] == "test/ember-bandit/000.jpg")
    bucket = store.bucket_path("data/embed/reef/images", store.bucket_of(image_id, 2))
    nodes = store.read_images(bucket, "embed.nodes/1", [image_id]).filter(pq.filters_to_expression([("view", "=", 0)]))
    cosines = store.vectors_of(nodes).astype(np.float32) @ store.vectors_of(texts).astype(np.float32).T
    assert [row[0] for row in rows] == list(range(len(nodes)))
    np.testing.assert_allclose([row[-1] for row in rows], cosines.max(axis=1), atol=2e-3)

    assert shown.columns == ["text", "shown", "its_own"]
    weights = [row[1] for row in shown.fetchall()]
    assert 0 < len(weights) <= 10
    assert weights == sorted(weights, reverse=True)

    concepts = store.read_table("data/concepts/concepts.parquet", "concepts/1").to_pylist()
    reasons = {reason: count for reason, count, _ in dropped.fetchall()}
    assert sum(reasons.values()) == sum(not row["kept"] for row in concepts) > 0
    assert None not in reasons

    table = pq.read_table("data/runs/zero_shot/predictions.parquet").to_pylist()
    header = store.read_header("data/runs/zero_shot/predictions.parquet", "run.predictions/1")
    right = {
        row["class_id"]: float(header.params["classes"][int(np.argmax(row["logits"]))] == row["class_id"])
        for row in table
        if row["split"] == "test"
    }
    assert {class_id: accuracy for class_id, _, accuracy in by_class.fetchall()} == right


@pytest.fixture
def polars() -> Iterator[Any]:
    """Polars; after the test Python has its own handler of Ctrl-C back: that of Polars wakes no waiting thread."""
    yield pytest.importorskip("polars")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_commands_and_the_programs_run(inside: Path, polars: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for line in "".join(blocks(READING, "sh")).splitlines():
        python, dash_m, module, *arguments = shlex.split(line)
        assert (python, dash_m) == ("python", "-m")
        run_module(module, *arguments)
    said = capsys.readouterr().out
    assert f"data/export/reef.safetensors: {CLASSES * (TRAIN + TEST)} images" in said
    assert "data/embed/reef/images" in said
    arrays, exported = blocks(READING, "python")
    found: dict[str, Any] = {}
    exec(exported, found)
    assert len(found["names"]) == len(found["vectors"]) == CLASSES * (TRAIN + TEST)
    assert len(set(found["names"])) == CLASSES
    pytest.importorskip("pandas")
    exec(arrays, found)
    assert found["vectors"].shape == (CLASSES * (TRAIN + TEST), found["nodes"]["vector"].dtype.shape[0])
    np.testing.assert_allclose(np.linalg.norm(found["vectors"].astype(np.float32), axis=1), 1, atol=2e-3)
    assert found["classes"].value_counts().to_dict() == dict.fromkeys(set(found["classes"]), TRAIN + TEST)


@pytest.fixture
def exporting(inside: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The blocks of the page of exports in a language, with a folder of this test and the only run that there is."""

    def read(language: str) -> list[str]:
        found = blocks(EXPORTING, language)
        return [block.replace("data/export", str(tmp_path)).replace("linear_probe", "zero_shot") for block in found]

    return read


def test_exports_are_opened_as_their_page_says(exporting: Callable[[str], list[str]]) -> None:
    for line in "".join(exporting("sh")).splitlines():
        python, dash_m, module, *arguments = shlex.split(line)
        assert (python, dash_m) == ("python", "-m")
        run_module(module, *arguments)
    programs, found = exporting("python"), dict[str, Any]()
    for program in programs:
        code = compile(program, EXPORTING, "exec")
        if not any(f"import {name}" in program for name in NOT_INSTALLED):
            exec(code, found)
    assert len(programs) == 6
    assert found["hidden"].shape == (found["batch"].num_nodes, 64)
    assert set(found["names"]) <= {name for name, _, _ in found["counts"]}
    assert len(found["wrong"]) <= len(found["rows"]) == len(found["truth"].getImgIds())
    assert sum(images for _, images, _ in found["counts"]) == CLASSES * (TRAIN - 1)


def using(language: str) -> list[str]:
    """The blocks of the page on results, with the only run that there is."""
    return [block.replace("linear_probe", "zero_shot") for block in blocks(USING, language)]


def test_a_run_is_asked_as_the_page_says(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in using("sh")[0].splitlines():
        python, dash_m, module, *arguments = shlex.split(line)
        assert (python, dash_m) == ("python", "-m")
        run_module(module, *arguments)
    assert capsys.readouterr().out.startswith("data/reef/test/ember-bandit/000.jpg\n")
    found: dict[str, Any] = {}
    exec(using("python")[0], found)
    assert len(found["rows"]) == CLASSES * TEST
    assert set(found["unsure"]) <= {row["path"] for row in found["rows"]}


def test_a_run_is_calibrated_as_the_page_says(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    exec(next(block for block in using("python") if "calibrate" in block), found)
    assert len(found["answers"]) == 3
    assert capsys.readouterr().out.startswith("calibration error | ")


def parquet_files() -> list[Path]:
    files = sorted(path for path in Path("data").rglob("*.parquet"))
    found = {pq.read_schema(path).metadata[b"schema"].decode() for path in files}
    assert found == {*store.COLUMNS, "run.predictions/1"} == set(ABOUT)
    return files


COMPARED = 16  # rows of a file, its first ones: a vector of a row is thousands of numbers


def assert_same(path: Path, columns: list[str], rows: int, values: list[Any]) -> None:
    """As another library read it, a file has the columns and the number of rows that Arrow reads.

    Its first rows are the same: numbers, texts, lists and vectors.
    """
    expected = pq.read_table(path, partitioning=None)
    assert (columns, rows) == (expected.schema.names, len(expected))
    for name, found in zip(columns, values, strict=True):
        wanted = expected.column(name).slice(0, COMPARED).to_pylist()
        assert [plain(value) for value in found] == [plain(value) for value in wanted], f"{path}: {name}"


def plain(value: Any) -> Any:
    """A cell without the library's own types; pandas' not-a-number is a missing value, None."""
    if isinstance(value, np.ndarray | list | tuple) or type(value).__name__ == "Series":  # polars' vectors
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if value != value else value


def test_duckdb_opens_every_file(inside: Path) -> None:
    for path in parquet_files():
        relation = duckdb.sql(f"SELECT * FROM '{path}'")
        [[rows]] = duckdb.sql(f"SELECT count(*) FROM '{path}'").fetchall()
        values = list(zip(*relation.limit(COMPARED).fetchall(), strict=True)) or [()] * len(relation.columns)
        assert_same(path, relation.columns, rows, values)


@pytest.mark.slow
def test_pandas_opens_every_file(inside: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for path in parquet_files():
        frame = pandas.read_parquet(path)
        values = [frame[name].head(COMPARED).tolist() for name in frame.columns]
        assert_same(path, list(frame.columns), len(frame), values)


@pytest.mark.slow
def test_polars_opens_every_file(inside: Path, polars: Any) -> None:
    for path in parquet_files():
        frame = polars.read_parquet(path)
        values = [frame[name].head(COMPARED).to_list() for name in frame.columns]
        assert_same(path, frame.columns, len(frame), values)


# The examples of docs/extending.md, in a copy of the code.

EXTENDING = "docs/extending.md"
PLACE = re.compile(r"saved as `([\w/]+\.py)`, is complete")


@pytest.fixture(scope="module")
def extended(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose code has the method, the control and the part of the page, over the data of `made`."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("fieldmark", "training", "evaluation"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").symlink_to(made / "data")
    shutil.copy(made / "params.yaml", folder)
    places = PLACE.findall((ROOT / EXTENDING).read_text())
    for place, code in zip(places, blocks(EXTENDING, "python"), strict=True):
        assert not (ROOT / place).exists()
        (folder / place).write_text(code)
    for block in (block for block in blocks(EXTENDING, "yaml") if is_study(block)):
        write_study(folder, block)
    return folder


def run_in(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What `make study` and `make compare` run. One process for all: each would import torch.
COMMANDS = [
    "evaluation.study --name mine --jobs 1", "evaluation.compare --name mine", "training.train --knobs nearest_mean",
    "evaluation.study --name patches --jobs 1", "evaluation.compare --name patches",
]  # fmt: skip
RUN_ALL = """
import contextlib, importlib, io, json, sys
said = {}
for line in sys.argv[1:]:
    module, *sys.argv[1:] = line.split()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        importlib.import_module(module).main()
    said[line] = out.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(extended: Path) -> dict[str, str]:
    """What each command prints in that project."""
    return dict(json.loads(run_in(extended, "-c", RUN_ALL, *COMMANDS)))


@pytest.mark.slow
def test_the_method_gets_its_paired_table(said: dict[str, str]) -> None:
    [steps] = blocks(EXTENDING, "sh")
    assert steps.splitlines() == ["make study NAME=mine", "make compare NAME=mine"]
    rows = [line for line in said["evaluation.compare --name mine"].splitlines() if line.startswith("nearest_mean")]
    assert len(rows) == 2  # with all images, and with one a class
    assert all(re.search(r"\[[-+]\d", row) for row in rows)
    knobs = said["training.train --knobs nearest_mean"]
    assert re.search(r"^scale: 20\.0 +# turns cosines into logits$", knobs, re.MULTILINE)


@pytest.mark.slow
def test_the_control_takes_its_part_away(said: dict[str, str]) -> None:
    lines = said["evaluation.compare --name patches"].splitlines()
    rows = [line.split()[:2] for line in lines if "_probe" in line.split(" ")[0]]
    assert rows == [["linear_probe", "none"], ["nodes_probe", "none"], ["nodes_probe", "patches_removed"]]


@pytest.mark.slow
def test_the_part_brings_its_field(extended: Path) -> None:
    table = store.read_table(extended / "data/index/images.parquet", "index.images/1")
    depths = [float(row) if row % 3 else None for row in range(len(table))]
    place = table.schema.get_field_index("depth_m")
    metadata = pq.read_schema(extended / "data/index/images.parquet").metadata
    other = extended / "sea"
    (other / "index").mkdir(parents=True)
    (other / "embed").symlink_to(extended / "data/embed")
    shutil.copy(extended / "data/index/classes.parquet", other / "index")
    changed = table.set_column(place, table.schema.field(place), [depths]).replace_schema_metadata(metadata)
    pq.write_table(changed, other / "index/images.parquet")
    program = """
import torch
from pathlib import Path
from training.data import read_cache
cache = read_cache(Path("sea"), "reef", 2, {"globals", "depth"})
print(cache.batch(torch.arange(len(cache.paths))).depth.tolist())
"""
    said = run_in(extended, "-c", program)
    assert [None if word == "nan" else float(word) for word in said.strip("[]\n").split(", ")] == depths
