"""Ask a model, or the recordings of the demo, what tells each class from the others in a photo; or import it.

Reads   data/index/classes.parquet, the prompt `concepts.prompt`, params: domain, llm, concepts; in `concepts.import`
        texts of your own for some classes or all: a JSON object of class -> list of texts, or a folder of CLASS.txt
        with one text a line. A class stands there as its folder, class_id or name.
Writes  data/concepts/answers.parquet (llm.answers/1): one row a class and sample, failed ones too; one row for a class
        that is imported.
Costs   llm.mode live: one call for each class and sample, but for imported classes, whose answer is held neither there
        nor in the journal under .cache/ (or $FIELDMARK_CACHE); see --dry-run. llm.mode replay: nothing.

An answer that came back refused, broken or not at all is a row with its status, asked again whenever the stage runs.
Too few answers (llm.min_coverage) are an error, after the file is written.

    python -m stages.generate_concepts
    python -m stages.generate_concepts --dry-run
    python -m stages.generate_concepts --show "Lantern bandit"
"""

import difflib
from pathlib import Path
from typing import Any

from stages import store
from stages.command import UserError, run, stage_parser
from stages.llm.answers import SCHEMA, Item, check_coverage, live_answers, plan_calls, preview
from stages.llm.imported import Texts, read_imported, row_of
from stages.llm.prompts import Message, Prompt, load_prompt
from stages.llm.replay import replay
from stages.lock import refuse_cold_start
from stages.params import Params, load_params

STAGE = "generate_concepts"
CLASSES = Path("data/index/classes.parquet")
ANSWERS = Path("data/concepts/answers.parquet")
Row = dict[str, Any]


def messages_of(row: Row, prompt: Prompt, params: Params) -> list[Message]:
    """The rendered prompt for one row of index.classes/1."""
    return prompt.render(
        {
            **params.domain.model_dump(),
            "name": row["name"],
            "scientific_name": row["scientific_name"],
            "note": row["note"],
            "per_class": params.concepts.per_class,
        }
    )


def items_of(classes: list[Row], prompt: Prompt, params: Params) -> list[Item]:
    items = []
    for row in classes:
        messages = messages_of(row, prompt, params)
        items += [Item(row["class_id"], sample, messages) for sample in range(params.concepts.samples)]
    return items


def replay_others(items: list[Item], prompt: Prompt, params: Params, coverage: str) -> list[Row]:
    """The recordings for the classes that are not imported; where there are no such classes, none need exist."""
    if not items:
        return []
    try:
        return replay(items, "class_id", prompt, params.llm)
    except UserError as error:
        if not coverage:
            raise
        raise UserError(f"{error}; {coverage}") from None


def content_params(prompt: Prompt, params: Params, texts: Texts, asked: bool) -> dict[str, Any]:
    """What decides the answers' content: not where, how fast or with what limits they are asked for.

    A hash of the imported texts where there are any; what is asked, unless all is imported.
    """
    imported = {"imported": store.sha256(store.canonical_json(texts))} if texts else {}
    if texts and not asked:
        return imported
    return imported | {
        "prompt_sha": prompt.sha,
        "domain": params.domain.model_dump(),
        "model": params.llm.model,
        "temperature": params.llm.temperature,
        "per_class": params.concepts.per_class,
        "samples": params.concepts.samples,
    }


def show(wanted: str, classes: list[Row], texts: Texts, prompt: Prompt, params: Params) -> str:
    """The messages, or the imported texts, for the class of this class_id or name. Raises UserError: no such class."""
    for row in classes:
        if wanted in (row["class_id"], row["name"]):
            if row["class_id"] in texts:
                return "\n".join([f"# imported from {params.concepts.imported}\n", *texts[row["class_id"]]])
            messages = messages_of(row, prompt, params)
            return "\n\n".join(f"# {message['role']}\n\n{message['content']}" for message in messages)
    close = difflib.get_close_matches(wanted, [row["name"] for row in classes], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"{CLASSES} lists them"
    raise UserError(f"--show: there is no class {wanted!r}; {hint}")


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and price, and call nobody")
    parser.add_argument("--show", metavar="CLASS", help="print what is asked of a class (class_id or name), and stop")
    args = parser.parse_args()
    params = load_params(args.params)
    prompt = load_prompt(params.concepts.prompt)
    upstream = store.read_header(CLASSES, "index.classes/1").fingerprint
    classes = store.read_table(CLASSES, "index.classes/1").to_pylist()
    texts = read_imported(params.concepts.imported, classes)
    if args.show:
        print(show(args.show, classes, texts, prompt, params))
        return

    items = items_of([row for row in classes if row["class_id"] not in texts], prompt, params)
    coverage = f"{params.concepts.imported} (concepts.import) covers {len(texts)} of {len(classes)} classes"
    if args.dry_run and texts:
        print(f"{STAGE}: {coverage}, 0 calls")
    if params.llm.mode == "replay":
        rows = replay_others(items, prompt, params, coverage if texts else "")
        if args.dry_run:
            print(f"{STAGE}: {len(items)} items, all from {params.llm.recordings}, 0 calls")
            return
    else:
        if items:
            refuse_cold_start(ANSWERS)
        if args.dry_run:
            print(preview(STAGE, plan_calls(STAGE, items, prompt, params.llm, ANSWERS), params.llm))
            return
        # Even if nothing is asked: it keeps the answers that the imported texts take the place of.
        rows = live_answers(STAGE, items, prompt, params.llm, ANSWERS, attach=lambda item: item.messages)
    rows += [row_of(class_id, own) for class_id, own in texts.items()]

    content = content_params(prompt, params, texts, bool(items))
    mark = store.fingerprint(SCHEMA, content, [upstream])
    store.write_table(store.make_table(SCHEMA, rows), ANSWERS, SCHEMA, content, mark)
    check_coverage(rows, {row["class_id"]: row["name"] for row in classes}, params.llm, ANSWERS)


if __name__ == "__main__":
    run(main)
