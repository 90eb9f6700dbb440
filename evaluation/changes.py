"""What an edit did: concepts, right answers on val and money, of two states of the outputs.

A state is what the report's stage leaves in data/report/state.json: of the half of val that chose nothing, how many
seeds of each run classify each image rightly; every concept by encoder and class, kept or why not; what answers cost,
by the second at which they came. It holds nothing of test: whoever edits concepts while looking at it tunes on it.

DVC removes what a stage wrote before it runs the stage again, and brings outputs back without running anything. So the
last two states are kept beside data/, in .cache/states, which neither DVC nor git touches: NOW as it was last seen,
BEFORE what was there when that one came. What is in data/ is compared with NOW or, where it *is* NOW, with BEFORE: so
an edit that is undone is compared with the edit. The copy in which `dvc exp run --temp` works has no states yet, and
reads those of its checkout; its own go with it.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.runs import Run
from fieldmark import store
from fieldmark.checkout import original_checkout
from fieldmark.llm.tables import PAID, answer_tables
from training.links import TRANSDUCTIVE, named

SCHEMA = "report.state/1"
STATES = Path(".cache/states")
NOW, BEFORE = "now.json", "before.json"
NOT_WRITTEN = "is not written any more"
GENERIC = "*"  # stands for the class of texts that are of none

Concepts = dict[str, dict[str, str | None]]  # class_id: {text: why it is not kept, or None}


@dataclass(frozen=True)
class State:
    """What is compared. All lists are in the order of `images`, the paths of the half of val that chose nothing."""

    names: dict[str, str]  # of classes, by class_id
    images: list[str]
    labels: list[str]  # the class_id of each image
    seeds: dict[str, int]  # of each run
    right: dict[str, list[int]]  # by run: how many seeds classify each image rightly
    concepts: dict[str, Concepts]  # by encoder
    costs: dict[str, tuple[int, int, float]]  # by the time of answers: how many, how many without a price, US dollars
    transductive: list[str] = field(default_factory=list)  # runs in which images that are judged send to each other
    schema: str = SCHEMA


@dataclass(frozen=True)
class ConceptChange:
    """Texts of a class that the bank keeps and did not keep before, and those that it kept; of these, why no more."""

    gained: list[str]
    lost: dict[str, str]


@dataclass(frozen=True)
class RunChange:
    """Accuracies are means over seeds, before and after, on images that are in val both times.

    An image is right where more than half of the seeds classify it rightly.
    """

    accuracy: tuple[float, float]
    now_right: list[str]  # images that were wrong
    now_wrong: list[str]  # images that were right
    classes: dict[str, tuple[float, float, int]]  # by class_id, where it changed: accuracies, images
    label: str  # its name, as it stands beside a number


@dataclass(frozen=True)
class Changes:
    """What is different between two states. `asdict` of it is plain: dictionaries, lists, numbers, texts."""

    concepts: dict[str, dict[str, ConceptChange]]  # by encoder and class_id, where anything changed
    runs: dict[str, RunChange]  # of runs that are in both states, where these have images in common
    added_runs: list[str]
    removed_runs: list[str]
    images: int  # of val, in both states
    added_images: int
    removed_images: int
    answers: int  # that came since, and cost
    unpriced: int  # of these, those whose price is not known
    usd: float


def take_state(data: Path, runs: Sequence[Run], encoders: Sequence[str]) -> State:
    """The state of what lies in `data`, of these runs (all of the same images) and encoders.

    Raises UserError where a table is missing or broken.
    """
    names = store.read_table(data / "index/classes.parquet", "index.classes/2", ["class_id", "name"]).to_pylist()
    shown = runs[0].split == "val"
    return State(
        names={row["class_id"]: row["name"] for row in names},
        images=np.array(runs[0].paths)[shown].tolist(),
        labels=[runs[0].classes[label] for label in runs[0].y[shown].tolist()],
        seeds={one.name: len(one.seeds) for one in runs},
        right={one.name: one.on("val").sum(axis=0).tolist() for one in runs},
        concepts={encoder: concepts_of(data, encoder) for encoder in encoders},
        costs=costs_of(data),
        transductive=[one.name for one in runs if one.transductive],
    )


def concepts_of(data: Path, encoder: str) -> Concepts:
    """Every text of every class, and why the encoder's bank does not keep it: for what cleaning says, or its own."""
    columns = ["class_id", "text", "kind", "kept", "drop_reason"]
    concepts: defaultdict[str, dict[str, str | None]] = defaultdict(dict)
    for row in store.read_table(data / "concepts/concepts.parquet", "concepts/1", columns).to_pylist():
        if row["kind"] != "name" and not row["kept"]:
            concepts[row["class_id"] or GENERIC][row["text"]] = row["drop_reason"]
    columns = ["class_ids", "text", "kind", "kept", "drop_reason"]
    for row in store.read_table(data / f"bank/{encoder}.parquet", "bank/1", columns).to_pylist():
        if row["kind"] not in ("name", "proto"):
            for class_id in row["class_ids"] or [GENERIC]:
                concepts[class_id][row["text"]] = None if row["kept"] else row["drop_reason"]
    return dict(concepts)


