"""A method's settings as YAML, each with the comment on its line: they are documented where they are defined."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from fieldmark.params import Block
from training.methods import load_method, read_settings

WIDTH = 40  # columns before a comment


def say_knobs(method: str) -> str:
    """The settings of a method and their defaults, as they would stand under `settings:` of a run.

    Raises UserError for a method that is not there.
    """
    read_settings("--knobs", method, method, {})
    return "\n".join([f"# {method}", *lines_of(load_method(method).Settings)]) + "\n"


def lines_of(model: type[Block], indent: str = "") -> Iterator[str]:
    """A line a knob; a block of knobs stands indented under its name."""
    said = comments_of(model)
    for name, field in model.model_fields.items():
        value: Any = field.get_default(call_default_factory=True)
        shown = value if isinstance(value, str) else json.dumps(value, default=in_short)
        line = f"{indent}{name}:" if isinstance(value, Block) else f"{indent}{name}: {shown}"
        yield f"{line.ljust(WIDTH)}  # {said[name]}" if name in said else line
        if isinstance(value, Block):
            yield from lines_of(type(value), f"{indent}  ")


def in_short(block: Block) -> dict[str, Any]:
    """A block within a list, in short."""
    return block.model_dump(exclude_defaults=True)


def comments_of(model: type[Block]) -> dict[str, str]:
    """What stands behind `#` on the line of each field, in the class that defines it last."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if isinstance(base, type) and issubclass(base, Block) and base is not Block:
            source = textwrap.dedent(inspect.getsource(base))
            lines = source.splitlines()
            for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    comment = re.search(r"  # (.*)$", lines[node.end_lineno - 1] if node.end_lineno else "")
                    if comment:
                        found[node.target.id] = comment.group(1)
    return found
