"""What texts about images give away: names in them, and how far a classifier of their words alone gets.

A model that describes a picture, or answers a question about it, often recognises its class, and says so in the
picture's own text, a test picture's too. The mask takes out what the class table names; the control says what is left:
TF-IDF of single words and ridge regression (scikit-learn's RidgeClassifier in kind, penalty 1, nothing chosen), fitted
on the texts of training images and judged on those of val. A run that reads them may get as far without looking at a
picture. Where a question asks for guesses of the class, the first one is a control of its own.

bench/leaks.py judges both on 10,000 real sentences about aircraft.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.runs import Row, Run
from evaluation.words import percent
from fieldmark import store
from fieldmark.concepts.guesses import Guessed
from fieldmark.concepts.names import Finder, Keys, domain_words, words, written_as_name
from fieldmark.llm.said import strings_in
from fieldmark.params import Domain
from training.data.asked import texts_of
from training.metrics import Floats, Ints

DESCRIPTIONS = "descriptions/descriptions.parquet"
CELLS = "descriptions/cells.parquet"
VOCABULARY = 4096  # words that a text is judged by: those in most training texts
Versions = dict[str, dict[str, str]]  # "before" and "after" the mask: texts by image_id
CHUNK = 1024  # texts counted at a time
PENALTY = 1.0
# A word that tells: in so many texts at least, and so large a share of them of one class.
OFTEN, SHARE, SHOWN = 5, 0.8, 12
# What a text names, from what gives most away; `any` is one of them at least.
KINDS = {
    "own": "its own class",
    "other": "another class",
    "group": "a genus, maker or other group",
    "any": "any of these",
}


class Names:
    """What every class and group of a class table is found by; `rows` are of index.classes."""

    def __init__(self, rows: Sequence[Row], domain: frozenset[str]) -> None:
        self.owners: dict[str, set[str]] = defaultdict(set)
        self.bare: list[str] = []  # names of classes of which no word tells: they are found whole or not at all
        every = Keys.of(rows, domain)
        self.groups, self.capital, self.modifiers = every.groups, every.capital, every.modifiers
        for row in rows:
            own = Keys.of([row], domain)
            for key in own.whole | own.telling | own.modifiers:
                self.owners[key].add(row["class_id"])
            if not own.telling:
                self.bare.append(row["name"])
        self.finder = Finder([*self.owners, *self.groups, *self.capital])

    def named_in(self, text: str, class_id: str) -> set[str]:
        """Of KINDS, what a text about an image of a class names."""
        found = set()
        mentions = list(self.finder.mentions(text))
        starts = {mention.start for mention in mentions}
        for mention in mentions:
            owners = self.owners.get(mention.key, set())
            written = mention.key not in self.modifiers or written_as_name(mention, text, starts)
            if owners and written:
                found.add("own" if class_id in owners else "other")
            elif mention.key in self.groups or (
                mention.key in self.capital and written_as_name(mention, text, starts)
            ):
                found.add("group")
        return found | {"any"} if found else found


def naming(names: Names, texts: Mapping[str, str], classes: Mapping[str, str]) -> dict[str, float]:
    """Of each of KINDS, the share of texts that name it; texts and their class_ids stand by image_id."""
    found = Counter(kind for image_id, text in texts.items() for kind in names.named_in(text, classes[image_id]))
    return {kind: found[kind] / max(len(texts), 1) for kind in KINDS}


def tf_idf(texts: Sequence[Counter[str]], place: Mapping[str, int], idf: Floats) -> Floats:
    """(n, F + 1): counts times idf, each row of unit length, and a 1 behind it."""
    x = np.zeros((len(texts), len(idf) + 1))
    for row, counts in enumerate(texts):
        for word in counts.keys() & place.keys():
            x[row, place[word]] = counts[word] * idf[place[word]]
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x[:, -1] = 1.0
    return x


def by_words(train: Sequence[str], y: Ints, asked: Sequence[str]) -> Ints:
    """The class (m,) that ridge regression on TF-IDF gives each text that is asked; y (n,) are those of `train`."""
    counts = [Counter(words(text)) for text in train]
    within = Counter(word for each in counts for word in each)
    ranked = sorted((word for word in within if within[word] > 1), key=lambda word: (-within[word], word))[:VOCABULARY]
    place = {word: number for number, word in enumerate(ranked)}
    idf = np.array([np.log((1 + len(train)) / (1 + within[word])) + 1 for word in ranked])
    targets = np.eye(int(y.max()) + 1)[y]
    gram, told = np.zeros((len(idf) + 1, len(idf) + 1)), np.zeros((len(idf) + 1, targets.shape[1]))
    for start in range(0, len(train), CHUNK):
        x = tf_idf(counts[start : start + CHUNK], place, idf)
        gram += x.T @ x
        told += x.T @ targets[start : start + CHUNK]
    penalty = PENALTY * np.eye(len(gram))
    penalty[-1, -1] = 1e-6  # of the intercept: none, but that there may be no text
    weights = np.linalg.solve(gram + penalty, told)
    found: list[Ints] = []
    for start in range(0, len(asked), CHUNK):
        x = tf_idf([Counter(words(text)) for text in asked[start : start + CHUNK]], place, idf)
        found.append((x @ weights).argmax(axis=1))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def telling_words(texts: Sequence[str], classes: Sequence[str]) -> list[Row]:
    """Words most of whose texts are of one class, from the most frequent down."""
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    for text, class_id in zip(texts, classes, strict=True):
        for word in set(words(text)):
            by_word[word][class_id] += 1
    rows: list[tuple[int, str, Row]] = []
    for word, counts in by_word.items():
        [(class_id, count)] = counts.most_common(1)
        if counts.total() >= OFTEN and count >= SHARE * counts.total() and len(set(classes)) > 1:
            rows.append((-count, word, {"word": word, "class_id": class_id, "texts": count, "of": counts.total()}))
    return [row for *_, row in sorted(rows, key=lambda found: found[:2])[:SHOWN]]


def audit(
    names: Names, versions: Mapping[str, Mapping[str, str]], classes: Mapping[str, str], split: Mapping[str, str]
) -> Row:
    """What texts give away in each of `versions` (before and after the mask): text, class_id and split by image_id.

    `alone` is the accuracy on val of words alone, None where train or val has no text; `majority` that of the class
    that most training texts are of.
    """
    found: Row = {"bare": names.bare, "versions": {}, "majority": None}
    label = {class_id: number for number, class_id in enumerate(sorted(set(classes.values())))}
    for version, texts in versions.items():
        of = {part: sorted(image_id for image_id in texts if split[image_id] == part) for part in ("train", "val")}
        y = {part: np.array([label[classes[one]] for one in ids], dtype=np.int64) for part, ids in of.items()}
        said = {part: [texts[one] for one in ids] for part, ids in of.items()}
        alone = None
        if of["train"] and of["val"]:
            alone = float((by_words(said["train"], y["train"], said["val"]) == y["val"]).mean())
            found["majority"] = float((np.bincount(y["train"]).argmax() == y["val"]).mean())
        found["versions"][version] = {"alone": alone, "naming": naming(names, texts, classes)}
        found["words"] = telling_words(said["train"], [classes[one] for one in of["train"]])
        found |= {"texts": len(texts), "judged": len(of["val"])}
    return found


def joined(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The sentences of each image as one text."""
    texts: dict[str, list[str]] = defaultdict(list)
    for image_id, sentence in rows:
        texts[image_id].append(sentence)
    return {image_id: " ".join(sentences) for image_id, sentences in texts.items()}


