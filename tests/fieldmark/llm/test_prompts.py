"""Prompt files: what is read, rendered and refused."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.llm.prompts import load_prompt, problem
from fieldmark.llm.rendering import with_article
from tests.fieldmark.llm.workspace import REPOSITORY

VALUES: dict[str, Any] = {
    "noun": "aircraft",
    "group": "airliners",
    "attributes": ["nose", "winglets"],
    "not_shown": ["engine", "how far it flies"],
    "name": 'A/B "x" {{ é }}',
    "scientific_name": None,
    "note": None,
    "superclass": "A/Bs",
    "siblings": ["C", "D"],
    "per_class": 7,
    "generic": 30,
    "sentences": 3,
}
PROMPTS = ("concepts", "generic_concepts", "contrast", "describe")
# The words of four domains: noun, group, attributes, not_shown, a class and its siblings.
CARDS = {
    "bird": ("birds", ["bill", "head and face"], ["song", "diet"], "White-breasted Kingfisher", ["Pied Kingfisher"]),
    "fish": ("reef fish", ["bars, stripes and spots"], [], "Lantern bandit", ["Ember bandit", "Hooded bandit"]),
    "car": ("cars", [], ["price"], "Audi S4 Sedan 2012", ["BMW M5 Sedan 2010"]),
    "oak leaf": ("leaves of trees", ["margin", "veins"], ["smell"], "Sessile oak", ["English oak"]),
}
# What a template gets wrong where a word is missing: doubled spaces, lines and stops, empty brackets, a for an.
BLEMISH = re.compile(r" {2}|\n{3}|\.\.| [.,]|\(\)|[{}]{2}|\ban [^aeiou]|\ba [aeiou]", re.IGNORECASE)
GOOD = """---
purpose: a test
variables: [name]
schema: {type: object}
---
# system
Be exact.
# user
# not a section
About {{ name }}.
"""


def concept(text: Any, kind: Any, part: Any) -> Any:
    return {"concepts": [{"text": text, "kind": kind, "part": part}]}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prompt.md"
    path.write_text(text)
    return path


def test_the_prompts_of_the_repository_render() -> None:
    concepts = load_prompt(REPOSITORY / "prompts/concepts.md")
    system, user = concepts.render(VALUES)
    assert "photo" in user["content"]
    assert "an aircraft with CHARACTERISTIC" in system["content"]
    assert 'A/B "x" {{ é }} from other airliners' in user["content"]
    assert "nose; winglets." in user["content"]
    assert "nothing that a photo cannot show (engine, how far it flies)." in " ".join(user["content"].split())
    assert "About it" not in user["content"]
    about = concepts.render(VALUES | {"note": "a twinjet", "scientific_name": "Aquila ferrea"})[1]["content"]
    assert "About it: a twinjet." in about
    assert "(Aquila ferrea)" in about


def test_a_description_is_asked_for_without_a_label() -> None:
    prompt = load_prompt(REPOSITORY / "prompts/describe.md")
    assert not {"name", "scientific_name", "note", "class_id"} & set(prompt.variables)
    assert "in 3 sentences" in prompt.render(VALUES)[1]["content"]


@pytest.mark.parametrize("noun", CARDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_one_template_serves_birds_fish_cars_and_leaves(name: str, noun: str) -> None:
    group, attributes, not_shown, known, siblings = CARDS[noun]
    card = {"noun": noun, "group": group, "attributes": attributes, "not_shown": not_shown}
    prompt = load_prompt(REPOSITORY / f"prompts/{name}.md")
    system, user = (
        message["content"] for message in prompt.render(VALUES | card | {"name": known, "siblings": siblings})
    )
    said = f"{system}\n{user}"
    article = "an" if noun == "oak leaf" else "a"
    assert f'"{article} {noun} with CHARACTERISTIC"' in said
    assert group in system
    assert group in user
    assert "photo" in said
    assert ("; ".join(attributes) + ".") in user
    assert ("(" + ", ".join(not_shown) + ")" in said) == bool(not_shown)
    assert (known in said) == (name in ("concepts", "contrast"))
    assert all(f"- {sibling}\n" in said for sibling in siblings) == (name == "contrast")
    assert not BLEMISH.search(said.replace("...", "X"))


def test_the_three_prompts_for_concepts_share_a_schema() -> None:
    first, *others = (load_prompt(REPOSITORY / f"prompts/{name}.md").schema for name in PROMPTS[:3])
    assert others == [first, first]


@pytest.mark.parametrize("noun", ["an aircraft", "an unknown fish", "an urchin", "an hourglass", "a unicorn", "a ewe"])
def test_an_article_is_chosen_by_sound(noun: str) -> None:
    assert with_article(noun.split(" ", 1)[1]) == noun


def test_sections_and_identity(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    prompt = load_prompt(path)
    assert prompt.name == "prompt"
    assert prompt.sha == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prompt.render({"name": "Ray", "more": 1}) == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "# not a section\nAbout Ray."},
    ]
    shutil.copy(path, tmp_path / "windows.md")
    (tmp_path / "windows.md").write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert load_prompt(tmp_path / "windows.md").render({"name": "Ray"}) == prompt.render({"name": "Ray"})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("---\npurpose", "purpose", "has no front matter"),
        ("purpose: a test", "purpose: [", "not YAML"),
        ("purpose: a test", "purpos: a test", "must hold purpose, schema, variables"),
        ("purpose: a test", "purpose: 3", "purpose: is not a text"),
        ("[name]", "name", "variables: is not a list"),
        ("purpose: a test", "purpose: a test\nsubject: photo", "subject: 'photo' is none of class, pair, image, "),
        ("purpose: a test", "purpose: a test\nguesses: x", "guesses: 'x' is no text of `schema`"),
        ("{type: object}", "3", "schema: is not a JSON schema"),
        ("{type: object}", "{type: objekt}", "'objekt' is no JSON type"),
        ("{type: object}", "{properties: {x: {pattern: a}}}", "schema.properties.x.pattern: is not supported"),
        ("# user", "# usr", "under `# system`"),
        ("# system\nBe exact.\n", "Be exact.\n", "under `# system`"),
        ("{{ name }}", "{{ nmae }}", "{{ nmae }} is not among its `variables`"),
        ("{{ name }}", "{{ name", "not a Jinja template"),
        ("{{ name }}", "{{ name | nofilter }}", "not a Jinja template"),
    ],
)
def test_a_malformed_prompt_is_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_prompt(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "field", "there"),
    [
        ("{properties: {x: {type: string}}}", "x", True),
        ("{properties: {x: {type: array, items: {type: string}}}}", "x", True),
        ("{properties: {x: {type: array, items: {properties: {y: {type: string}}}}}}", "x.y", True),
        ("{properties: {x: {type: array, items: {properties: {y: {type: string}}}}}}", "x", False),
        ("{properties: {x: {type: integer}}}", "x", False),
        ("{properties: {x: {type: string}}}", "[x]", False),
    ],
)
def test_guesses_are_a_text_of_the_schema(tmp_path: Path, schema: str, field: str, there: bool) -> None:
    lines = f"purpose: a test\nsubject: image\nguesses: {field}"
    path = write(tmp_path, GOOD.replace("purpose: a test", lines).replace("{type: object}", schema))
    if there:
        assert (load_prompt(path).subject, load_prompt(path).guesses) == ("image", field)
    else:
        with pytest.raises(UserError, match="is no text of `schema`"):
            load_prompt(path)


def test_what_the_stage_cannot_fill_in_is_one_line(tmp_path: Path) -> None:
    prompt = load_prompt(write(tmp_path, GOOD))
    with pytest.raises(UserError, match="'name' is not known to this stage; it knows group, noun"):
        prompt.render({"noun": "fish", "group": "fish"})
    prompt = load_prompt(write(tmp_path, GOOD.replace("{{ name }}", "{{ name.first }}")))
    with pytest.raises(UserError, match="cannot be rendered"):
        prompt.render({"name": "Ray"})
    with pytest.raises(UserError, match="cannot be read"):
        load_prompt(tmp_path / "none.md")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"concepts": []}, None),
        (concept("x", "visual", None), None),
        ([], "answer is not of type object"),
        ({}, "answer lacks concepts"),
        ({"concepts": [], "more": 1}, "answer has the unknown key more"),
        ({"concepts": {}}, "answer.concepts is not of type array"),
        (concept(True, "visual", None), "answer.concepts[0].text is not of type string"),
        (concept("x", "song", None), "answer.concepts[0].kind is none of visual, habitat"),
        (concept("x", "visual", 3), "answer.concepts[0].part is not of type string or null"),
    ],
)
def test_answers_are_held_against_the_schema(value: Any, found: str | None) -> None:
    assert problem(value, load_prompt(REPOSITORY / "prompts/concepts.md").schema) == found


def test_true_is_no_number() -> None:
    assert problem(True, {"type": "integer"}) == "answer is not of type integer"
    assert problem(True, {"type": ["boolean", "null"]}) is None
    assert problem(1, {"type": "number"}) is None
