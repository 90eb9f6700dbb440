"""Turn answers into concepts: one text a row, and for each text that is dropped the reason.

Reads   data/concepts/answers.parquet (rows with status ok), data/index/classes.parquet, params: domain, clean.
Writes  data/concepts/concepts.parquet (concepts/1): every candidate of every class, kept or not, in the order in which
        the answers gave them; and for each class its name in each of clean.name_templates (kind name).
Costs   nothing but a second or two.

Of a text that ends in a remark on the class by its name ("a long stiff tail, typical of the Brown Creeper") the remark
is cut off. A text is dropped, for the first of these reasons that holds: empty, fragment, too_long (more than
clean.max_words), class_name (it gives the class away), habitat (the model says so), sound, diet, range, size,
population, behaviour (a photo cannot show it), duplicate (another text of the class says it in the same words). A class
that keeps no visual text is named on stderr.

    python -m stages.clean_concepts
"""

import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from stages import store
from stages.command import run, stage_parser
from stages.llm.names import ClassName, domain_words, words
from stages.params import Clean, Domain, load_params

ANSWERS = Path("data/concepts/answers.parquet")
CLASSES = Path("data/index/classes.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
SCHEMA = "concepts/1"
Row = dict[str, Any]

# A list's bullet or number, and what ends one of several sentences in a text.
BULLET = re.compile(r"^\s*(?:[-*\u2022\u2013]|\(?\d{1,2}[.)])\s+")
SENTENCE_END = re.compile(r"[\n;]+|(?<=[a-z)\"'])[.!]\s+(?=[A-Z])")
CLAUSE_END = re.compile(r",|\band\b|\bwith\b|\bhas\b|\bhaving\b")
FILLER = frozenset(words("a an the of that which is are it its this these in on at to has have with and"))
DANGLING = frozenset(words("a an the of with and or in on at to by for from its that which has is are"))

# What a photo cannot show, in general English. The first pattern that is found names the reason.
PLACE = "in near around across throughout from"
REGION = r"(?:north|south|east|west|central)(?:ern)? (?:america|africa|asia|europe|australia)\w*"
UNIT = (
    "mm cm m km inch inches ft feet foot yards? g kg grams? kilograms? lbs? pounds? oz ounces?"
    " (?:milli|centi|kilo)?met(?:er|re)s?"
)
NUMBER = r"\d+(?:[.,]\d+)?"


def any_of(alternatives: str) -> str:
    return f"(?:{'|'.join(alternatives.split())})"


INVISIBLE = {
    reason: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    for reason, pattern in {
        "sound": any_of(
            r"songs? (?<!so-)calls? calling sings? singing sounds? noisy loud\w* vocal\w* chirp\w* whistl\w* trill\w*"
            r" melod\w* croak\w* barking roar\w* audible"
        ),
        "diet": any_of(
            r"feeds? feeding eats? eaten eating diets? forag\w+ prey\w* hunts? hunting grazes? grazing scaveng\w+"
            r" (?:carni|herbi|insecti|omni|pisci)vor\w+"
        ),
        "range": any_of("found lives? living occurs? occurring resides? residing breeds? winters?")
        + rf" (?:\w+ly )?{any_of(PLACE)}|native to|{REGION}|"
        + any_of(r"endemic inhabits? inhabiting habitats? distribution geographic\w* migrat\w+"),
        "size": rf"{NUMBER}(?:\s*(?:-|\u2013|to)\s*{NUMBER})?[\s-]*{any_of(UNIT)}|"
        + any_of(r"weigh weighs weighing weights? lifespans?"),
        "population": any_of(
            r"populations? endangered threatened conservation extinct\w* abundan\w+ rare rarely uncommon widespread"
            r" vulnerable"
        ),
        "behaviour": rf"known {any_of('for to as')}|{any_of('often usually typically commonly sometimes')} "
        + any_of("seen found observed")
        + "|breeding season|"
        + any_of(
            r"behaviou?r\w* flocks? shoals? schooling solitary nocturnal diurnal crepuscular aggressive\w* shy"
            r" territorial\w* social lifestyles? courtship mates? mating lays nests nested nesting dives? diving"
            r" soar\w* hover\w* glides? gliding swims? swimming fly flies flying burrow\w*"
        ),
    }.items()
}


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


def reason_to_drop(candidate: Row, name: ClassName, clean: Clean) -> str | None:
    """Why a text cannot be a concept of its class, whatever the class's other texts are; or None."""
    text = candidate["text"]
    tokens = words(text)
    if not tokens:
        return "empty"
    if len(tokens) < 2 or tokens[-1] in DANGLING:
        return "fragment"
    if len(text.split()) > clean.max_words:
        return "too_long"
    if name.is_in(text):
        return "class_name"
    if candidate["kind"] == "habitat":
        return "habitat"
    return next((reason for reason, pattern in INVISIBLE.items() if pattern.search(text)), None)


def clean_class(row: Row, answers: list[Row], domain: Domain, clean: Clean) -> list[Row]:
    """Rows of concepts/1 for one class: its names, then every candidate of its answers (in order of sample)."""
    card = domain_words(domain.noun, domain.group, *domain.attributes)
    noun = domain_words(domain.noun)
    name = ClassName(row["name"], row["scientific_name"], card)
    texts = [template.format(name=row["name"], noun=domain.noun) for template in clean.name_templates]
    concepts = [concept_row(row["class_id"], text, "name", rank) for rank, text in enumerate(texts)]
    seen: set[frozenset[frozenset[str]]] = set()
    for rank, candidate in enumerate(found for answer in answers for found in candidates_of(answer)):
        candidate["text"] = cut_remark(candidate["text"], name)
        reason = reason_to_drop(candidate, name, clean)
        if reason is None:
            key = wording(candidate["text"], noun)
            if key in seen:
                reason = "duplicate"
            seen.add(key)
        concept = concept_row(row["class_id"], candidate["text"], candidate["kind"], rank)
        concept |= {"part": candidate["part"], "item_key": candidate["item_key"]}
        concepts.append(concept | {"kept": reason is None, "drop_reason": reason})
    return concepts


def concept_row(class_id: str, text: str, kind: str, rank: int) -> Row:
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
    content = {"domain": params.domain.model_dump(), "clean": params.clean.model_dump()}
    mark = store.fingerprint(SCHEMA, content, upstream)
    store.write_table(store.make_table(SCHEMA, concepts), CONCEPTS, SCHEMA, content, mark)
    report(concepts, classes)


if __name__ == "__main__":
    run(main)
