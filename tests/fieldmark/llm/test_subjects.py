"""What questions of one's own are asked about, and what they are told."""

import itertools
from typing import Any

import numpy as np
import pytest

from fieldmark.command import UserError
from fieldmark.llm.prompts import Prompt
from fieldmark.llm.subjects import (
    check_blind,
    class_values,
    names_of,
    nearest_of_class,
    pair_items,
    text_items,
    texts_of,
    told_of_class,
)

FIELDS = ("class_id", "name", "scientific_name", "superclass", "lineage", "aliases", "note")


def class_row(class_id: str, name: str, superclass: str | None = None) -> dict[str, Any]:
    return dict.fromkeys(FIELDS) | {"class_id": class_id, "name": name, "superclass": superclass}


def prompt_of(subject: str, body: str, *variables: str) -> Prompt:
    return Prompt("prompts/test.md", "0" * 64, "a test", variables, {}, (("user", body),), subject)


def test_classes_of_one_name_are_listed_by_their_ids() -> None:
    rows = [class_row("a", "Ray"), class_row("b", "Tang"), class_row("c", "Ray")]
    assert names_of(rows) == ["Tang", "a", "c"]
    assert class_values([class_row("a", "Ray", "x"), class_row("b", "Tang", "x")])["a"]["siblings"] == ["Tang"]


@pytest.mark.parametrize("siblings", [True, False])
def test_every_pair_is_asked_about_once(siblings: bool) -> None:
    rows = [class_row(str(n), f"name {n}", superclass) for n, superclass in enumerate(["x", "y", "x", None, "y", "x"])]
    items = pair_items(prompt_of("pair", "{{ first.name }} {{ second.name }}", "first", "second"), rows, {}, 2,
                       siblings=siblings)  # fmt: skip
    expected = [
        (f"{one['class_id']} {other['class_id']}", sample)
        for one, other in itertools.combinations(rows, 2)
        if not siblings or (one["superclass"] == other["superclass"] is not None)
        for sample in range(2)
    ]
    assert [(item.subject_id, item.sample) for item in items] == expected
    assert len(items) == (2 * 4 if siblings else 2 * 15)


def test_the_nearest_of_a_class_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    images = {f"{n:02d}": str(rng.integers(3)) for n in range(30)}
    texts = {image_id for image_id in images if rng.random() < 0.7}
    links = [
        {"src": f"{rng.integers(33):02d}", "dst": f"{rng.integers(33):02d}", "weight": float(rng.integers(5)) / 5}
        for _ in range(600)
    ]
    found = nearest_of_class(links, texts, images, 2)
    several = 0
    for image_id in images:
        best: dict[str, float] = {}
        for link in links:
            source = link["src"]
            own = source != image_id and images.get(source) == images[image_id]
            if link["dst"] == image_id and own and source in texts:
                best[source] = max(best.get(source, 0.0), link["weight"])
        expected = sorted(best, key=lambda source: (-best[source], source))[:2]
        assert found.get(image_id, []) == expected
        several += len(best) > 2
    assert several > 10


def test_texts_are_sentences_in_the_order_of_their_rank() -> None:
    rows = [{"image_id": "a", "rank": rank, "text": f"sentence {rank}"} for rank in (10, 2, 0)]
    texts = texts_of(rows)
    assert texts == {"a": "sentence 0\nsentence 2\nsentence 10"}
    [item] = text_items(prompt_of("text", "{{ text }}", "text"), texts, {"a": "ray"}, {}, [], {}, 1)
    assert item.messages == [{"role": "user", "content": texts["a"]}]


def test_what_tells_the_class_is_for_training_alone_and_the_list_of_classes_is_not() -> None:
    for subject, variables, told in (
        ("image", ("noun", "classes", "count"), []),
        ("text", ("text", "siblings", "name"), ["name", "siblings"]),
        ("text", ("text", "neighbours"), ["neighbours"]),
        ("class", ("name",), []),
    ):
        prompt = prompt_of(subject, "", *variables)
        assert told_of_class(prompt) == told
        check_blind(prompt, ["train"], "ask.one")
        if told:
            with pytest.raises(UserError, match=r"ask\.one\.splits: prompts/test\.md is told the class"):
                check_blind(prompt, ["train", "val"], "ask.one")
        else:
            check_blind(prompt, ["test"], "ask.one")
