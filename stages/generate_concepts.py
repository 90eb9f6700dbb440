"""Ask a model, or the recordings of the demo, what tells each class from the others in a photo; or import it.

Reads   data/index/classes.parquet, the prompt `concepts.prompt`, params: domain, llm, concepts; in `concepts.import`
        texts of your own for some classes or all: a JSON object of class -> list of texts, or a folder of CLASS.txt
        with one text a line; in `concepts.edits`, of the same form, model's answers that you wrote over. A class stands
        there as its folder, class_id or name.
Writes  data/concepts/answers.parquet (llm.answers/1): one row a class and sample, failed ones too; one row for a class
        that is imported or edited; data/concepts/metrics.json: rows, tokens and cost in sum.
Costs   llm.mode live or batch: one call for each class and sample, but for imported and edited classes, whose answer is
        held neither there nor in the journal, which lies in .cache/ of the original checkout of an experiment or
        worktree (or in $FIELDMARK_CACHE); see --dry-run. llm.mode replay or import: nothing. Of several runs at a time
        one asks and the others wait for its answers.

Two prompts more, both off by default. `concepts.generic` N: one call for N texts that hold for many classes, kept as a
row with subject_id "*". `concepts.contrast`: one call more a class for what tells it from its siblings, the other
classes of its superclass, or what `concepts.siblings` says that it is taken for (tools.foci writes such a file). A
class without any is not asked about, and of more than 20 siblings the first 20 are named, of a superclass by name. A
class that comes or goes changes the question about its siblings, which is then asked anew.

Classes that are numbers say nothing to a model (cultivars): with `concepts.prompt: data/none` no class is asked about,
and `concepts.generic` asks once for words of the whole group. Where a file of texts has "*" for a class, these are
texts of no class too.

Where the data set is of documents (`text_graph`), nobody is asked and no text is missing: concepts are chosen by the
pictures that they show in, and there is none.

A class in `concepts.edits` is not asked and not imported, whatever becomes of prompt and model; --edit copies what its
answer holds into that file, for you to edit. Texts of kind habitat stay behind: an edited text counts as visual.

An answer that came back refused, broken or not at all is a row with its status, asked again whenever the stage runs.
Too few classes with an answer (llm.min_coverage) are an error, after the file is written where classes are asked about,
and before anything is asked where they are imported alone; texts of no class do not count.

    python -m stages.generate_concepts
    python -m stages.generate_concepts --dry-run
    python -m stages.generate_concepts --show "Lantern bandit"    # or '*', for the texts of no class
    python -m stages.generate_concepts --edit "Lantern bandit"
"""

import difflib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fieldmark import store
from fieldmark.command import UserError, name_some, run, stage_parser
from fieldmark.concepts.siblings import MOST, siblings_of
from fieldmark.llm.answers import Item, check_coverage, keep_answers
from fieldmark.llm.held import SCHEMA
from fieldmark.llm.imported import EDITS, GENERIC, IMPORT, SIBLINGS, Own, read_own, read_texts, row_of, start_edit
from fieldmark.llm.prompts import load_prompt
from fieldmark.llm.questions import Question, Questions, ask, foresee, write_metrics
from fieldmark.llm.replay import replay
from fieldmark.lock import refuse_cold_start, refuse_old_index
from fieldmark.params import NONE, Params, load_params

STAGE = "generate_concepts"
CLASSES = Path("data/index/classes.parquet")
ANSWERS = Path("data/concepts/answers.parquet")
METRICS = Path("data/concepts/metrics.json")
NOT_OF_DOCUMENTS = "the data set is of documents, which have no pictures to choose concepts by: nobody is asked"
Row = dict[str, Any]


def questions_of(classes: list[Row], own: list[Own], params: Params) -> Questions:
    """What is asked about the classes that have no texts of one's own: `concepts`, and where wanted the other two.

    Without a prompt for classes (data/none) none is asked about, but for what tells it from its siblings.
    """
    settings = params.concepts
    card = {**params.domain.model_dump(), "per_class": settings.per_class, "generic": settings.generic}
    about = {
        row["class_id"]: card | {key: row[key] for key in ("name", "scientific_name", "note")}
        for row in without_own(classes, own)
    }
    questions = {}
    if about and settings.prompt != NONE:
        prompt = load_prompt(settings.prompt)
        rendered = {class_id: prompt.render(values) for class_id, values in about.items()}
        samples = range(settings.samples)
        items = [Item(class_id, sample, messages) for class_id, messages in rendered.items() for sample in samples]
        questions["concepts"] = Question(prompt, items)
    if settings.generic:
        prompt = load_prompt(settings.generic_prompt)
        questions["generic"] = Question(prompt, [Item(GENERIC, 0, prompt.render(card))])
    if settings.contrast:
        prompt = load_prompt(settings.contrast_prompt)
        family = family_of(classes, settings.siblings)
        values = {class_id: about[class_id] | family[class_id] for class_id in about if class_id in family}
        items = [Item(class_id, 0, prompt.render(each)) for class_id, each in values.items()]
        if items:
            questions["contrast"] = Question(prompt, items)
    return questions


