"""Ask a question of your own: about each class, pair of classes, image, pair of images, or text.

Reads   the prompt that `ask.NAME.prompt` names; its front matter says what is asked about (`subject`) and what it uses
        (`variables`; fieldmark/llm/subjects.py lists them). data/index/images.parquet and classes.parquet; for subject
        image or image_pair the pictures with status ok as `dataset` says, for subject text
        data/descriptions/descriptions.parquet, for neighbours the table that `ask.NAME.links` names; params: domain,
        dataset, llm, ask.NAME.
Writes  data/asked/NAME/answers.parquet (llm.answers/1): one row a subject and sample, failed ones too;
        data/asked/NAME/texts.parquet (asked/1): every string of the answers, by field and rank; names of classes and of
        their groups are masked in all but guesses of classes (`mask`); data/asked/NAME/metrics.json: rows, tokens and
        cost in sum.
Costs   llm.mode live or batch: one call for each subject and sample whose answer is held neither there nor in the
        journal that all such questions share (.cache/ask.jsonl of the original checkout of an experiment or worktree,
        or in $FIELDMARK_CACHE); see --dry-run. llm.mode replay: nothing. Of several runs at a time one asks and the
        others wait for its answers.

A prompt that is told the class of an image or text asks about training images alone (`splits: [train]`): what is said
of a val or test image must not know its label. The list of all classes may be told of any.

Pairs of pictures (image_pair) are `drawn` training images, each with the next one by hash; nobody is told of which
classes. What is said of them can become words for all (`python -m tools.collect_words`).

Images without a description are not asked about where the subject is text, nor texts without a neighbour where the
prompt uses neighbours: those are the nearest training items of the same class among the links into an item.

    python -m stages.ask --ask guess
    python -m stages.ask --ask guess --dry-run
    python -m stages.ask --ask guess --show
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError, counted, key_parser, name_some, run
from fieldmark.concepts.guesses import Guessed
from fieldmark.concepts.names import MASK_RULES, Keys, NameMask, domain_words
from fieldmark.llm.answers import Item, check_coverage, keep_answers
from fieldmark.llm.held import SCHEMA, Named
from fieldmark.llm.pictures import JPEG_QUALITY, as_sent, image_part, with_part, with_parts
from fieldmark.llm.prompts import SUBJECTS, Message, Prompt, load_prompt
from fieldmark.llm.questions import Question, ask, foresee, read_answers, write_answers
from fieldmark.llm.replay import replay
from fieldmark.llm.said import strings_in
from fieldmark.llm.subjects import (
    NEIGHBOURS,
    check_blind,
    class_items,
    image_items,
    image_pair_items,
    image_pairs,
    names_of,
    nearest_of_class,
    pair_items,
    text_items,
    texts_of,
    told_of_class,
)
from fieldmark.lock import refuse_cold_start, refuse_old_index
from fieldmark.params import NONE, Ask, Params, load_params
from fieldmark.pictures.cuts import Place, Places

STAGE = "ask"
IMAGES = Path("data/index/images.parquet")
CLASSES = Path("data/index/classes.parquet")
DESCRIPTIONS = Path("data/descriptions/descriptions.parquet")
ASKED = Path("data/asked")
TEXTS = "asked/1"
# What a recording calls its subject, by the prompt's.
RECORDED = {
    "class": "class_id", "pair": "subject_id", "image": "image_id", "image_pair": "subject_id", "text": "image_id",
}  # fmt: skip
PICTURED = ("image", "image_pair")  # subjects whose pictures are sent
Row = dict[str, Any]


class Sources(NamedTuple):
    """What questions are made of: the images and texts that may be asked about, by image_id, and all classes."""

    classes: list[Row]  # of index.classes/2
    images: dict[str, str]  # their class_ids
    places: Mapping[str, Place]
    texts: dict[str, str]
    neighbours: dict[str, list[str]]
    upstream: list[str]  # fingerprints of what was read


def settings_of(name: str, params: Params) -> Ask:
    """Raises UserError where params.yaml asks nothing under that name."""
    if name not in params.ask:
        known = ", ".join(params.ask) or "none is there"
        raise UserError(f"params.yaml: ask.{name}: is not there; choose one of: {known}")
    return params.ask[name]


def load_question(name: str, settings: Ask, *, documents: bool) -> Prompt:
    """The prompt of a question. Raises UserError where it says no subject, or one that the data set does not have, and
    where settings and prompt contradict. `documents`: whether the data set is of these, which have no picture."""
    prompt, key = load_prompt(settings.prompt), f"ask.{name}"
    if prompt.subject is None:
        raise UserError(f"{prompt.path}: subject: is missing; say one of {', '.join(SUBJECTS)} in the front matter")
    if documents and prompt.subject in PICTURED:
        raise UserError(f"params.yaml: {key}: {prompt.path} sends pictures, and documents have none; ask about texts")
    check_blind(prompt, settings.splits, key)
    near = NEIGHBOURS in prompt.variables
    if near and prompt.subject != "text":
        raise UserError(f"{prompt.path}: {NEIGHBOURS}: are for subject text; take it out of `variables`")
    if near == (settings.links == NONE):
        what = f"uses {NEIGHBOURS}; name a table of data/links" if near else f"uses no {NEIGHBOURS}; set it to {NONE}"
        raise UserError(f"params.yaml: {key}.links: {prompt.path} {what}")
    of_images = prompt.subject in (*PICTURED, "text")
    if not of_images and set(settings.splits) != {"train", "val", "test"}:
        raise UserError(f"params.yaml: {key}.splits: {prompt.path} asks about a {prompt.subject}; take it out")
    return prompt


def read_sources(prompt: Prompt, settings: Ask, params: Params) -> Sources:
    """Read what a prompt needs, and no more. Raises UserError where a text is needed and there is none."""
    upstream = [store.read_header(CLASSES, "index.classes/2").fingerprint]
    classes = store.read_table(CLASSES, "index.classes/2").to_pylist()
    if prompt.subject not in (*PICTURED, "text"):
        return Sources(classes, {}, {}, {}, {}, upstream)
    upstream.append(store.read_header(IMAGES, "index.images/1").fingerprint)
    columns = ["path", "image_id", "class_id", "split", "status", "box"]
    rows = store.read_table(IMAGES, "index.images/1", columns)
    of_splits = pc.is_in(rows["split"], pa.array(sorted(settings.splits), store.TEXT))
    rows = rows.filter(pc.and_(pc.equal(rows["status"], "ok"), of_splits))
    # A class's name is one text, however many images are of it.
    class_ids = rows["class_id"].combine_chunks().dictionary_encode()
    names = class_ids.dictionary.to_pylist()
    images = {
        image_id: names[place]
        for image_id, place in zip(rows["image_id"].to_pylist(), class_ids.indices.to_pylist(), strict=True)
    }
    places = Places(params.dataset.folder, rows.select(["path", "image_id", "box"]))
    if prompt.subject in PICTURED:
        return Sources(classes, images, places, {}, {}, upstream)
    upstream.append(store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint)
    said = texts_of(store.read_table(DESCRIPTIONS, "descriptions/1").to_pylist())
    texts = {image_id: text for image_id, text in said.items() if image_id in images}
    if not texts:
        remedy = "set describe.enabled: true, or take the question out of `ask`"
        raise UserError(f"{DESCRIPTIONS}: says nothing of any image that {prompt.path} asks about; {remedy}")
    neighbours = {}
    if settings.links != NONE:
        upstream.append(store.read_header(settings.links, "links/1").fingerprint)
        links = store.read_table(settings.links, "links/1", ["src", "dst", "weight"]).to_pylist()
        neighbours = nearest_of_class(links, texts.keys(), images, settings.neighbours)
    return Sources(classes, images, places, texts, neighbours, upstream)


def items_of(prompt: Prompt, settings: Ask, sources: Sources, params: Params) -> Sequence[Item]:
    """One item a subject and sample."""
    card = {**params.domain.model_dump(), "count": settings.count, "classes": names_of(sources.classes)}

    def show(messages: list[Message], image_id: str) -> list[Message]:
        return with_part(messages, image_part(image_id, settings.image_px))

    def show_both(messages: list[Message], pair: Sequence[str]) -> list[Message]:
        return with_parts(messages, [image_part(image_id, settings.image_px) for image_id in pair])

    classes, samples = sources.classes, settings.samples
    if prompt.subject == "class":
        return class_items(prompt, classes, card, samples)
    if prompt.subject == "pair":
        return pair_items(prompt, classes, card, samples, siblings=settings.pairs == "siblings")
    if prompt.subject == "image":
        return image_items(prompt, sources.images, classes, card, samples, show)
    if prompt.subject == "image_pair":
        return image_pair_items(prompt, image_pairs(sources.images, settings.drawn), card, samples, show_both)
    return text_items(prompt, sources.texts, sources.images, sources.neighbours, classes, card, samples)


def not_asked(prompt: Prompt, sources: Sources, items: Sequence[Item]) -> str | None:
    """What to say of images that the question is not put about."""
    if prompt.subject != "text":
        return None
    bare, lone = len(sources.images) - len(sources.texts), len(sources.texts) - len({item.subject_id for item in items})
    said = []
    if bare:
        said.append(f"{bare} of {len(sources.images)} images have no description")
    if lone:
        said.append(f"{lone} of {len(sources.texts)} texts have no neighbour of their class")
    return f"{STAGE}: {' and '.join(said)}, and are not asked about" if said else None


def readable(prompt: Prompt, sources: Sources, items: Sequence[Item]) -> Mapping[str, str]:
    """What people call each subject, by subject_id."""
    names = {row["class_id"]: row["name"] for row in sources.classes}
    if prompt.subject in (*PICTURED, "text"):
        places, subjects = sources.places, dict.fromkeys(item.subject_id for item in items)
        return Named(subjects, lambda subject: " and ".join(str(places[each].file) for each in subject.split(" ")))
    return {item.subject_id: " and ".join(names[each] for each in item.subject_id.split(" ")) for item in items}


def content_params(prompt: Prompt, settings: Ask, params: Params) -> dict[str, Any]:
    """What decides the answers' content: not where, how fast or with what limits they are asked for."""
    of_subject: dict[str | None, dict[str, Any]] = {
        "pair": {"pairs": settings.pairs},
        "image": {"image_px": settings.image_px, "jpeg_quality": JPEG_QUALITY, "splits": sorted(settings.splits)},
        "image_pair": {"drawn": settings.drawn, "image_px": settings.image_px, "jpeg_quality": JPEG_QUALITY},
        "text": {"splits": sorted(settings.splits)},
    }
    of_links = {} if settings.links == NONE else {"neighbours": settings.neighbours}
    return {
        "prompt_sha": prompt.sha,
        "domain": params.domain.model_dump(),
        "model": params.llm.model,
        "temperature": params.llm.temperature,
        "count": settings.count,
        "samples": settings.samples,
        **of_subject.get(prompt.subject, {}),
        **of_links,
    }


