"""What texts about images give away: names counted before and after the mask, and words alone against scikit-learn."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from evaluation.leaks import Names, audit, by_words, naming, telling_words
from evaluation.report import report
from fieldmark.concepts.names import Keys, NameMask, domain_words
from fieldmark.store import make_table, read_table, write_table
from tests.evaluation.reported import Page, make_params
from tests.project import ROOT

CARD = domain_words("bird")
ROWS: list[dict[str, Any]] = [
    {"class_id": "tern", "name": "Sooty Tern", "scientific_name": "Onychoprion fuscatus", "superclass": "Laridae"},
    {"class_id": "gull", "name": "Ivory Gull", "scientific_name": "Pagophila eburnea", "superclass": "Laridae"},
    {"class_id": "tail", "name": "Black Tail"},
]
TEXTS = ROOT.parent / "shared/data/aircraft_texts"


@pytest.mark.parametrize(
    ("text", "class_id", "named"),
    [
        ("a tern on sand", "tern", {"own", "any"}),
        ("a tern on sand", "gull", {"other", "any"}),
        ("one of the Laridae", "tail", {"group", "any"}),
        ("an onychoprion beside an ivory gull", "gull", {"own", "other", "any"}),
        ("a bird with a black tail", "tail", {"own", "any"}),
        ("a sooty bird with a tail", "tern", set()),
    ],
)
def test_what_a_text_names(text: str, class_id: str, named: set[str]) -> None:
    assert Names(ROWS, CARD).named_in(text, class_id) == named


def test_classes_without_a_telling_word_are_said() -> None:
    assert Names(ROWS, CARD).bare == ["Black Tail"]


def test_no_name_is_left_by_the_mask() -> None:
    texts = {"1": "A tern and a gull of the Laridae.", "2": "Pagophila eburnea, a Black Tail.", "3": "a bird"}
    classes, names = {"1": "tern", "2": "tail", "3": "tail"}, Names(ROWS, CARD)
    assert naming(names, texts, classes) == pytest.approx({"own": 2 / 3, "other": 2 / 3, "group": 1 / 3, "any": 2 / 3})
    mask = NameMask(Keys.of(ROWS, CARD), "bird")
    assert not any(naming(names, {one: mask.apply(text)[0] for one, text in texts.items()}, classes).values())


def test_words_alone_against_scikit_learn() -> None:
    generator = np.random.default_rng(5)
    y = generator.integers(0, 4, 300)
    vocabulary = np.array([f"word{number}" for number in range(60)])
    odds = generator.dirichlet(np.full(60, 0.3), 4)
    texts = [" ".join(generator.choice(vocabulary, 8, p=odds[label])) for label in y]
    vectorizer = TfidfVectorizer(token_pattern=r"[^\W_]+", min_df=2)
    # The constant is a word of every text, as penalised as the others.
    x, asked = (
        np.hstack([part.toarray(), np.ones((part.shape[0], 1))])
        for part in (vectorizer.fit_transform(texts[:200]), vectorizer.transform(texts[200:]))
    )
    expected = Ridge(alpha=1.0, fit_intercept=False).fit(x, np.eye(4)[y[:200]]).predict(asked).argmax(axis=1)
    found = by_words(texts[:200], y[:200], texts[200:])
    np.testing.assert_array_equal(found, expected)
    assert (found == y[200:]).mean() > 0.7
    shuffled = by_words(texts[:200], generator.permutation(y[:200]), texts[200:])
    assert (shuffled == y[200:]).mean() < 0.5


def test_words_that_tell_one_class() -> None:
    texts = [*["a hornet, grey"] * 5, *["a grey jet"] * 5, "a jet on a hornet"]
    found = telling_words(texts, [*["a"] * 5, *["b"] * 6])
    assert found == [
        {"word": "jet", "class_id": "b", "texts": 6, "of": 6},
        {"word": "hornet", "class_id": "a", "texts": 5, "of": 6},
    ]


def test_without_texts_of_val_nothing_is_said_of_words() -> None:
    found = audit(Names(ROWS, CARD), {"after": {"1": "a tern"}}, {"1": "tern"}, {"1": "train"})
    assert found["versions"]["after"]["alone"] is None
    assert found["majority"] is None


def usable_images(data: Path) -> list[dict[str, Any]]:
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    return [row for row in index if row["status"] == "ok"]


def has_read(data: Path, file: str) -> None:
    """linear_probe was trained on a file."""
    config = data / "runs/linear_probe/config.json"
    written = json.loads(config.read_text())
    written["fingerprints"][file] = "mark"
    config.write_text(json.dumps(written))


def describe(data: Path) -> None:
    """Give every usable image a sentence that names its class, and one masked; linear_probe has read them."""
    rows, answers = [], []
    for row in usable_images(data):
        marks = f"a fish with {('red', 'blue', 'green')[int(row['class_id'][-2:])]} marks"
        rows.append({"image_id": row["image_id"], "rank": 0, "text": marks})
        same = {"sample": 0, "prompt_sha": "p", "status": "ok", "model_requested": "m", "attempts": 1, "source": "live"}
        said = json.dumps({"sentences": [f"{row['class_id'].title()}: {marks}"]})
        own = {"item_key": row["image_id"], "subject_id": row["image_id"], "created_at": "now", "response_json": said}
        answers.append({**same, **own})
    failed = {**answers[0], "sample": 1, "item_key": "failed", "status": "invalid", "response_json": "I cannot say."}
    tables = {"descriptions": ("descriptions/1", rows), "answers": ("llm.answers/1", [*answers, failed])}
    for name, (schema, content) in tables.items():
        write_table(make_table(schema, content), data / f"descriptions/{name}.parquet", schema, {}, name)
    has_read(data, "descriptions/descriptions.parquet")


def ask(data: Path, *, told: bool = False, wrong: int = 0) -> None:
    """Have every usable image answered about, with marks that tell its class and a guess of it; `wrong` of those of
    val are of another class. linear_probe has read the texts."""
    rows, answers = [], []
    of_val = [row["image_id"] for row in usable_images(data) if row["split"] == "val"]
    for row in usable_images(data):
        marks, own = f"{('red', 'blue', 'green')[int(row['class_id'][-2:])]} marks", row["class_id"]
        guess = "nothing like it" if row["image_id"] in of_val[:wrong] else own
        same = {"subject_id": row["image_id"], "sample": 0}
        rows.append({**same, "field": "guesses", "rank": 0, "text": guess})
        # A second guess, and the guess of a second answer, count for nothing.
        rows.append({**same, "field": "guesses", "rank": 1, "text": "nothing like it"})
        rows.append({**same, "sample": 1, "field": "guesses", "rank": 0, "text": "nothing like it"})
        rows.append({**same, "field": "reasons", "rank": 0, "text": marks})
        said = json.dumps({"guesses": [guess, "nothing like it"], "reasons": [f"{own.title()} has {marks}"]})
        cost = {"prompt_sha": "p", "status": "ok", "model_requested": "m", "attempts": 1, "source": "live"}
        answers.append({**same, **cost, "item_key": row["image_id"], "created_at": "now", "response_json": said})
    failed = {**answers[0], "sample": 1, "item_key": "failed", "status": "invalid", "response_json": "I cannot say."}
    made_by = {"subject": "image", "guesses": "guesses", "mask": True, "told": told}
    write_table(make_table("asked/1", rows), data / "asked/guess/texts.parquet", "asked/1", made_by, "asked")
    table = make_table("llm.answers/1", [*answers, failed])
    write_table(table, data / "asked/guess/answers.parquet", "llm.answers/1", {}, "answers")
    has_read(data, "asked/guess/texts.parquet")


@pytest.mark.parametrize(
    ("write", "what", "guessed"),
    [
        (describe, "descriptions", ""),
        (partial(ask, wrong=6), "answers to guess", "; the model's first guess 75.0 % of val"),
    ],
)
def test_the_report_warns_of_runs_that_read_texts_about_images(
    data: Path, write: Callable[[Path], None], what: str, guessed: str
) -> None:
    write(data)
    summary = report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    said = "their words alone get 100.0 % of 24 val images (the most frequent class: 33.3 %)"
    assert f"warning: linear_probe: read {what}; {said}{guessed}\n" in summary
    assert f"Runs that read {what}: linear_probe" in page.text
    assert ("Its first guess of the class is right for 75.0 % of val" in page.text) == bool(guessed)
    # Guesses name the class, and are no text.
    assert "name its own class 100.0 0.0" in page.text
    assert "words alone are right 100.0 100.0" in page.text


def test_answers_that_were_told_the_class_are_read_of_training_images_alone(data: Path) -> None:
    ask(data, told=True)
    assert "answers to guess" not in report(make_params(), data)


def test_descriptions_and_answers_stand_side_by_side(data: Path) -> None:
    describe(data)
    ask(data)
    summary = report(make_params(), data)
    assert "linear_probe: read descriptions; their words" in summary
    assert "linear_probe: read answers to guess; their words" in summary


def test_what_cells_give_away_counts_too(data: Path) -> None:
    describe(data)
    described, header = data / "descriptions/descriptions.parquet", "descriptions/1"
    rows = read_table(described, header).to_pylist()
    # All that tells a class, and its name in the answer, moves from the picture to a cell of it.
    mute = [{**row, "text": "a fish"} for row in rows]
    box = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
    cells = [{**row, "cell": 1, **box} for row in rows]
    answers = read_table(data / "descriptions/answers.parquet", "llm.answers/1").to_pylist()
    answers = [{**row, "subject_id": f"{row['subject_id']}#0,0,0.5,0.5"} for row in answers]
    tables = {"descriptions/1": ("descriptions", mute), "descriptions.cells/1": ("cells", cells),
              "llm.answers/1": ("answers", answers)}  # fmt: skip
    for schema, (name, content) in tables.items():
        write_table(make_table(schema, content), data / f"descriptions/{name}.parquet", schema, {"nodes": [2]}, name)
    config = data / "runs/linear_probe/config.json"
    written = json.loads(config.read_text())
    del written["fingerprints"]["descriptions/descriptions.parquet"]
    config.write_text(json.dumps(written))
    assert "read descriptions" not in report(make_params(), data)
    written["fingerprints"]["descriptions/cells.parquet"] = "cells"
    config.write_text(json.dumps(written))
    summary = report(make_params(), data)
    assert "warning: linear_probe: read descriptions; their words alone get 100.0 % of 24 val images" in summary
    assert "name its own class 100.0 0.0" in Page((data / "report/index.html").read_text()).text


def test_nothing_is_said_where_nothing_is_described(data: Path) -> None:
    assert "descriptions" not in report(make_params(), data)
    assert 'id="descriptions"' not in (data / "report/index.html").read_text()


@pytest.mark.skipif(not TEXTS.is_dir(), reason="needs ../shared/data/aircraft_texts, which is not here")
def test_real_sentences_no_longer_state_the_family() -> None:
    from bench.leaks import CARD, class_rows, read_texts, stating

    texts, labels = read_texts()
    patterns = {row["family"]: stating(row["family"]) for row in labels}
    right = [row for row in labels if patterns[row["family"]].search(texts[row["file"]])][::10]
    assert len(right) > 300
    for grouped, most in ((False, 0.05), (True, 0.0)):
        mask = NameMask(Keys.of(class_rows(labels, grouped), CARD), "aircraft")
        masked = {row["file"]: mask.apply(texts[row["file"]])[0] for row in right}
        assert sum(bool(patterns[row["family"]].search(masked[row["file"]])) for row in right) <= most * len(right)
        grammar = r"aircraft aircraft|\b[Aa] aircraft|aircraft[-/]\d"
        assert not [text for text in masked.values() if re.search(grammar, text)]
