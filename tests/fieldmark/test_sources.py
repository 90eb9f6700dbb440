"""Which files a module runs, on repositories of a few lines; and of a real stage."""

import subprocess
import sys
from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.sources import files_there, imported_names, imports_of, modules_named, read_source
from fieldmark.store import sha256
from tests.project import ROOT


def write(root: Path, **files: str) -> None:
    """Files by their dotted names; a package's `__init__.py` is empty unless it is given."""
    for name, content in files.items():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
        path.write_text(content)


def names(module: str, root: Path) -> list[str]:
    return [file.as_posix() for file in imports_of([Path(module)], root)]


@pytest.mark.parametrize(
    "line",
    [
        "import fieldmark.inner.a",
        "import os, fieldmark.inner.a as a",
        "from fieldmark.inner import a",
        "from fieldmark.inner import a as other, CONSTANT",
        "from fieldmark.inner.a import NAME",
        "from fieldmark.inner.a import *",
        "def late() -> None:\n    from fieldmark.inner import a",
        "try:\n    import fieldmark.inner.a\nexcept ImportError:\n    pass",
    ],
)
def test_every_way_to_import_a_module(line: str, tmp_path: Path) -> None:
    write(tmp_path, **{"stages.x": line, "fieldmark.inner.a": "NAME = 1", "fieldmark.inner.b": "", "fieldmark.c": ""})
    assert names("stages/x.py", tmp_path) == [
        "fieldmark/__init__.py",
        "fieldmark/inner/__init__.py",
        "fieldmark/inner/a.py",
        "stages/__init__.py",
        "stages/x.py",
    ]


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("fieldmark.inner.x", "from . import a", ["fieldmark/inner/a.py"]),
        ("fieldmark.inner.x", "from .a import NAME", ["fieldmark/inner/a.py"]),
        ("fieldmark.inner.x", "from .. import b", ["fieldmark/b.py"]),
        ("fieldmark.inner.x", "from ..b import NAME", ["fieldmark/b.py"]),
        ("fieldmark.inner.__init__", "from .a import NAME", ["fieldmark/inner/a.py"]),
        ("fieldmark.inner.__init__", "from ..b import NAME", ["fieldmark/b.py"]),
        ("fieldmark.x", "from fieldmark import NAME", ["fieldmark/__init__.py"]),
        ("fieldmark.x", "import fieldmark", ["fieldmark/__init__.py"]),
        ("fieldmark.x", "from fieldmark import inner", ["fieldmark/inner/__init__.py"]),
        ("fieldmark.x", "import numpy, fieldmarks, bench.a", []),
    ],
)
def test_what_a_line_names(module: str, line: str, found: list[str], tmp_path: Path) -> None:
    write(tmp_path, **{"fieldmark.inner.a": "", "fieldmark.b": "", "bench.a": "", module: line})
    file = Path(*module.split(".")).with_suffix(".py")
    names = imported_names(read_source(file, tmp_path), file)
    assert [path.as_posix() for path in modules_named(names, files_there(tmp_path))] == found


def test_imports_are_followed_through_packages_and_circles(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{
            "fieldmark.__init__": "import fieldmark.d",
            "stages.x": "from training import a",
            "training.a": "import training.b",
            "training.b": "import training.a",
            "fieldmark.d": "",
            "training.__init__": "from fieldmark import c",
            "fieldmark.c": "",
            "tools.unused": "",
        },
    )
    assert names("stages/x.py", tmp_path) == [
        "fieldmark/__init__.py", "fieldmark/c.py", "fieldmark/d.py", "stages/__init__.py", "stages/x.py",
        "training/__init__.py", "training/a.py", "training/b.py",
    ]  # fmt: skip


def test_a_changed_file_is_seen_at_once(tmp_path: Path) -> None:
    write(tmp_path, **{"stages.x": "import fieldmark.a", "fieldmark.a": "", "fieldmark.b": ""})
    first = imports_of([Path("stages/x.py")], tmp_path)
    assert first[Path("stages/x.py")] == sha256("import fieldmark.a")
    write(tmp_path, **{"fieldmark.a": "import fieldmark.b"})
    second = imports_of([Path("stages/x.py")], tmp_path)
    assert set(second) - set(first) == {Path("fieldmark/b.py")}
    assert {file for file in first if first[file] != second[file]} == {Path("fieldmark/a.py")}


def test_names_of_other_packages_are_told_whole(tmp_path: Path) -> None:
    write(tmp_path, **{"fieldmark.a": "import PIL.Image\nfrom torch.nn import functional as F\nfrom . import b"})
    file = Path("fieldmark/a.py")
    assert imported_names(read_source(file, tmp_path), file) == ("PIL.Image", "fieldmark.b", "torch.nn.functional")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, **{"stages.x": "import fieldmark.a", "fieldmark.a": "x = 1\nimport ="})
    with pytest.raises(UserError, match=r"^fieldmark/a\.py: line 2: is not Python \(.*\); correct it$"):
        imports_of([Path("stages/x.py")], tmp_path)
    with pytest.raises(UserError, match=r"^stages/y\.py: cannot be read"):
        imports_of([Path("stages/y.py")], tmp_path)


LOADED = """
import sys
import stages.generate_concepts
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in ("fieldmark", "stages")]
print(*files, sep="\\n")
"""


def test_what_a_stage_runs_is_what_python_loads() -> None:
    """Of a stage that imports nothing later than at its start."""
    said = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {Path(file).relative_to(ROOT) for file in said.splitlines()}
    assert set(imports_of([Path("stages/generate_concepts.py")], ROOT)) == loaded
