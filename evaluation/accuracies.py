"""The table of accuracies: a row a run, its differences to the reference, how far the forest plot reaches; votes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.leaks import words_alone
from evaluation.opened import MARKER
from evaluation.runs import SPLITS, NotMade, Row, Run, group_numbers, read_logits
from evaluation.statistics import UNITS, Paired, paired_difference
from evaluation.votes import shown_classes, vote
from evaluation.words import lay_out, percent_and_deviation, points, points_range
from fieldmark.command import printable
from training.links import TRANSDUCTIVE, named

COMPARED = ("val", "test")  # where runs are held against the reference
NEAR = 0.1  # a run whose difference on val is at most this lies near the reference


def accuracy_rows(runs: Sequence[Run], reference: Run, groups: Mapping[str, str] | None) -> list[Row]:
    """A row for each run: its accuracies by split and, on val and test, its differences to the reference (`paired`).

    The reference itself has none. `groups` says which group each image is of.
    """
    rows = []
    for found in runs:
        paired: dict[str, Paired] = {}
        for split in COMPARED if found is not reference else ():
            of_split = found.split == split
            numbers = group_numbers([path for path, own in zip(found.paths, of_split, strict=True) if own], groups)
            right = found.on(split), reference.on(split)
            paired[split] = paired_difference(*right, found.y[of_split], numbers, by_class=found.by_class)
        splits = {split: found.accuracy(split) for split in SPLITS}
        row = {"name": found.name, "encoder": found.encoder, "seeds": len(found.seeds), "paired": paired}
        rows.append({**row, TRANSDUCTIVE: found.transductive, **splits})
    return rows


def vote_rows(data: Path, runs: Sequence[Run], groups: Mapping[str, str] | None) -> list[Row]:
    """Of each run, how often the vote of a group's pictures (evaluation.votes) is right, and of how many groups.

    A row has `name` and, for val and test, (share, groups), of the seed whose model is kept. Groups of one picture
    count too, those that show several classes do not. Empty where no group of val or test has several pictures.
    """
    if groups is None:
        return []
    rows = []
    for found in runs:
        row: Row = {"name": found.name, "several": False}
        for split in COMPARED:
            own = found.split == split
            numbers = group_numbers([path for path, is_own in zip(found.paths, own, strict=True) if is_own], groups)
            assert numbers is not None
            _, voted = vote(read_logits(data, found, [split]).astype(np.float64), numbers)
            shown, alike = shown_classes(found.y[own], numbers)
            right = (voted.argmax(axis=1) == shown)[alike]
            row[split] = (float(right.mean()) if right.size else 0.0, len(right))
            row["several"] |= len(shown) < len(numbers)
        rows.append(row)
    return [row for row in rows if row["several"]]


def reach_of(rows: Sequence[Row]) -> float:
    """How far the forest plot reaches on either side of 0: to the ends of intervals of runs near the reference.

    A run far away, such as zero-shot at chance, would press all others into one point; it is drawn as an arrow. Where
    no run is near, the nearest one says how far.
    """
    on_val = sorted((row["paired"]["val"] for row in rows if row["paired"]), key=lambda paired: abs(paired.difference))
    near = [paired for paired in on_val if abs(paired.difference) <= NEAR] or on_val[:1]
    return max([0.01, *(abs(end) for paired in near for end in paired.over)])


def units_of(rows: Sequence[Row]) -> str:
    """What the intervals on val and test are over, in words; empty where nothing is compared."""
    paired = next((row["paired"] for row in rows if row["paired"]), None)
    if paired is None:
        return ""
    said = " and ".join(f"{paired[split].units} {paired[split].unit} of {split}" for split in COMPARED)
    few = not all(paired[split].judged for split in COMPARED)
    return said + (f": fewer than {UNITS} say nothing of others" if few else "")


def summarise(
    rows: Sequence[Row],
    votes: Sequence[Row],
    not_made: Sequence[NotMade],
    reference: str,
    warning: Row | None,
    leaks: Sequence[Row],
    was_opened: bool,
    page: Path,
) -> str:
    """summary.txt: the table in % and points, and the notes that it must not be read without.

    `votes` are those of vote_rows, `warning` is about contamination, `leaks` what texts about images give away
    (read_leaks); `was_opened`: test pictures were looked at.
    """
    lines = [["run", *(head for split in COMPARED for head in (split, f"{split} - {reference} [95 %]")), "train"]]
    for row in rows:
        fields = [named(row["name"], row[TRANSDUCTIVE])]
        for split in COMPARED:
            paired = row["paired"].get(split)
            difference = f"{points(paired.difference)} {points_range(paired.over)}" if paired else "reference"
            fields += [percent_and_deviation(*row[split]), difference]
        lines.append([*fields, percent_and_deviation(*row["train"])])
    counts = sorted({row["seeds"] for row in rows})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"accuracy in %, mean +- standard deviation over seeds ({seeds}); paired difference in points"
    missing = [f"{one.name}: cannot work on this data: {one.reason}" for one in not_made]
    over = units_of(rows)
    lasts = [
        note,
        *([f"95 % intervals over {over}"] if over else []),
        "val: the half of it that chose no setting and no epoch",
        "test: a single, uncorrected reading of every run here; verdicts are a study's (docs/studies.md)",
        *missing,
        f"report: {page.as_posix()}",
    ]
    if votes:
        counts_of = f"{votes[0]['val'][1]} groups of val and {votes[0]['test'][1]} of test"
        voted = "; ".join(f"{row['name']} {100 * row['val'][0]:.1f} and {100 * row['test'][0]:.1f}" for row in votes)
        lasts.insert(-1, f"votes of {counts_of} (tracks, clips) that are right, in %: {voted}")
    if any(row[TRANSDUCTIVE] for row in rows):
        lasts.insert(-1, f"{TRANSDUCTIVE}: images that are judged send to each other (never their labels)")
    if was_opened:
        lasts.insert(-1, f"note: test pictures were opened (data/{MARKER}); test accuracy may be optimistic")
    if warning is not None:
        reasons = ", ".join(f"{images} {reason}" for images, reason in warning["reasons"])
        counts_of = f"{warning['images']} of {warning['of']} images ({reasons})"
        lasts.insert(-1, f"warning: test is contaminated: {counts_of}; test accuracy is optimistic")
    for leak in leaks:
        if leak["runs"]:
            lasts.insert(-1, f"warning: {', '.join(leak['runs'])}: read {leak['what']}; {words_alone(leak)}")
    return printable("\n".join([lay_out(lines), "", *lasts])) + "\n"
