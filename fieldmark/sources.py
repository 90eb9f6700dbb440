"""Which files of this repository a module runs: beside what it reads, they decide whether a result is still valid.

Code is parsed, never imported. A module runs what it imports anywhere, inside functions too, and the `__init__.py` of
each package on the way. Not followed are modules that code names at run time (a method by its name in params.yaml) and
texts that it reads (a template beside a module).
"""

import ast
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.store import sha256

# The packages of this repository whose code makes results.
PACKAGES = ("fieldmark", "stages", "training", "evaluation", "tools")


def imports_of(module: Path, root: Path, *others: Path) -> dict[Path, str]:
    """The sha256 of each file that `module` runs, and that `others` run, themselves among them; by path, sorted.

    Modules are paths from `root`, the folder of the repository, and so are those found. Raises UserError for a file
    that cannot be read or is not Python.
    """
    found: dict[Path, str] = {}
    # Folders are read once a call, and in the next one anew, for files may have come: a study's plan asks for a million
    # files. Each name is looked for once, however many files import it.
    there = files_there(root)
    file_of = cache(lambda name: resolve(name, there))
    waiting = [module, *others]
    while waiting:
        file = waiting.pop()
        if file not in found:
            source = read_source(file, root)
            found[file] = sha256(source)
            waiting += packages_of(file, there) + files_of(imported(source, file), file_of)
    return dict(sorted(found.items()))


def modules_named(file: Path, root: Path) -> list[Path]:
    """The files that one file's own imports name, sorted, without the packages on the way; paths from `root`."""
    there = files_there(root)
    return sorted(files_of(imported_names(file, root), lambda name: resolve(name, there)))


def files_of(names: tuple[str, ...], file_of: Callable[[str], Path | None]) -> list[Path]:
    """The files of dotted names, each once; none for what lies elsewhere."""
    return [file for file in {file_of(name) for name in names} if file is not None]


def imported_names(file: Path, root: Path) -> tuple[str, ...]:
    """The dotted names that one file imports, of any package: `from a import b` gives a.b, whatever b is."""
    return imported(read_source(file, root), file)


def imported(source: bytes, file: Path) -> tuple[str, ...]:
    try:
        return names_in(source, file.parent.parts)
    except SyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: is not Python ({error.msg}); correct it") from None


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