class Texts:
    """Rows of asked/1 from the answers that are ok, sorted where those are. Once they are taken, `masked` is how many
    names were masked in them, and `guessed` counts the guesses among them.
    """

    def __init__(self, answers: Iterable[Row], guesses: str | None, mask: NameMask | None) -> None:
        self.answers, self.guesses, self.mask = answers, guesses, mask
        self.masked, self.guessed = 0, Counter[str]()

    def __iter__(self) -> Iterator[Row]:
        for answer in self.answers:
            if answer["status"] != "ok":
                continue
            of_answer = {"subject_id": answer["subject_id"], "sample": answer["sample"]}
            for said in sorted(strings_in(json.loads(answer["response_json"]))):
                text, found = said.text, 0
                if said.field == self.guesses:
                    self.guessed[text] += 1
                elif self.mask is not None:
                    text, found = self.mask.apply(text)
                self.masked += found
                yield {**of_answer, **said._asdict(), "text": text}


def report_guesses(guessed: Counter[str], classes: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of guesses that are no class, where there are any."""
    known = Guessed(classes)
    wrong = [text for text in guessed if known.place(text) is None]
    if not wrong:
        return None
    count = sum(guessed[text] for text in wrong)
    some = name_some(list(map(repr, wrong)), 5)
    return f"{STAGE}: of {guessed.total()} guesses {count} name no class, and count as none: {some}"


def shown(items: Sequence[Item], prompt: Prompt) -> str:
    """The first question, as it is put."""
    said = []
    for message in items[0].messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "(the picture)") for part in content]
        said.append(f"# {message['role']} ({prompt.path})\n\n" + "\n\n".join(parts))
    return "\n\n".join(said)


def main() -> None:
    parser = key_parser(__doc__, "--ask", "ask")
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and price, and call nobody")
    parser.add_argument("--show", action="store_true", help="print the first question as it is put, and stop")
    args = parser.parse_args()
    params = load_params(args.params)
    llm, name = params.llm, args.ask
    settings = settings_of(name, params)
    prompt = load_question(name, settings, documents=params.dataset.format == "text_graph")
    for table in (IMAGES, CLASSES):
        refuse_old_index(table, params.dataset, args.params)
    sources = read_sources(prompt, settings, params)
    items = items_of(prompt, settings, sources, params)
    if not items:
        raise UserError(f"params.yaml: ask.{name}: {prompt.path} has nothing to ask about; look at its splits or links")
    if args.show:
        print(shown(items, prompt))
        return
    if said := not_asked(prompt, sources, items):
        print(said, file=sys.stderr)

    folder, questions = ASKED / name, {name: Question(prompt, items)}
    answers_path = folder / "answers.parquet"
    if llm.mode == "import":
        raise UserError(f"params.yaml: ask.{name}: llm.mode import asks nobody; set it to live, batch or replay")
    if llm.mode in ("live", "batch"):
        refuse_cold_start(answers_path)
        if args.dry_run:
            print(foresee(STAGE, questions, llm, answers_path))
            return
        places = sources.places
        attach = (lambda item: as_sent(item, places)) if prompt.subject in PICTURED else (lambda item: item.messages)
        rows: Sequence[Row] = ask(STAGE, questions, llm, answers_path, attach=attach)[name]
    else:
        rows = replay(items, RECORDED[str(prompt.subject)], prompt, llm)
        if args.dry_run:
            print(f"{STAGE}: {len(items)} items, all from {llm.recordings}, 0 calls")
            return
        keep_answers(STAGE, answers_path, [])

    content = content_params(prompt, settings, params)
    mark = store.fingerprint(SCHEMA, content, sources.upstream)
    write_answers([rows], answers_path, content, mark, folder / "metrics.json")
    kept = read_answers(answers_path, ["subject_id", "sample", "status", "response_json"])
    write_texts(folder / "texts.parquet", kept, prompt, settings, sources, params, mark)
    kept = read_answers(answers_path, ["subject_id", "status", "response_json"])
    check_coverage(kept, readable(prompt, sources, items), llm, answers_path)


def write_texts(
    path: Path, answers: Iterable[Row], prompt: Prompt, settings: Ask, sources: Sources, params: Params, mark: str
) -> None:
    """Write asked/1 from answers with this fingerprint, and say what was masked and which guesses mean no class."""
    domain = params.domain
    card = domain_words(domain.noun, domain.group, *domain.attributes)
    mask = NameMask(Keys.of(sources.classes, card), domain.noun) if settings.mask else None
    texts = Texts(answers, prompt.guesses, mask)
    content: dict[str, Any] = {"subject": prompt.subject, "guesses": prompt.guesses, "mask": settings.mask}
    content |= {"told": bool(told_of_class(prompt))}
    content |= {"domain": domain.model_dump(), "rules": MASK_RULES} if settings.mask else {}
    upstream = [mark, store.read_header(CLASSES, "index.classes/2").fingerprint]
    store.write_rows(texts, path, TEXTS, content, store.fingerprint(TEXTS, content, upstream))
    if texts.masked:
        where = counted(texts.masked, "name of a class or its group is", "names of classes or their groups are")
        print(f"{STAGE}: {where} masked in {path}", file=sys.stderr)
    if prompt.guesses and (said := report_guesses(texts.guessed, sources.classes)):
        print(said, file=sys.stderr)


if __name__ == "__main__":
    run(main)
