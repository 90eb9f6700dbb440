"""Which files of this repository a module runs: beside what it reads, they decide whether a result is still valid.

Code is parsed, never imported. A module runs what it imports anywhere, inside functions too, and the `__init__.py` of
each package on the way. Not followed are modules that code names at run time (a method by its name in params.yaml) and
texts that it reads (a template beside a module).
"""

import ast
from functools import cache
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.store import sha256

# The packages of this repository whose code makes results.
PACKAGES = ("fieldmark", "stages", "training", "evaluation", "tools")


def imports_of(module: Path, root: Path) -> dict[Path, str]:
    """The sha256 of each file that `module` runs, itself among them, by its path from `root`; sorted.

    `module` is a path from `root` too, the folder of the repository. Raises UserError for a file that cannot be read
    or is not Python.
    """
    found: dict[Path, str] = {}
    waiting = [module]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = sha256(read_source(file, root))
            waiting += packages_of(file, root) + modules_named(file, root)
    return dict(sorted(found.items()))


def modules_named(file: Path, root: Path) -> list[Path]:
    """The files that one file's own imports name, sorted, without the packages on the way; paths from `root`."""
    found = {resolve(name, root) for name in imported_names(file, root)}
    return sorted(each for each in found if each is not None)


def imported_names(file: Path, root: Path) -> tuple[str, ...]:
    """The dotted names that one file imports, of any package: `from a import b` gives a.b, whatever b is."""
    try:
        return names_in(read_source(file, root), file.parent.parts)
    except SyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: is not Python ({error.msg}); correct it") from None


def packages_of(file: Path, root: Path) -> list[Path]:
    """The `__init__.py` of each package that a file lies in: Python runs them before it."""
    inits = [folder / "__init__.py" for folder in file.parents]
    return [init for init in inits if (root / init).is_file()]


def resolve(name: str, root: Path) -> Path | None:
    """The file of a dotted name: a module's, or that of the module in which its last part is a name; None elsewhere."""
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return None
    module = Path(package, *rest)
    for path in (module, module.parent) if rest else (module,):
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if (root / file).is_file():
                return file
    return None


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
