"""Find the answer in what a model wrote: bare JSON, or JSON in a code fence, after its thoughts or amid prose."""

import json
import re
import string
from collections.abc import Iterator
from typing import Any

from fieldmark.llm.prompts import problem
from fieldmark.store import canonical_json

# Thoughts end at the last </think>, whose opening tag some chat templates write themselves; what is never closed is
# nothing but thought.
THOUGHTS = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)
OPENING = re.compile(r"[{\[]")
# How often a text is gone through in search of JSON.
MOST_READINGS = 20
DECODER = json.JSONDecoder()


class NoAnswer(ValueError):
    """A completion without an answer that fits. The message says what is wrong, to people and to the model."""


def find_answer(content: str, schema: dict[str, Any]) -> Any:
    """The JSON value in a completion that fits a checked schema; of several the last, as drafts come first.

    Raises NoAnswer.
    """
    try:
        found = [(DECODER.decode(content), len(content))]
    except (ValueError, RecursionError) as error:
        found = list(values_in(without_thoughts(content)))
        if not found:
            raise NoAnswer(f"not JSON: {error}" if content.strip() else "not JSON: the answer is empty") from None
    fitting = [value for value, _ in found if misfit(value, schema) is None]
    if fitting:
        return fitting[-1]
    longest, _ = max(found, key=lambda pair: pair[1])
    raise NoAnswer(misfit(longest, schema))


def without_thoughts(content: str) -> str:
    return THOUGHTS.sub("", content).strip()


def values_in(text: str) -> Iterator[tuple[Any, int]]:
    """The JSON objects and arrays in a text, in order, with their lengths: none inside another, none inside one that
    was cut short."""
    end = len(text.rstrip().rstrip(string.ascii_letters + string.digits + "+-."))
    position = 0
    read = 0
    while match := OPENING.search(text, position):
        start, position = match.span()
        try:
            value, position = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            read += error.pos - start
            # Brackets in brackets that all fail at their end are read once each: of a long text, minutes.
            if error.pos >= end or error.msg.startswith("Unterminated string") or read > MOST_READINGS * len(text):
                return
            continue
        except (ValueError, RecursionError):
            # Digits without end, or brackets a thousand deep: a model that repeats itself.
            return
        yield value, position - start


def misfit(value: Any, schema: dict[str, Any]) -> str | None:
    """What keeps a value from being stored (NaN, half a character) or from fitting the schema, or None."""
    try:
        canonical_json(value).encode()
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return problem(value, schema)
