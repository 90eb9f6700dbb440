"""Turn answers into concepts: one text a row, and for each text that is dropped the reason.

Reads   data/concepts/answers.parquet (rows with status ok), data/index/classes.parquet, params: domain, clean.
Writes  data/concepts/concepts.parquet (concepts/1): every candidate of every class, kept or not, in the order in which
        the answers gave them; for each class its name in each of clean.name_templates (kind name); and the candidates
        of the answer about no class, if there is one (class_id null, kind generic).
Costs   nothing but a second or two.

The reasons to drop a text stand in fieldmark/concepts/cleaning.py. Classes that keep no visual text are named on
stderr; so is domain.noun, where texts were imported and none of them says it. No text that you imported or edited goes
without a word: those that are dropped are named there line by line, of the imported ones the first 50, and --dropped
prints all.

    python -m stages.clean_concepts
    python -m stages.clean_concepts --dropped
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
# So many imported texts that are dropped are named one by one; a file of a model's texts may hold thousands.
SHOWN = 50
Row = dict[str, Any]


def report(concepts: list[Row], classes: list[Row]) -> None:
    """Say on stderr what was kept, why the rest was dropped, and which classes are left without a visual text."""
    texts = [row for row in concepts if row["kind"] != "name"]
    reasons = Counter(row["drop_reason"] for row in texts if not row["kept"])
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    kept = len(texts) - reasons.total()
    print(f"clean_concepts: {len(texts)} texts, {kept} kept; dropped: {dropped}", file=sys.stderr)
    looping = {row["class_id"] for row in texts if row["drop_reason"] == "loop"}
    if looping:
        names = [row["name"] for row in classes if row["class_id"] in looping]
        names += ["the one about no class"] if None in looping else []
        cut = counted(len(names), "answer repeats itself and is", "answers repeat themselves and are")
        print(f"warning: {cut} cut where it says nothing new (drop_reason loop): {name_some(names)}", file=sys.stderr)
    served = {row["class_id"] for row in texts if row["kept"] and row["kind"] == "visual"}
    bare = [row["name"] for row in classes if row["class_id"] not in served]
    if bare:
        keep = counted(len(bare), "class keeps", "classes keep")
        print(f"warning: {keep} no visual concept: {name_some(bare)}", file=sys.stderr)


def own_dropped(concepts: list[Row], answers: dict[str, list[Row]], classes: list[Row], source: str) -> list[str]:
    """A line for each text of one's own, of `source` import or edited, that is dropped: class, reason, text."""
    keys = {row["item_key"] for rows in answers.values() for row in rows if row["source"] == source}
    names = {row["class_id"]: row["name"] for row in classes}
    return [
        f"{names[row['class_id']]}: {row['drop_reason']}: {row['text']}"
        for row in concepts
        if row["item_key"] in keys and not row["kept"]
    ]


def report_own(edited: list[str], imported: list[str]) -> None:
    """Name on stderr what is dropped of one's own texts; all edited ones, for somebody wrote each of them by hand."""
    if edited or imported:
        what = counted(len(edited) + len(imported), "text of your own is dropped", "texts of your own are dropped")
        remedy = "reword them, or set clean.visibility: off in params.yaml where a photo shows them all the same"
        print(f"warning: {what}; {remedy}:", file=sys.stderr)
        for line in [*edited, *imported[:SHOWN]]:
            print(f"  {line}", file=sys.stderr)
    if len(imported) > SHOWN:
        more = f"and {len(imported) - SHOWN} more, which `python -m stages.clean_concepts --dropped` prints"
        print(f"  {more}", file=sys.stderr)


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
    parser = stage_parser(__doc__)
    parser.add_argument("--dropped", action="store_true", help="print your own texts that are dropped; write nothing")
    args = parser.parse_args()
    file = args.params
    params = load_params(file)
    header = store.read_header(ANSWERS, "llm.answers/1")
    upstream = [header.fingerprint, store.read_header(CLASSES, "index.classes/2").fingerprint]
    # What the answers were to hold is written with them, where anybody was asked.
    asked, generic = header.params.get("per_class"), header.params.get("generic")
    classes = store.read_table(CLASSES, "index.classes/2").to_pylist()
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
    edited, imported = (own_dropped(concepts, answers, classes, source) for source in ("edited", "import"))
    if args.dropped:
        print(*edited, *imported, sep="\n")
        return
    content = {"domain": params.domain.model_dump(), "clean": params.clean.model_dump()}
    mark = store.fingerprint(SCHEMA, content, upstream)
    store.write_table(store.make_table(SCHEMA, concepts), CONCEPTS, SCHEMA, content, mark)
    report(concepts, classes)
    report_own(edited, imported)


if __name__ == "__main__":
    run(main)
