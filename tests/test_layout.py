"""The map of docs/architecture.md, held against what the code imports; dvc.yaml, against what a stage's module runs."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from dvc.schema import COMPILED_MULTI_STAGE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from fieldmark.sources import PACKAGES, files_there, imported_names, imports_of, modules_named, read_source
from tests.project import ROOT

# The folders of this repository that a package may import; a stage imports no other stage.
MAY_IMPORT = {
    "fieldmark": {"fieldmark"},
    "stages": {"fieldmark"},
    "training": {"fieldmark", "training"},
    "evaluation": {"fieldmark", "training", "evaluation"},
    "tools": {*PACKAGES},
}
OURS = {*PACKAGES, "bench", "tests"}
MODULES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# What training/ and evaluation/ do without, so that a machine trains from Parquet alone.
NOT_TO_TRAIN = {"openai", "open_clip", "PIL"}
# A study may label nodes by the pixels under them: the picture in data/thumbs is then opened, and only then.
OPENS_THUMBS = Path("fieldmark/labels/pixels.py")

# Every knob stands under `params:` of the stage that reads it, and command.py says errors and help: neither decides
# what a stage writes. Listed, an edit of them would run every stage again.
NOT_LISTED = {Path("fieldmark/params.py"), Path("fieldmark/command.py")}
# A stage is a process of its own, and most often finds little to do: what takes seconds to import is imported by those
# alone that compute with it. torch takes two, open_clip six with all that it brings.
WITHOUT_TORCH = [
    "tools.inputs", "tools.preflight", "tools.profiles", "tools.repro", "tools.share", "stages.draw_reef",
    "stages.index_images", "stages.clean_concepts", "stages.generate_concepts", "stages.describe_images", "stages.ask",
]
WITHOUT_ENCODERS = [
    "stages.select_concepts", "stages.label_patches", "stages.build_graphs", "stages.link_images",
    "training.plan_first_looks", "training.first_look", "training.plan_runs", "training.train", "evaluation.report",
]
# PyTorch's compiler takes as long as PyTorch. AdamW loads it at its first step.
COMPILER = "torch._dynamo"
WITHOUT_COMPILER = ["stages.embed_images", "stages.pool_tokens", "tools.predict"]
OF_ENCODERS = {"open_clip", "timm", "torchvision", "transformers", "torch_geometric", "sklearn", "scipy", "pandas"}


def read_stages() -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml; none where that is no YAML, of which a test of its own tells."""
    try:
        stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    except YAMLError:
        return {}
    return {name: stage.get("do", stage) for name, stage in stages.items()}


STAGES = read_stages()
# Folders whose modules are loaded by a name in params.yaml: a stage that imports the folder may run any of them.
BY_NAME = [Path("fieldmark/formats"), Path("fieldmark/encoders/towers")]
# What train runs depends on the methods of params.yaml: plan_runs, which reads all of that code, finds it run by run.
# So it is with first looks.
BY_PLAN = ["train", "first_look"]
PLANNED = [*BY_PLAN, "plan_runs", "plan_first_looks"]


def refuse(wrong: Iterable[str]) -> None:
    """Fail with all that is wrong, a line each."""
    lines = sorted(wrong)
    assert not lines, "\n".join(lines)


def names_of(file: Path) -> tuple[str, ...]:
    return imported_names(read_source(file, ROOT), file)


def tops(file: Path) -> set[str]:
    """The packages that a file imports, ours and others, by their first names."""
    return {name.split(".")[0] for name in names_of(file)}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_of_the_others(package: str) -> None:
    found = {file: tops(file) & OURS - MAY_IMPORT[package] for file in MODULES if file.parts[0] == package}
    assert found
    refuse(f"{file} imports {name}" for file, names in found.items() for name in names)


@pytest.mark.parametrize("package", ["training", "evaluation"])
def test_training_and_judging_reach_no_picture_and_no_model(package: str) -> None:
    refuse(
        f"{module} reaches {name} by way of {file}"
        for module in MODULES
        if module.parts[0] == package
        for file in imports_of([module], ROOT)
        for name in tops(file) & NOT_TO_TRAIN
        if (package, file, name) != ("evaluation", OPENS_THUMBS, "PIL")
    )


def test_pixels_open_a_picture_only_when_asked() -> None:
    """PIL is imported inside the function that opens it: no module of evaluation/ loads it on import."""
    body = ast.parse((ROOT / OPENS_THUMBS).read_text()).body
    at_once = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("PIL" in line for line in at_once)


def test_no_module_imports_dvc() -> None:
    refuse(f"{file} imports dvc" for file in MODULES if "dvc" in tops(file))


def test_no_modules_import_each_other_in_a_circle() -> None:
    circle: list[Path] = []
    there = files_there(ROOT)
    try:
        TopologicalSorter({file: modules_named(names_of(file), there) for file in MODULES}).prepare()
    except CycleError as error:
        circle = error.args[1]
    refuse([" is imported by ".join(map(str, circle))] if circle else [])