def without_own(classes: list[Row], own: list[Own]) -> list[Row]:
    return [row for row in classes if not any(row["class_id"] in each.texts for each in own)]


def family_of(classes: list[Row], named: str) -> dict[str, dict[str, Any]]:
    """The superclass and the siblings of each class that has any, by class_id; "" where the file `named` says them.

    Raises UserError where none has siblings, or as `read_texts` does.
    """
    if named != NONE:
        by_class = read_texts(named, SIBLINGS, classes)
        if GENERIC in by_class:
            raise UserError(f"{named}: {SIBLINGS}: {GENERIC!r} is no class, so it is taken for none; take it out")
        return {key: {"superclass": "", "siblings": names[:MOST]} for key, names in by_class.items()}
    siblings = siblings_of(classes)
    if not siblings:
        remedy = f"name theirs in the column `superclass` of classes.csv, name {SIBLINGS}, or set it to false"
        raise UserError(f"params.yaml: concepts.contrast: no two classes of {CLASSES} share a superclass; {remedy}")
    superclass = {row["class_id"]: row["superclass"] for row in classes}
    return {key: {"superclass": superclass[key], "siblings": names} for key, names in siblings.items()}


def check_imported(classes: list[Row], own: list[Own], params: Params) -> None:
    """Raises UserError where llm.mode import, which asks nobody, leaves something to ask."""
    settings = params.concepts
    for key, wanted in (("generic", settings.generic), ("contrast", settings.contrast)):
        if wanted:
            raise UserError(f"params.yaml: concepts.{key}: asks a model, and llm.mode import asks nobody; change one")
    missing = [row["name"] for row in without_own(classes, own)]
    if len(classes) - len(missing) < params.llm.min_coverage * len(classes):
        raise UserError(
            f"params.yaml: llm.mode: import asks nobody, and {len(missing)} of {len(classes)} classes have no texts in"
            f" {' or '.join(map(str, own))}: {name_some(missing)}; write some, choose another llm.mode, or lower"
            " llm.min_coverage"
        )


def replay_all(questions: Questions, params: Params, coverage: str) -> dict[str, list[Row]]:
    """The recordings that answer the questions; where there are no questions, none need exist."""
    try:
        return {name: replay(items, "class_id", prompt, params.llm) for name, (prompt, items) in questions.items()}
    except UserError as error:
        if not coverage:
            raise
        raise UserError(f"{error}; {coverage}") from None


def content_params(questions: Questions, own: list[Own], params: Params) -> dict[str, Any]:
    """What decides the answers' content: not where, how fast or with what limits they are asked for.

    A hash of one's own texts where there are any; what is asked, unless nothing is.
    """
    settings = params.concepts
    hashes = {each.source: store.sha256(store.canonical_json(each.texts)) for each in own if each.texts}
    content: dict[str, Any] = {**hashes}
    if questions:
        content |= {"domain": params.domain.model_dump(), "model": params.llm.model}
        content |= {"temperature": params.llm.temperature}
    if "concepts" in questions:
        content |= {"prompt_sha": questions["concepts"].prompt.sha, "samples": settings.samples}
        content |= {"per_class": settings.per_class}
    if "generic" in questions:
        content |= {"generic_prompt_sha": questions["generic"].prompt.sha, "generic": settings.generic}
    if "contrast" in questions:
        content |= {"contrast_prompt_sha": questions["contrast"].prompt.sha}
        if settings.siblings != NONE:
            asked = [item.messages for item in questions["contrast"].items]
            content |= {"contrast_sha": store.sha256(store.canonical_json(asked))}
    return content


