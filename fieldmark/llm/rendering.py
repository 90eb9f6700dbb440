"""The process in which prompt files are rendered: a template can make texts there and do nothing else.

Prompts are files that people share. Jinja's sandbox keeps a template from reaching into the program; this process keeps
what a sandbox allows within bounds, since a few words can ask for a loop without end or for gigabytes (a filter's
width, a text doubled forty times). It has no key and nothing else of the environment, opens no file once it has
started, and ends by itself when it has taken too long or its parent is gone.

It speaks JSON, a line a question and a line an answer: {"sections": [[role, template], ...]} gives {"used": [...]}, the
variables that the templates take; with "values" it gives {"messages": [...]}, and where it cannot, {"error": "..."}.
`Renderer` is the other side.
"""

import atexit
import contextlib
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Bounds of one question. A prompt of a million characters is beyond every model's reach.
SECONDS = 5
MEMORY = 512 * 2**20
LONGEST = 1_000_000
# What Jinja imports only when a template needs it, which is too late where no file can be opened.
LATE = ("encodings.unicode_escape", "html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap")
# A vowel that is heard as one: an orchid, but a unicorn and a eucalypt; and an hourglass.
VOWEL = re.compile(r"(?!eu|ew|one\b|uni(?![dmn])|us[aeu])[aeiou]|hour|heir", re.IGNORECASE)


def with_article(noun: str) -> str:
    return f"{'an' if VOWEL.match(noun) else 'a'} {noun}"


JINJA = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)
JINJA.filters["with_article"] = with_article


class Renderer:
    """The parent's side: one process for all prompts, started at the first question and again where it has died."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, sections: Any, values: Any = None) -> dict[str, Any]:
        """The answer to one question, as above. May be asked by several threads."""
        question = {"sections": sections} | ({} if values is None else {"values": values})
        with self.lock:
            process = self.process = self.process or start(self.seconds)
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if answer:
                found: dict[str, Any] = json.loads(answer)
                return found
            self.process = None
        with suppress(BrokenPipeError):  # what was not written is tried once more
            process.stdin.close()
        if process.wait() == -signal.SIGXCPU:
            return {"error": f"it takes more than {self.seconds} s"}
        return {"error": "the process that renders it died; it may take too much memory or nest too deeply"}

    def end(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def start(seconds: int) -> "subprocess.Popen[bytes]":
    # No key; what is left is where an interpreter may look for its own libraries.
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
    return subprocess.Popen(
        [sys.executable, "-I", __file__, str(seconds)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for the parent.
        start_new_session=True,
    )


@cache
def compiled(source: str) -> Template:
    return JINJA.from_string(source)


def render(sections: list[tuple[str, str]], values: dict[str, Any]) -> list[dict[str, str]]:
    """The messages. Raises what a template raises, and ValueError for a text without measure."""
    messages, length = [], 0
    for role, source in sections:
        parts = []
        for part in compiled(source).generate(values):
            parts.append(part)
            length += len(part)
            if length > LONGEST:
                raise ValueError(f"it makes more than {LONGEST:,} characters")
        messages.append({"role": role, "content": "".join(parts).strip()})
    return messages


def answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        if "values" in question:
            return {"messages": render(question["sections"], question["values"])}
        used: set[str] = set()
        for _, source in question["sections"]:
            used |= meta.find_undeclared_variables(JINJA.parse(source))
            compiled(source)
        return {"used": sorted(used)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def confine() -> None:
    """Give up what no template needs: memory beyond a bound, files, and a dump of the memory where it dies."""
    for name in LATE:
        importlib.import_module(name)
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        # macOS knows no bound of memory; there the one of time is left.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


def allow(seconds: int) -> None:
    """Let the process work for so many seconds from now; then the system ends it, wherever it is."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, resource.RLIM_INFINITY))


def serve(seconds: int) -> None:
    confine()
    for line in sys.stdin.buffer:
        allow(seconds)
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


RENDERER = Renderer()

if __name__ == "__main__":
    serve(int(sys.argv[1]))
else:
    atexit.register(RENDERER.end)