def test_what_computes_little_imports_little() -> None:
    """All in one process, what imports least first: the first of them that brings a library is named."""
    refused = {each: {"torch", *OF_ENCODERS} for each in WITHOUT_TORCH}
    refused |= {each: {COMPILER, *OF_ENCODERS} for each in WITHOUT_ENCODERS}
    refused |= {each: {COMPILER} for each in WITHOUT_COMPILER}
    script = "\n".join([
        "import importlib, sys",
        "seen = set()",
        f"for module, names in {refused}.items():",
        "    importlib.import_module(module)",
        "    found = names & set(sys.modules) - seen",
        "    seen |= found",
        "    [print(module, 'imports', each) for each in found]",
        # What training sets, an optimizer of another kind than AdamW, and what torchvision then asks of the compiler.
        "import torch, torchvision.ops, fieldmark.devices",
        "fieldmark.devices.set_up_torch()",
        "parameter = torch.nn.Parameter(torch.zeros(1))",
        "torch.optim.LBFGS([parameter]).step(lambda: (parameter**2).sum())",
        f"if '{COMPILER}' in sys.modules: print('L-BFGS loads the compiler')",
        "answer = sys.modules['torchvision.ops.roi_align'].is_compile_supported('cpu')",
        f"if answer is not True or '{COMPILER}' not in sys.modules: print('torchvision is told nothing')",
    ])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refuse(done.stdout.splitlines())


def test_nouns_have_no_command() -> None:
    refuse(f"{file} has a main()" for file in MODULES if file.parts[0] == "fieldmark" and has_main(file))


def has_main(file: Path) -> bool:
    body = ast.parse((ROOT / file).read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def test_dvc_reads_dvc_yaml() -> None:
    """A line says where it does not: other tests, which run dvc, fail of it without saying so."""
    refused = ""
    try:
        COMPILED_MULTI_STAGE_SCHEMA(YAML(typ="safe").load((ROOT / "dvc.yaml").read_text()))
    except (YAMLError, Invalid) as error:
        refused = " ".join(str(error).split())
    assert not refused


def test_dvc_has_the_parser_in_c() -> None:
    """Without it DVC takes five times as long to read dvc.yaml and dvc.lock, which it does at every command."""
    assert YAML(typ="safe").Parser is not YAML(typ="safe", pure=True).Parser


def code_of(stage: dict[str, Any]) -> list[Path]:
    """The files and folders of code that a stage of dvc.yaml depends on, as they stand there."""
    paths = [Path(dep) for dep in stage["deps"] if "$" not in dep]
    return [path for path in paths if path.parts[0] in PACKAGES]


def python_files(path: Path) -> set[Path]:
    """A Python file, or all of a folder; what is neither is a text that code reads beside itself."""
    if (ROOT / path).is_dir():
        return {file.relative_to(ROOT) for file in (ROOT / path).rglob("*.py")}
    return {path} if path.suffix == ".py" else set()


def says_nothing(file: Path) -> bool:
    """Whether a file holds a docstring at most, as most `__init__.py` do: it decides nothing and need not be listed."""
    return all(isinstance(node, ast.Expr) for node in ast.parse((ROOT / file).read_text()).body)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_yaml_lists_code_that_is_there(name: str) -> None:
    code = code_of(STAGES[name])
    assert code or name in BY_PLAN
    refuse(f"{path} is not there" for path in code if not (ROOT / path).exists())
    refuse(f"{path} is listed twice" for path, count in Counter(code).items() if count > 1)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in PLANNED])
def test_dvc_yaml_lists_the_code_that_a_stage_runs(name: str) -> None:
    [module] = re.findall(r"python -m ([\w.]+)", STAGES[name]["cmd"])
    run = set(imports_of([Path(*module.split(".")).with_suffix(".py")], ROOT))
    for folder in BY_NAME:
        if folder / "__init__.py" in run:
            run |= set(imports_of(python_files(folder), ROOT))
    listed = set().union(*map(python_files, code_of(STAGES[name])))
    needless = {file for file in run if says_nothing(file)} | NOT_LISTED
    refuse(
        [f"{file} is imported, and not listed" for file in run - listed - needless]
        + [f"{file} is listed, and not imported" for file in listed - run]
        + [f"{file} is listed, and need not be" for file in listed & NOT_LISTED]
    )


# What stages keep where it still holds: buckets and vectors, adapted encoders, answers that were paid for.
KEPT = re.compile(
    r"data/(embed|graphs|adapted|again|links)/\$\{key\}.*|data/asked/\$\{key\}/vectors|data/.*/answers\.parquet"
)


def test_dvc_leaves_what_a_stage_keeps() -> None:
    """An output without `persist` is deleted before its stage runs, which then embeds all anew, or pays again."""
    outs = [out for stage in STAGES.values() for out in stage.get("outs", [])]
    marks: dict[str, dict[str, Any]] = {}
    for out in outs:
        marks |= {out: {}} if isinstance(out, str) else out
    kept = {path for path in marks if KEPT.fullmatch(path)}
    assert {f"data/embed/${{key}}/{name}" for name in ("images", "tokens", "moments")} <= kept
    refuse(f"{path} is not marked persist: true" for path in kept if marks[path].get("persist") is not True)


@pytest.mark.parametrize("name", STAGES)
def test_no_name_of_params_yaml_reaches_a_shell(name: str) -> None:
    assert "$" not in STAGES[name]["cmd"]