def costs_of(data: Path) -> dict[str, tuple[int, int, float]]:
    """By the time at which answers came: how many, how many of them without a known price, US dollars."""
    found: defaultdict[str, tuple[int, int, float]] = defaultdict(lambda: (0, 0, 0.0))
    for path in answer_tables(data):
        columns = ["source", "created_at", "cost_usd"]
        for row in store.read_table(path, "llm.answers/1", columns).to_pylist():
            if row["source"] in PAID:
                answers, unpriced, usd = found[row["created_at"]]
                unpriced += row["cost_usd"] is None
                found[row["created_at"]] = (answers + 1, unpriced, usd + (row["cost_usd"] or 0.0))
    return dict(sorted(found.items()))


def compare(before: State, after: State) -> Changes:
    """What is different in `after`."""
    known = set(before.images)
    common = [image for image in after.images if image in known]
    in_both = [name for name in after.right if name in before.right and common]
    return Changes(
        concepts=compare_concepts(before.concepts, after.concepts),
        runs={name: compare_run(name, before, after, common) for name in in_both},
        added_runs=[name for name in after.right if name not in before.right],
        removed_runs=[name for name in before.right if name not in after.right],
        images=len(common),
        added_images=len(after.images) - len(common),
        removed_images=len(before.images) - len(common),
        **money_since(before.costs, after.costs),
    )


def compare_concepts(
    before: Mapping[str, Concepts], after: Mapping[str, Concepts]
) -> dict[str, dict[str, ConceptChange]]:
    """By encoder and class, texts gained and lost, where there are any."""
    found: dict[str, dict[str, ConceptChange]] = {}
    for encoder in dict.fromkeys([*after, *before]):
        then, now = before.get(encoder, {}), after.get(encoder, {})
        changes = {one: compare_texts(then.get(one, {}), now.get(one, {})) for one in sorted({*then, *now})}
        changed = {class_id: change for class_id, change in changes.items() if change.gained or change.lost}
        if changed:
            found[encoder] = changed
    return found


def compare_texts(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> ConceptChange:
    kept_before, kept_after = ([text for text, reason in texts.items() if reason is None] for texts in (before, after))
    gained = [text for text in kept_after if text not in kept_before]
    lost = {text: after.get(text) or NOT_WRITTEN for text in kept_before if text not in kept_after}
    return ConceptChange(gained, lost)


def compare_run(name: str, before: State, after: State, common: Sequence[str]) -> RunChange:
    """Of the images `common`, of which there are some, what a run made before and after."""
    rates = []
    for state in (before, after):
        place = {image: number for number, image in enumerate(state.images)}
        rates.append(np.array([state.right[name][place[image]] / state.seeds[name] for image in common]))
    class_of = dict(zip(after.images, after.labels, strict=True))
    labels = np.array([class_of[image] for image in common], dtype=str)
    then, now = rates
    by_class = {}
    for class_id in np.unique(labels).tolist():
        own = labels == class_id
        if then[own].mean() != now[own].mean():
            by_class[class_id] = (float(then[own].mean()), float(now[own].mean()), int(own.sum()))
    images = np.array(common, dtype=str)
    return RunChange(
        accuracy=(float(then.mean()), float(now.mean())),
        now_right=images[(then <= 0.5) & (now > 0.5)].tolist(),
        now_wrong=images[(then > 0.5) & (now <= 0.5)].tolist(),
        classes=by_class,
        label=label_of(name, name in before.transductive, name in after.transductive),
    )


def label_of(name: str, before: bool, after: bool) -> str:
    """A run's name, with what it has to say of both its numbers: whether each is transductive."""
    if before == after:
        return named(name, after)
    return f"{name} ({TRANSDUCTIVE} {'now' if after else 'before'})"


def money_since(
    before: Mapping[str, tuple[int, int, float]], after: Mapping[str, tuple[int, int, float]]
) -> dict[str, Any]:
    """What answers cost that came after the last one of before. An answer that comes back from the journal is older."""
    since = max(before, default="")
    answers, unpriced, usd = zip((0, 0, 0.0), *(each for time, each in after.items() if time > since), strict=True)
    return {"answers": sum(answers), "unpriced": sum(unpriced), "usd": float(sum(usd))}


def dump(state: State) -> str:
    return json.dumps(asdict(state), ensure_ascii=False) + "\n"


def parse(text: str) -> State | None:
    """A state of `dump`; None where it is of another version, which is as good as none."""
    content = json.loads(text)
    return State(**content) if content.get("schema") == SCHEMA else None


def last_state(state: State, data: Path) -> State | None:
    """The newest other state that was seen in this checkout; in an experiment's copy, in the one it is a copy of."""
    folder = data.parent / STATES
    if not folder.is_dir():
        folder = original_checkout(data.parent.resolve(), os.environ.get("DVC_ROOT")) / STATES
    for name in (NOW, BEFORE):
        try:
            found = parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not there or spoilt: as if nothing had been seen
        if found is not None and dump(found) != dump(state):
            return found
    return None


def remember(state: State, data: Path) -> None:
    """Keep a state as NOW; what NOW was, if it is another, is BEFORE from then on."""
    text, now = dump(state), data.parent / STATES / NOW
    if now.is_file():
        if now.read_text(encoding="utf-8") == text:
            return
        now.replace(now.with_name(BEFORE))
    store.write_text(now, text)
