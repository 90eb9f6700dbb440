"""Which files of this repository a module runs, by reading its imports; nothing is imported for it."""

import ast
import functools
from pathlib import Path

from fieldmark.store import sha256

PACKAGES = ("fieldmark", "stages", "training", "evaluation", "tools")


def imported_files(module: Path, root: Path) -> dict[Path, str]:
    """A module and every module of this repository that it imports, directly or not, by its path below `root`.

    With the sha256 of each. An import inside a function counts as well; what is loaded by its name alone does not.
    """
    found: dict[Path, str] = {}
    waiting = [module.resolve().relative_to(root.resolve())]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path], imports = read_imports(root / path, (root / path).stat().st_mtime_ns)
            waiting += [Path(name) for name in imports if (root / name).is_file()]
    return dict(sorted(found.items()))


@functools.cache
def read_imports(path: Path, modified: int) -> tuple[str, tuple[str, ...]]:
    """A module's sha256, and the files that its imports may mean: a package's __init__.py is run on the way."""
    text = path.read_text(encoding="utf-8")
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import name`: the name may be a module.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files: list[str] = []
    for name in names:
        parts = name.split(".")
        if parts[0] in PACKAGES:
            files += ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)]
            files.append("/".join(parts) + ".py")
    return sha256(text), tuple(dict.fromkeys(files))
