"""Cards in Markdown, with the YAML front matter that the Hugging Face hub reads; templates lie beside this file."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ruamel.yaml import YAML

from evaluation.words import percent
from fieldmark.command import printable


def cell(text: object) -> str:
    """A text of others in a line of Markdown or a table: neither markup nor a line of its own."""
    plain = printable(" ".join(str(text).split()), keep="")
    return "".join(f"\\{char}" if char in r"\`*_{}[]<>#!|~" else char for char in plain)


def render(template: str, front: Mapping[str, Any], **values: Any) -> str:
    """The card of a template; it writes `front` out itself, as YAML between lines of ---."""
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "cell": cell}
    text, yaml = StringIO(), YAML()
    yaml.width = 1000  # no line is folded
    yaml.dump(dict(front), text)
    return environment.get_template(template).render(front=text.getvalue(), **values)
