"""Which texts of an answer can be concepts: one text a row, and for each text that is dropped the reason.

Of a text that ends in a remark on the class by its name ("a long stiff tail, typical of the Brown Creeper") the remark
is cut off. A text is dropped, for the first of these reasons that holds:

    empty, fragment    holds no words, or is no whole phrase
    too_long           has more than clean.max_words, of which one of more than 40 letters counts as several
    class_name         gives the class away; a generic one, any class
    habitat            is about the surroundings: the model says so, or the words do
    sound, smell, diet, range, habitat, size, population, breeding, mechanics, lore, behaviour, comparison,
    nothing_visible    claims what one photo cannot show, or nothing that it can: see visibility.py. Where
                       clean.visibility is off, none of these, nor habitat by its words
    surplus            is one of more than were asked for, or than ten of one text; of those only the first are rows
    loop               stands in an answer that repeats itself without end, behind the texts that still said new things
    duplicate          says in the same words what another text of the class says
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fieldmark import store
from fieldmark.concepts.names import ClassNames, domain_words, words
from fieldmark.concepts.visibility import Eye
from fieldmark.params import Clean, Domain

Row = dict[str, Any]

# In characters; a model that repeats itself writes no end of them.
LONGEST_TEXT = 2_000
LONGEST_WORD = 40
# Texts that one text of an answer may hold, and how many times what is wanted is still shown as dropped.
MOST_PIECES = 10
SURPLUS = 10
# An answer loops where some text of it stands there so many times, and so many texts are repeats: a tenth at least.
TIMES, REPEATS = 4, 10
# It is cut before the first so many texts that bring fewer new words than they are.
WINDOW = 10
# A list's bullet or number, and what ends one of several sentences in a text.
BULLET = re.compile(r"^\s*(?:[-*\u2022\u2013]|\(?\d{1,2}[.)])\s+")
SENTENCE_END = re.compile(r"[\n;]+|(?<=[a-z)\"'])[.!]\s+(?=[A-Z])")
CLAUSE_END = re.compile(r",|\band\b|\bwith\b|\bhas\b|\bhaving\b")
FILLER = frozenset(words("a an the of that which is are it its this these in on at to has have with and"))
DANGLING = frozenset(words("a an the of with and or in on at to by for from its that which has is are"))


def candidates_of(answer: Row, asked: int | None = None) -> list[Row]:
    """The texts of one ok answer, split and normalised; each with the answer's kind and part, and in `out` why it is
    none that was asked for: `surplus` to the `asked` (None: any number), or behind the place where a `loop` begins."""
    found = []
    concepts = json.loads(answer["response_json"])["concepts"]
    # One's own texts are as many as they are.
    asked = asked if answer["source"] in ("live", "batch") else None
    for place, concept in enumerate(concepts if asked is None else concepts[: SURPLUS * asked]):
        part = normalise((concept["part"] or "")[:LONGEST_TEXT]) or None
        pieces = split_text(concept["text"])
        for piece, text in enumerate(pieces if asked is None else pieces[: SURPLUS * MOST_PIECES]):
            surplus = asked is not None and (place >= asked or piece >= MOST_PIECES)
            row = {"text": text[:LONGEST_TEXT], "kind": concept["kind"], "part": part, "item_key": answer["item_key"]}
            found.append({**row, "out": "surplus" if surplus else None})
    loop = where_it_loops([row["text"] for row in found])
    return found[:loop] + [{**row, "out": row["out"] or "loop"} for row in found[loop:]]


def where_it_loops(texts: Sequence[str]) -> int:
    """From which text on an answer that repeats itself says nothing new; the number of its texts for any other.

    Before a model repeats itself word for word it goes through its words in every combination: "white primary edges,
    white secondary edges". An answer of few new words that repeats nothing is left alone.
    """
    folded = [text.casefold() for text in texts]
    times = Counter(filter(None, folded))
    repeats = times.total() - len(times)
    if max(times.values(), default=0) < TIMES or repeats < max(REPEATS, len(texts) / 10):
        return len(texts)
    first = next(place for place, text in enumerate(folded) if folded.index(text) < place)  # what is said before stays
    seen: set[str] = set()
    for start in range(0, len(texts), WINDOW):
        new = {singular(word) for text in texts[start : start + WINDOW] for word in words(text)} - seen
        if len(new) < WINDOW:
            return start or first
        seen |= new
    return len(texts)


def split_text(text: str) -> list[str]:
    """The texts that one text holds, normalised. One that is empty stays one, so that it is seen to be dropped."""
    pieces = [normalise(piece) for piece in SENTENCE_END.split(unicodedata.normalize("NFC", text))]
    return [piece for piece in pieces if piece] or [""]


def normalise(text: str) -> str:
    """One line without bullet, quotes or full stop; its first letter small, but for an acronym."""
    text = BULLET.sub("", " ".join(text.split())).strip(" \"'\u201c\u201d").rstrip(" .;,:!")
    first = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first in {"A", "An", "The"} or first[1:].islower() else text


def cut_remark(text: str, name: ClassNames) -> str:
    """The clauses before the first comma after which the class is named; the text itself where nothing is left."""
    before = ""
    for clause in text.split(","):
        if name.is_in(clause):
            return normalise(before) if before else text
        before = f"{before},{clause}" if before else clause
    return text


def wording(text: str, noun: frozenset[str]) -> frozenset[frozenset[str]]:
    """What two texts share that differ only in wording: of each clause the set of its words, without filler and plural.

    By clause, so that "a red tail and a white head" is not "a white tail and a red head".
    """
    clauses = CLAUSE_END.split(text.casefold())
    sets = (frozenset(singular(word) for word in words(clause) if word not in FILLER) - noun for clause in clauses)
    return frozenset(clause for clause in sets if clause)


def singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def reason_to_drop(candidate: Row, names: ClassNames, eye: Eye, clean: Clean) -> str | None:
    """Why a text cannot be a concept, whatever the others are; or None. `names` are those it must not give away."""
    if candidate["out"]:
        return str(candidate["out"])
    text = candidate["text"]
    tokens = words(text)
    if not tokens:
        return "empty"
    if len(tokens) < 2 or tokens[-1] in DANGLING:
        return "fragment"
    if sum(math.ceil(len(word) / LONGEST_WORD) for word in text.split()) > clean.max_words:
        return "too_long"
    if names.is_in(text):
        return "class_name"
    if candidate["kind"] == "habitat":
        return "habitat"
    return eye.why_invisible(text) if clean.visibility == "on" else None


def clean_class(row: Row, answers: list[Row], domain: Domain, clean: Clean, asked: int | None = None) -> list[Row]:
    """Rows of concepts/1 for one class: its names, then every candidate of its answers (in order of sample), each of
    which was to hold `asked` texts (None: not known)."""
    name = class_names([row], domain)
    texts = [template.format(name=row["name"], noun=domain.noun) for template in clean.name_templates]
    concepts = [concept_row(row["class_id"], text, "name", rank) for rank, text in enumerate(texts)]
    candidates = [
        found | {"text": cut_remark(found["text"], name)}
        for answer in answers
        for found in candidates_of(answer, asked)
    ]
    return concepts + judge(candidates, row["class_id"], name, domain, clean)


def clean_generic(
    answers: list[Row], classes: list[Row], domain: Domain, clean: Clean, asked: int | None = None
) -> list[Row]:
    """Rows of concepts/1 for what is said of no class: none names any of `classes`. `asked` as in clean_class."""
    candidates = [
        found | {"kind": "generic" if found["kind"] == "visual" else found["kind"]}
        for answer in answers
        for found in candidates_of(answer, asked)
    ]
    return judge(candidates, None, class_names(classes, domain), domain, clean)


def class_names(rows: list[Row], domain: Domain) -> ClassNames:
    return ClassNames(rows, domain_words(domain.noun, domain.group, *domain.attributes))


def judge(
    candidates: list[Row], class_id: str | None, names: ClassNames, domain: Domain, clean: Clean
) -> list[Row]:
    """Rows of concepts/1, one a candidate: kept, or dropped with the reason."""
    eye = Eye(domain.noun, domain.group, domain.attributes)
    noun = domain_words(domain.noun)
    seen: set[frozenset[frozenset[str]]] = set()
    concepts = []
    for rank, candidate in enumerate(candidates):
        reason = reason_to_drop(candidate, names, eye, clean)
        if reason is None:
            key = wording(candidate["text"], noun)
            if key in seen:
                reason = "duplicate"
            seen.add(key)
        concept = concept_row(class_id, candidate["text"], candidate["kind"], rank)
        concept |= {"part": candidate["part"], "item_key": candidate["item_key"]}
        concepts.append(concept | {"kept": reason is None, "drop_reason": reason})
    return concepts


def concept_row(class_id: str | None, text: str, kind: str, rank: int) -> Row:
    """A kept row of concepts/1 that comes from no answer."""
    return {
        "concept_id": store.sha256(text),
        "text": text,
        "class_id": class_id,
        "kind": kind,
        "part": None,
        "rank": rank,
        "kept": True,
        "drop_reason": None,
        "item_key": None,
    }
