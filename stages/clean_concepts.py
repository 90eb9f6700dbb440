"""Turn answers into concepts: one text a row, and for each text that is dropped the reason.

Reads   data/concepts/answers.parquet (rows with status ok), data/index/classes.parquet, params: domain, clean.
Writes  data/concepts/concepts.parquet (concepts/1): every candidate of every class, kept or not, in the order in which
        the answers gave them; for each class its name in each of clean.name_templates (kind name); and the candidates
        of the answer about no class, if there is one (class_id null, kind generic).
Costs   nothing but a second or two.

The reasons to drop a text stand in fieldmark/concepts/cleaning.py. Classes that keep no visual text are named on
stderr; so is domain.noun, where texts were imported and none of them says it.

    python -m stages.clean_concepts
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fieldmark import store
from fieldmark.command import UserError, counted, name_some, run, stage_parser, where_to_edit
from fieldmark.concepts.cleaning import clean_class, clean_generic
from fieldmark.params import load_params

ANSWERS = Path("data/concepts/answers.parquet")
CLASSES = Path("data/index/classes.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
SCHEMA = "concepts/1"
# The subject of an answer about no class.
GENERIC = "*"
Row = dict[str, Any]


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
        keep = counted(len(bare), "class keeps", "classes keep")
        print(f"warning: {keep} no visual concept: {name_some(bare)}", file=sys.stderr)


def check_noun(answers: dict[str, list[Row]], noun: str, params: str) -> None:
    """Warn where no text of one's own says the noun: it may still be that of another data set."""
    own = [row for rows in answers.values() for row in rows if row["source"] == "import"]
    texts = [concept["text"] for row in own for concept in json.loads(row["response_json"])["concepts"]]
    if texts and not any(noun.casefold() in text.casefold() for text in texts):
        what = f"none of {len(texts)} imported texts says {noun!r}; is it what your pictures show?"
        said = f"{params}: domain.noun: {what}"
        print(f"warning: {said}{where_to_edit(said)}", file=sys.stderr)


def read_answers() -> dict[str, list[Row]]:
    """The rows with status ok by their subject."""
    answers = defaultdict(list)
    for row in store.read_table(ANSWERS, "llm.answers/1").to_pylist():
        if row["status"] == "ok":
            answers[row["subject_id"]].append(row)
    return answers


def main() -> None:
    file = stage_parser(__doc__).parse_args().params
    params = load_params(file)
    header = store.read_header(ANSWERS, "llm.answers/1")
    upstream = [header.fingerprint, store.read_header(CLASSES, "index.classes/1").fingerprint]
    # What the answers were to hold is written with them, where anybody was asked.
    asked, generic = header.params.get("per_class"), header.params.get("generic")
    classes = store.read_table(CLASSES, "index.classes/1").to_pylist()
    try:
        answers = read_answers()
        concepts = [
            concept
            for row in classes
            for concept in clean_class(row, answers[row["class_id"]], params.domain, params.clean, asked)
        ]
        check_noun(answers, params.domain.noun, file)
        concepts += clean_generic(answers[GENERIC], classes, params.domain, params.clean, generic)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{ANSWERS}: holds what is no answer ({type(error).__name__}: {' '.join(str(error).split())[:100]}); run"
            " generate_concepts again, what its journal holds costs nothing"
        ) from None
    content = {"domain": params.domain.model_dump(), "clean": params.clean.model_dump()}
    mark = store.fingerprint(SCHEMA, content, upstream)
    store.write_table(store.make_table(SCHEMA, concepts), CONCEPTS, SCHEMA, content, mark)
    report(concepts, classes)


if __name__ == "__main__":
    run(main)