def described(data: Path) -> Versions:
    """What data/descriptions/ says of images, of pictures and cells together."""
    path = data / DESCRIPTIONS
    table = store.read_table(path, "descriptions/1").sort_by([("image_id", "ascending"), ("rank", "ascending")])
    sentences = table.select(["image_id", "text"]).to_pylist()
    if (data / CELLS).is_file():  # what was described before cells could be has none
        cells = store.read_table(data / CELLS, "descriptions.cells/1")
        cells = cells.sort_by([(name, "ascending") for name in ("image_id", "cell", "rank")])
        sentences += cells.select(["image_id", "text"]).to_pylist()
    written = joined(
        # What stands behind # is the box of a cell.
        (row["subject_id"].partition("#")[0], sentence)
        for row in read_answers(path.with_name("answers.parquet"))
        for sentence in json.loads(row["response_json"])["sentences"]
    )
    return {"before": written, "after": joined((row["image_id"], row["text"]) for row in sentences)}


def answered(data: Path, question: str, texts: pa.Table, guesses: str | None) -> Versions:
    """What a question's answers say of images, its field of guesses left out; `texts` is its table asked/1."""
    columns = [(name, "ascending") for name in ("subject_id", "sample", "field", "rank")]
    rows = texts.sort_by(columns).to_pylist()
    written = joined(
        (row["subject_id"], said.text)
        for row in read_answers(data / f"asked/{question}/answers.parquet")
        for said in strings_in(json.loads(row["response_json"]))
        if said.field != guesses
    )
    return {
        "before": written,
        "after": joined((row["subject_id"], row["text"]) for row in rows if row["field"] != guesses),
    }


