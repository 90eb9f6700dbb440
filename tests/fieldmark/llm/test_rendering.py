"""Prompt files of somebody else's: they make texts, within bounds, and nothing else."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from fieldmark.command import UserError
from fieldmark.llm.prompts import Prompt, load_prompt
from fieldmark.llm.rendering import Renderer

HEAD = "---\npurpose: a test\nvariables: [name, names]\nschema: {type: object}\n---\n# user\n"
VALUES: dict[str, Any] = {"name": "Ray", "names": ["Ray", "Skate"]}

# Ways from a text to the program around it.
REACHING = [
    "{{ ''.__class__ }}",
    "{{ name.__class__.__mro__[1].__subclasses__() }}",
    "{{ name['__class__'] }}",
    "{{ name | attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(name) }}",
    "{{ '{0.__class__}'.format_map({'0': name}) }}",
    "{{ names | map(attribute='__class__') | first }}",
    "{{ names | map('attr', '__class__') | first }}",
    "{{ names | sort(attribute='__class__') }}",
    "{{ names | groupby('__class__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% set x = names.append('x') %}{{ names }}",
    "{% set x = names.clear() %}",
    "{% do names.append('x') %}",
    "{% debug %}",
    "{{ ().__class__.__base__ }}",
    "{{ config }}",
]
# Texts, lists and loops without measure.
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ 'x\\nx' | indent(10 ** 10) }}",
    "{{ lipsum(n=10 ** 8) }}",
    "{{ range(10 ** 10) | list }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 1 | round(10 ** 9, 'floor') }}",
    "{{ 'x' | replace('', 'x' * 10 ** 6) | replace('x', 'x' * 10 ** 6) }}",
    "{{ ('x' * 10 ** 6) | join('x' * 10 ** 6) }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=[]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% macro a() %}{{ 'x' * 9999 }}{% endmacro %}{% for i in range(9999) %}{{ a() }}{% endfor %}",
    "{% for i in range(99999) %}{{ name }} and {{ name }} and {{ name }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ [" + "[" * 5000 + "]" * 5000 + "] }}",
    "{% if true %}" * 3000 + "{% endif %}" * 3000,
    # Two structures that only a walk of 2 ** 60 steps finds equal, in one step of the interpreter.
    "{% set m = namespace(s=[]) %}{% set n = namespace(s=[]) %}{% for i in range(60) %}{% set m.s = [m.s, m.s] %}"
    "{% set n.s = [n.s, n.s] %}{% endfor %}{{ m.s == n.s }}",
]


def written(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "prompt.md"
    path.write_text(HEAD + body)
    return path


def rendered(tmp_path: Path, body: str) -> str:
    return str(load_prompt(written(tmp_path, body)).render(VALUES)[0]["content"])


@pytest.mark.parametrize("body", REACHING)
def test_a_template_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        rendered(tmp_path, body)
    assert str(caught.value).startswith(str(tmp_path / "prompt.md"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert rendered(tmp_path, "{{ names | join(' ') }}") == "Ray Skate"


def check_bounds(tmp_path: Path, body: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        rendered(tmp_path, body)
    assert time.monotonic() - began < 60
    assert "\n" not in str(caught.value)
    assert rendered(tmp_path, "{{ name }}") == "Ray"


@pytest.mark.parametrize("body", ENDLESS)
@pytest.mark.slow
def test_a_template_stays_within_its_bounds(tmp_path: Path, body: str) -> None:
    check_bounds(tmp_path, body)


@pytest.mark.parametrize("body", ["{{ 'x' * 10**10 }}", "{{ 10 ** (10 ** 10) }}", ENDLESS[-1], ENDLESS[0]])
def test_a_loop_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr("fieldmark.llm.prompts.RENDERER", renderer := Renderer(seconds=1))
    check_bounds(tmp_path, body)
    renderer.end()


FILTERS = [
    "{{ name | upper }}", "{{ 3.14159 | round(2) }}", "{{ names | tojson }}", "{{ names | pprint }}",
    "{{ lipsum(html=false)[:0] }}",
    "{{ 'see http://x.org' | urlize }}", "{{ '<b>x</b>' | striptags }}", "{{ 'a b c' | wordwrap(2) }}",
    "{{ names | batch(1) | list }}", "{{ 'é ñ' | urlencode }}", "{{ '%s' | format(name) }}",
    "{{ 12345 | filesizeformat }}",
    "{{ names | map('lower') | sort | join(', ') }}", "{{ names | groupby(0) | list }}", "{{ name | center(9) }}",
    "{% for n in names %}{{ loop.index }}{{ loop.cycle(1, 2) }}{{ n }}{% if not loop.last %},{% endif %}{% endfor %}",
    "{% set x = namespace(n=0) %}{% for n in names %}{% set x.n = x.n + 1 %}{% endfor %}{{ x.n }}",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(name) }}", "{{ name.lower() }} {{ '{}'.format(name) }}",
    "{% filter upper %}x{% endfilter %}", "{{ names | xmlattr if false else 'x' }}", "{{ range(3) | sum }}",
    "{{ 'a\\u00e9\\n' | escape }}", "{{ names | dictsort if false else name | title }}", "{{ 7 // 2 }} {{ 2 ** 8 }}",
]  # fmt: skip


@pytest.mark.parametrize("body", FILTERS)
def test_what_jinja_can_do_a_prompt_can(tmp_path: Path, body: str) -> None:
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(body)
    assert rendered(tmp_path, body) == plain.render(VALUES).strip()


def test_the_process_has_no_key_and_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter22")
    renderer = Renderer()
    renderer.ask([["user", "x"]])
    assert renderer.process
    proc = Path(f"/proc/{renderer.process.pid}")
    assert b"hunter22" not in (proc / "environ").read_bytes()
    assert "Max open files            3" in (proc / "limits").read_text()
    process = renderer.process
    renderer.end()
    assert process.returncode == 0


def test_a_process_that_is_killed_is_started_again() -> None:
    renderer = Renderer()
    renderer.ask([["user", "x"]])
    assert renderer.process
    os.kill(renderer.process.pid, signal.SIGKILL)
    assert "died" in renderer.ask([["user", "x"]], {})["error"]
    assert renderer.ask([["user", "x"]], {}) == {"messages": [{"role": "user", "content": "x"}]}
    renderer.end()


def test_threads_may_ask(tmp_path: Path) -> None:
    prompt = load_prompt(written(tmp_path, "{{ name }}"))
    said: dict[str, str] = {}

    def ask(prompt: Prompt, name: str) -> None:
        said[name] = prompt.render({"name": name, "names": []})[0]["content"]

    threads = [threading.Thread(target=ask, args=(prompt, str(number))) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {name: name for name in said}
    assert len(said) == 20
