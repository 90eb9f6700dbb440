"""Turn answers into concepts: one text a row, and for each text that is dropped the reason.

Reads   data/concepts/answers.parquet (rows with status ok), data/index/classes.parquet, params: domain, clean.
Writes  data/concepts/concepts.parquet (concepts/1): every candidate of every class, kept or not, in the order in which
        the answers gave them; for each class its name in each of clean.name_templates (kind name); and the candidates
        of the answer about no class, if there is one (class_id null, kind generic).
Costs   nothing but a second or two.

Of a text that ends in a remark on the class by its name ("a long stiff tail, typical of the Brown Creeper") the remark
is cut off. A text is dropped, for the first of these reasons that holds:

    empty, fragment    holds no words, or is no whole phrase
    too_long           has more than clean.max_words
    class_name         gives the class away; a generic one, any class
    habitat            is about the surroundings: the model says so, or the words do
    sound, smell, diet, range, habitat, size, population, breeding, mechanics, lore, behaviour, comparison,
    nothing_visible    claims what one photo cannot show, or nothing that it can: see fieldmark/concepts/visibility.py
    duplicate          says in the same words what another text of the class says

A class that keeps no visual text is named on stderr.

    python -m stages.clean_concepts
"""

import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fieldmark import store
from fieldmark.command import run, stage_parser
from fieldmark.concepts.names import ClassName, domain_words, words
from fieldmark.concepts.visibility import Eye
from fieldmark.params import Clean, Domain, load_params

ANSWERS = Path("data/concepts/answers.parquet")
CLASSES = Path("data/index/classes.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
SCHEMA = "concepts/1"
# The subject of an answer about no class.
GENERIC = "*"
Row = dict[str, Any]

# A list's bullet or number, and what ends one of several sentences in a text.
BULLET = re.compile(r"^\s*(?:[-*\u2022\u2013]|\(?\d{1,2}[.)])\s+")
SENTENCE_END = re.compile(r"[\n;]+|(?<=[a-z)\"'])[.!]\s+(?=[A-Z])")
CLAUSE_END = re.compile(r",|\band\b|\bwith\b|\bhas\b|\bhaving\b")
FILLER = frozenset(words("a an the of that which is are it its this these in on at to has have with and"))
DANGLING = frozenset(words("a an the of with and or in on at to by for from its that which has is are"))


def candidates_of(answer: Row) -> list[Row]:
    """The texts of one ok answer, split and normalised; each with the answer's kind and part."""
    found = []
    for concept in json.loads(answer["response_json"])["concepts"]:
        for text in split_text(concept["text"]):
            part = normalise(concept["part"] or "") or None
            found.append({"text": text, "kind": concept["kind"], "part": part, "item_key": answer["item_key"]})
    return found


def split_text(text: str) -> list[str]:
    """The texts that one text holds, normalised. One that is empty stays one, so that it is seen to be dropped."""
    pieces = [normalise(piece) for piece in SENTENCE_END.split(unicodedata.normalize("NFC", text))]
    return [piece for piece in pieces if piece] or [""]


def normalise(text: str) -> str:
    """One line without bullet, quotes or full stop; its first letter small, but for an acronym."""
    text = BULLET.sub("", " ".join(text.split())).strip(" \"'\u201c\u201d").rstrip(" .;,:!")
    first = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first in {"A", "An", "The"} or first[1:].islower() else text


def cut_remark(text: str, name: ClassName) -> str:
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


def reason_to_drop(candidate: Row, names: Iterable[ClassName], eye: Eye, clean: Clean) -> str | None:
    """Why a text cannot be a concept, whatever the others are; or None. `names` are those it must not give away."""
    text = candidate["text"]
    tokens = words(text)
    if not tokens:
        return "empty"
    if len(tokens) < 2 or tokens[-1] in DANGLING:
        return "fragment"
    if len(text.split()) > clean.max_words:
        return "too_long"
    if any(name.is_in(text) for name in names):
        return "class_name"
    if candidate["kind"] == "habitat":
        return "habitat"
    return eye.why_invisible(text)


def clean_class(row: Row, answers: list[Row], domain: Domain, clean: Clean) -> list[Row]:
    """Rows of concepts/1 for one class: its names, then every candidate of its answers (in order of sample)."""
    name = class_name(row, domain)
    texts = [template.format(name=row["name"], noun=domain.noun) for template in clean.name_templates]
    concepts = [concept_row(row["class_id"], text, "name", rank) for rank, text in enumerate(texts)]
    candidates = [
        found | {"text": cut_remark(found["text"], name)} for answer in answers for found in candidates_of(answer)
    ]
    return concepts + judge(candidates, row["class_id"], [name], domain, clean)


def clean_generic(answers: list[Row], classes: list[Row], domain: Domain, clean: Clean) -> list[Row]:
    """Rows of concepts/1 for what is said of no class: none names any of `classes`."""
    candidates = [
        found | {"kind": "generic" if found["kind"] == "visual" else found["kind"]}
        for answer in answers
        for found in candidates_of(answer)
    ]
    return judge(candidates, None, [class_name(row, domain) for row in classes], domain, clean)


def class_name(row: Row, domain: Domain) -> ClassName:
    card = domain_words(domain.noun, domain.group, *domain.attributes)
    return ClassName(row["name"], row["scientific_name"], card)


def judge(
    candidates: list[Row], class_id: str | None, names: list[ClassName], domain: Domain, clean: Clean
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


def report(concepts: list[Row], classes: list[Row]) -> None:
    """Say on stderr what was kept, why the rest was dropped, and which classes are left without a visual text."""
    texts = [row for row in concepts if row["kind"] != "name"]
    reasons = Counter(row["drop_reason"] for row in texts if not row["kept"])
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    kept = len(texts) - reasons.total()
    print(f"clean_concepts: {len(texts)} texts, {kept} kept; dropped: {dropped}", file=sys.stderr)
    served = {row["class_id"] for row in texts if row["kept"] and row["kind"] == "visual"}
    bare = [row["name"] for row in classes if row["class_id"] not in served]
    if bare:
        print(f"warning: {len(bare)} classes keep no visual concept: {', '.join(bare)}", file=sys.stderr)


def main() -> None:
    params = load_params(stage_parser(__doc__).parse_args().params)
    upstream = [
        store.read_header(path, schema).fingerprint
        for path, schema in ((ANSWERS, "llm.answers/1"), (CLASSES, "index.classes/1"))
    ]
    answers = defaultdict(list)
    for row in store.read_table(ANSWERS, "llm.answers/1").to_pylist():
        if row["status"] == "ok":
            answers[row["subject_id"]].append(row)
    classes = store.read_table(CLASSES, "index.classes/1").to_pylist()

    concepts = [
        concept
        for row in classes
        for concept in clean_class(row, answers[row["class_id"]], params.domain, params.clean)
    ]
    concepts += clean_generic(answers[GENERIC], classes, params.domain, params.clean)
    content = {"domain": params.domain.model_dump(), "clean": params.clean.model_dump()}
    mark = store.fingerprint(SCHEMA, content, upstream)
    store.write_table(store.make_table(SCHEMA, concepts), CONCEPTS, SCHEMA, content, mark)
    report(concepts, classes)


if __name__ == "__main__":
    run(main)