def read_answers(path: Path) -> list[Row]:
    """Those that are ok, in order: what others hold need not be JSON."""
    columns = ["subject_id", "sample", "status", "response_json"]
    table = store.read_table(path, "llm.answers/1", columns)
    table = table.filter(pc.equal(table["status"], "ok"))
    return table.sort_by([("subject_id", "ascending"), ("sample", "ascending")]).to_pylist()


def right_guesses(texts: pa.Table, guesses: str, classes: Sequence[Row], of_val: Mapping[str, str]) -> float:
    """The share of val images of which the model's first guess is right, of a table asked/1; `of_val` has their
    class_ids by image_id. An image without a guess counts as wrong."""
    rows = texts.filter(pc.equal(texts["field"], guesses)).sort_by([("sample", "descending"), ("rank", "descending")])
    first = {row["subject_id"]: row["text"] for row in rows.to_pylist()}  # the last one that is written stays
    known = Guessed(classes)
    places = {image_id: known.place(first.get(image_id, "")) for image_id in of_val}
    right = [place is not None and classes[place]["class_id"] == of_val[one] for one, place in places.items()]
    return sum(right) / len(right)


def read_leaks(data: Path, index: pa.Table, classes: pa.Table, domain: Domain, runs: Sequence[Run]) -> list[Row]:
    """What data/descriptions/ gives away, where something is described, and the answers to each question about images
    or their texts that one of `runs` reads; with the names of the runs that read it.

    Left out is a question whose prompt was told the class: its texts are read of training images alone. `index` and
    `classes` are the tables index.images and index.classes.
    """
    questions = asked_in(runs)
    if not questions and not (data / DESCRIPTIONS).is_file():
        return []
    usable = {row["image_id"]: row for row in index.to_pylist() if row["status"] == "ok"}
    rows = classes.to_pylist()
    names = Names(rows, domain_words(domain.noun, domain.group, *domain.attributes))
    found: list[Row] = []

    def judge(what: str, versions: Versions, files: set[str], guessed: float | None = None) -> None:
        after = {image_id: text for image_id, text in versions["after"].items() if image_id in usable}
        before = {image_id: text for image_id, text in versions["before"].items() if image_id in after}
        of_class, split = ({one: usable[one][part] for one in after} for part in ("class_id", "split"))
        reading = [one.name for one in runs if files & one.fingerprints.keys()]
        if after or guessed is not None:
            judged = audit(names, {"before": before, "after": after}, of_class, split)
            found.append({**judged, "what": what, "kinds": KINDS, "runs": reading, "guessed": guessed})

    if (data / DESCRIPTIONS).is_file():
        judge("descriptions", described(data), {DESCRIPTIONS, CELLS})
    of_val = {one: row["class_id"] for one, row in usable.items() if row["split"] == "val"}
    for question in questions:
        made_by = store.read_header(data / texts_of(question), "asked/1").params
        if made_by["told"]:
            continue
        texts, guesses = store.read_table(data / texts_of(question), "asked/1"), made_by["guesses"]
        guessed = right_guesses(texts, guesses, rows, of_val) if guesses is not None and of_val else None
        judge(f"answers to {question}", answered(data, question, texts, guesses), {texts_of(question)}, guessed)
    return found


def asked_in(runs: Sequence[Run]) -> list[str]:
    """The questions whose answers a run reads."""
    parts = {Path(file).parts for one in runs for file in one.fingerprints}
    return sorted({part[1] for part in parts if part[0] == "asked" and part[2:] == ("texts.parquet",)})


def words_alone(leaks: Row) -> str:
    """How far the words of the masked texts get without a picture, and the model's guesses, as a clause."""
    found = leaks["versions"]["after"]["alone"]
    said = "how far their words get alone cannot be told: train or val has none"
    if found is not None:
        said = (
            f"their words alone get {percent(found)} % of {leaks['judged']} val images (the most frequent class:"
            f" {percent(leaks['majority'])} %)"
        )
    return said if leaks["guessed"] is None else f"{said}; the model's first guess {percent(leaks['guessed'])} % of val"
