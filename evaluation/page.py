"""The report as one page: the templates of evaluation/report/ with their style and script inlined, and what may run.

A browser runs the one script and takes the one style whose sha256 stands in the page's policy (CSP), and loads nothing
from elsewhere: a script that came in with a class name would not run. All the same, everything that comes from data is
escaped. Data for the script stand in script elements of type application/json, which no browser runs, in ASCII and
without `<`, `>` and `&`: no text in them ends the element, and no separator of lines (U+2028) ends a line.

Pictures stand in the page, until it would be larger than LARGEST; then they are files beside it.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from evaluation.runs import Row
from evaluation.words import percent, points, points_range
from fieldmark.command import printable

FOLDER = Path(__file__).with_name("report")
SCRIPTS = ("elements.js", "gallery.js", "picture.js", "classes.js", "concepts.js", "start.js")
LARGEST = 20_000_000  # bytes of a page that holds its own pictures
FILES = "pictures"  # the folder of pictures beside a larger one


class Page(NamedTuple):
    html: str
    files: dict[str, bytes]  # by path from the page: its pictures, where it does not hold them itself


def number(value: float | None) -> str:
    """A count or a median: without decimals where it is whole, a dash where it is None."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def shown(value: Any) -> Any:
    """A JSON value whose texts hold no character that a page obeys."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: shown(each) for key, each in value.items()}
    return [shown(each) for each in value] if isinstance(value, list | tuple) else value


def as_json(value: Any) -> Markup:
    """JSON that can stand in a script element. Raises ValueError for what is no number, such as nan."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def source_of(text: str) -> str:
    """What a policy names a script or a style by: the sha256 of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def read_assets() -> tuple[str, str]:
    """The style and the script of the page. Each file of the script is strict, and all share one scope."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    parts = [(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return style, "(() => {\n\"use strict\";\n" + "\n".join(parts) + "})();\n"


def render(content: Row, data: Row, pictures: Mapping[str, bytes]) -> Page:
    """The page. `content` fills the templates, `data` goes to the script, `pictures` are WebP by their id.

    Characters of data that change how a text is read are written as escapes.
    """
    style, script = read_assets()
    numbers = as_json(shown(data))
    inside = sum(len(webp) for webp in pictures.values()) * 4 / 3 + len(numbers) <= LARGEST
    encoded = {name: base64.b64encode(webp).decode() for name, webp in pictures.items()} if inside else {}
    images = "data:" if inside else "'self' file:"
    policy = (
        f"default-src 'none'; script-src {source_of(script)}; style-src {source_of(style)}; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )

    def source(name: str) -> str:
        """Where an img finds the picture of an id."""
        return f"data:image/webp;base64,{encoded[name]}" if inside else f"{FILES}/{name}.webp"

    filters = {"percent": percent, "points": points, "points_range": points_range, "number": number}
    html = environment(FOLDER, **filters).get_template("page.html.jinja").render(
        **content,
        source=source,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=numbers,
        pictures=as_json(encoded),
        files=FILES,
    )
    return Page(html, {} if inside else {f"{FILES}/{name}.webp": webp for name, webp in sorted(pictures.items())})


@cache
def environment(folder: Path, **filters: Callable[..., str]) -> ImmutableSandboxedEnvironment:
    """Jinja for the HTML templates of a folder, compiled once: what comes from data is escaped."""
    made = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        # What is not a plain text was made by the template itself, or is a number.
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(filters)
    return made
