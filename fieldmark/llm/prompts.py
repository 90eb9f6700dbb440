"""Prompts as files that people edit: YAML front matter, then one Jinja section a message.

---
purpose: what it is for
variables: [name, noun]        # all that the sections use
schema: {type: object, ...}    # JSON schema of the answer
subject: image                 # of a question of your own: what it is asked about (subjects.py)
guesses: labels                # of one that asks for classes: where they stand in the answer (said.py: field)
---
# system
...
# user
What tells {{ name }} ...

Jinja's own filters and one more work there: `{{ noun | with_article }}` writes "a fish", "an aircraft". A template runs
in Jinja's sandbox, in a process of its own with bounds of time, memory and length (rendering.py): a prompt of somebody
else's can ask for nothing but a text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fieldmark.command import UserError
from fieldmark.llm.rendering import RENDERER
from fieldmark.store import sha256

Message = dict[str, Any]
FRONT_MATTER = re.compile(r"---\s*\n(.*?\n)---\s*\n(.*)", re.DOTALL)
HEADING = re.compile(r"^# (system|user|assistant)[ \t]*$", re.MULTILINE)
KEYS = {"purpose", "variables", "schema"}
OF_ONES_OWN = {"subject", "guesses"}  # may be left out
SUBJECTS = ("class", "pair", "image", "image_pair", "text")
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
SCHEMA_WORDS = {"type", "enum", "properties", "required", "additionalProperties", "items", "description", "title"}


@dataclass(frozen=True)
class Prompt:
    """A prompt file. `sha` is the sha256 of its bytes, `sections` its (role, template source) in order."""

    path: str
    sha: str
    purpose: str
    variables: tuple[str, ...]
    schema: dict[str, Any]
    sections: tuple[tuple[str, str], ...]
    subject: str | None = None
    guesses: str | None = None

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def render(self, values: Mapping[str, Any]) -> list[Message]:
        """The messages for these values. Raises UserError where the file uses what `values` does not hold."""
        unknown = [name for name in self.variables if name not in values]
        if unknown:
            known = ", ".join(sorted(values))
            raise UserError(f"{self.path}: variables: {unknown[0]!r} is not known to this stage; it knows {known}")
        chosen = {name: values[name] for name in self.variables}
        answer = RENDERER.ask(self.sections, chosen)
        if "error" in answer:
            raise UserError(f"{self.path}: cannot be rendered: {answer['error']}; correct it")
        messages: list[Message] = answer["messages"]
        return messages


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt file. Raises UserError: unreadable, malformed, or a section uses an undeclared variable."""
    try:
        content = Path(path).read_bytes()
        text = content.decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the prompt cannot be read ({error})") from None
    match = FRONT_MATTER.fullmatch(text)
    if not match:
        raise UserError(f"{path}: has no front matter; begin it with a YAML block between two lines of ---")
    front = read_front_matter(path, match[1])
    prompt = Prompt(
        str(path),
        sha256(content),
        front["purpose"],
        tuple(front["variables"]),
        front["schema"],
        split_sections(path, match[2]),
        front.get("subject"),
        front.get("guesses"),
    )
    check_variables(prompt)
    return prompt


def read_front_matter(path: str | Path, text: str) -> dict[str, Any]:
    try:
        front = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{path}: the front matter is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: the front matter is nested too deeply to be read; correct it") from None
    if not isinstance(front, dict) or not KEYS <= set(front) <= KEYS | OF_ONES_OWN:
        found = ", ".join(map(str, front)) if isinstance(front, dict) else "something else"
        must, may = (", ".join(sorted(keys)) for keys in (KEYS, OF_ONES_OWN))
        raise UserError(f"{path}: the front matter holds {found}; it must hold {must}, may hold {may}, and no more")
    if not isinstance(front["purpose"], str):
        raise UserError(f"{path}: purpose: is not a text")
    if not (isinstance(front["variables"], list) and all(isinstance(name, str) for name in front["variables"])):
        raise UserError(f"{path}: variables: is not a list of names")
    if front.get("subject") not in (None, *SUBJECTS):
        raise UserError(f"{path}: subject: {front['subject']!r} is none of {', '.join(SUBJECTS)}")
    check_schema(path, front["schema"], "schema")
    if "guesses" in front and not holds_texts(front["schema"], front["guesses"]):
        what = f"{front['guesses']!r} is no text of `schema`"
        raise UserError(f"{path}: guesses: {what}; write the keys that lead to one as KEY or KEY.KEY")
    return front


def holds_texts(schema: dict[str, Any], field: Any) -> bool:
    """Whether answers that fit a checked schema hold texts in a field, in lists or not."""
    if not isinstance(field, str):
        return False
    for key in field.split("."):
        schema = within_lists(schema).get("properties", {}).get(key, {})
    return within_lists(schema).get("type") == "string"


def within_lists(schema: dict[str, Any]) -> dict[str, Any]:
    while "items" in schema:
        schema = schema["items"]
    return schema


def split_sections(path: str | Path, body: str) -> tuple[tuple[str, str], ...]:
    before, *parts = HEADING.split(body)
    sections = tuple(zip(parts[::2], parts[1::2], strict=True))
    if before.strip() or "user" not in [role for role, _ in sections]:
        raise UserError(
            f"{path}: after the front matter each message stands under `# system`, `# user` or `# assistant`, alone on"
            " its line; one `# user` at least"
        )
    return sections


def check_variables(prompt: Prompt) -> None:
    answer = RENDERER.ask(prompt.sections)
    if "error" in answer:
        raise UserError(f"{prompt.path}: is not a Jinja template: {answer['error']}; correct it")
    for name in answer["used"]:
        if name not in prompt.variables:
            remedy = "correct it or declare it there"
            raise UserError(f"{prompt.path}: {{{{ {name} }}}} is not among its `variables`; {remedy}")


def check_schema(path: str | Path, schema: Any, where: str) -> None:
    """Accept the part of JSON Schema that `problem` checks and that structured output understands; refuse the rest."""
    if not isinstance(schema, dict):
        raise UserError(f"{path}: {where}: is not a JSON schema")
    for word in schema:
        if word not in SCHEMA_WORDS:
            raise UserError(f"{path}: {where}.{word}: is not supported; use {', '.join(sorted(SCHEMA_WORDS))}")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in JSON_TYPES:
            raise UserError(f"{path}: {where}.type: {kind!r} is no JSON type; use {', '.join(JSON_TYPES)}")
    for key, inner in schema.get("properties", {}).items():
        check_schema(path, inner, f"{where}.properties.{key}")
    if "items" in schema:
        check_schema(path, schema["items"], f"{where}.items")


def problem(value: Any, schema: dict[str, Any]) -> str | None:
    """The first thing that keeps an answer from fitting a checked schema, or None."""
    return next(problems(value, schema, "answer"), None)


def problems(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    kinds = schema.get("type", list(JSON_TYPES))
    allowed = [kind for name in (kinds if isinstance(kinds, list) else [kinds]) for kind in JSON_TYPES[name]]
    if not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed):
        yield f"{where} is not of type {' or '.join(kinds) if isinstance(kinds, list) else kinds}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where} is none of {', '.join(map(str, schema['enum']))}"
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        yield from (f"{where} lacks {key}" for key in schema.get("required", []) if key not in value)
        if schema.get("additionalProperties") is False:
            yield from (f"{where} has the unknown key {key}" for key in value if key not in properties)
        for key in filter(properties.__contains__, value):
            yield from problems(value[key], properties[key], f"{where}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for number, inner in enumerate(value):
            yield from problems(inner, schema["items"], f"{where}[{number}]")