def find_class(wanted: str, classes: list[Row], option: str) -> Row:
    """The class of this class_id, or else of this name. Raises UserError: no such class, or several of that name."""
    found = [row for row in classes if row["class_id"] == wanted] or [row for row in classes if row["name"] == wanted]
    if not found:
        close = difflib.get_close_matches(wanted, [row["name"] for row in classes], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{CLASSES} lists them"
        raise UserError(f"{option}: there is no class {wanted!r}; {hint}")
    if len(found) > 1:
        ids = ", ".join(row["class_id"] for row in found)
        raise UserError(f"{option}: {wanted!r} is the name of {ids}; give one of these")
    return found[0]


def show(wanted: str, classes: list[Row], own: list[Own], questions: Questions) -> str:
    """The texts of one's own for a class, and what is asked of it, by prompt; for "*" those of no class."""
    class_id = GENERIC if wanted == GENERIC else find_class(wanted, classes, "--show")["class_id"]
    shown = ["\n".join([f"# from {each}\n", *each.texts[class_id]]) for each in own if class_id in each.texts]
    shown += [
        f"# {message['role']} ({prompt.path})\n\n{message['content']}"
        for prompt, items in questions.values()
        for item in items
        if (item.subject_id, item.sample) == (class_id, 0)
        for message in item.messages
    ]
    if class_id == GENERIC and not shown:
        raise UserError(
            f"--show: there are no texts of {GENERIC!r} and nothing is asked for it: concepts.generic is 0 in"
            " params.yaml; set a number"
        )
    return "\n\n".join(shown)


def of_classes(texts: Collection[str]) -> set[str]:
    """The subjects that are classes."""
    return set(texts) - {GENERIC}


def edit(wanted: str, classes: list[Row], params: Params) -> str:
    """Copy a class's answer into concepts.edits, those of the contrast prompt last; say where and what is next."""
    path = params.concepts.edits
    if path == NONE:
        raise UserError(f"--edit: params.yaml: {EDITS}: is {NONE}; name a file there that git keeps, e.g. edits.json")
    row = find_class(wanted, classes, "--edit")
    contrast = load_prompt(params.concepts.contrast_prompt).sha if params.concepts.contrast else None
    answers = [
        answer
        for answer in store.read_table(ANSWERS, SCHEMA).to_pylist()
        if (answer["subject_id"], answer["status"]) == (row["class_id"], "ok")
    ]
    answers.sort(key=lambda answer: answer["prompt_sha"] == contrast)
    concepts = [concept for answer in answers for concept in json.loads(answer["response_json"])["concepts"]]
    texts = list(dict.fromkeys(concept["text"] for concept in concepts if concept["kind"] != "habitat"))
    if not texts:
        raise UserError(f"--edit: {ANSWERS} holds no text of {row['name']!r} to edit; run the stage first (dvc repro)")
    target = start_edit(path, row["class_id"], texts, classes)
    return f"{target}: {len(texts)} texts of {row['name']!r} to edit; then run the stage again (dvc repro)"


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and price, and call nobody")
    parser.add_argument("--show", metavar="CLASS", help="print what is asked of a class (class_id or name), and stop")
    parser.add_argument("--edit", metavar="CLASS", help="copy a class's answer into concepts.edits, and stop")
    args = parser.parse_args()
    params = load_params(args.params)
    llm = params.llm
    refuse_old_index(CLASSES, params.dataset, args.params)
    upstream = store.read_header(CLASSES, "index.classes/2").fingerprint
    classes = store.read_table(CLASSES, "index.classes/2").to_pylist()
    if args.edit:
        print(edit(args.edit, classes, params))
        return
    own = read_own(params.concepts, classes)
    documents = store.are_documents(CLASSES, "index.classes/2")
    if documents:
        print(f"{STAGE}: {NOT_OF_DOCUMENTS}", file=sys.stderr)
    questions = {} if documents else questions_of(classes, own, params)
    if args.show:
        print(show(args.show, classes, own, questions))
        return

    coverage = "; ".join(
        f"{each} covers {len(of_classes(each.texts))} of {len(classes)} classes" for each in own if each.texts
    )
    if llm.mode == "import" and not documents:
        check_imported(classes, own, params)
        questions = {}
    imageless = sum(not row["from_images"] for row in without_own(classes, own))
    if imageless and questions:
        print(
            f"{STAGE}: of the classes asked about {imageless} have no image (dataset.without_images)", file=sys.stderr
        )
    if args.dry_run and coverage:
        print(f"{STAGE}: {coverage}, 0 calls")
    owned = [row_of(class_id, texts, each.source) for each in own for class_id, texts in each.texts.items()]
    own_rows = [row for row in owned if row["subject_id"] != GENERIC]
    names = {row["class_id"]: row["name"] for row in classes}
    imported = any(each.key == IMPORT and of_classes(each.texts) for each in own)
    if imported and "concepts" not in questions and not documents and not args.dry_run:
        # What is asked besides makes up for no class: whether texts are too few is known before anything is paid.
        check_coverage(own_rows, names, llm, ANSWERS)
    if llm.mode in ("live", "batch"):
        if questions:
            refuse_cold_start(ANSWERS)
        if args.dry_run:
            print(foresee(STAGE, questions, llm, ANSWERS))
            return
        answers: Mapping[str, Sequence[Row]] = ask(STAGE, questions, llm, ANSWERS, attach=lambda item: item.messages)
    else:
        answers = replay_all(questions, params, coverage)
        if args.dry_run:
            items = sum(len(question.items) for question in questions.values())
            print(f"{STAGE}: {items} items, all from {llm.recordings}, 0 calls")
            return
        keep_answers(STAGE, ANSWERS, [])
    rows = [*owned, *(row for each in answers.values() for row in each)]

    content = content_params(questions, own, params)
    mark = store.fingerprint(SCHEMA, content, [upstream])
    store.write_table(store.make_table(SCHEMA, rows), ANSWERS, SCHEMA, content, mark)
    write_metrics(rows, METRICS)
    if "concepts" in questions:
        check_coverage([*own_rows, *answers["concepts"]], names, llm, ANSWERS)


if __name__ == "__main__":
    run(main)
