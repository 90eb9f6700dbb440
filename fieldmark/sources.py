"""Which files of this repository a module runs: beside what it reads, they decide whether a result is still valid.

Code is parsed, never imported. A module runs what it imports anywhere, inside functions too, and the `__init__.py` of
each package on the way. Not followed are modules that code names at run time (a method by its name in params.yaml) and
texts that it reads (a template beside a module).
"""

import ast
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.store import sha256

# The packages of this repository whose code makes results.
PACKAGES = ("fieldmark", "stages", "training", "evaluation", "tools")


def imports_of(modules: Iterable[Path], root: Path) -> dict[Path, str]:
    """The sha256 of each file that `modules` run, themselves among them; by path, sorted.

    Modules are paths from `root`, the folder of the repository, and so are those found. Raises UserError for a file
    that cannot be read or is not Python.
    """
    found: dict[Path, str] = {}
    # Folders are read once a call, and in the next one anew, for files may have come: a study's plan asks for a million
    # files.
    there = files_there(root)
    waiting = [*modules]
    while waiting:
        file = waiting.pop()
        if file not in found:
            source = read_source(file, root)
            found[file] = sha256(source)
            waiting += packages_of(file, there) + modules_named(imported_names(source, file), there)
    return dict(sorted(found.items()))


def imported_names(source: bytes, file: Path) -> tuple[str, ...]:
    """The dotted names that one file imports, of any package: `from a import b` gives a.b, whatever b is."""
    try:
        return names_in(source, file.parent.parts)
    except SyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: is not Python ({error.msg}); correct it") from None


def modules_named(names: Iterable[str], there: set[str]) -> list[Path]:
    """The files of dotted names, sorted, without the packages on the way; none for what lies elsewhere."""
    found = {resolve(name, there) for name in names}
    return sorted(each for each in found if each is not None)


def files_there(root: Path) -> set[str]:
    """The Python files of all packages, by their paths from `root`."""
    above = len(os.path.join(root, ""))
    folders = [walked for package in PACKAGES for walked in os.walk(root / package)]
    return {os.path.join(folder, name)[above:] for folder, _, names in folders for name in names if name[-3:] == ".py"}


def packages_of(file: Path, there: set[str]) -> list[Path]:
    """The `__init__.py` of each package that a file lies in: Python runs them before it."""
    return [init for init in inits_above(file.parent) if str(init) in there]


def resolve(name: str, there: set[str]) -> Path | None:
    """The file of a dotted name: a module's, or that of the module in which its last part is a name; None elsewhere."""
    return next((file for file in places(name) if str(file) in there), None)


@cache
def inits_above(folder: Path) -> list[Path]:
    return [each / "__init__.py" for each in (folder, *folder.parents)]


@cache
def places(name: str) -> list[Path]:
    """Where the file of a dotted name may lie, the first choice first."""
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return []
    module = Path(package, *rest)
    modules = (module, module.parent) if rest else (module,)
    return [file for each in modules for file in (each.with_suffix(".py"), each / "__init__.py")]


def read_source(file: Path, root: Path) -> bytes:
    try:
        return (root / file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); get it back with: git checkout {file}") from None


@cache
def names_in(source: bytes, package: tuple[str, ...]) -> tuple[str, ...]:
    """The dotted names that a module of `package` imports. Parsing takes the time: equal bytes are parsed once."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package itself, each dot more its parent.
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return tuple(sorted(names))
